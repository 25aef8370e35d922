"""The top Hessian eigenvalue against matrices whose eigenvalues are known, and against an explicit Hessian."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import optim
from optim.core.curvature import top_hessian_eigenvalue

torch.set_num_threads(1)


def quadratic(eigenvalues, seed=0):
    """f(a, b) = x^T H x / 2 over x = (a, b), H = Q diag(eigenvalues) Q^T, and its two parameters."""
    n = len(eigenvalues)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    H = torch.from_numpy(Q @ np.diag(eigenvalues) @ Q.T)
    a, b = nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(1, n - 2, dtype=torch.float64))

    def loss():
        x = torch.cat([a, b.flatten()])
        return x @ H @ x / 2

    return loss, [a, b]


@pytest.mark.parametrize(
    "eigenvalues",
    [[4.0, 1.0, 0.5, 0.1], [-5.0, 3.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0], [1e-12, 1e-13, 0.0, 0.0]],
    ids=["convex", "the negative end is longer", "multiple of the identity", "flat"],
)
def test_a_quadratic_has_the_eigenvalue_that_it_was_made_with(eigenvalues):
    loss, parameters = quadratic(eigenvalues)
    value, residual = top_hessian_eigenvalue(loss, parameters, iterations=60, seed=1)
    assert value == pytest.approx(max(eigenvalues), rel=1e-9)
    assert residual < 1e-6


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_an_eigenvalue_lies_within_the_residual(iterations):
    eigenvalues = [3.0, 2.9, -2.5, 1.0, 0.2]
    loss, parameters = quadratic(eigenvalues)
    value, residual = top_hessian_eigenvalue(loss, parameters, iterations=iterations, seed=2)
    assert min(abs(value - true) for true in eigenvalues) <= residual * abs(value)
    assert residual > 1e-6  # five eigenvalues take five iterations


def test_it_ends_as_soon_as_the_residual_is_small_enough():
    loss, parameters = quadratic([10.0, *np.linspace(-1, 1, 60)])
    found = [top_hessian_eigenvalue(loss, parameters, iterations=n, seed=3) for n in range(1, 30)]
    enough = next(curvature for curvature in found if curvature.residual <= 0.01)
    assert enough != found[-1]
    assert enough.value == pytest.approx(10.0, rel=1e-3)
    assert top_hessian_eigenvalue(loss, parameters, iterations=30, tolerance=0.01, seed=3) == enough


def test_two_ends_of_one_length_do_not_swing():
    """Where power iteration does not converge at all."""
    loss, parameters = quadratic([5.0, -5.0, *np.linspace(-4, 4, 58)])
    value, residual = top_hessian_eigenvalue(loss, parameters, iterations=30, seed=2)
    assert value == pytest.approx(5.0, rel=1e-4)
    assert residual < 0.02


@pytest.mark.parametrize("loss", [lambda x: 0 * x.square().sum(), lambda x: x.sum()], ids=["zero", "linear"])
def test_no_curvature_is_zero(loss):
    x = nn.Parameter(torch.ones(3))
    assert top_hessian_eigenvalue(lambda: loss(x), [x], seed=0) == (0.0, 0.0)


class Attention(nn.Module):
    """Small, with the attention whose fused kernels have no second derivative, and a parameter without a part."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(2, 6)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        q, k, v = self.qkv(x).view(1, 1, 4, 3, 2).unbind(dim=3)  # of four dimensions, or no fused kernel is taken
        return nn.functional.scaled_dot_product_attention(q, k, v).square().mean()


def test_a_network_against_its_explicit_hessian_and_nothing_else_moves():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention()
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 2))).float()
    weights = dict(model.named_parameters())
    sizes = [weight.numel() for weight in weights.values()]

    def of_flat(flat):
        parts = [part.view_as(w) for part, w in zip(flat.split(sizes), weights.values(), strict=True)]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(model, dict(zip(weights, parts, strict=True)), (x,))

    flat = torch.cat([weight.detach().flatten() for weight in weights.values()])
    explicit = torch.linalg.eigvalsh(torch.autograd.functional.hessian(of_flat, flat))
    model(x).backward()
    gradients = {name: copy.deepcopy(weight.grad) for name, weight in weights.items()}
    kept, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():  # as a training loop may call it
        found = top_hessian_eigenvalue(lambda: model(x), model.parameters(), iterations=100, seed=4)
    assert found.value == pytest.approx(max(explicit.tolist()), rel=1e-4)
    assert found.residual < 1e-2
    assert found == top_hessian_eigenvalue(lambda: model(x), model.parameters(), iterations=100, seed=4)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    for name, weight in weights.items():
        assert weight.grad is gradients[name] is None or torch.equal(weight.grad, gradients[name])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"iterations": 0}, "found 0 iterations and 1 parameters"),
        ({"parameters": []}, "found 20 iterations and 0 parameters"),
        ({"loss_fn": lambda: nn.Parameter(torch.ones(2))}, r"the loss has shape \(2,\)"),
    ],
)
def test_what_has_no_hessian_is_refused(change, sentence):
    x = nn.Parameter(torch.ones(1))
    arguments = {"loss_fn": lambda: x.square().sum(), "parameters": [x], "seed": 0, **change}
    with pytest.raises(optim.OptionError, match=sentence):
        top_hessian_eigenvalue(**arguments)


def test_a_loss_that_is_not_finite_is_named():
    x = nn.Parameter(torch.full((1,), float("inf")))
    with pytest.raises(optim.NonFiniteError, match="Hessian-vector product"):
        top_hessian_eigenvalue(lambda: (x**3).sum(), [x], seed=0)
