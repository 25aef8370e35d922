"""What one step did: the evidence for why an optimizer works or fails.

    of every parameter
    grad_norm                     ||g||_F
    momentum_rms                  rms of M (of AdamW: of its first moment)
    update_rms                    rms of the change of the (master) weights, lr and weight decay included

    of every matrix that is orthogonalised
    noise_fired_share             share of the steps since the last diagnosis in which it got noise

    of a sample of them
    effective_rank_share_before   effective rank / k of what Muon would orthogonalise: M, or g + mu*M
    effective_rank_share_after    effective rank / k of what was orthogonalised
    numerical_rank_share          numerical rank / k of the same
    turn                          1 - cosine of the update and Muon's own, the polar factor of the momentum that
                                  the same gradients give without gate, damping, projection and noise

    (the share of damped entries is none of them: the quantile is exact, so it is 1 - quantile but for ties)

Each is a mean over the hidden matrices; of another group (embedding, head, vector, tensor) it is a mean over
that group's parameters and has the group's name at its end, as in `grad_norm_embedding`. `skipped_steps` is
the count since the run began, there in every step for `on_nonfinite: skip_step` alone.

The sample is what keeps this cheap: of b matrices of one shape, as many as fit in SAMPLE_ENTRIES, at least
one, at even distances in the model's order, the same in each step as long as all of them have a gradient;
their mean stands for all b. Of matrices
64 x 64 and larger that is one a shape, of matrices 32 x 32 four.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optim.core.spectrum import effective_rank, numerical_rank, singular_values

Rows = dict[str, list[float]]
Many = Sequence[Tensor] | Tensor

SAMPLE_ENTRIES = 2**12

QUICK_ENTRIES = 2**18
"""Up to which size a norm is summed in float32: its relative error there was under 1e-5, at 2^25 entries 3e-3."""

SAFE_NORM = (1e-10, 1e18)
"""Outside of these, squares of float32 entries might over- or underflow."""


def sample(b: int, m: int, n: int) -> list[int]:
    """Which of b matrices m x n are looked at closely."""
    count = min(b, max(1, SAMPLE_ENTRIES // (m * n)))
    return [i * b // count for i in range(count)]


def of_parameters(grads: Many, momenta: Many, changes: Many) -> Rows:
    """Norm and rms of each of some parameters: of any shapes, or stacked [b, m, n]."""
    return {
        "grad_norm": _norms(grads),
        "momentum_rms": _rms(momenta),
        "update_rms": _rms(changes),
    }


def of_orthogonalized(plain: Tensor, matrix: Tensor, update: Tensor, muons: Tensor | None) -> Rows:
    """What is known of a sample of b matrices [b, m, n], each a mean that is repeated b times.

    `plain` is the momentum after gate and damping (with Nesterov's gradient), `matrix` what projection and
    noise made of it (the same tensor where they did nothing), `update` its polar factor. `muons` is Muon's
    update in place of it, of the sample alone: None where that is the same, NaN where it is not known.
    """
    b, m, n = matrix.shape
    chosen = sample(b, m, n)
    untouched = matrix is plain
    plain, matrix, update = (torch.stack([x[i] for i in chosen]) for x in (plain, matrix, update))
    k = min(m, n)
    singular = singular_values(plain if untouched else torch.cat([plain, matrix]))
    share = effective_rank(singular) / k
    after = slice(-len(chosen), None)
    means = {
        "effective_rank_share_before": share[: len(chosen)].mean(),
        "effective_rank_share_after": share[after].mean(),
        "numerical_rank_share": numerical_rank(singular[after], m, n).double().mean() / k,
        "turn": torch.zeros_like(share[0]) if muons is None else _turn(update, muons).mean(),
    }
    return {name: [mean] * b for name, mean in zip(means, torch.stack(list(means.values())).tolist(), strict=True)}


def _norms(tensors: Many) -> list[float]:
    """||x||_F; in the tensor's own precision first, since most are small and harmless."""
    if isinstance(tensors, Tensor):
        quick = torch.linalg.vector_norm(tensors.flatten(start_dim=1), dim=1)
    else:
        quick = torch.stack([torch.linalg.vector_norm(x) for x in tensors])
    low, high = SAFE_NORM
    return [
        norm
        if low < norm < high and x.numel() <= QUICK_ENTRIES
        else float(torch.linalg.vector_norm(x, dtype=torch.float64))
        for norm, x in zip(quick.tolist(), tensors, strict=True)
    ]


def _rms(tensors: Many) -> list[float]:
    return [norm / math.sqrt(x.numel()) for norm, x in zip(_norms(tensors), tensors, strict=True)]


def _turn(update: Tensor, reference: Tensor) -> Tensor:
    """1 - cosine, matrix by matrix; 0 where both are zero, 1 where one is."""
    a, b = update.double().flatten(start_dim=1), reference.double().flatten(start_dim=1)
    a_norm, b_norm = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=1)
    norms = a_norm * b_norm
    cosine = torch.where(norms == 0, a_norm == b_norm, torch.linalg.vecdot(a, b) / norms)
    return 1 - cosine
