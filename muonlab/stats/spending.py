"""What the arms of a pair cost: the difference of their bills, and the bill until a target loss.

    cost difference   mean of baseline_i - challenger_i with its 95 % t interval        (positive = challenger cheaper)
    cost to target    C_i = T_i * price of a step,   T_i the steps to the target (`speed.steps_to_target`)
                      r_i = log C_baseline,i - log C_challenger,i,   geometric mean ratio by the paired t of r

A run that never arrives is censored: its cost is +-infinity in r, no mean is given, and the median and the sign test
take its place (dropping it would flatter its arm). Costs are in USD, or in seconds for machines without a price.
Assumes independent pairs, normal differences (of the costs, or of their logs), and a price of a step that is constant
over a run. Sources: Student (1908) doi:10.2307/2331554; censoring as in `speed.py`.
"""

import numpy as np
from numpy.typing import ArrayLike

from muonlab.stats.effect import Interval, t_interval, t_p_values
from muonlab.stats.evidence import Floats
from muonlab.stats.kernel import paired_t
from muonlab.stats.result import Result
from muonlab.stats.sample import moments
from muonlab.stats.speed import log_ratios, ratio_summary


class CostDifference(Result):
    """baseline - challenger over n pairs, in the unit of the costs."""

    n: int
    mean_diff: float
    ci95: Interval | None
    rel_diff_pct: float | None
    """Of the baseline's mean cost."""
    p_two_sided: float | None


class CostToTarget(Result):
    """Cost of the baseline until the target over that of the challenger; above 1 the challenger is cheaper."""

    n: int
    target: float
    baseline_never: int
    challenger_never: int
    baseline_mean: float | None
    challenger_mean: float | None
    difference: CostDifference | None
    geometric_mean_ratio: float | None
    ratio_ci95: Interval | None
    p_one_sided: float | None
    p_two_sided: float | None
    median_ratio: float | None
    sign_p_one_sided: float | None
    sign_p_two_sided: float | None


def cost_difference(baseline: ArrayLike, challenger: ArrayLike) -> CostDifference:
    """Difference of the costs [n] of paired runs, in their unit.

    Raises ValueError on no pairs, on costs of different shape, or on one that is negative or not finite.
    """
    base, chal = _costs(baseline, challenger)
    d = base - chal
    undefined: dict[str, str] = {}
    mean, ss = moments(d)
    interval, p = None, None
    if d.size >= 2 and ss > 0:
        interval, p = t_interval(d), t_p_values(float(paired_t(d.size, mean, ss)), d.size)[1]
    else:
        reason = "one pair has no spread" if d.size == 1 else "every difference is the same (s = 0)"
        undefined.update(dict.fromkeys(("ci95", "p_two_sided"), reason))
    if base.mean() == 0:
        undefined["rel_diff_pct"] = "the baseline costs nothing"
    return CostDifference(
        n=d.size,
        mean_diff=mean,
        ci95=interval,
        rel_diff_pct=None if base.mean() == 0 else float(100 * mean / base.mean()),
        p_two_sided=p,
        undefined=undefined,
    )


def cost_to_target(
    baseline: ArrayLike,
    challenger: ArrayLike,
    *,
    target: float,
    baseline_per_step: ArrayLike,
    challenger_per_step: ArrayLike,
) -> CostToTarget:
    """What each arm costs until its validation loss is at most `target`.

    baseline, challenger: [S] steps to the target of the same seeds, above 0, infinity for never; per_step: [S] or one
    price of a step, above 0. Raises ValueError on other shapes, steps or prices.
    """
    sides = [np.asarray(steps, dtype=np.float64) for steps in (baseline, challenger)]
    prices = [np.asarray(price, dtype=np.float64) for price in (baseline_per_step, challenger_per_step)]
    pairs = sides[0].shape
    fits = all(price.shape in ((), pairs) and (np.isfinite(price) & (price > 0)).all() for price in prices)
    if len(pairs) != 1 or pairs != sides[1].shape or not fits or not all((steps > 0).all() for steps in sides):
        raise ValueError(
            f"cost to target: steps of shapes {[steps.shape for steps in sides]}, prices {[p.shape for p in prices]}; "
            "give the steps of both arms on the same seeds, above 0, and prices above 0, one or one a seed"
        )
    spent = [price * steps for price, steps in zip(prices, sides, strict=True)]
    never = [int(np.isinf(cost).sum()) for cost in spent]
    r = log_ratios(spent[0], spent[1])
    undefined: dict[str, str] = {}
    ratios = ratio_summary(r, never[0], never[1], undefined)
    means: list[float | None] = [float(cost.mean()) if not n else None for cost, n in zip(spent, never, strict=True)]
    for name, n in zip(("baseline", "challenger"), never, strict=True):
        if n:
            undefined[f"{name}_mean"] = f"{n} of {r.size} {name} runs never arrive"
    if sum(never):
        undefined["difference"] = undefined["geometric_mean_ratio"]
    return CostToTarget(
        n=r.size,
        target=target,
        baseline_never=never[0],
        challenger_never=never[1],
        baseline_mean=means[0],
        challenger_mean=means[1],
        difference=None if sum(never) else cost_difference(*spent),
        undefined=undefined,
        **ratios,
    )


def _costs(baseline: ArrayLike, challenger: ArrayLike) -> tuple[Floats, Floats]:
    base, chal = np.asarray(baseline, dtype=np.float64), np.asarray(challenger, dtype=np.float64)
    every = np.concatenate([base.ravel(), chal.ravel()])
    if base.ndim != 1 or base.shape != chal.shape or not base.size or not (np.isfinite(every) & (every >= 0)).all():
        raise ValueError(
            f"cost difference: baseline {base.shape}, challenger {chal.shape}; give one finite cost, 0 or more, a seed "
            "for each arm, of at least one pair"
        )
    return base, chal
