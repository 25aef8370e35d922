"""Mamba2 on a CPU: the replaced functions give what transformers' give, and what the recurrence says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as theirs

from muonlab.training import mamba

sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "length": st.integers(1, 70),
        "groups": st.sampled_from([1, 2]),
        "rank": st.integers(1, 3),
        "size": st.sampled_from([1, 4]),
        "state": st.sampled_from([2, 48]),
        "seed": st.integers(0, 2**20),
    }
)


def inputs(*, batch: int, length: int, groups: int, rank: int, size: int, state: int, seed: int) -> dict[str, Tensor]:
    """As a model of transformers has them in training: decays from slow to sudden."""
    draw = torch.Generator().manual_seed(seed)
    heads = groups * rank
    return {
        "hidden_states": torch.randn(batch, length, heads, size, generator=draw),
        "dt": torch.randn(batch, length, heads, generator=draw),
        "A": -torch.arange(1, heads + 1).float(),
        "B": torch.randn(batch, length, groups, state, generator=draw),
        "C": torch.randn(batch, length, groups, state, generator=draw),
        "D": torch.randn(heads, generator=draw),
        "dt_bias": torch.randn(heads, generator=draw),
    }


def recurrence(values: dict[str, Tensor]) -> Tensor:
    """The definition, token after token, in float64."""
    v = {name: value.double() for name, value in values.items()}
    batch, length, heads, size = v["hidden_states"].shape
    rank = heads // v["B"].shape[2]
    dt = functional.softplus(v["dt"] + v["dt_bias"])
    state = torch.zeros(batch, heads, size, v["B"].shape[3], dtype=torch.float64)
    out = []
    for t in range(length):
        B, C = (v[name][:, t].repeat_interleave(rank, dim=1) for name in "BC")
        fed = (dt[:, t, :, None] * v["hidden_states"][:, t])[..., None] * B[:, :, None]
        state = torch.exp(dt[:, t] * v["A"])[..., None, None] * state + fed
        out.append((state * C[:, :, None]).sum(-1) + v["D"][:, None] * v["hidden_states"][:, t])
    return torch.stack(out, dim=1)


def result_and_gradients(function: object, values: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    result = function(leaves)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return [result, *torch.autograd.grad((result * weights).sum(), list(leaves.values()))]


def ours(values: dict[str, Tensor]) -> Tensor:
    return mamba.chunk_scan(**values, chunk_size=256, dt_softplus=True)


def stock(values: dict[str, Tensor]) -> Tensor:
    return mamba.stock_scan(**values, chunk_size=256, dt_softplus=True)


def together(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def error(found: Tensor, expected: Tensor) -> float:
    return (torch.linalg.vector_norm(found.double() - expected) / torch.linalg.vector_norm(expected)).item()


@settings(max_examples=25, deadline=None)
@given(sizes)
def test_the_scan_is_the_recurrence_and_so_are_its_gradients(size: dict[str, int]) -> None:
    """Tolerance: float32 against float64."""
    values = inputs(**size)
    found, expected = (result_and_gradients(function, values) for function in (ours, recurrence))
    assert {part.dtype for part in found} == {torch.float32}
    assert error(found[0], expected[0].double()) < 1e-6
    assert error(together(found[1:]), together(expected[1:])) < 2e-6


def test_the_scan_is_that_of_transformers() -> None:
    """Shapes of the tiny model, with and without padding to chunks; all gradients together within 1e-6."""
    for length in (128, 77):
        values = inputs(batch=4, length=length, groups=1, rank=4, size=32, state=16, seed=0)
        ours_, theirs_ = (result_and_gradients(function, values) for function in (ours, stock))
        assert error(ours_[0], theirs_[0].double()) < 1e-6
        assert error(together(ours_[1:]), together(theirs_[1:])) < 1e-6


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution_is_that_of_transformers(bias: bool, activation: str | None) -> None:
    draw = torch.Generator().manual_seed(0)
    values = {"x": torch.randn(2, 33, 5, generator=draw), "weight": torch.randn(5, 4, generator=draw)}
    if bias:
        values["bias"] = torch.randn(5, generator=draw)
    found = [
        result_and_gradients(
            lambda v, f=function: f(v["x"].transpose(1, 2), v["weight"], v.get("bias"), activation=activation), values
        )
        for function in (mamba.causal_convolution, mamba.stock_convolution)
    ]
    for mine, their in zip(*found, strict=True):
        assert error(mine, their.double()) < 1e-6


@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_convolutions_gradient_is_its_derivative(length: int) -> None:
    """In float64, against finite differences; shorter than the kernel of width 4, too."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, length, 3), (3, 4), (3,))
    values = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(mamba.Convolution.apply, values)


@pytest.mark.parametrize("length", [5, 16, 37])
def test_the_scans_gradient_is_its_derivative(length: int) -> None:
    """In float64, against finite differences: in one chunk of 16 with and without padding, and over three."""
    values = inputs(batch=2, length=length, groups=2, rank=2, size=2, state=3, seed=0)
    values["dt"] = functional.softplus(values["dt"] + values.pop("dt_bias"))
    leaves = [values[name].double().requires_grad_() for name in ("hidden_states", "dt", "A", "B", "C", "D")]
    assert torch.autograd.gradcheck(mamba.Scan.apply, leaves, fast_mode=True)


def test_the_gradient_of_the_gradient_is_there() -> None:
    """The Hessian's eigenvalues are measured through it; against finite differences, in float32."""
    values = inputs(batch=1, length=20, groups=1, rank=2, size=2, state=3, seed=5)
    draw = torch.Generator().manual_seed(2)
    direction = {name: torch.randn(value.shape, generator=draw) for name, value in values.items()}

    def slope(shift: float) -> tuple[Tensor, dict[str, Tensor]]:
        moved = {name: value + shift * direction[name] for name, value in values.items()}
        leaves = {name: value.requires_grad_() for name, value in moved.items()}
        gradient = torch.autograd.grad(ours(leaves).square().sum(), list(leaves.values()), create_graph=True)
        along = sum((g * d).sum() for g, d in zip(gradient, direction.values(), strict=True))
        return along, leaves

    along, leaves = slope(0.0)
    second = torch.autograd.grad(along, list(leaves.values()))
    exact = sum((s * d).sum() for s, d in zip(second, direction.values(), strict=True)).item()
    step = 1e-3
    assert (slope(step)[0] - slope(-step)[0]).item() / (2 * step) == pytest.approx(exact, rel=1e-2)


def test_they_stand_in_for_the_stock_functions_and_can_be_taken_out() -> None:
    assert mamba.install()
    assert (theirs.mamba2_chunk_scan, theirs.causal_conv1d_fn) == (mamba.chunk_scan, mamba.causal_convolution)
    mamba.uninstall()
    assert (theirs.mamba2_chunk_scan, theirs.causal_conv1d_fn) == (mamba.stock_scan, mamba.stock_convolution)
    assert mamba.install()


def test_another_version_of_transformers_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mamba.uninstall()
    monkeypatch.setattr("transformers.__version__", "5.99.0")
    assert not mamba.install()
    assert theirs.mamba2_chunk_scan is mamba.stock_scan
    monkeypatch.undo()
    assert mamba.install()


def test_what_generation_asks_for_is_left_to_the_stock_function() -> None:
    values = inputs(batch=1, length=9, groups=1, rank=2, size=4, state=4, seed=0)
    out, state = mamba.chunk_scan(**values, chunk_size=8, dt_softplus=True, return_final_states=True)
    assert state.shape == (1, 2, 4, 4)
    torch.testing.assert_close(out, ours(values), rtol=1e-5, atol=1e-5)
