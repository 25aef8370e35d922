"""Two arms whose runs share no seeds: Welch's test, or Mann and Whitney's where runs never arrived. One look only.

    x_i (baseline, [n]), y_j (challenger, [m]): losses in nats/token, or log steps to a target
    effect = mean(x) - mean(y) [positive = challenger better]     se^2 = s_x^2/n + s_y^2/m
    df = se^4 / (s_x^4 / (n^2 (n-1)) + s_y^4 / (m^2 (m-1)))       95 % interval effect -+ t_{.975,df} se
    A: effect / se     B: (margin - effect) / se     C: (effect + margin) / se      each one-sided against t_df

A run that never arrives needs infinitely many steps. With one in either arm there is no mean: A, B and C are then
Mann-Whitney tests of the challenger's steps against the baseline's, against 1 - p times and against 1 / (1 - p) times
the baseline's (p = the smallest share of steps worth saving), and the effect is the log ratio of the medians.
A run that never arrives ranks last. Where it ended before a run of the other arm arrived, that is a guess: a claim then
has to hold also when both arms are looked at no longer than the shortest such run (its p is the larger of the two), and
for a GO the baseline's median counts as if such runs had arrived where they ended.
Verdicts are classified as those of pairs are; over a family, Holm on each of A, B, C.
Assumes independent runs; Welch, normal x and y; Mann-Whitney, distributions of steps that differ by a factor.
Nothing here is valid under repeated looks: the e-process of the sequential plan is for pairs.
Sources: Welch (1947) doi:10.2307/2332510; Mann and Whitney (1947) doi:10.1214/aoms/1177730491; order-statistic interval
of a median: David and Nagaraja, Order Statistics (2003), section 7.1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, model_validator

from muonlab.registry.verdict import Verdict
from muonlab.stats.decision import CLAIMS, NOT_NO_EFFECT, NOT_TESTED, holm
from muonlab.stats.effect import CONFIDENCE, N_SEARCH, POWER, Interval, required_n
from muonlab.stats.evidence import Floats
from muonlab.stats.kernel import classify
from muonlab.stats.result import Result
from muonlab.stats.rule import Rule
from muonlab.stats.speed import unpaired_speed_p

CORRELATIONS = (0.5, 0.9)  # between the arms of a seed: assumed, to say what pairing would save
IQR_OF_NORMAL = 1.349  # in standard deviations
SURE = 19.0  # noncentrality in critical values beyond which power is 1 to 1e-18, and the library's CDF may be nan

Three = tuple[float | None, float | None, float | None]


class UnpairedSample(BaseModel):
    """Outcomes of one challenger's runs and of the baseline's, in any order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    baseline: tuple[PositiveFloat, ...]
    """Losses [nats/token], a diverged run by intention to treat; or steps to the target, infinity for never."""
    challenger: tuple[PositiveFloat, ...]
    outcome: Literal["loss", "steps"]
    margin: PositiveFloat
    """Smallest effect worth having: in nats/token, or the share of steps saved, below 1."""
    baseline_ends: tuple[PositiveFloat, ...] = ()
    """Under steps, the last step of each run; infinity for one that diverged, which no longer run would have saved."""
    challenger_ends: tuple[PositiveFloat, ...] = ()
    baseline_diverged: NonNegativeInt = 0
    challenger_diverged: NonNegativeInt = 0
    early_regress: float | None = None
    provenance: Literal["run", "reported"] = "run"
    integrity_failures: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.outcome == "loss" and np.isinf([*self.baseline, *self.challenger]).any():
            raise ValueError(f"arm '{self.arm}': a loss is infinite; give a diverged run its diverged loss")
        if self.outcome == "steps" and self.margin >= 1:
            raise ValueError(f"arm '{self.arm}': margin {self.margin:g} of the steps; give a share below 1")
        if self.outcome == "steps" and (len(self.baseline), len(self.challenger)) != (
            len(self.baseline_ends),
            len(self.challenger_ends),
        ):
            raise ValueError(f"arm '{self.arm}': give the last step of every run of both arms")
        return self

    @property
    def never(self) -> tuple[int, int]:
        """How many runs of the baseline and of the challenger never arrive."""
        return int(np.isinf(self.baseline).sum()), int(np.isinf(self.challenger).sum())

    @property
    def censored(self) -> bool:
        """Whether a run of either arm never arrives."""
        return sum(self.never) > 0

    @property
    def values(self) -> tuple[Floats, Floats]:
        """What Welch compares: losses, or log steps."""
        base, chal = np.array(self.baseline), np.array(self.challenger)
        return (base, chal) if self.outcome == "loss" else (np.log(base), np.log(chal))

    @property
    def effect_margin(self) -> float:
        """The margin in the unit of the effect."""
        return self.margin if self.outcome == "loss" else float(-np.log1p(-self.margin))


class Unpaired(Result):
    """One challenger against the baseline without pairs; effects in nats/token, or in log steps."""

    arm: str
    method: Literal["welch", "mann-whitney"]
    n_baseline: int
    n_challenger: int
    baseline_never: int
    challenger_never: int
    effect: float | None
    effect_pct: float | None
    """Of the baseline's mean loss; or steps saved, in % of the baseline's."""
    ci95: Interval | None
    ci95_pct: Interval | None
    t: float | None
    df: float | None
    p_improves: float | None
    """A: effect <= 0."""
    p_below_margin: float | None
    """B: effect >= margin."""
    p_above_minus_margin: float | None
    """C: effect <= -margin."""
    p_two_sided: float | None
    p_adjusted: float | None
    """Of A, by Holm over the family."""
    effect_margin: float
    runs_per_arm_80: int | None
    """For 80 % power at the margin, one-sided, without pairs."""
    pairs_80: tuple[int | None, ...]
    """The same with pairs, one number for each of CORRELATIONS between the arms of a seed (assumed)."""
    required_runs_80: int | None
    """Runs per arm for 80 % power at the effect as estimated."""
    verdict: Verdict
    reasons: tuple[str, ...]


class Median(Result):
    """Median of [n] steps and its order-statistic interval, at least 95 %; an end at infinity is None."""

    n: int
    never: int
    median: float | None
    low: float | None
    high: float | None


def decide_unpaired(samples: Sequence[UnpairedSample], rule: Rule) -> tuple[Unpaired, ...]:
    """Decide every challenger of a family on the runs at hand, in the order given.

    Raises ValueError on a plan that is not fixed, an empty family, or arms of the same name.
    """
    names = [sample.arm for sample in samples]
    if rule.plan != "fixed":
        raise ValueError("unpaired: no test here may be looked at twice; declare a fixed plan")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"family: arms {names}; give at least one challenger, each once")
    broken = [_broken(sample) for sample in samples]
    measured = [_measure(sample) for sample in samples]
    adjusted = []
    for test in range(3):
        p = [
            m.p[test] if not b and _enough(s, rule) else None for m, b, s in zip(measured, broken, samples, strict=True)
        ]
        adjusted.append(holm(p))
    rejected = tuple(np.array([p is not None and p <= rule.alpha for p in ps]) for ps in adjusted)
    verdicts = classify(
        (rejected[0], rejected[1], rejected[2]),
        np.array([m.at_least for m in measured]),
        np.array([sample.effect_margin for sample in samples]),
        unstable=np.array([_less_stable(sample) for sample in samples]),
        blocked=np.array([bool(_guardrails(sample, rule)) for sample in samples]),
    )
    return tuple(
        _conclude(sample, m, b, (a, low, high), Verdict(str(verdict)), len(samples), rule)
        for sample, m, b, a, low, high, verdict in zip(samples, measured, broken, *adjusted, verdicts, strict=True)
    )


def welch(x: ArrayLike, y: ArrayLike) -> tuple[float, float, float] | None:
    """mean(x) - mean(y), its standard error and degrees of freedom; None where they are undefined."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if min(x.size, y.size) < 2:
        return None
    per_x, per_y = x.var(ddof=1) / x.size, y.var(ddof=1) / y.size
    if per_x + per_y <= 0:
        return None
    df = (per_x + per_y) ** 2 / (per_x**2 / (x.size - 1) + per_y**2 / (y.size - 1))
    return float(x.mean() - y.mean()), float(np.sqrt(per_x + per_y)), float(df)


def median_of_steps(steps: ArrayLike) -> Median:
    """Median of steps [n], with infinity for never, between its two order statistics of at least 95 % coverage.

    The interval holds for any continuous distribution; it needs 6 runs.
    """
    from scipy.stats import binom

    ordered = np.sort(np.asarray(steps, dtype=np.float64))
    n = ordered.size
    undefined: dict[str, str] = {}
    # The interval from the (k+1)-th smallest to the (k+1)-th largest misses with probability 2 P(Bin(n, 1/2) <= k).
    k = int(np.sum(2 * binom.cdf(np.arange(n), n, 0.5) <= 1 - CONFIDENCE)) - 1
    found = {"median": _middle(ordered)}
    if k < 0:
        undefined.update(dict.fromkeys(("low", "high"), f"a 95% interval of a median needs 6 runs, there are {n}"))
    else:
        found.update(low=float(ordered[k]), high=float(ordered[n - 1 - k]))
    undefined.update({name: "never: too many runs do not arrive" for name, value in found.items() if np.isinf(value)})
    median, low, high = (None if name in undefined else found[name] for name in ("median", "low", "high"))
    return Median(n=n, never=int(np.isinf(ordered).sum()), median=median, low=low, high=high, undefined=undefined)


def runs_per_arm(sd_baseline: float, sd_challenger: float, effect: float, alpha: float) -> int | None:
    """Runs in each arm for 80 % power of Welch's one-sided test at a true effect; None beyond 10,000."""

    def enough(n: int) -> bool:
        return _welch_power(n, sd_baseline, sd_challenger, effect, alpha) >= POWER

    return _smallest(enough) if effect > 0 else None


def _smallest(enough: Callable[[int], bool]) -> int | None:
    low, high = 1, N_SEARCH  # power rises with n
    if not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _welch_power(n: int, sd_x: float, sd_y: float, effect: float, alpha: float) -> float:
    from scipy.special import nctdtr, stdtrit

    variance = sd_x**2 + sd_y**2
    df = (n - 1) * variance**2 / (sd_x**4 + sd_y**4)
    noncentrality, critical = effect * np.sqrt(n / variance), stdtrit(df, 1 - alpha)
    if noncentrality > SURE * critical:
        return 1.0
    return float(1 - nctdtr(df, noncentrality, critical))


@dataclass(frozen=True)
class _Measured:
    """Estimates and the p-values of A, B, C of one arm, before the family's correction."""

    p: Three = (None, None, None)
    p_two_sided: float | None = None
    center: float = float("nan")
    """The effect; infinite where only the baseline's median run, or only the challenger's, never arrives."""
    at_least: float = float("nan")
    """The effect that a GO may count on: the least that runs which ended without arriving allow."""
    ci95: Interval | None = None
    t: float | None = None
    df: float | None = None
    why_none: str = ""

    @property
    def effect(self) -> float | None:
        return self.center if np.isfinite(self.center) else None


def _measure(sample: UnpairedSample) -> _Measured:
    x, y = sample.values
    if not (x.size and y.size):
        return _Measured(why_none="an arm has no finished run")
    return _by_ranks(sample) if sample.censored else _by_means(x, y, sample.effect_margin)


def _by_means(x: Floats, y: Floats, margin: float) -> _Measured:
    from scipy.special import stdtr, stdtrit

    effect = float(x.mean() - y.mean())
    found = welch(x, y)
    if found is None:
        few = min(x.size, y.size) < 2
        return _Measured(
            center=effect, at_least=effect, why_none="a single run has no spread" if few else "nothing varies (s = 0)"
        )
    _, se, df = found
    a, b, c = (float(stdtr(df, -shifted / se)) for shifted in (effect, margin - effect, effect + margin))
    half = float(stdtrit(df, (1 + CONFIDENCE) / 2)) * se
    return _Measured(
        p=(a, b, c),
        p_two_sided=float(2 * stdtr(df, -abs(effect) / se)),
        center=effect,
        at_least=effect,
        ci95=(effect - half, effect + half),
        t=effect / se,
        df=df,
    )


def _by_ranks(sample: UnpairedSample) -> _Measured:
    base, chal = np.array(sample.baseline), np.array(sample.challenger)
    ends = np.log([_middle(base), _middle(chal)])
    center = float("nan") if np.isinf(ends).all() else float(ends[0] - ends[1])
    if min(base.size, chal.size) < 2:
        return _Measured(center=center, why_none="a single run has no spread")
    base_ends, chal_ends, kept = np.array(sample.baseline_ends), np.array(sample.challenger_ends), 1 - sample.margin
    a = _slower_p(base, base_ends, chal, chal_ends)
    b = _slower_p(chal, chal_ends, kept * base, kept * base_ends)
    c = _slower_p(base / kept, base_ends / kept, chal, chal_ends)
    arrived_at_end = _middle(np.where(np.isinf(base), base_ends, base))
    at_least = np.log(arrived_at_end) - ends[1] if np.isfinite([arrived_at_end, ends[1]]).any() else np.nan
    reason = "runs that never arrive have no mean: see the medians"
    return _Measured(
        p=(a, b, c),
        center=center,
        at_least=float(at_least),
        why_none=reason if np.isfinite(center) else "half of an arm's runs or more never arrive: no ratio of medians",
    )


def _slower_p(slow: Floats, slow_ends: Floats, fast: Floats, fast_ends: Floats) -> float:
    """One-sided p that `fast` needs fewer steps than `slow`; steps to the target and last steps, [n] and [m].

    The larger of two: with all arrivals, and with those before the shortest run that never arrived ended.
    """
    p = unpaired_speed_p(slow, fast)
    horizon = min(
        np.min(ends[np.isinf(steps)], initial=np.inf) for steps, ends in ((slow, slow_ends), (fast, fast_ends))
    )
    late = [np.isfinite(steps) & (steps > horizon) for steps in (slow, fast)]
    if not (late[0].any() or late[1].any()):
        return p
    cut = (np.where(after, np.inf, steps) for after, steps in zip(late, (slow, fast), strict=True))
    return max(p, unpaired_speed_p(*cut))


def _middle(steps: Floats) -> float:
    """Median; infinite as soon as its upper half begins there."""
    ordered = np.sort(steps)
    n = ordered.size
    return float((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)


def _enough(sample: UnpairedSample, rule: Rule) -> bool:
    return min(len(sample.baseline), len(sample.challenger)) >= rule.n_min


def _broken(sample: UnpairedSample) -> tuple[str, ...]:
    """What makes the comparison INVALID."""
    found = list(sample.integrity_failures)
    total = len(sample.baseline) + len(sample.challenger)
    if total and sample.baseline_diverged + sample.challenger_diverged == total:
        found.append("every run of both arms diverged: the workload is broken and nothing can be compared")
    sides = (
        ("the baseline", sample.baseline, sample.baseline_diverged),
        (sample.arm, sample.challenger, sample.challenger_diverged),
    )
    for name, values, diverged in sides:
        if sample.outcome == "loss" and len(values) > 1 and diverged < len(values) and len(set(values)) == 1:
            found.append(
                f"suspect: all {len(values)} runs of {name} ended with the same loss; training noise never does"
            )
    return tuple(found)


def _less_stable(sample: UnpairedSample) -> bool:
    """Whether the challenger diverges at a higher rate than the baseline."""
    return sample.challenger_diverged * len(sample.baseline) > sample.baseline_diverged * len(sample.challenger)


def _guardrails(sample: UnpairedSample, rule: Rule) -> list[str]:
    broken = []
    if sample.challenger_diverged:
        broken.append(
            f"{sample.challenger_diverged} of {len(sample.challenger)} challenger runs diverged (baseline: "
            f"{sample.baseline_diverged} of {len(sample.baseline)})"
        )
    if sample.early_regress is not None and sample.early_regress > rule.max_early_regress:
        broken.append(
            f"early regress of {sample.early_regress:.2%} in the first 30% of the steps, over the limit of "
            f"{rule.max_early_regress:.2%}"
        )
    return broken


def _percent(sample: UnpairedSample, effect: float) -> float:
    """An effect in % of the baseline's mean loss (held fixed), or as steps saved in %."""
    if sample.outcome == "loss":
        return float(100 * effect / np.mean(sample.baseline))
    return float(-100 * np.expm1(-effect))


def _conclude(
    sample: UnpairedSample,
    m: _Measured,
    broken: tuple[str, ...],
    adjusted: Three,
    tested: Verdict,
    family_size: int,
    rule: Rule,
) -> Unpaired:
    undefined: dict[str, str] = {}
    enough = _enough(sample, rule)
    values: dict[str, Any] = {
        "effect": m.effect,
        "effect_pct": None if m.effect is None else _percent(sample, m.effect),
        "ci95": m.ci95,
        "ci95_pct": None if m.ci95 is None else (_percent(sample, m.ci95[0]), _percent(sample, m.ci95[1])),
        "t": m.t,
        "df": m.df,
        "p_improves": m.p[0],
        "p_below_margin": m.p[1],
        "p_above_minus_margin": m.p[2],
        "p_two_sided": m.p_two_sided,
        "p_adjusted": adjusted[0],
        **_sizes(sample, m, rule, undefined),
    }
    for name, value in values.items():
        if value is None:
            undefined.setdefault(name, m.why_none or NOT_TESTED)
    verdict = tested
    if broken:
        verdict, reasons = Verdict.INVALID, list(broken)
    elif not (sample.baseline and sample.challenger):
        verdict, reasons = Verdict.INCOMPLETE, ["no run is finished in one of the arms; run it"]
    else:
        reasons = [
            _effect_sentence(sample, m, rule),
            *_verdict_sentences(sample, m, adjusted, tested, enough, family_size, rule),
        ]
        if sample.provenance == "reported":
            verdict = Verdict.INCONCLUSIVE
            reasons.append(f"reported by others: the verdict is capped at INCONCLUSIVE (uncapped: {tested})")
        if tested is Verdict.INCONCLUSIVE and enough:
            reasons.append(f"the plan looked once, at all runs at hand: {NOT_NO_EFFECT}")
    reasons.append(_cost_of_not_pairing(sample, values, undefined))
    return Unpaired(
        arm=sample.arm,
        method="mann-whitney" if sample.censored else "welch",
        n_baseline=len(sample.baseline),
        n_challenger=len(sample.challenger),
        baseline_never=sample.never[0],
        challenger_never=sample.never[1],
        effect_margin=sample.effect_margin,
        verdict=verdict,
        reasons=tuple(reasons),
        undefined=undefined,
        **values,
    )


def _sizes(sample: UnpairedSample, m: _Measured, rule: Rule, undefined: dict[str, str]) -> dict[str, Any]:
    """Runs per arm and pairs for 80 % power, from the spread of the two arms."""
    none: tuple[int | None, ...] = (None,) * len(CORRELATIONS)
    x, y = (_spread(v) for v in sample.values)
    if x is None or y is None or x + y == 0:
        why = "a quarter of an arm's runs never arrives" if sample.censored else m.why_none
        undefined.update(dict.fromkeys(("runs_per_arm_80", "required_runs_80"), why))
        return {"runs_per_arm_80": None, "pairs_80": none, "required_runs_80": None}
    pairs = tuple(
        required_n(sample.effect_margin / np.sqrt(variance), rule.alpha) if variance > 0 else None
        for variance in (x**2 + y**2 - 2 * rho * x * y for rho in CORRELATIONS)
    )
    runs = runs_per_arm(x, y, sample.effect_margin, rule.alpha)
    at_estimate = runs_per_arm(x, y, m.center, rule.alpha)
    if runs is None:
        undefined["runs_per_arm_80"] = f"more than {N_SEARCH} runs"
    if at_estimate is None:
        undefined["required_runs_80"] = (
            f"more than {N_SEARCH} runs" if m.center > 0 else "the estimated effect is not an improvement"
        )
    return {"runs_per_arm_80": runs, "pairs_80": pairs, "required_runs_80": at_estimate}


def _spread(values: Floats) -> float | None:
    """Standard deviation of [n] values; from the quartiles where some are infinite, if those are finite."""
    if values.size < 2:
        return None
    if np.isfinite(values).all():
        return float(values.std(ddof=1))
    # By order statistics, not by interpolation, which would make infinity out of a finite and an infinite neighbour.
    low, high = np.quantile(values, [0.25, 0.75], method="nearest")
    return float(high - low) / IQR_OF_NORMAL if np.isfinite(high) else None


def _cost_of_not_pairing(sample: UnpairedSample, values: dict[str, Any], undefined: dict[str, str]) -> str:
    runs = values["runs_per_arm_80"]
    if runs is None:
        return f"unpaired: what pairing would save is unknown ({undefined['runs_per_arm_80']})"
    pairs = " and ".join(
        f"{'over ' + format(N_SEARCH, ',') if n is None else n} at {rho:g}"
        for n, rho in zip(values["pairs_80"], CORRELATIONS, strict=True)
    )
    spread = ", and a spread from the quartiles, since some runs never arrive" if sample.censored else ""
    return (
        f"unpaired: to find a true effect of min_effect with 80% power takes {runs} runs per arm; pairs on shared "
        f"seeds needed, by the correlation between the arms of a seed: {pairs} "
        f"(correlations assumed, not measured{spread})"
    )


def _effect_sentence(sample: UnpairedSample, m: _Measured, rule: Rule) -> str:
    runs = f"{len(sample.baseline)} baseline and {len(sample.challenger)} challenger runs, unpaired"
    if m.effect is None:
        if sample.outcome == "steps" and 0 < m.at_least < np.inf:
            return f"at least {_percent(sample, m.at_least):.4g}% fewer steps by the medians ({m.why_none}), {runs}"
        return f"no effect can be estimated ({m.why_none}), {runs}"
    percent = _percent(sample, m.effect)
    if sample.outcome == "steps":
        size = f"{abs(percent):.4g}% {'fewer' if percent >= 0 else 'more'} steps"
        if m.ci95 is None:
            by = " by the medians" if sample.censored else ""
            interval = f"no interval ({m.why_none})"
        else:
            by = ""
            low, high = (_percent(sample, end) for end in m.ci95)
            interval = f"95% interval of the steps saved [{low:+.4g}%, {high:+.4g}%]"
        return f"{size}{by}, {interval}, {runs}, smallest effect worth having {100 * sample.margin:g}% fewer"
    size = f"{'better' if m.effect > 0 else 'worse'} by {abs(m.effect):.4g} nats/token ({abs(percent):.4g}%)"
    interval = f"no interval: {m.why_none}" if m.ci95 is None else f"95% interval [{m.ci95[0]:+.4g}, {m.ci95[1]:+.4g}]"
    declared = f" ({rule.min_effect:g}% of the baseline's mean)" if rule.min_effect_unit == "percent" else ""
    return f"{size}, {interval}, {runs}, smallest effect worth having {sample.margin:.4g}{declared}"


def _verdict_sentences(
    sample: UnpairedSample,
    m: _Measured,
    adjusted: Three,
    tested: Verdict,
    enough: bool,
    family_size: int,
    rule: Rule,
) -> list[str]:
    guardrails = _guardrails(sample, rule)
    if not enough:
        few = min(len(sample.baseline), len(sample.challenger))
        return [f"{few} runs in an arm: no verdict is given below {rule.n_min}, GO is blocked", *_broke(guardrails)]
    method = "Mann-Whitney" if sample.censored else "Welch"
    over = f", Holm over {family_size} arms" if family_size > 1 else ""
    a, b, c = (
        f"{claim}: not tested"
        if p is None
        else f"{claim}: {'established' if p <= rule.alpha else 'not established'} ({method}, p = {p:.3g}{over})"
        for claim, p in zip(CLAIMS, adjusted, strict=True)
    )
    below = adjusted[1] is not None and adjusted[1] <= rule.alpha
    if tested is Verdict.NO_GO and _less_stable(sample):
        return [f"instability: {guardrails[0]}, a higher rate than the baseline's", a, b]
    if tested is Verdict.NO_GO and not below:
        return [f"would be GO but for a guardrail: {'; '.join(guardrails)}", a]
    if tested is Verdict.EQUIVALENT:
        kind = "better but trivial" if m.center > 0 else "worse but within the margin"
        return [f"{kind}: keep the baseline, archive the challenger", b, c, *_broke(guardrails)]
    if tested is Verdict.NO_GO:
        return ["archive the challenger", b, c, *_broke(guardrails)]
    if tested is Verdict.GO:
        return [a, "the estimated improvement reaches min_effect"]
    return [a, b, *_broke(guardrails)]


def _broke(guardrails: list[str]) -> list[str]:
    return [f"guardrail broken: {sentence}" for sentence in guardrails]
