"""Where the mathematics is that of torch.optim.Muon, so are the bits."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import optim

torch.set_num_threads(1)

SHAPES = [(40, 12), (12, 40), (16, 16), (1, 7), (7, 1), (40, 12)]  # two alike: they are updated in one stack
STEPS, LR, DECAY = 5, 0.02, 5.0
AS_TORCH = {"orthogonalizer": "newton_schulz", "momentum_form": "averaged"}

each_setting = pytest.mark.parametrize(
    ("adjust", "nesterov", "decay"),
    list(itertools.product(("original", "match_rms_adamw"), (True, False), (DECAY, 0.0))),
)


class Matrices(nn.Module):
    """Hidden matrices alone."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        draw = np.random.default_rng(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.from_numpy(0.02 * draw.standard_normal(shape)).to(dtype)) for shape in SHAPES
        )


def train(model, optimizer):
    for step in range(STEPS):
        draw = np.random.default_rng([1, step])
        for weight in model.weights:
            weight.grad = torch.from_numpy(draw.standard_normal(weight.shape) * 10.0 ** draw.integers(-4, 3)).to(weight)
        optimizer.step()
    return [weight.detach() for weight in model.weights]


def torchs(dtype, adjust, nesterov, decay, lr=LR):
    model = Matrices(dtype)
    settings = {"lr": lr, "weight_decay": decay, "momentum": 0.95, "nesterov": nesterov, "adjust_lr_fn": adjust}
    return train(model, torch.optim.Muon(model.parameters(), **settings))


def ours(dtype, adjust, nesterov, decay, lr=LR, **options):
    model = Matrices(dtype)
    settings = {"lr": lr, "weight_decay": decay, "nesterov": nesterov, "lr_adjust": adjust, **options}
    return train(model, optim.build("muon", model, **settings))


@each_setting
def test_averaged_momentum_and_five_bf16_newton_schulz_steps_equal_torchs_bit_for_bit(adjust, nesterov, decay):
    expected = torchs(torch.float32, adjust, nesterov, decay)
    for a, b in zip(ours(torch.float32, adjust, nesterov, decay, **AS_TORCH), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_without_masters_bf16_weights_equal_torchs_bit_for_bit(adjust, decay):
    # With Nesterov only: without it, torch 2.13 divides a bf16 momentum buffer itself by its norm. Tall matrices
    # within two roundings: torch adds a transposed bf16 tensor, as its update is there, by another kernel.
    expected = torchs(torch.bfloat16, adjust, True, decay)
    for a, b in zip(ours(torch.bfloat16, adjust, True, decay, **AS_TORCH, masters=False), expected, strict=True):
        assert a.dtype == torch.bfloat16
        tall = a.shape[0] > a.shape[1]
        assert torch.equal(a, b) or (tall and (a - b).abs().max() <= 2 * 2**-8 * b.abs().max())


def test_masters_are_what_keeps_bf16_weights_from_torchs():
    expected = torchs(torch.bfloat16, "original", True, 0.0)
    found = ours(torch.bfloat16, "original", True, 0.0, **AS_TORCH)
    assert not any(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each_setting
def test_accumulated_momentum_differs_by_bf16_rounding_alone(adjust, nesterov, decay):
    # M accumulated is M averaged / (1 - mu): the same polar factor, but its bf16 digits are rounded elsewhere.
    # In the Frobenius norm, five steps spread that to 0.057 of the change of a matrix, the worst found over 400
    # draws of these gradients; a wrong Nesterov rule, lr factor or decay is off by 0.12 and more.
    start = Matrices().weights
    expected = torchs(torch.float32, adjust, nesterov, decay)
    found = ours(torch.float32, adjust, nesterov, decay, **{**AS_TORCH, "momentum_form": "accumulated"})
    for a, b, w in zip(found, expected, start, strict=True):
        assert (a - b).norm() < 0.09 * (b - w).norm()


def test_the_form_of_the_momentum_is_invisible_to_an_exact_polar_factor():
    exact = {"orthogonalizer": "svd"}
    for a, b in zip(
        ours(torch.float64, "original", True, DECAY, **exact),
        ours(torch.float64, "original", True, DECAY, **exact, momentum_form="averaged"),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
