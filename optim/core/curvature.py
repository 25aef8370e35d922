"""The top eigenvalue of a loss's Hessian H, by Lanczos' iteration on Hessian-vector products.

    beta_j v_j+1 = H v_j - alpha_j v_j - beta_j-1 v_j-1,   alpha_j = v_j^T H v_j,   H v = d/dp (g^T v)
    lambda = the largest eigenvalue of T = tridiag(beta, alpha, beta), with eigenvector s
    residual = beta_m |s_m| / |lambda|

H is symmetric, so some eigenvalue lies within residual * |lambda| of lambda. It is the largest, not that of
largest magnitude: on small models the negative end of the spectrum is as long as the positive one, and power
iteration then swings between the two (seen: 30 iterations left a residual of 20, where this leaves under 0.01).
Three vectors are kept and none is orthogonalised again, which repeats eigenvalues and leaves the largest as it
is. One forward pass, and one pass backward through the gradient's graph per iteration; it ends early once the
residual is small enough, which for a large model's lone top eigenvalue is well before the last iteration.
Sources: Lanczos (1950), doi:10.6028/jres.045.026; Paige (1980), doi:10.1016/0024-3795(80)90167-6; Pearlmutter
(1994), doi:10.1162/neco.1994.6.1.147.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from optim.core.errors import NonFiniteError, OptionError


class Curvature(NamedTuple):
    """An eigenvalue [loss per squared unit of the parameters] and its relative residual."""

    value: float
    residual: float


def top_hessian_eigenvalue(
    loss_fn: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    *,
    iterations: int = 20,
    tolerance: float = 0.0,
    seed: int,
) -> Curvature:
    """The largest Hessian eigenvalue of `loss_fn()` over all `parameters` together.

    At most so many `iterations`, and none more once the residual is at most `tolerance`.

    `loss_fn` returns a scalar, the same at every call (no dropout); it is called once. The start is a function
    of `seed` alone; no global generator is read, and neither `.grad` nor a parameter is changed. A Hessian of
    zero gives (0, 0). Raises OptionError for iterations below 1, no parameters, or a loss that is no scalar;
    NonFiniteError where a product is not finite.
    """
    variables = [parameter for parameter in parameters if parameter.requires_grad]
    if iterations < 1 or not variables:
        raise OptionError(
            f"top_hessian_eigenvalue: found {iterations} iterations and {len(variables)} parameters that require a "
            "gradient; give at least one of each."
        )
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        loss = loss_fn()
        if loss.numel() != 1:
            raise OptionError(f"top_hessian_eigenvalue: the loss has shape {tuple(loss.shape)}; give a scalar.")
        gradient = torch.autograd.grad(loss, variables, create_graph=True, materialize_grads=True)
        curved = [g.requires_grad for g in gradient]  # of a linear loss none is
        draw = np.random.default_rng(seed)
        vector = _unit([torch.from_numpy(draw.standard_normal(v.shape, np.float32)).to(v) for v in variables])
        before = [torch.zeros_like(v) for v in vector]
        diagonal: list[float] = []
        beside: list[float] = []
        for _ in range(iterations):
            product = _product(gradient, variables, vector, curved)
            diagonal.append(_dot(vector, product))
            beta = beside[-1] if beside else 0.0
            rest = [p - diagonal[-1] * v - beta * u for p, v, u in zip(product, vector, before, strict=True)]
            length = _dot(rest, rest) ** 0.5
            if not np.isfinite(length):
                raise NonFiniteError("top_hessian_eigenvalue: a Hessian-vector product holds inf or NaN.")
            beside.append(length)
            if length <= _rounding(vector) * max(map(abs, diagonal + beside[:-1])):
                break  # the eigenvectors that the start has a part of are exhausted
            if _top(np.array(diagonal), np.array(beside)).residual <= tolerance:
                break
            before, vector = vector, _unit(rest)
    return _top(np.array(diagonal), np.array(beside))


def _top(diagonal: np.ndarray, beside: np.ndarray) -> Curvature:
    """The largest eigenvalue of T with `diagonal` [m] and `beside` [m], whose last entry is the length left over."""
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1))
    value, left = float(values[-1]), float(beside[-1] * abs(vectors[-1, -1]))
    if left == 0.0:
        return Curvature(value, 0.0)
    return Curvature(value, left / abs(value) if value != 0.0 else float("inf"))


def _rounding(vector: list[Tensor]) -> float:
    """Relative length under which what is left of a product is rounding."""
    return max(float(torch.finfo(v.dtype).eps) for v in vector)


def _product(
    gradient: tuple[Tensor, ...], variables: list[Tensor], vector: list[Tensor], curved: list[bool]
) -> list[Tensor]:
    if not any(curved):
        return [torch.zeros_like(v) for v in variables]
    return list(
        torch.autograd.grad(
            [g for g, has_graph in zip(gradient, curved, strict=True) if has_graph],
            variables,
            [v for v, has_graph in zip(vector, curved, strict=True) if has_graph],
            retain_graph=True,
            materialize_grads=True,
        )
    )


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    """a^T b over all tensors, in float64."""
    return float(sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True)))


def _unit(vector: list[Tensor]) -> list[Tensor]:
    length = _dot(vector, vector) ** 0.5
    return [(x.double() / length).to(x.dtype) for x in vector]
