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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.core.methods import method_options
from optim.core.orthogonalize import polar
from optim.core.spectrum import effective_rank, numerical_rank, singular_values

Rows = dict[str, list[float]]

SAMPLE_ENTRIES = 2**12


def sample(b: int, m: int, n: int) -> list[int]:
    """Which of b matrices m x n are looked at closely."""
    count = min(b, max(1, SAMPLE_ENTRIES // (m * n)))
    return [i * b // count for i in range(count)]


def of_parameters(grads: Sequence[Tensor], momenta: Sequence[Tensor], changes: Sequence[Tensor]) -> Rows:
    """Norm and rms of each of some parameters, of any shapes."""
    return {
        "grad_norm": _norms(grads),
        "momentum_rms": _rms(momenta),
        "update_rms": _rms(changes),
    }


def of_orthogonalized(
    plain: Tensor, matrix: Tensor, update: Tensor, own: Tensor | None, group: Mapping[str, Any]
) -> Rows:
    """What is known of a sample of b matrices [b, m, n], each a mean that is repeated b times.

    `plain` is the momentum after gate and damping (with Nesterov's gradient), `matrix` what projection and
    noise made of it (the same tensor where they did nothing), `update` its polar factor. `own` is what Muon
    would have in place of `plain`, of the sample alone; None where that is `plain`.
    """
    b, m, n = matrix.shape
    chosen = sample(b, m, n)
    untouched = matrix is plain
    plain, matrix, update = plain[chosen], matrix[chosen], update[chosen]
    k = min(m, n)
    method, options = method_options(group)
    singular = singular_values(plain if untouched else torch.cat([plain, matrix]))
    before, after = singular[: len(chosen)], singular[-len(chosen) :]
    means = {
        "effective_rank_share_before": effective_rank(before).mean() / k,
        "effective_rank_share_after": effective_rank(after).mean() / k,
        "numerical_rank_share": numerical_rank(after, m, n).double().mean() / k,
        "turn": torch.zeros(()),
    }
    if own is not None or not untouched:
        reference = plain if own is None else own
        # Muon's own momentum may overflow where a gate has kept this one small.
        known = bool(reference.isfinite().all())
        means["turn"] = _turn(update, polar(reference, method, **options)).mean() if known else torch.tensor(math.nan)
    return {name: [float(mean)] * b for name, mean in means.items()}


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    norms: list[float] = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors]).tolist()
    return norms


def _rms(tensors: Sequence[Tensor]) -> list[float]:
    return [norm / math.sqrt(x.numel()) for norm, x in zip(_norms(tensors), tensors, strict=True)]


def _turn(update: Tensor, reference: Tensor) -> Tensor:
    """1 - cosine, matrix by matrix; 0 where both are zero, 1 where one is."""
    a, b = update.double().flatten(start_dim=1), reference.double().flatten(start_dim=1)
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    cosine = torch.where(norms > 0, (a * b).sum(dim=1) / norms, 0)
    both_zero = (a == 0).all(dim=1) & (b == 0).all(dim=1)
    return torch.where(both_zero, 0, 1 - cosine)
