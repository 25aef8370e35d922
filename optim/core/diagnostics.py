"""What one step did to the matrices: the evidence for why an optimizer works or fails.

    grad_norm                     ||g||_F
    update_rms                    rms of the change of the (master) weights, lr and weight decay included
    momentum_rms                  rms of M
    effective_rank_share_before   effective rank / k of what Muon would orthogonalise: M, or g + mu*M
    effective_rank_share_after    effective rank / k of what was orthogonalised
    numerical_rank_share          numerical rank / k of the same
    turn                          1 - cosine of update and polar of the former: 0 where no heuristic acted
    noise_fired_share             share of the matrices that got noise

Each is a mean over matrices. The first two exist for every optimizer, the rest where matrices are
orthogonalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optim.core.orthogonalize import polar
from optim.core.spectrum import effective_rank, numerical_rank, singular_values

Rows = dict[str, list[float]]


def rms(X: Tensor) -> Tensor:
    """Root mean square of each matrix, [..., m, n] -> [...], in float64."""
    return X.double().square().mean(dim=(-2, -1)).sqrt()


def of_orthogonalized(plain: Tensor, matrix: Tensor, update: Tensor, method: str) -> Rows:
    """Ranks and turn of each of b matrices, [b, m, n].

    `matrix` is what the heuristics made of `plain` (the same tensor where they did nothing), `update` the
    polar factor of `matrix` by `method`.
    """
    m, n = matrix.shape[-2:]
    k = min(m, n)
    before = singular_values(plain)
    untouched = matrix is plain
    after = before if untouched else singular_values(matrix)
    return {
        "effective_rank_share_before": (effective_rank(before) / k).tolist(),
        "effective_rank_share_after": (effective_rank(after) / k).tolist(),
        "numerical_rank_share": (numerical_rank(after, m, n) / k).tolist(),
        "turn": [0.0] * len(update) if untouched else _turn(update, polar(plain, method)).tolist(),
    }


def _turn(update: Tensor, reference: Tensor) -> Tensor:
    """1 - cosine, matrix by matrix; 0 where both are zero, 1 where one is."""
    a, b = update.double().flatten(start_dim=1), reference.double().flatten(start_dim=1)
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    cosine = torch.where(norms > 0, (a * b).sum(dim=1) / norms, 0)
    both_zero = (a == 0).all(dim=1) & (b == 0).all(dim=1)
    return torch.where(both_zero, 0, 1 - cosine)
