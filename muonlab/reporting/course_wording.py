"""The sentences on how training went: the early phase, the speed to a loss, and the four open hypotheses.

All of it describes: none of these numbers is tested, and no sentence turns a difference that is not seen into one that
is not there. A hypothesis whose numbers were not measured gets no sentence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from muonlab.reporting.courses import Diagnosis
from muonlab.reporting.standing import ArmComparison, Standing
from muonlab.reporting.wording import DETAILED_CLAUSES, count, listed, percent_of, plain
from muonlab.stats.guardrails import EARLY_SHARE

QUANTITIES: Mapping[str, str] = {
    "grad_norm": "gradient norm, all parameters [nats/token per unit of weight]",
    "opt_momentum_rms": "momentum rms, hidden matrices [as the gradient]",
    "opt_effective_rank_share_before": "effective rank before projection and noise [share of full]",
    "opt_effective_rank_share_after": "effective rank of what is orthogonalised [share of full]",
    "opt_turn": "turn from Muon's own update [1 - cosine]",
    "opt_noise_fired_share": "noise fired [share of matrices and steps]",
    "hessian_top": "Hessian's top eigenvalue [nats/token per squared unit of weight]",
}
"""Column of curve.csv -> what a reader calls it, with its unit."""

ROUNDING = 1e-12
"""A turn of less is that of a difference of equal numbers."""


def absences(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """One sentence a reason from (who or what, why): what a dash in a table stands for."""
    by_reason: dict[str, list[str]] = {}
    for who, why in reasons:
        if who not in by_reason.setdefault(why, []):
            by_reason[why].append(who)
    return [f"Not given for {_some(who)}: {why}." for why, who in by_reason.items()]


def _some(names: Sequence[str]) -> str:
    return listed(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"


# Speed


def speed_sentence(standing: Standing, comparison: ArmComparison) -> str:
    """How many steps an arm takes for a loss that the baseline takes others for; it needs a pair of curves."""
    speed = comparison.speed
    assert speed is not None
    arm, baseline = comparison.arm, standing.snapshot.study.baseline
    pairs = count(speed.n, "pair")
    ratio, saved = speed.geometric_mean_ratio, speed.steps_saved_pct
    if ratio is None or saved is None:
        never = (
            f"{arm}: {speed.challenger_never} of its {count(speed.n, 'run')} never {_get(speed.challenger_never)} to "
            f"the losses of {baseline}'s, and {speed.baseline_never} of {baseline}'s not to its"
        )
        if speed.median_ratio is None:
            return f"{never}; no mean is given, and no median: {speed.undefined['median_ratio']}."
        return f"{never}; no mean is given, the median ratio of steps is {ratio_text(speed.median_ratio, None)}."
    if speed.ratio_ci95 is None:
        reach = f"ratio {ratio_text(ratio, None)}, {pairs}, no interval: {speed.undefined['ratio_ci95']}"
    else:
        limits = ratio_interval(speed.ratio_ci95)
        reach = f"ratio {ratio_text(ratio, speed.ratio_ci95)}, 95% interval {limits}, {pairs}"
    more_or_fewer = (
        f"{plain(abs(saved), 2)}% {'fewer' if saved > 0 else 'more'} steps than" if saved else "as many steps as"
    )
    if speed.n == 1:
        return f"In the only pair {arm} took {more_or_fewer} {baseline} for the same loss ({reach})."
    text = f"{arm} takes {more_or_fewer} {baseline} for the same loss ({reach})"
    if speed.ratio_ci95 is not None and speed.ratio_ci95[0] <= 1 <= speed.ratio_ci95[1]:
        text += "; the interval contains 1, so that neither faster nor slower is established"
    return text + "."


def _get(number: int) -> str:
    return "gets" if number == 1 else "get"


def ratio_text(ratio: float, interval: tuple[float, float] | None) -> str:
    """A ratio to two digits of its interval's half width, at least to hundredths: what differs from 1 must show it."""
    return f"{ratio:,.{_decimals(interval)}f}" if ratio < 1e4 else plain(ratio)


def ratio_interval(limits: tuple[float, float]) -> str:
    """An interval of a ratio, both ends to the same digit."""
    return f"[{ratio_text(limits[0], limits)}, {ratio_text(limits[1], limits)}]"


def _decimals(interval: tuple[float, float] | None) -> int:
    half = (interval[1] - interval[0]) / 2 if interval else 0.0
    return min(9, max(2, round(1.5 - math.log10(half)))) if half > 0 else 3


def grid_sentence(standing: Standing) -> str:
    """What the distance between evaluations leaves open; it needs a pair of curves."""
    study = standing.snapshot.study
    gaps = {b - a for c in standing.comparisons for a, b in itertools.pairwise([0, *c.curve_steps])}
    apart = f"{min(gaps)} to {max(gaps)}" if len(gaps) > 1 else f"{max(gaps)}"
    text = f"The evaluations that are compared are {apart} steps apart"
    levels = [c.first_level.target for c in standing.comparisons if c.first_level is not None]
    targets = sorted(level for level in levels if level is not None)
    if not targets:
        return f"{text}; between two of them a curve is taken as a straight line."
    ends = dict.fromkeys(plain(target, 4) for target in (targets[0], targets[-1]))
    at = " to ".join(ends)
    return (
        f"{text}, and between two of them a curve is taken as a straight line. What that leaves open is widest at the "
        f"first level, {study.baseline}'s mean loss at 40% of the run ({at} nats/token); the last column has the steps "
        "saved that the grid allows there, since each arrival lies anywhere between two evaluations."
    )


# The early phase


def worst_regress(standing: Standing, comparison: ArmComparison) -> str | None:
    """The largest early lag of any seed, in percent of the baseline's loss, and that seed where it is known."""
    early = comparison.early
    if early is None or early.regress_by_seed is None:
        return None
    lag, seed = max(zip(early.regress_by_seed, comparison.curve_seeds, strict=True))
    return f"{percent_of(lag)} (seed {seed})" if standing.snapshot.study.provenance == "run" else percent_of(lag)


# The four hypotheses


def hypotheses(standing: Standing) -> list[str]:
    """One sentence for each open hypothesis whose numbers were measured: what they are, and what they cannot say."""
    makers = (_geometry, _start, _rank, _warmup)
    return [sentence for make in makers if (sentence := make(standing)) is not None]


def measured(value: float) -> str:
    """A measurement to three digits; what is under rounding is 0."""
    if abs(value) < ROUNDING:
        return "0"
    return plain(value) if abs(value) >= 1e-3 else f"{value:.2e}"


def diagnosed(standing: Standing, quantity: str) -> list[Diagnosis]:
    """The arms' diagnoses of one quantity; an arm in which it is 0 throughout is left out."""
    found = [d for d in standing.diagnostics if d.quantity == quantity]
    return [d for d in found if any(abs(value) >= ROUNDING for value in (d.first, d.mean, d.last))]


def _compared(standing: Standing, quantity: str) -> list[Diagnosis]:
    """The diagnoses of the baseline and the challengers."""
    study = standing.snapshot.study
    return [d for d in diagnosed(standing, quantity) if d.arm in (study.baseline, *study.challengers)]


def _each(found: Sequence[Diagnosis], value: Callable[[Diagnosis], str], number: Callable[[Diagnosis], float]) -> str:
    """`muon 2.9 and nolah 2.8`; of many arms the lowest and the highest."""
    if len(found) <= DETAILED_CLAUSES + 1:
        return listed(f"{d.arm} {value(d)}" for d in found)
    low, high = min(found, key=number), max(found, key=number)
    return f"{value(low)} ({low.arm}) to {value(high)} ({high.arm}) over {len(found)} arms"


def _firsts(found: Sequence[Diagnosis]) -> str:
    return _each(found, lambda d: measured(d.first), lambda d: d.first)


def _means(found: Sequence[Diagnosis]) -> str:
    return _each(found, lambda d: measured(d.mean), lambda d: d.mean)


def _earlies(found: Sequence[Diagnosis]) -> str:
    """`; in the first 30% of the steps: muon 0.6 and nolah 0.5`, where that is another mean than those at hand."""
    if all(d.early in (None, d.first, d.mean) for d in found):
        return ""
    found = [d for d in found if d.early is not None]
    known = _each(found, lambda d: measured(d.early or 0.0), lambda d: d.early or 0.0)
    return f"; in the first {EARLY_SHARE:.0%} of the steps: {known}"


def _lasts(found: Sequence[Diagnosis]) -> str:
    return _each(found, lambda d: measured(d.last), lambda d: d.last)


def _at(steps: Iterable[int]) -> str:
    """`step 10`, or `steps 10 to 40` where the arms differ."""
    known = sorted(set(steps))
    return f"step {known[0]}" if len(known) == 1 else f"steps {known[0]} to {known[-1]}"


def _described(found: Sequence[Diagnosis]) -> str:
    seeds = sorted({len(d.seeds) for d in found})
    many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    noun = "seed" if seeds == [1] else "seeds"
    return f"This describes {many} {noun} an arm at this one size and tests nothing"


def _geometry(standing: Standing) -> str | None:
    found = _compared(standing, "hessian_top")
    if not found:
        # Said only where something else was measured: without any diagnostics there is no section.
        other = any(d.quantity.startswith("opt_") for d in standing.diagnostics)
        return "Is the loss surface another one? Not measured: no Hessian was asked for." if other else None
    ends = _each(
        found,
        lambda d: f"{measured(d.last)} (seeds {measured(d.last_range[0])} to {measured(d.last_range[1])})",
        lambda d: d.last,
    )
    start = f"{_at(d.first_step for d in found)}: {_firsts(found)}{_earlies(found)}; at "
    course = start if any(d.first_step != d.last_step for d in found) else ""
    return (
        f"Is the loss surface another one? Top eigenvalue of the Hessian at {course}"
        f"{_at(d.last_step for d in found)}: {ends}. {_described(found)}; whether the surface differs at another scale "
        "takes runs there."
    )


def _start(standing: Standing) -> str | None:
    found = [d for d in _compared(standing, "opt_turn") if d.arm != standing.snapshot.study.baseline]
    if not found:
        return None
    return (
        "Is the start too aggressive? Turn of the update from Muon's own (0: the same direction, 1: at right angles) "
        f"at {_at(d.first_step for d in found)}: {_firsts(found)}{_earlies(found)}; on average: {_means(found)}. All "
        f"parts of an arm do that together, not its `scale` alone. {_described(found)}."
    )


def _rank(standing: Standing) -> str | None:
    after = _compared(standing, "opt_effective_rank_share_after")
    before = _compared(standing, "opt_effective_rank_share_before")
    if not after or [d.arm for d in before] != [d.arm for d in after]:
        return None
    return (
        "Does the rank collapse? Effective rank as a share of full rank, of what is orthogonalised, on average: "
        f"{_means(after)}{_earlies(after)}; at {_at(d.last_step for d in after)}: {_lasts(after)}; before projection "
        f"and noise, on average: {_means(before)}. {_described(after)}."
    )


def _warmup(standing: Standing) -> str | None:
    settings = standing.snapshot.settings
    steps = getattr(settings, "warmup_steps", None)
    found = _compared(standing, "grad_norm")
    if steps is None or not found:
        return None
    lags = [
        f"{c.arm} {percent_of(c.estimates.early_regress)}"
        for c in standing.decided
        if c.estimates.early_regress is not None
    ]
    lag = ""
    if lags and len(lags) <= DETAILED_CLAUSES:
        lag = f"; largest mean lag in the first 30% of the steps, of the baseline's loss: {listed(lags)}"
    return (
        f"Is the warmup too short? It takes {steps} of {settings.steps} steps in every arm, so that no arm here tests "
        f"another. Gradient norm at {_at(d.first_step for d in found)}: {_firsts(found)}{_earlies(found)}; "
        f"at {_at(d.last_step for d in found)}: {_lasts(found)}{lag}. {_described(found)}."
    )
