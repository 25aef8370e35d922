"""The decision kernel: from moments of paired differences to verdicts, for one study or a million at once.

    A tests  d            on H0: effect <= 0            B tests  margin - d  on H0: effect >= margin
    C tests  d + margin   on H0: effect <= -margin      (each one-sided at `level`)
    sequential: reject when E >= 1/level; with the last planned pair also when t >= t*(level), unless amended
    fixed:      reject when the paired t reaches the 1 - level quantile of Student's t; amended, E as above
    family of K: each of A, B, C at alpha/K, then alpha/(K - r) once r arms are rejected (Holm)

Shape letters: `...` = studies, looks or draws; K = challengers of the family, always the last axis.
`decide` and the calibration suite both call these functions: what is calibrated is what decides. E rises with t, so
E >= 1/level is tested as t >= `critical_t`: the same rejections, without a CDF for every study.
Assumes independent, normal differences. Sources: `evidence.py`; Holm (1979), Scandinavian Journal of
Statistics 6.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from muonlab.registry.verdict import Verdict
from muonlab.stats.evidence import Floats, critical_t, log_e_value
from muonlab.stats.rule import Rule
from muonlab.stats.threshold import t_star

Bools = NDArray[np.bool_]
Cache = MutableMapping[str, float]


@dataclass(frozen=True)
class Evidence:
    """One of the three tests of n pairs with this (shifted) mean and sum of squared deviations [..., K]."""

    n: ArrayLike
    mean: Floats
    ss: ArrayLike
    g: float

    @cached_property
    def t(self) -> Floats:
        """Paired t; nan where it is undefined."""
        return paired_t(self.n, self.mean, self.ss)

    @cached_property
    def log_e(self) -> Floats:
        """log E."""
        return log_e_value(self.n, self.mean, self.ss, self.g)


@dataclass(frozen=True)
class Outcome:
    """Verdicts [..., K] as strings; of A, B, C the evidence, what is rejected, and the levels they were
    tested at."""

    verdict: NDArray[np.str_]
    tests: tuple[Evidence, Evidence, Evidence]
    rejected: tuple[Bools, Bools, Bools]
    levels: tuple[Floats, Floats, Floats]


def paired_t(n: ArrayLike, mean: ArrayLike, ss: ArrayLike) -> Floats:
    """Student's paired t, elementwise; nan where n < 2 or nothing varies."""
    n, mean, ss = (np.asarray(x, dtype=np.float64) for x in (n, mean, ss))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where((n > 1) & (ss > 0), mean * np.sqrt(n * (n - 1) / ss), np.nan))


def gather(
    n: ArrayLike, mean: ArrayLike, ss: ArrayLike, margin: ArrayLike, g: float
) -> tuple[Evidence, Evidence, Evidence]:
    """Evidence of A, B, C from n pairs with this mean and sum of squared deviations; nan moments give nan
    evidence."""
    mean, margin = np.asarray(mean, dtype=np.float64), np.asarray(margin, dtype=np.float64)
    shifted = (mean, margin - mean, mean + margin)
    a, b, c = (Evidence(n=n, mean=m, ss=ss, g=g) for m in shifted)
    return a, b, c


def is_last_look(n: ArrayLike, rule: Rule) -> Bools:
    """Whether the plan ends with these pairs."""
    if rule.plan == "sequential":
        return np.asarray(n) >= rule.n_max
    if isinstance(rule.fixed_n, int):
        return np.asarray(n) >= rule.fixed_n
    return np.ones(np.shape(n), dtype=bool)


def decides_by_t(rule: Rule) -> bool:
    """Whether the paired t alone decides: a fixed plan that was not amended."""
    return rule.plan == "fixed" and not rule.amended


def rejects(evidence: Evidence, n: ArrayLike, level: float, rule: Rule, cache: Cache | None = None) -> Bools:
    """Whether one test rejects at `level`, elementwise; never before n_min pairs."""
    n = np.asarray(n)
    may_look = n >= rule.n_min
    if decides_by_t(rule):
        from scipy.special import stdtrit

        t_limit = np.asarray(stdtrit(np.maximum(n - 1, 1), 1 - level))
        return np.asarray(may_look & is_last_look(n, rule) & (evidence.t >= t_limit))
    rejected = may_look & (evidence.t >= _e_limits(n, level, rule.g))
    last = may_look & is_last_look(n, rule)
    if not rule.amended and last.any():
        limit = t_star(rule.n_max, level, n_min=rule.n_min, g=rule.g, cache=cache)
        rejected = rejected | (last & (evidence.t >= limit))
    return np.asarray(rejected)


def _e_limits(n: NDArray[np.int_], level: float, g: float) -> Floats:
    """The t from which E >= 1/level, for each of n; infinity where E cannot get there."""
    counts, where = np.unique(n, return_inverse=True)
    limits = [critical_t(int(count), level, g) for count in counts]
    return np.array([np.inf if limit is None else limit for limit in limits])[where].reshape(n.shape)


def step_down(
    evidence: Evidence, n: ArrayLike, rule: Rule, family_size: int, cache: Cache | None = None
) -> tuple[Bools, Floats]:
    """Holm over the last axis: which arms are rejected [..., K], and at which level each was (last) tested.

    `family_size` counts every declared challenger, also those without usable data.
    """
    done = np.zeros(np.broadcast_shapes(evidence.t.shape, np.shape(n)), dtype=bool)
    levels = np.full(done.shape, rule.alpha / family_size)
    for r in range(family_size):
        level = rule.alpha / (family_size - r)
        reached = np.broadcast_to((done.sum(axis=-1) >= r)[..., np.newaxis], done.shape)
        if not reached.any():
            break
        levels = np.where(reached & ~done, level, levels)
        done = done | (reached & rejects(evidence, n, level, rule, cache))
    return done, levels


def classify(
    rejected: tuple[Bools, Bools, Bools],
    mean: ArrayLike,
    margin: ArrayLike,
    *,
    unstable: ArrayLike = False,
    blocked: ArrayLike = False,
) -> NDArray[np.str_]:
    """Steps 2 to 6 of the verdict, elementwise.

    unstable: the plan ended with more divergences of the challenger than of the baseline.
    blocked: a guardrail is broken, or the challenger diverged at all: a GO becomes NO_GO.
    """
    a, b, c = rejected
    would_go = a & (np.asarray(mean) >= np.asarray(margin)) & ~b
    blocked = np.asarray(blocked, dtype=bool)
    unstable = np.broadcast_to(np.asarray(unstable, dtype=bool), would_go.shape)
    return np.select(
        [unstable, would_go & ~blocked, would_go, b & c, b],
        [
            Verdict.NO_GO.value,
            Verdict.GO.value,
            Verdict.NO_GO.value,
            Verdict.EQUIVALENT.value,
            Verdict.NO_GO.value,
        ],
        default=Verdict.INCONCLUSIVE.value,
    )


def decide_moments(
    n: ArrayLike,
    mean: ArrayLike,
    ss: ArrayLike,
    margin: ArrayLike,
    rule: Rule,
    *,
    family_size: int,
    unstable: ArrayLike = False,
    blocked: ArrayLike = False,
    cache: Cache | None = None,
) -> Outcome:
    """Verdicts of families from the moments of their differences [..., K]; integrity is the caller's matter.

    n pairs, mean and margin in one unit, ss in its square; an arm without usable data has nan moments.
    """
    tests = gather(n, mean, ss, margin, rule.g)
    (a, level_a), (b, level_b), (c, level_c) = (step_down(test, n, rule, family_size, cache) for test in tests)
    return Outcome(
        verdict=classify((a, b, c), mean, margin, unstable=unstable, blocked=blocked),
        tests=tests,
        rejected=(a, b, c),
        levels=(level_a, level_b, level_c),
    )
