"""The k x k Gram matrix of X [..., m, n], k = min(m, n): X^T X, or X X^T when m < n, in float64.

No square over- or underflows: those of float32 entries fit into float64, and a float64 matrix is first multiplied
by the power of two that brings its largest entry into [1/2, 1), which is exact. What is computed from it does not
depend on a factor 2^j by a single bit either way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NULL_ULPS = 4
"""An eigenvalue of the Gram matrix under NULL_ULPS * k * 2^-52 of the largest is rounding error, so its
direction is null: a singular value under 3e-8 * sqrt(k) of the largest. Over 300 matrices of 8 shapes with
duplicated rows, null eigenvalues reached 0.5 * k * 2^-52; a condition number of 1e6 is kept to k = 1000."""

STRIPES = 4
"""Into how many stripes the Gram matrix of one large matrix is cut; the part under the diagonal is copied, so
4 stripes need 5/8 of the products. Measured for k = 768 on one core: 0.60 to 0.75 of the time of one product;
more stripes gain nothing."""

ONE_BY_ONE = 128
"""From this k on, a stack is computed matrix by matrix on the CPU: batching gains nothing there."""


def largest(X: Tensor) -> Tensor:
    """max|x| of each matrix, [..., 1, 1]; inf or NaN where there is one. Makes no copy of X, as abs would."""
    return torch.maximum(X.amax(dim=(-2, -1), keepdim=True), -X.amin(dim=(-2, -1), keepdim=True))


def scaled_to_one(X: Tensor) -> Tensor:
    """X [..., m, n] in float32, or float64 if it came so, each matrix times the power of two that brings
    max|x| into [1/2, 1). Exact but for entries under 2^-126 (2^-1022) of the largest."""
    wide = X if X.dtype == torch.float64 else X.float()
    _, exponent = torch.frexp(largest(wide).double())
    half = torch.div(-exponent, 2, rounding_mode="floor")  # in two factors: 2^1074 is no float64
    return wide * _power_of_two(half).to(wide.dtype) * _power_of_two(-exponent - half).to(wide.dtype)


def in_float64(X: Tensor) -> Tensor:
    """X [..., m, n] in float64, safe to square; each matrix of a float64 X up to one power of two."""
    return scaled_to_one(X) if X.dtype == torch.float64 else X.double()


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exact, which exp2 and pow are not on every device."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def is_large(X: Tensor) -> bool:
    """Whether matrices of this size are computed one after the other; the same for one as for many."""
    return X.device.type == "cpu" and min(X.shape[-2:]) >= ONE_BY_ONE


def one_by_one(function: Callable[[Tensor], Tensor], X: Tensor, dtype: torch.dtype) -> Tensor:
    """`function` of each matrix of X [b, m, n], the results [b, m, n] in `dtype`."""
    out = torch.empty(X.shape, dtype=dtype, device=X.device)
    for into, one in zip(out, X, strict=True):
        into.copy_(function(one))
    return out


def gram(wide: Tensor) -> Tensor:
    """X^T X, or X X^T when m < n, of X [m, n], or [b, m, n] where matrices are not large."""
    rows = wide if wide.shape[-2] < wide.shape[-1] else wide.mT
    return rows_times_rows(rows) if rows.ndim == 2 else rows @ rows.mT


def rows_times_rows(rows: Tensor) -> Tensor:
    """rows rows^T [k, k] of one matrix [k, l], exactly symmetric, for the price of half a product."""
    k = len(rows)
    out = rows.new_empty(k, k)
    height = -(-k // STRIPES)
    for start in range(0, k, height):
        stop = start + height
        stripe = rows[start:stop] @ rows[start:].mT
        out[start:stop, start:] = stripe
        out[stop:, start:stop] = stripe[:, height:].mT
    return out
