"""Speed to target: how many steps an arm needs for a loss that the other arm needs more, or fewer, for.

    T(level) = first step at which the running minimum of the validation loss is at most `level`, by linear
               interpolation between evaluations; infinity for a run that never gets there (censored)
    r_i      = log T_baseline,i(target) - log T_challenger,i(target)            [positive = challenger faster]
    without a target: the mean of r_i over 9 levels, evenly from the baseline's loss at 40 % of the run to the worse of
               the two final losses, so that both runs of a pair pass every level

Paired t over seeds, reported as a geometric mean ratio; where a run is censored r_i is +-infinity, and only the median
and the sign test are given: dropping censored pairs turned a third of null comparisons into speedups.
The evaluation grid brackets T in (previous evaluation, this one]; what it leaves open is reported beside the estimate.
Assumes that seed i gave both arms the same initial weights and data order, and evaluations at the same steps.
Sources: Student (1908) doi:10.2307/2331554; Mann and Whitney (1947) doi:10.1214/aoms/1177730491.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from muonlab.stats.effect import Interval, t_interval, t_p_values
from muonlab.stats.evidence import Floats
from muonlab.stats.kernel import paired_t
from muonlab.stats.result import Result
from muonlab.stats.sample import moments

LEVELS = 9
FIRST_LEVEL_SHARE = 0.4  # of the run: earlier losses are about warm-up, not about the optimizer


class Speed(Result):
    """Steps of the baseline over those of the challenger, over n pairs; above 1 the challenger is faster."""

    n: int
    target: float | None
    baseline_never: int
    challenger_never: int
    geometric_mean_ratio: float | None
    ratio_ci95: Interval | None
    steps_saved_pct: float | None
    p_one_sided: float | None
    p_two_sided: float | None
    median_ratio: float | None
    sign_p_one_sided: float | None
    sign_p_two_sided: float | None
    grid_saved_pct: Interval | None
    """Steps saved [%] that the evaluation grid allows, from (exclusive) and to, means over pairs."""


def steps_to_target(steps: ArrayLike, losses: ArrayLike, target: float) -> float:
    """First step at which the running minimum of losses [E] reaches target; infinity if never. steps: [E], rising."""
    steps, best = _running_minimum(steps, losses)
    reached = np.flatnonzero(best <= target)
    if reached.size == 0:
        return float("inf")
    i = int(reached[0])
    if i == 0 or not np.isfinite(best[i - 1]):
        return float(steps[i])  # nothing before it to interpolate from
    share = (best[i - 1] - target) / (best[i - 1] - best[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def grid_bracket(steps: ArrayLike, losses: ArrayLike, target: float) -> tuple[float, float]:
    """(last evaluation above target, first at or below it); (last evaluation, infinity) if never."""
    steps, best = _running_minimum(steps, losses)
    reached = np.flatnonzero(best <= target)
    if reached.size == 0:
        return float(steps[-1]), float("inf")
    i = int(reached[0])
    return (float(steps[i - 1]) if i > 0 else 0.0), float(steps[i])


def log_ratio_over_levels(steps: ArrayLike, baseline: ArrayLike, challenger: ArrayLike) -> float:
    """Mean log ratio of steps over the 9 levels, for one pair of curves [E].

    -infinity if the challenger ends worse than the baseline was at 40 % of the run; infinity if only the baseline has
    no finite loss by then, 0 if neither has one.
    """
    steps_e, best_base = _running_minimum(steps, baseline)
    _, best_chal = _running_minimum(steps, challenger)
    highest = float(np.interp(FIRST_LEVEL_SHARE * steps_e[-1], steps_e, best_base))
    lowest = float(max(best_base[-1], best_chal[-1]))
    if not np.isfinite(highest):
        return float("inf") if np.isfinite(best_chal[-1]) else 0.0
    if lowest > highest:
        return float("-inf")
    levels = np.linspace(highest, lowest, LEVELS)
    return float(np.mean([_log_ratio(steps_e, best_base, best_chal, level) for level in levels]))


def speed_to_target(
    steps: ArrayLike, baseline: ArrayLike, challenger: ArrayLike, *, target: float | None = None
) -> Speed:
    """Speed of one arm over pairs of curves.

    steps: [E]; baseline, challenger: [S, E] losses in nats/token of the same seeds. target: one loss, or None for the
    9 levels of each pair. Raises ValueError on curves of different shape.
    """
    steps = np.asarray(steps, dtype=np.float64)
    base, chal = (np.atleast_2d(np.asarray(curves, dtype=np.float64)) for curves in (baseline, challenger))
    if base.shape != chal.shape or base.shape[-1] != steps.size:
        raise ValueError(
            f"speed to target: {steps.size} evaluation steps, baseline {base.shape}, challenger {chal.shape}; give "
            "both arms as [seeds, evaluations] on the same seeds and steps"
        )
    if target is not None:
        arrivals = [[steps_to_target(steps, curve, target) for curve in curves] for curves in (base, chal)]
        brackets = [[grid_bracket(steps, curve, target) for curve in curves] for curves in (base, chal)]
        return speed_of_arrivals(*arrivals, *brackets, target=target)
    r = np.array([log_ratio_over_levels(steps, b, c) for b, c in zip(base, chal, strict=True)])
    undefined = {
        "target": "no single target: nine levels of each pair",
        "grid_saved_pct": "the grid's bounds are given for a single target",
    }
    return _speed(r, int(np.isposinf(r).sum()), int(np.isneginf(r).sum()), None, None, undefined)


def speed_of_arrivals(
    baseline: ArrayLike,
    challenger: ArrayLike,
    baseline_brackets: ArrayLike,
    challenger_brackets: ArrayLike,
    *,
    target: float,
) -> Speed:
    """Speed of one arm over pairs of runs that were evaluated at any steps of their own.

    baseline, challenger: [S] steps to the target (`steps_to_target`) of the same seeds, above 0, infinity for never;
    brackets: [S, 2] of each (`grid_bracket`).
    """
    base, chal = (np.asarray(arrivals, dtype=np.float64) for arrivals in (baseline, challenger))
    undefined: dict[str, str] = {}
    never = [int(np.isinf(arrivals).sum()) for arrivals in (base, chal)]
    grid = None
    if sum(never):
        undefined["grid_saved_pct"] = "a run never arrives"
    else:
        grid = _grid_saved(np.asarray(baseline_brackets), np.asarray(challenger_brackets), undefined)
    return _speed(log_ratios(base, chal), never[0], never[1], grid, target, undefined)


def log_ratios(baseline: Floats, challenger: Floats) -> Floats:
    """log baseline - log challenger of pairs [S] of steps or costs; 0 where both are infinite: nothing is known."""
    both = np.isinf(baseline) & np.isinf(challenger)
    with np.errstate(invalid="ignore"):
        return np.where(both, 0.0, np.log(baseline) - np.log(challenger))


def _speed(
    r: Floats,
    baseline_never: int,
    challenger_never: int,
    grid: Interval | None,
    target: float | None,
    undefined: dict[str, str],
) -> Speed:
    ratios = ratio_summary(r, baseline_never, challenger_never, undefined)
    ratio = ratios["geometric_mean_ratio"]
    if ratio is None:
        undefined["steps_saved_pct"] = undefined["geometric_mean_ratio"]
    return Speed(
        n=r.size,
        target=target,
        baseline_never=baseline_never,
        challenger_never=challenger_never,
        steps_saved_pct=None if ratio is None else 100 * (1 - 1 / ratio),
        grid_saved_pct=grid,
        undefined=undefined,
        **ratios,
    )


def ratio_summary(r: Floats, baseline_never: int, challenger_never: int, undefined: dict[str, str]) -> dict[str, Any]:
    """Fields of a ratio of what two arms need, from the log ratios r [n] of pairs, +-infinity where one is censored.

    Geometric mean, its interval and paired t where every run arrives; median and sign test in any case. The reasons of
    those that are None are added to `undefined`.
    """
    t_based = ("geometric_mean_ratio", "ratio_ci95", "p_one_sided", "p_two_sided")
    values: dict[str, Any] = dict.fromkeys(t_based)
    if baseline_never + challenger_never > 0:
        never = f"{baseline_never} baseline and {challenger_never} challenger runs never arrive"
        undefined.update(dict.fromkeys(t_based, f"{never}: see the median and the sign test"))
    else:
        values["geometric_mean_ratio"] = float(np.exp(r.mean()))
        if r.size >= 2 and r.std() > 0:
            low, high = t_interval(r)
            values["ratio_ci95"] = (float(np.exp(low)), float(np.exp(high)))
            p_values = t_p_values(float(paired_t(r.size, *moments(r))), r.size)
            values["p_one_sided"], values["p_two_sided"] = p_values
        else:
            reason = "one pair has no spread" if r.size == 1 else "every ratio is the same"
            undefined.update(dict.fromkeys(t_based[1:], reason))
    with np.errstate(invalid="ignore"):  # between -inf and inf there is no middle
        middle = float(np.median(r))
    values["median_ratio"] = float(np.exp(middle)) if np.isfinite(middle) else None
    if not np.isfinite(middle):
        undefined["median_ratio"] = "at least half of the pairs are censored on one side"
    values["sign_p_one_sided"], values["sign_p_two_sided"] = sign_test_p(r, undefined)
    return values


def sign_test_p(r: Floats, undefined: dict[str, str]) -> tuple[float | None, float | None]:
    """Exact sign test of r [n] against 0, one-sided for r > 0 and two-sided; ties are left out, infinities count."""
    positive, informative = int((r > 0).sum()), int((r != 0).sum())
    if informative == 0:
        undefined.update(dict.fromkeys(("sign_p_one_sided", "sign_p_two_sided"), "every pair is a tie"))
        return None, None
    # P(X >= k) of X ~ Binomial(n, 1/2), which is symmetric; scipy.stats says the same after a second of imports.
    one, other = (
        sum(math.comb(informative, i) for i in range(k, informative + 1)) / 2**informative
        for k in (positive, informative - positive)
    )
    return one, min(1.0, 2 * min(one, other))


def unpaired_speed_p(baseline_steps: ArrayLike, challenger_steps: ArrayLike) -> float:
    """One-sided Mann-Whitney p that the challenger needs fewer steps; infinity (censored) ranks last.

    For runs that share no seeds: steps to target [n] and [m]. From the permutation distribution, which two censored
    runs need since they tie: exact up to 9,999 splits, else from as many random ones with a fixed seed.
    """
    from scipy.stats import PermutationMethod, mannwhitneyu, rankdata

    base = np.asarray(baseline_steps, dtype=np.float64)
    ranks = rankdata(np.concatenate([base, np.asarray(challenger_steps, dtype=np.float64)]))
    method = PermutationMethod(n_resamples=9_999, rng=np.random.default_rng(0))
    return float(mannwhitneyu(ranks[base.size :], ranks[: base.size], alternative="less", method=method).pvalue)


def _running_minimum(steps: ArrayLike, losses: ArrayLike) -> tuple[Floats, Floats]:
    loss = np.asarray(losses, dtype=np.float64)
    best = np.minimum.accumulate(np.where(np.isfinite(loss), loss, np.inf))
    return np.asarray(steps, dtype=np.float64), best


def _log_ratio(steps: Floats, baseline: Floats, challenger: Floats, target: float) -> float:
    """r of one pair; 0 where neither arrives."""
    base, chal = steps_to_target(steps, baseline, target), steps_to_target(steps, challenger, target)
    return 0.0 if base == chal else float(np.log(base) - np.log(chal))


def _grid_saved(baseline: Floats, challenger: Floats, undefined: dict[str, str]) -> Interval | None:
    """Mean over pairs of the smallest and largest share of steps saved that the brackets [S, 2] allow, in %."""
    if (baseline[:, 0] == 0).any():
        undefined["grid_saved_pct"] = "the baseline arrives before its first evaluation: no lower bound"
        return None
    low = np.mean(1 - challenger[:, 1] / baseline[:, 0])
    high = np.mean(1 - challenger[:, 0] / baseline[:, 1])
    return float(100 * low), float(100 * high)
