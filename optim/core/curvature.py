"""The dominant eigenvalue of a loss's Hessian, by power iteration on Hessian-vector products.

    v <- H v / ||H v||,  lambda = v^T H v,  residual = ||H v - lambda v|| / |lambda|,  H v = d/dp (g^T v)

H is symmetric, so some eigenvalue lies within residual * |lambda| of lambda. It is the eigenvalue of largest
magnitude, with its sign: where a negative one dominates, that is what is found. The iteration halves its
error in log(2) / log|lambda_1 / lambda_2| steps; the residual says whether that was enough. One forward pass,
and one pass backward through the gradient's graph per iteration.
Source: Pearlmutter (1994), doi:10.1162/neco.1994.6.1.147.
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
    loss_fn: Callable[[], Tensor], parameters: Iterable[Tensor], *, iterations: int = 20, seed: int
) -> Curvature:
    """The Hessian eigenvalue of largest magnitude of `loss_fn()` over all `parameters` together.

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
        value = residual = 0.0
        for _ in range(iterations):
            product = _product(gradient, variables, vector, curved)
            value = _dot(vector, product)
            length = _dot(product, product) ** 0.5
            if not np.isfinite(length):
                raise NonFiniteError("top_hessian_eigenvalue: a Hessian-vector product holds inf or NaN.")
            if length == 0.0:
                return Curvature(0.0, 0.0)
            off = _dot(*[[p - value * v for p, v in zip(product, vector, strict=True)]] * 2) ** 0.5
            residual = off / abs(value) if value != 0.0 else float("inf")
            vector = _unit(product)
    return Curvature(value, residual)


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
