"""The exact orthogonalisers: svd, and gram_eigh by the eigenvectors of the Gram matrix.

    svd        U V^T in X's precision, at least float32. Directions that X lacks are filled with arbitrary
               orthonormal ones: a rank-deficient X gives a full isometry, not unique.
    gram_eigh  X W or W X with W = V diag(lambda^-1/2) V^T, by X^T X or X X^T = V diag(lambda) V^T in float64.
               Directions that X lacks become zero: a rank-deficient X gives a partial isometry, and
               that is unique.

W amplifies: rounding in the product X W costs at most about eps * ||X||_F ||W||_F / sqrt(rank). In a large
matrix the directions that make this bound large are multiplied in float64, the others in float32. The error
stays under 1e-4 to a condition number of 1e6 (||Q - U V^T||_F / sqrt(k); tests/property/test_optim_orthogonalize.py).
Source: Higham, Functions of Matrices (2008), chapter 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optim.core.gram import NULL_ULPS, gram, in_float64, is_large, one_by_one, rows_times_rows, scaled_to_one

EPS64 = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps

FLOAT32_BOUND = 1e-4
"""Up to which value of that bound the last product is in float32. The error was 0.14 to 0.24 of the bound on 40
matrices (200 x 300 to 768 x 2048, ten spectra each): at most 2.4e-5."""

GRAM_BOUND = 5e-5
"""The Gram matrix knows an eigenvalue to eps * lambda_1, so W is off by about eps * rms(lambda_1 / lambda_i), eps =
2^-52. Beyond this value of it, met only where most of the range lies near a millionth of s_1, gram_eigh takes
the SVD in float64. The error was up to 1.5 times this quantity."""

WEAK_SHARE = 0.4
"""The share of directions up to which taking those in float64 and the others in float32 needs less time than
everything in float64: by the products of a 4096 x 768 matrix, one in float32 counting half."""


def svd(X: Tensor) -> Tensor:
    """U V^T of X [b, m, n] by torch.linalg.svd; a zero matrix gives zero."""
    scaled = scaled_to_one(X)
    wide = scaled.shape[-2] < scaled.shape[-1]
    # LAPACK takes half as long again, or twice as long, for a wide matrix as for its transpose.
    U, _, Vh = torch.linalg.svd(scaled.mT if wide else scaled, full_matrices=False)
    present = (scaled != 0).any(dim=-1).any(dim=-1)[..., None, None]
    filled: Tensor = U @ Vh
    return torch.where(present, filled.mT if wide else filled, 0)


def gram_eigh(X: Tensor) -> Tensor:
    """X (X^T X)^(-1/2), or (X X^T)^(-1/2) X when m < n, of X [b, m, n], null directions set to zero."""
    if is_large(X):
        scaled = scaled_to_one(X)
        return one_by_one(_large, scaled, scaled.dtype)
    wide = in_float64(X)
    eigenvalue, V = torch.linalg.eigh(gram(wide))
    null = eigenvalue <= null_floor(eigenvalue)
    inverse_root = torch.where(null, 0, eigenvalue.clamp_min(torch.finfo(torch.float64).tiny).rsqrt())
    W = (V * inverse_root[..., None, :]) @ V.mT
    found: Tensor = W @ wide if wide.shape[-2] < wide.shape[-1] else wide @ W
    vague = _gram_is_too_vague(inverse_root.square(), eigenvalue[..., -1:])
    if vague.any():
        found[vague] = _partial_svd(wide[vague])
    return found


def in_range(singular: Tensor) -> Tensor:
    """Which singular values, [..., k] descending, gram_eigh does not take for zero."""
    square = singular.square()
    return square > null_floor(square.flip(-1))


def null_floor(eigenvalue: Tensor) -> Tensor:
    """What an eigenvalue of the Gram matrix must exceed not to be rounding error: [..., k] -> [..., 1]."""
    return NULL_ULPS * eigenvalue.shape[-1] * EPS64 * eigenvalue[..., -1:]


def _large(scaled: Tensor) -> Tensor:
    """gram_eigh of one matrix [m, n]: half of each symmetric product, and float32 at the end where it is enough."""
    is_wide = len(scaled) < scaled.shape[1]
    wide = scaled.double()
    eigenvalue, V = torch.linalg.eigh(gram(wide))
    null = int((eigenvalue <= null_floor(eigenvalue)).sum())
    eigenvalue, V = eigenvalue[null:], V[:, null:]  # ascending
    if null < len(V) and _gram_is_too_vague(eigenvalue.reciprocal(), eigenvalue[-1:]):
        return _partial_svd(wide)
    weak = _too_weak_for_float32(eigenvalue)
    if scaled.dtype == torch.float64 or weak > WEAK_SHARE * V.shape[1]:
        in_float64 = _whitening(eigenvalue, V)
        return in_float64 @ wide if is_wide else wide @ in_float64
    W = _whitening(eigenvalue[weak:].float(), V[:, weak:].float())
    V, whitened = V[:, :weak], V[:, :weak] * eigenvalue[:weak].rsqrt()
    if is_wide:
        return (W @ scaled).addmm_(V.float(), (whitened.mT @ wide).float())
    return (scaled @ W).addmm_((wide @ whitened).float(), V.float().mT)


def _gram_is_too_vague(inverse: Tensor, largest: Tensor) -> Tensor:
    """Whether too much of the range is too weak for the Gram matrix, by 1 / eigenvalue [..., r], 0 where null."""
    rank = (inverse > 0).sum(dim=-1).clamp_min(1)
    error = EPS64 * torch.sqrt((inverse * largest).square().sum(dim=-1) / rank)
    return error > GRAM_BOUND


def _partial_svd(wide: Tensor) -> Tensor:
    """What gram_eigh is to give, by an SVD in float64: several times slower, and exact."""
    U, singular, Vh = torch.linalg.svd(wide, full_matrices=False)
    partial: Tensor = (U * in_range(singular)[..., None, :]) @ Vh
    return partial


def _whitening(eigenvalue: Tensor, V: Tensor) -> Tensor:
    """V diag(eigenvalue^-1/2) V^T."""
    return rows_times_rows(V * eigenvalue.pow(-0.25))


def _too_weak_for_float32(eigenvalue: Tensor) -> int:
    """How many directions, weakest first, must be taken in float64 for the rest to meet FLOAT32_BOUND."""
    amplified = eigenvalue.reciprocal().flip(0).cumsum(0).flip(0) * eigenvalue.sum() / max(1, len(eigenvalue))
    return int((EPS32 * amplified.sqrt() > FLOAT32_BOUND).sum())
