"""How often a rule errs: verdicts of simulated studies, from the functions that decide real ones.

    d [S, n, J] -> moments after every look of the plan -> `kernel.decide_moments` -> one verdict a look and arm
    rate = share of studies in which some arm gets the verdict at some look; nobody waits for the last one
    standard error = sqrt(p (1 - p) / S), p = (count + 1) / (S + 2), so that a count of 0 is not called certain

Shape letters: S = studies, n = pairs, J = simulated arms of the family, L = looks.
A look whose pairs all differ by the same amount is INVALID, as `decide` has it; with resampled noise it happens.
Assumes nothing of the noise but independent pairs; every result holds for the noise that it was given.
Source of resampling centred residuals: Davison and Hinkley, Bootstrap Methods and their Application (1997), 4.4.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from muonlab.registry.verdict import Verdict
from muonlab.stats.evidence import Floats
from muonlab.stats.kernel import Bools, Cache, decide_moments, decides_by_t
from muonlab.stats.result import Result
from muonlab.stats.rule import Rule

CHUNK_STUDIES = 10_000  # keeps one chunk's arrays in the processor's cache
FEWEST_RESIDUALS = 2
USUAL_SETS, USUAL_STUDIES, USUAL_SEED = 100, 500, 20240603


class Rate(Result):
    """A share of simulated studies, with its Monte Carlo standard error."""

    value: float
    standard_error: float
    studies: int


class NoiseRate(Rate):
    """The rate at which a rule says GO wrongly when its noise is resampled from `pairs` observed pairs."""

    pairs: int
    usual_low: float
    usual_high: float
    """5 % and 95 % quantiles of the same figure over sets of as many pairs of exactly normal noise."""
    sentence: str


def rate_of(count: int, studies: int) -> Rate:
    """The rate of `count` in `studies` simulated studies."""
    smoothed = (count + 1) / (studies + 2)
    return Rate(
        value=count / studies, standard_error=float(np.sqrt(smoothed * (1 - smoothed) / studies)), studies=studies
    )


def looks_of(rule: Rule, at_hand: int) -> NDArray[np.int_]:
    """After how many pairs [L] the plan looks; `at_hand` pairs are there for a fixed plan that takes them all.

    Empty where the plan ends below n_min: no verdict is ever given.
    """
    last = rule.pairs_used_at_most() or at_hand
    first = rule.n_min if rule.plan == "sequential" else max(last, rule.n_min)
    return np.arange(first, last + 1)


def verdicts(
    d: Floats,
    margin: float,
    rule: Rule,
    looks: NDArray[np.int_],
    *,
    family_size: int,
    unstable: Bools | bool = False,
    blocked: Bools | bool = False,
    cache: Cache | None = None,
) -> NDArray[np.str_]:
    """Verdicts [S, L, J] of studies with differences d [S, n, J] after each of `looks` [L].

    d and margin in one unit, and d of a mean that is not far larger than its spread: sums of squares are incremental.
    unstable, blocked: [S, L, J], see `kernel.classify`.
    """
    mean, ss = moments_after(d, looks)
    outcome = decide_moments(
        looks[:, np.newaxis],
        mean,
        ss,
        margin,
        rule,
        family_size=family_size,
        unstable=unstable,
        blocked=blocked,
        cache=cache,
    )
    same = np.logical_and.accumulate(d == d[:, :1], axis=1)[:, looks - 1]
    return np.where(same, Verdict.INVALID.value, outcome.verdict)


def moments_after(d: Floats, looks: NDArray[np.int_]) -> tuple[Floats, Floats]:
    """Mean and sum of squared deviations [S, L, J] of d [S, n, J] after each of `looks` [L] pairs."""
    total, squares = np.cumsum(d, axis=1)[:, looks - 1], np.cumsum(d * d, axis=1)[:, looks - 1]
    mean = total / looks[:, np.newaxis]
    return mean, np.maximum(squares - total * mean, 0.0)


def chunks(studies: int) -> Iterator[int]:
    """Sizes of the chunks that add up to `studies`."""
    for start in range(0, studies, CHUNK_STUDIES):
        yield min(CHUNK_STUDIES, studies - start)


def centred(residuals: Floats) -> Floats:
    """Residuals [n, J] of mean 0 and sd 1 in each arm, from differences [n] or [n, J].

    The scale is free: no rate at min_effect -> 0 depends on it. Raises ValueError on fewer than two rows, a value that
    is not finite, or an arm whose differences are all the same.
    """
    x = np.asarray(residuals, dtype=np.float64)
    x = x[:, np.newaxis] if x.ndim == 1 else x
    if x.ndim != 2 or x.shape[0] < FEWEST_RESIDUALS or not np.isfinite(x).all() or (x == x[:1]).all(axis=0).any():
        raise ValueError(
            f"residuals of shape {np.shape(residuals)}: give at least {FEWEST_RESIDUALS} finite differences [n], or "
            "[n, arms] on the same seeds, not all the same in any arm"
        )
    x = x - x.mean(axis=0)
    return np.asarray(x / x.std(axis=0))


def false_go_rate(
    residuals: Floats,
    rule: Rule,
    *,
    family_size: int,
    studies: int = 20_000,
    seed: int = 0,
    cache: Cache | None = None,
) -> NoiseRate:
    """How often the rule says GO to an arm that is no better, where noise is drawn from these residuals.

    residuals: paired differences [n] of one challenger, or [n, J] of J challengers on the same seeds; centred here, and
    drawn with replacement by seed, so that arms stay correlated. The rate is that of a GO of any of the J arms at any
    look, in a family of `family_size` declared challengers (arms that are not given are never rejected), at the hardest
    setting: effect 0 and min_effect -> 0. A larger min_effect can only lower it; guardrails are left out.
    Few residuals are a rough picture: they hold no tail that was not seen, and one odd pair weighs 1/n. The usual range
    says how rough. Deterministic for a seed. Raises ValueError as `centred` does, on a family smaller than J, and on
    one that Dunnett's test decides: families are simulated with Holm's correction, which an amended plan falls back to.
    """
    pool = centred(residuals)
    n, arms = pool.shape
    if rule.correction == "dunnett" and decides_by_t(rule) and family_size > 1:
        raise ValueError("false GO rate: correction is dunnett; only Holm's is simulated: declare correction holm")
    if family_size < arms:
        raise ValueError(f"family_size {family_size} is under the {arms} arms whose residuals are given")
    rate = _resampled(pool, rule, family_size, studies, np.random.default_rng(seed), cache)
    low, high = _usual_range(n, arms, rule, family_size)
    return NoiseRate(
        **rate.model_dump(),
        pairs=n,
        usual_low=low,
        usual_high=high,
        sentence=(
            f"with noise drawn from these {n} pairs, this rule says GO wrongly in {rate.value:.1%} of null studies "
            f"(Monte Carlo standard error {rate.standard_error:.1%}); {n} pairs are a rough picture of the noise: "
            f"as few pairs of normal noise, where the rule errs in {rule.alpha:.0%} at most, give "
            f"{low:.1%} to {high:.1%} when counted so"
        ),
    )


def _resampled(
    pool: Floats, rule: Rule, family_size: int, studies: int, rng: np.random.Generator, cache: Cache | None
) -> Rate:
    looks = looks_of(rule, at_hand=pool.shape[0])
    if looks.size == 0:
        return rate_of(0, studies)
    count = 0
    for size in chunks(studies):
        d = pool[rng.integers(pool.shape[0], size=(size, int(looks[-1])))]
        said = verdicts(d, 0.0, rule, looks, family_size=family_size, cache=cache)
        count += int((said == Verdict.GO.value).any(axis=(1, 2)).sum())
    return rate_of(count, studies)


@lru_cache(maxsize=256)
def _usual_range(n: int, arms: int, rule: Rule, family_size: int) -> tuple[float, float]:
    """5 % and 95 % quantiles of the rate over sets of n normal residuals: what resampling so few does by itself."""
    rng = np.random.default_rng(USUAL_SEED)
    rates = [
        _resampled(centred(rng.standard_normal((n, arms))), rule, family_size, USUAL_STUDIES, rng, None).value
        for _ in range(USUAL_SETS)
    ]
    low, high = np.quantile(rates, [0.05, 0.95])
    return float(low), float(high)
