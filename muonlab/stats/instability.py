"""Instability of training: early regress per seed, spikes, and how rough the rest of the curve is.

    regress_i = max over evaluations at step <= 0.3 total of (challenger_i - baseline_i) / baseline_i
    e_k       = loss_k - (loss_{k-1} + loss_{k+1}) / 2          [residual against the two neighbouring evaluations]
    spike     : e_k more than 5 MAD above the median of the baseline's residuals, pooled over its seeds
    ratio     = var(e of the challenger) / var(e of the baseline)

Residuals are taken after the first 30 % of the steps, where the curve's own bend is small against its noise.
Descriptive: no test is made of them. Losses must be finite; a diverged run is counted as such elsewhere.
"""

import numpy as np
from numpy.typing import ArrayLike

from muonlab.stats.evidence import Floats
from muonlab.stats.guardrails import EARLY_SHARE
from muonlab.stats.result import Result

SPIKE_MAD = 5.0
FEWEST_RESIDUALS = 5


class Instability(Result):
    """Regress as fractions of the baseline's loss; spikes are counts over all seeds."""

    worst_regress: float | None
    mean_regress: float | None
    regress_by_seed: tuple[float, ...] | None
    baseline_spikes: int | None
    challenger_spikes: int | None
    residual_variance_ratio: float | None


def instability(steps: ArrayLike, baseline: ArrayLike, challenger: ArrayLike, *, total_steps: int) -> Instability:
    """Instability of one arm against the baseline; steps [E], losses [S, E] of the same seeds, finite.

    Raises ValueError on curves of different shape or with losses that are not finite.
    """
    steps = np.asarray(steps, dtype=np.float64)
    base, chal = (np.atleast_2d(np.asarray(curves, dtype=np.float64)) for curves in (baseline, challenger))
    if base.shape != chal.shape or base.shape[-1] != steps.size or not np.isfinite([base, chal]).all():
        raise ValueError(
            f"instability: {steps.size} evaluation steps, baseline {base.shape}, challenger {chal.shape}; give "
            "finite losses of both arms as [seeds, evaluations] on the same seeds and steps"
        )
    undefined: dict[str, str] = {}
    early = steps <= EARLY_SHARE * total_steps
    regress: Floats | None = None
    if early.any():
        regress = ((chal - base) / base)[:, early].max(axis=1)
    else:
        reason = "no evaluation in the first 30% of the steps"
        undefined.update(dict.fromkeys(("worst_regress", "mean_regress", "regress_by_seed"), reason))

    noise_base, noise_chal = (_residuals(curves, late=~early) for curves in (base, chal))
    spikes: tuple[int | None, int | None] = (None, None)
    ratio = None
    names = ("baseline_spikes", "challenger_spikes", "residual_variance_ratio")
    if noise_base.size < FEWEST_RESIDUALS:
        undefined.update(
            dict.fromkeys(names, f"fewer than {FEWEST_RESIDUALS} residuals after the first 30% of the steps")
        )
    elif (scale := float(np.median(np.abs(noise_base - np.median(noise_base))))) == 0:
        undefined.update(dict.fromkeys(names, "the baseline's curve has no noise to compare with"))
    else:
        limit = float(np.median(noise_base)) + SPIKE_MAD * scale
        spikes = (int((noise_base > limit).sum()), int((noise_chal > limit).sum()))
        ratio = float(noise_chal.var(ddof=1) / noise_base.var(ddof=1))
    return Instability(
        worst_regress=None if regress is None else float(regress.max()),
        mean_regress=None if regress is None else float(regress.mean()),
        regress_by_seed=None if regress is None else tuple(float(x) for x in regress),
        baseline_spikes=spikes[0],
        challenger_spikes=spikes[1],
        residual_variance_ratio=ratio,
        undefined=undefined,
    )


def _residuals(losses: Floats, *, late: np.ndarray) -> Floats:
    """Residuals of all seeds [S * (L - 2)] over the L late evaluations."""
    x = losses[:, late]
    return np.asarray((x[:, 1:-1] - (x[:, :-2] + x[:, 2:]) / 2).ravel())
