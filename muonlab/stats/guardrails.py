"""Guardrails on the course of training: early regress and divergence.

    early regress: max over evaluations at step <= 0.3 total, of the mean over seeds,
       of (challenger - baseline) / baseline
    diverged: a loss is not finite, or is above 1.5 times its running minimum at two evaluations

A GO needs an early regress within the rule's limit (2 % by default) and no diverged challenger run.
"""

import numpy as np
from numpy.typing import ArrayLike

EARLY_SHARE = 0.3
DIVERGED_FACTOR = 1.5
DIVERGED_EVALUATIONS = 2


def early_regress(
    steps: ArrayLike,
    baseline: ArrayLike,
    challenger: ArrayLike,
    *,
    total_steps: int,
    diverged_loss: float | None = None,
) -> float | None:
    """Largest early regress as a fraction; None where no evaluation lies in the first 30 % of the steps.

    steps: [E] of the evaluations; baseline, challenger: [S, E] losses in nats/token of the same S seeds. A
    loss that is not finite counts as `diverged_loss`; without one it is refused.
    """
    steps = np.asarray(steps)
    base = np.atleast_2d(np.asarray(baseline, dtype=np.float64))
    chal = np.atleast_2d(np.asarray(challenger, dtype=np.float64))
    if base.shape != chal.shape or base.shape[-1] != steps.size:
        raise ValueError(
            f"early regress: {steps.size} evaluation steps, baseline {base.shape}, challenger {chal.shape}; "
            "give both arms as [seeds, evaluations] on the same seeds and steps"
        )
    early = steps <= EARLY_SHARE * total_steps
    if not early.any():
        return None
    base, chal = base[:, early], chal[:, early]
    if not (np.isfinite(base).all() and np.isfinite(chal).all()):
        if diverged_loss is None:
            raise ValueError(
                "early regress: a loss is not finite and no diverged_loss is given; pass ln(vocabulary size)"
            )
        base = np.where(np.isfinite(base), base, diverged_loss)
        chal = np.where(np.isfinite(chal), chal, diverged_loss)
    return float(((chal - base) / base).mean(axis=0).max())


def diverged(losses: ArrayLike) -> bool:
    """Whether a run's validation losses [E], in order, show divergence."""
    loss = np.asarray(losses, dtype=np.float64)
    if not np.isfinite(loss).all():
        return True
    above = loss > DIVERGED_FACTOR * np.minimum.accumulate(loss)
    return bool(above.sum() >= DIVERGED_EVALUATIONS)


def identical_curves(baseline: ArrayLike, challenger: ArrayLike) -> bool:
    """Whether two runs have equal losses [E] at all of two or more evaluations: the arm did nothing."""
    base, chal = np.asarray(baseline, dtype=np.float64), np.asarray(challenger, dtype=np.float64)
    return base.size >= 2 and base.shape == chal.shape and bool((base == chal).all())
