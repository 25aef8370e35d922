"""The loss in tiles of the logits is the cross-entropy, and its gradients are its derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from muonlab.registry.settings import DataSettings, ModelSettings, WorkloadSettings
from muonlab.training import model as models
from muonlab.training.fused_loss import FEWEST_TOKENS, TILE_LOGITS, HeadLoss


def head(tokens: int, vocabulary: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=draw) for n in (tokens, vocabulary))
    targets = torch.randint(vocabulary, (tokens,), generator=draw)
    return (scale * hidden).requires_grad_(), weight.requires_grad_(), targets


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight).double(), targets)


@pytest.mark.parametrize("vocabulary", [3, 2048, TILE_LOGITS // FEWEST_TOKENS + 5])
@pytest.mark.parametrize("tokens", [1, FEWEST_TOKENS, 300])
def test_it_is_the_cross_entropy(tokens: int, vocabulary: int) -> None:
    """One tile and several, the last of them whole and not. Tolerance: logits up to 20 in float32."""
    values = head(tokens, vocabulary)
    found, expected = HeadLoss.apply(*values), cross_entropy(*values)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    for mine, exact in zip(
        torch.autograd.grad(3 * found, values[:2]), torch.autograd.grad(3 * expected, values[:2]), strict=True
    ):
        assert torch.linalg.vector_norm(mine - exact) <= 5e-6 * torch.linalg.vector_norm(exact)


def test_its_gradients_are_its_derivatives() -> None:
    """In float64, against finite differences."""
    hidden, weight, targets = head(FEWEST_TOKENS + 3, 5000)
    small = weight.detach()[:7].double().requires_grad_()
    assert torch.autograd.gradcheck(HeadLoss.apply, (hidden.detach().double().requires_grad_(), small, targets % 7))


def test_huge_logits_overflow_nowhere_and_infinite_ones_are_seen() -> None:
    values = head(70, 50, scale=1e4)
    found = HeadLoss.apply(*values)
    torch.testing.assert_close(found.double(), cross_entropy(*values), rtol=1e-6, atol=0)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found, values[:2]))
    assert not HeadLoss.apply(values[0] * torch.inf, *values[1:]).isfinite()


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_models_mean_loss_is_the_mean_of_its_token_losses(weights: str) -> None:
    """With the gradients of all parameters: in tiles where the weights are float32, else as they are."""
    settings = WorkloadSettings(
        steps=30,
        weights=weights,
        data=DataSettings(vocab_size=300, sequence_length=40),
        model=ModelSettings(hidden_size=16, mamba_d_head=8, mamba_d_state=4, mlp_size=24),
    )
    model = models.build(settings, seed=0)
    model.config.logits_scaling = 3.0
    tokens = torch.randint(300, (3, 41), generator=torch.Generator().manual_seed(1))
    found, expected = models.mean_loss(model, tokens), models.token_losses(model, tokens).mean()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    mine, theirs = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])
        for loss in (found, expected)
    )
    assert torch.linalg.vector_norm(mine - theirs) <= 1e-6 * torch.linalg.vector_norm(theirs)
