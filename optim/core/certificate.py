"""How good an orthogonal factor is: Q = orthogonalize(X, method) against X = U S V^T by SVD in float64.

Everything is measured on X's numerical range, the right singular vectors V_r with s_i > floor * s_1, where
floor = sqrt(NULL_ULPS * k * 2^-52), k = min(m, n), is the smallest ratio that a float64 Gram matrix tells from
zero (3e-8 * sqrt(k)). Beyond it polar(X) is not defined by X: svd fills in directions, gram_eigh leaves zeros.

    orthogonality  ||I - (Q V_r)^T (Q V_r)||, the spectral norm: the largest | sigma^2 - 1 | of Q on the range
    error          ||Q V_r - U_r||_F / sqrt(r): relative, since ||U_r||_F = sqrt(r)
    condition      s_1 / s_r
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from optim.core.exact import in_range
from optim.core.gram import scaled_to_one
from optim.core.methods import check
from optim.core.orthogonalize import polar, refuse, resolve


@dataclasses.dataclass(frozen=True)
class Certificate:
    """One value per matrix of X [..., m, n]: tensors [...], float64, `rank` int64.

    A zero matrix has rank 0, error and orthogonality 0 and condition 1: nothing is asked of its factor.
    """

    method: str
    """The method that was used; never `auto`."""
    rank: Tensor
    """r, the numerical rank: the dimension of the numerical range."""
    condition: Tensor
    """s_1 / s_r."""
    orthogonality: Tensor
    """||I - (Q V_r)^T (Q V_r)||, spectral."""
    error: Tensor
    """||Q V_r - U_r||_F / sqrt(r)."""


def certify(X: Tensor, method: str = "svd", **options: Any) -> Certificate:
    """The certificate of `orthogonalize(X, method, **options)`; raises what that raises."""
    check(method, options, "certificate")
    refuse(X, "certificate")
    if method == "auto":
        method = resolve(X.shape, X.dtype, X.device.type)
    Q = polar(X, method, **options).double()
    U, singular, Vh = torch.linalg.svd(scaled_to_one(X).double(), full_matrices=False)  # descending
    kept = in_range(singular)
    smallest = torch.where(kept, singular, torch.inf).amin(dim=-1)
    rank = kept.sum(dim=-1)
    V = Vh.mT * kept[..., None, :]
    found = Q @ V
    off = found.mT @ found - torch.diag_embed(kept.double())
    difference = torch.linalg.vector_norm(found - U * kept[..., None, :], dim=(-2, -1))
    return Certificate(
        method=method,
        rank=rank,
        condition=torch.where(rank > 0, singular[..., 0] / smallest, 1),
        orthogonality=torch.linalg.eigvalsh(off).abs().amax(dim=-1),
        error=difference / rank.clamp_min(1).double().sqrt(),
    )
