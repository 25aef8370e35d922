"""Estimates for one arm against the baseline: what is printed, whether or not the arm is decided.

    t = sqrt(n) mean(d) / s            95 % interval mean(d) -+ t_{.975,n-1} s / sqrt(n)
    d_z = mean(d) / s                  g_z = d_z Gamma((n-1)/2) / (Gamma((n-2)/2) sqrt((n-1)/2))
    TOST p = max(P(T >= sqrt(n)(margin - mean)/s), P(T >= sqrt(n)(margin + mean)/s))
    power at effect delta = P(T' >= t_{1-alpha,n-1}),  T' noncentral with sqrt(n) delta / s

s has ddof 1; T and T' have n - 1 degrees of freedom. Wilcoxon and sign-flip are exact over all 2^n sign patterns.
All assume independent pairs; t, TOST and power also normal differences; Wilcoxon and sign-flip differences symmetric
about 0 under H0.
Sources: Student (1908) doi:10.2307/2331554; Hedges (1981) doi:10.2307/1164588; Schuirmann (1987)
doi:10.1007/BF01068419; Clopper and Pearson (1934) doi:10.1093/biomet/26.4.404.
"""

from functools import lru_cache
from typing import Any, Literal

import numpy as np

from muonlab.stats.cost import CostPerPoint, cost_per_point
from muonlab.stats.evidence import Floats, confidence_sequence, crossing, e_from_log, first_attainable_n, log_e_value
from muonlab.stats.kernel import paired_t
from muonlab.stats.result import Result
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample, Pairs, margin_of, moments, pair

CONFIDENCE = 0.95
SEQUENCE_LEVEL = 0.05  # each side: a 90 % confidence sequence
POWER = 0.8
N_EXACT = 16  # 2^16 sign patterns take half a second, and each further pair doubles it
N_SEARCH = 10_000
RESOLUTION = 1e-12  # nats/token; closer differences tie: float subtraction parts what the logs have equal
SEVERAL_RUN_SD = 3.0

Interval = tuple[float, float]


class Estimates(Result):
    """Estimates of one arm over n pairs; losses in nats/token, differences are baseline - challenger."""

    arm: str
    n: int
    seeds: tuple[int, ...]
    unpaired_seeds: tuple[int, ...]
    baseline_mean: float | None
    challenger_mean: float | None
    mean_diff: float | None
    sd_diff: float | None
    rel_diff_pct: float | None
    ci95: Interval | None
    rel_ci95_pct: Interval | None
    t: float | None
    p_one_sided: float | None
    p_two_sided: float | None
    d_z: float | None
    g_z: float | None
    wilcoxon_p_one_sided: float | None
    wilcoxon_p_two_sided: float | None
    signflip_p_one_sided: float | None
    signflip_p_two_sided: float | None
    margin: float | None
    """min_effect in nats/token."""
    margin_in_run_sd: float | None
    tost_p: float | None
    e_value: float | None
    confidence_sequence: Interval | None
    required_n_80: int | None
    mde_80: float | None
    """Smallest true effect [nats/token] that these n pairs detect with 80 % power, at the observed sd."""
    early_regress: float | None
    baseline_diverged: int
    challenger_diverged: int
    challenger_divergence_bound95: float | None
    usd_per_pp: CostPerPoint
    notes: tuple[str, ...]


def describe(sample: PairedSample, rule: Rule) -> Estimates:
    """Estimates without a verdict: for control and reference arms, and beside every decision."""
    return estimate(pair(sample, rule), sample, rule)


def evidence_path(
    sample: PairedSample, rule: Rule, claim: Literal["improves", "below_margin"] = "improves"
) -> list[tuple[int, float]]:
    """(n, E) after each pair in seed order, as it was at every look.

    E against "effect <= 0", or, for `below_margin`, against "effect >= the smallest effect worth having".
    """
    pairs = pair(sample, rule)

    def at(n: int) -> float:
        mean, ss = moments(pairs.d[:n])
        margin = margin_of(rule, pairs.baseline[:n], pairs.baseline_diverged[:n])
        return e_from_log(log_e_value(n, mean if claim == "improves" else margin - mean, ss, rule.g))

    return [(n, at(n)) for n in range(1, pairs.n + 1)]


def estimate(pairs: Pairs, sample: PairedSample, rule: Rule) -> Estimates:
    """Estimates of pairs already made from `sample` under `rule`."""
    values: dict[str, Any] = dict.fromkeys(Estimates.model_fields, None)
    undefined: dict[str, str] = {}
    n, d = pairs.n, pairs.d
    mean, ss = pairs.moments
    notes = list(pairs.notes)
    values.update(
        arm=pairs.arm,
        n=n,
        seeds=pairs.seeds,
        unpaired_seeds=pairs.unpaired_seeds,
        early_regress=sample.early_regress,
        baseline_diverged=int(pairs.baseline_diverged.sum()),
        challenger_diverged=int(pairs.challenger_diverged.sum()),
    )
    rel_ci: Interval | None = None
    if n >= 1:
        rel = pairs.rel_pct
        values.update(
            baseline_mean=float(pairs.baseline.mean()),
            challenger_mean=float(pairs.challenger.mean()),
            mean_diff=mean,
            rel_diff_pct=float(rel.mean()),
            margin=pairs.margin,
            e_value=e_from_log(log_e_value(n, mean, ss, rule.g)),
            challenger_divergence_bound95=divergence_bound(values["challenger_diverged"], n),
        )
    if n >= 2 and ss > 0:
        sd = float(np.sqrt(ss / (n - 1)))
        rel_ci = t_interval(pairs.rel_pct)
        values.update(_t_family(n, mean, ss, pairs.margin, rule), sd_diff=sd, ci95=t_interval(d), rel_ci95_pct=rel_ci)
        values["confidence_sequence"] = confidence_sequence(n, mean, sd, level=SEQUENCE_LEVEL, g=rule.g)
        if values["confidence_sequence"] is None:
            first = first_attainable_n(SEQUENCE_LEVEL, rule.g)
            undefined["confidence_sequence"] = f"unbounded at {n} pairs; bounded from {first} pairs on"
        if mean <= 0:
            undefined["required_n_80"] = "the estimated effect is not an improvement"
        elif values["required_n_80"] is None:
            undefined["required_n_80"] = f"more than {N_SEARCH} pairs"
    if n >= 1:
        values.update(_exact_tests(d, rule.alpha, undefined))
    values["usd_per_pp"] = (
        cost_per_point(values["rel_diff_pct"], rel_ci, rule.price_per_pair_usd)
        if n >= 1 and (rel_ci is not None or n == 1)
        else _no_cost(n)
    )
    _add_margin_in_run_sd(values, pairs, undefined, notes)
    if 2 <= n < rule.n_min:
        notes.append(f"{n} pairs: no verdict is given below {rule.n_min} pairs, GO is blocked")
    if rule.amended:
        notes.append("plan amended after a result: only the e-process decides")
    if values["early_regress"] is None:
        undefined["early_regress"] = "no evaluations in the first 30% of the steps were given"
    values.update(notes=tuple(notes), undefined={})
    if n == 2:
        undefined["g_z"] = "the small-sample correction needs 3 pairs"
    for name, value in values.items():
        if value is None:
            undefined.setdefault(name, _why_undefined(n))
    return Estimates(**{**values, "undefined": undefined})


def _why_undefined(n: int) -> str:
    if n == 0:
        return "no pairs"
    return "one pair has no spread" if n == 1 else "every difference is the same (s = 0)"


def _no_cost(n: int) -> CostPerPoint:
    reason = _why_undefined(n)
    names = ("point", "low", "high")
    return CostPerPoint(point=None, low=None, high=None, sentence=reason, undefined=dict.fromkeys(names, reason))


def _add_margin_in_run_sd(values: dict[str, Any], pairs: Pairs, undefined: dict[str, str], notes: list[str]) -> None:
    converged = pairs.baseline[~pairs.baseline_diverged]
    run_sd = float(converged.std(ddof=1)) if converged.size >= 2 else 0.0
    if run_sd == 0:
        undefined["margin_in_run_sd"] = "the baseline's runs have no spread to compare with"
        return
    values["margin_in_run_sd"] = pairs.margin / run_sd
    if values["margin_in_run_sd"] > SEVERAL_RUN_SD:
        notes.append(
            f"min_effect is {values['margin_in_run_sd']:.1f} run-sd of the baseline: a margin this wide "
            "calls most differences equivalent"
        )


def t_interval(x: Floats) -> Interval:
    """95 % t interval of the mean of x [n], n >= 2."""
    from scipy.special import stdtrit

    half = stdtrit(x.size - 1, (1 + CONFIDENCE) / 2) * x.std(ddof=1) / np.sqrt(x.size)
    return float(x.mean() - half), float(x.mean() + half)


def t_p_values(t: float, n: int) -> tuple[float, float]:
    """One-sided (improvement) and two-sided p of the paired t of n pairs."""
    from scipy.special import stdtr

    return float(stdtr(n - 1, -t)), float(2 * stdtr(n - 1, -abs(t)))


def _t_family(n: int, mean: float, ss: float, margin: float, rule: Rule) -> dict[str, Any]:
    from scipy.special import stdtr

    df = n - 1
    sd = np.sqrt(ss / df)
    t = float(paired_t(n, mean, ss))
    p_one_sided, p_two_sided = t_p_values(t, n)
    d_z = mean / sd
    to_margin = [float(stdtr(df, -paired_t(n, m, ss))) for m in (margin - mean, margin + mean)]
    return {
        "t": t,
        "p_one_sided": p_one_sided,
        "p_two_sided": p_two_sided,
        "d_z": float(d_z),
        "g_z": hedges_g(float(d_z), n) if n > 2 else None,
        "tost_p": max(to_margin),
        "required_n_80": required_n(float(d_z), rule.alpha),
        "mde_80": minimum_detectable_effect(n, float(sd), rule.alpha),
    }


def hedges_g(d_z: float, n: int) -> float:
    """Standardised effect of n >= 3 pairs without small-sample bias (at n = 2 the correction is 0)."""
    from scipy.special import gammaln

    df = n - 1
    return float(d_z * np.exp(gammaln(df / 2) - gammaln((df - 1) / 2)) / np.sqrt(df / 2))


def power(n: int, d_z: float, alpha: float) -> float:
    """Power of the one-sided paired t-test with n pairs at a true standardised effect d_z."""
    from scipy.special import nctdtr, stdtrit

    noncentrality, critical = np.sqrt(n) * d_z, stdtrit(n - 1, 1 - alpha)
    if noncentrality > 1e4 * critical:
        return 1.0  # to 1e-8 at worst (n = 2); much further out the library's CDF is nan
    below = float(nctdtr(n - 1, noncentrality, critical))
    # The library's CDF is nan now and then where it is under 1e-20, e.g. at n = 625, d_z = 1.5.
    return 1.0 if np.isnan(below) else 1 - below


def required_n(d_z: float, alpha: float) -> int | None:
    """Smallest number of pairs with 80 % power at d_z, by search; None if d_z <= 0 or beyond 10,000 pairs."""
    if d_z <= 0:
        return None
    low, high = 1, 2  # power rises with n: power(low) < POWER <= power(high)
    while power(high, d_z, alpha) < POWER:
        if high == N_SEARCH:
            return None
        low, high = high, min(2 * high, N_SEARCH)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, d_z, alpha) >= POWER else (middle, high)
    return high


def minimum_detectable_effect(n: int, sd: float, alpha: float) -> float:
    """The true effect, in sd's unit, that n >= 2 pairs detect with 80 % power (one-sided)."""
    return sd * _detectable_d_z(n, alpha)


@lru_cache(maxsize=4096)
def _detectable_d_z(n: int, alpha: float) -> float:
    from scipy.special import stdtrit

    # The noncentral median is near the critical value; no needed shift exceeds it by 10 sd of the statistic.
    upper = (2 * float(stdtrit(n - 1, 1 - alpha)) + 10) / np.sqrt(n)
    return crossing(lambda d_z: power(n, d_z, alpha) - POWER, 0.0, float(upper))


def divergence_bound(diverged: int, n: int) -> float:
    """One-sided 95 % Clopper-Pearson upper bound on the divergence rate, from `diverged` of n runs."""
    from scipy.special import betaincinv

    return 1.0 if diverged == n else float(betaincinv(diverged + 1, n - diverged, CONFIDENCE))


def _exact_tests(d: Floats, alpha: float, undefined: dict[str, str]) -> dict[str, float]:
    names = [f"{test}_p_{side}" for test in ("wilcoxon", "signflip") for side in ("one_sided", "two_sided")]
    n = d.size
    if 2.0**-n > alpha:
        undefined.update(dict.fromkeys(names, f"unattainable (smallest p = 2^-{n})"))
        return {}
    if n > N_EXACT:
        undefined.update(dict.fromkeys(names, f"all 2^n sign patterns are enumerated up to {N_EXACT} pairs"))
        return {}
    # Integers in float64: sums over sign patterns are exact, so that ties are ties.
    units = np.rint(d / RESOLUTION)
    if not units.any():
        undefined.update(dict.fromkeys(names, "every difference is 0"))
        return {}
    return dict(zip(names, (*sign_flip_p(_signed_ranks(units)), *sign_flip_p(units)), strict=True))


def _signed_ranks(d: Floats) -> Floats:
    """Signs times the ranks of |d| [n]; ties share their mean rank."""
    _, group, size = np.unique(np.abs(d), return_inverse=True, return_counts=True)
    return np.asarray(np.sign(d) * (np.cumsum(size) - (size - 1) / 2)[group])


def sign_flip_p(d: Floats) -> tuple[float, float]:
    """Exact one- and two-sided p of sum(d) over all 2^n sign patterns of d [n], whose sums are exact (integers, say).

    Of signed ranks it is Wilcoxon's, zeros ranked as Pratt does. Enumerated here: of one verdict,
    scipy's permutation_test took half of the time.
    """
    sums = np.zeros(1)
    for x in d:
        sums = np.concatenate([sums - x, sums + x])
    observed = sums[-1]
    # The null distribution is symmetric about 0: one enumeration serves both sides.
    return float(np.mean(sums >= observed)), float(np.mean(np.abs(sums) >= abs(observed)))
