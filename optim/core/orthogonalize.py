"""The orthogonal polar factor of a matrix: polar(X) = U V^T for X = U S V^T, batched over X [..., m, n].

One signature, `orthogonalize(X, method, **options)`, for exact methods (`optim.core.exact`) and approximate
ones (`optim.core.iterative`); `auto` is the exact one that `resolve` names. All of them first multiply each
matrix by a power of two, so polar(2^j X) = polar(X) bit for bit; a zero matrix gives zero; one matrix meets the
same kernels as many, so batched equals looped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.core import exact, iterative
from optim.core.errors import NonFiniteError, OptionError
from optim.core.gram import largest
from optim.core.methods import check, method_options

__all__ = ["METHODS", "method_options", "orthogonalize", "polar", "resolve"]

METHODS: dict[str, Callable[..., Tensor]] = {
    "svd": exact.svd,
    "gram_eigh": exact.gram_eigh,
    "newton_schulz": iterative.newton_schulz,
    "polar_express": iterative.polar_express,
}
"""name -> function(X [b, m, n], finite, k > 0, **options) -> polar(X) in the precision of the method."""


def resolve(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> str:
    """The exact method that `auto` means for X of this shape [..., m, n], dtype and device ("cpu", "cuda", ...).

    A function of its arguments alone, never of a clock, so that a run can be repeated.
    """
    if dtype == torch.float64:
        return "svd"  # the Gram matrix in float64 would halve the digits of a float64 X
    return "gram_eigh"


def polar(X: Tensor, method: str, **options: Any) -> Tensor:
    """polar(X) of X [..., m, n] that is known to be finite with k > 0, in its shape and dtype."""
    if method == "auto":
        method = resolve(X.shape, X.dtype, X.device.type)
    return METHODS[method](X.reshape(-1, *X.shape[-2:]), **options).to(X.dtype).reshape(X.shape)


def orthogonalize(X: Tensor, method: str = "svd", **options: Any) -> Tensor:
    """polar(X) over the last two dimensions of a real floating X [..., m, n], in its shape and dtype.

    Raises OptionError for an unknown method or option, for fewer than two dimensions, for m or n of 0 and for
    a dtype that is not real floating; NonFiniteError for an infinity or NaN.
    """
    check(method, options, "orthogonalize")
    refuse(X, "orthogonalize")
    return polar(X, method, **options)


def refuse(X: Tensor, caller: str) -> None:
    """Raises OptionError or NonFiniteError, naming `caller`, for an X that has no polar factor."""
    if X.ndim < 2 or 0 in X.shape[-2:] or not X.is_floating_point():
        raise OptionError(
            f"{caller}: X is {X.dtype} of shape {tuple(X.shape)}; give real floating [..., m, n], m, n > 0."
        )
    if X.numel() > 0 and not largest(X).isfinite().all():
        raise NonFiniteError(f"{caller}: X of shape {tuple(X.shape)} holds inf or NaN; no polar factor exists.")
