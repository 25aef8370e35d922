"""How training went, beside where it ended: the early phase, the speed to a loss, and the diagnostics on the way.

Curves are paired by seed on the baseline's evaluation steps. What a run did not reach, because it diverged, counts with
the diverged loss in the early phase, as in the guardrail, and as never arriving in the speed; its residuals are
compared with nothing. Where no diverged loss is known (`reported`) only the evaluations that all runs share are used.
Losses in nats/token, steps in optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muonlab.registry.settings import Closed
from muonlab.stats.guardrails import EARLY_SHARE, early_regress
from muonlab.stats.instability import Instability, instability
from muonlab.stats.speed import FIRST_LEVEL_SHARE, Speed, speed_to_target

Curve = Sequence[tuple[int, float | None]]
"""(step, validation loss) of one run; None where the loss was not finite."""

Series = Mapping[str, Sequence[tuple[int, float]]]
"""Column of a run's curve.csv -> (step, value)."""

DIAGNOSED = (
    "grad_norm",
    "opt_momentum_rms",
    "opt_effective_rank_share_before",
    "opt_effective_rank_share_after",
    "opt_turn",
    "opt_noise_fired_share",
    "hessian_top",
)
"""The columns that speak to the open hypotheses; `optim.core.diagnostics` says what they are."""

LARGEST_RESIDUAL = 0.1
"""Relative. An eigenvalue of the Hessian that Lanczos' iteration left less certain than this says nothing."""


@dataclass(frozen=True)
class PairedCurves:
    """The curves of the seeds that both arms have: steps [E], losses [S, E], nan where a run has none."""

    steps: list[int]
    baseline: NDArray[np.float64]
    challenger: NDArray[np.float64]

    @property
    def whole(self) -> bool:
        """Whether every run has a finite loss at every evaluation."""
        return bool(np.isfinite(self.baseline).all() and np.isfinite(self.challenger).all())


class Diagnosis(Closed):
    """One quantity of one arm over its run: means over seeds, at the steps that all the arm's runs have."""

    arm: str
    quantity: str
    """Its column in curve.csv."""
    seeds: list[int]
    first_step: int
    last_step: int
    first: float
    early: float | None
    """Mean over the diagnosed steps in the first EARLY_SHARE of the run; None where there is none."""
    mean: float
    """Over the diagnosed steps, each counting alike."""
    last: float
    last_range: tuple[float, float]
    """Lowest and highest seed at the last step."""


def pair_curves(baseline: Sequence[Curve], challenger: Sequence[Curve], *, shared: bool = False) -> PairedCurves | None:
    """The curves of the same seeds on the baseline's steps after 0; None where there is no seed or no step.

    `shared`: on the steps alone that every run has.
    """
    base, chal = ([dict(curve) for curve in curves] for curves in (baseline, challenger))
    steps = sorted({step for curve in base for step in curve if step > 0})
    if shared:
        steps = [step for step in steps if all(curve.get(step) is not None for curve in (*base, *chal))]
    if not steps:
        return None

    def losses(curves: list[dict[int, float | None]]) -> NDArray[np.float64]:
        # None becomes nan.
        return np.array([[curve.get(step) for step in steps] for curve in curves], dtype=np.float64)

    return PairedCurves(steps, losses(base), losses(chal))


def guardrail_regress(pairs: PairedCurves, *, total_steps: int, diverged_loss: float | None) -> float | None:
    """The early regress that the guardrail looks at, as a fraction of the baseline's loss."""
    return early_regress(
        pairs.steps, pairs.baseline, pairs.challenger, total_steps=total_steps, diverged_loss=diverged_loss
    )


def early_stability(pairs: PairedCurves, *, total_steps: int, diverged_loss: float | None) -> Instability:
    """Instability over the pairs; spikes and residuals only where every run has all its evaluations."""
    if pairs.whole:
        return instability(pairs.steps, pairs.baseline, pairs.challenger, total_steps=total_steps)
    assert diverged_loss is not None  # else the steps are those that all runs share
    base, chal = (np.where(np.isfinite(x), x, diverged_loss) for x in (pairs.baseline, pairs.challenger))
    found = instability(pairs.steps, base, chal, total_steps=total_steps)
    late = ("baseline_spikes", "challenger_spikes", "residual_variance_ratio")
    reason = "a run lacks evaluations that the other of its pair has"
    changed = found.model_dump() | dict.fromkeys(late)
    return Instability.model_validate({**changed, "undefined": {**found.undefined, **dict.fromkeys(late, reason)}})


def speeds(pairs: PairedCurves) -> tuple[Speed, Speed | None]:
    """Speed over the nine levels of each pair, and to the first alone: the baseline's mean loss at 40% of the run.

    The second has the bounds that the evaluation grid leaves; they are widest there. None where a run of the baseline
    has no loss by then.
    """
    steps = np.asarray(pairs.steps, dtype=np.float64)
    over_levels = speed_to_target(steps, pairs.baseline, pairs.challenger)
    early = np.where(np.isfinite(pairs.baseline), pairs.baseline, np.inf)
    best = np.minimum.accumulate(early, axis=1)
    level = float(np.mean([np.interp(FIRST_LEVEL_SHARE * steps[-1], steps, curve) for curve in best]))
    if not math.isfinite(level):
        return over_levels, None
    return over_levels, speed_to_target(steps, pairs.baseline, pairs.challenger, target=level)


def diagnose(arm: str, series: Mapping[int, Series], *, total_steps: int) -> list[Diagnosis]:
    """The quantities that all runs of an arm have, by seed; nothing where a run has no series.

    `total_steps`: the declared length of a run.
    """
    if not series:
        return []
    found = []
    for quantity in DIAGNOSED:
        if not all(quantity in of_run for of_run in series.values()):
            continue
        values = {seed: dict(of_run[quantity]) for seed, of_run in series.items()}
        if quantity == "hessian_top":
            values = {seed: converged(series[seed]) for seed in series}
        steps = sorted(set.intersection(*map(set, values.values())))
        if steps:
            found.append(_diagnosis(arm, quantity, values, steps, total_steps))
    return found


def converged(of_run: Series) -> dict[int, float]:
    """Step -> the Hessian's top eigenvalue, where the iteration's residual is recorded and small enough."""
    residual = dict(of_run.get("hessian_residual", ()))
    return {s: v for s, v in of_run.get("hessian_top", ()) if residual.get(s, math.inf) <= LARGEST_RESIDUAL}


def _diagnosis(
    arm: str, quantity: str, values: dict[int, dict[int, float]], steps: list[int], total_steps: int
) -> Diagnosis:
    by_step = {step: [of_seed[step] for of_seed in values.values()] for step in steps}
    means = {step: math.fsum(found) / len(found) for step, found in by_step.items()}
    early = [mean for step, mean in means.items() if step <= EARLY_SHARE * total_steps]
    last = by_step[steps[-1]]
    return Diagnosis(
        arm=arm,
        quantity=quantity,
        seeds=sorted(values),
        first_step=steps[0],
        last_step=steps[-1],
        first=means[steps[0]],
        early=math.fsum(early) / len(early) if early else None,
        mean=math.fsum(means.values()) / len(means),
        last=means[steps[-1]],
        last_range=(min(last), max(last)),
    )


def course_fields(pairs: PairedCurves | None, *, total_steps: int, diverged_loss: float | None) -> dict[str, Any]:
    """The fields of an arm's comparison that its curves give, and in `undefined` why one of them is None."""
    if pairs is None:
        reason = "no seed has a curve in both arms"
        return {"undefined": dict.fromkeys(("early", "speed", "first_level"), reason)}
    over_levels, first_level = speeds(pairs)
    return {
        "early": early_stability(pairs, total_steps=total_steps, diverged_loss=diverged_loss),
        "speed": over_levels,
        "first_level": first_level,
        "curve_steps": pairs.steps,
        "undefined": {}
        if first_level
        else {"first_level": f"a run of the baseline has no finite loss by {FIRST_LEVEL_SHARE:.0%} of the steps"},
    }
