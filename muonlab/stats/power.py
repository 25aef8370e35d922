"""What a plan is likely to say, and to cost, for a true effect: before the first run.

    d_i ~ N(effect, sd^2) -> the verdict after every look, by the functions that decide (`simulate.verdicts`)
    sequential: the chance that the plan has stopped by n pairs with this verdict; it stops at its first decision
    fixed:      the chance of this verdict from exactly n pairs, for each n

A GO needs a mean of at least min_effect, so that at an effect of exactly min_effect a fixed plan says GO in at most
half of the studies, however many pairs there are. The chances hold for normal differences of a known sd; guardrails,
divergence and other arms' rejections are left out. The sd of a pilot is itself uncertain, by
    [s sqrt((n-1) / chi2_{.975}), s sqrt((n-1) / chi2_{.025})]      with n - 1 degrees of freedom.
Source of the interval: any text on normal samples, e.g. Casella and Berger, Statistical Inference (2002), 9.2.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from muonlab.registry.verdict import Verdict
from muonlab.stats.effect import CONFIDENCE, POWER, Interval, required_n
from muonlab.stats.kernel import Cache
from muonlab.stats.result import Result
from muonlab.stats.rule import N_LIMIT, Rule
from muonlab.stats.simulate import chunks, looks_of, verdicts

SEARCH_STUDIES = 5_000  # binomial standard error 0.006 at 80 %
STAGES = (Verdict.GO, Verdict.NO_GO, Verdict.EQUIVALENT, Verdict.INCONCLUSIVE)


class Chances(Result):
    """Chance of each verdict at n pairs, and what these pairs cost [USD]."""

    n: int
    go: float
    no_go: float
    equivalent: float
    inconclusive: float
    cost_usd: float


class EffectPower(Result):
    """What the plan does with one true effect."""

    effect: float
    chances: tuple[Chances, ...]
    expected_pairs: float
    """Mean number of pairs at which the plan stops; of a fixed plan, its pairs."""
    expected_cost_usd: float
    pairs_to_detect: int | None
    """Pairs with which a one-sided t-test of "effect <= 0" has 80 % power."""
    pairs_to_go: int | None
    """Pairs of the smallest fixed plan with an 80 % chance of GO."""


class Power(Result):
    """Chances of every verdict for several true effects; effects, sd and margin in one unit."""

    sd_diff: float
    margin: float
    level: float
    """One-sided level of a single challenger's test: alpha over the size of the family."""
    studies: int
    seed: int
    effects: tuple[EffectPower, ...]


def sd_of_difference(run_sd: float, correlation: float) -> float:
    """sd of baseline - challenger for two runs of sd `run_sd` that correlate over seeds; in run_sd's unit."""
    if not (run_sd > 0 and -1 <= correlation < 1):
        raise ValueError(
            f"run_sd {run_sd:g}, correlation {correlation:g}; give run_sd > 0 and a correlation in [-1, 1)"
        )
    return float(run_sd * np.sqrt(2 * (1 - correlation)))


def sd_interval(sd: float, n: int) -> Interval:
    """95 % interval of the true sd, from the sd of n >= 2 normal values."""
    from scipy.special import chdtri

    # chdtri inverts the upper tail.
    low, high = (float(sd * np.sqrt((n - 1) / chdtri(n - 1, p))) for p in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return low, high


def power_of_plan(
    sd_diff: float,
    margin: float,
    rule: Rule,
    effects: Sequence[float],
    *,
    family_size: int = 1,
    studies: int = 20_000,
    seed: int = 0,
    cache: Cache | None = None,
) -> Power:
    """Chances of each verdict at n_min to n_max pairs for each true effect; sd, margin and effects in one unit.

    A fixed rule is evaluated at each number of pairs as if it had been planned. With family_size K the challenger is
    tested at alpha/K, as the first of K is. Deterministic for a seed. Raises ValueError on an sd or margin that is not
    positive.
    """
    if not (sd_diff > 0 and margin > 0 and np.isfinite([sd_diff, margin]).all()):
        raise ValueError(f"sd of a difference {sd_diff:g}, min_effect {margin:g}; both should be positive")
    looks = looks_of(rule, rule.n_max) if rule.plan == "sequential" else np.arange(rule.n_min, rule.n_max + 1)
    counts = np.zeros((len(effects), len(looks), len(STAGES)))
    pairs = np.zeros(len(effects))
    plan = rule if rule.plan == "sequential" else _fixed(rule)
    rng = np.random.default_rng(seed)
    for size in chunks(studies):
        noise = sd_diff * rng.standard_normal((size, int(looks[-1]), 1))
        for i, effect in enumerate(effects):
            said = verdicts(noise + effect, margin, plan, looks, family_size=family_size, cache=cache)[..., 0]
            if rule.plan == "sequential":
                said, stopped_at = _stopped(said)
                pairs[i] += looks[stopped_at].sum()
            counts[i] += np.stack([(said == verdict.value).sum(axis=0) for verdict in STAGES], axis=-1)
    shares = counts / studies
    mean_pairs = (
        pairs / studies if rule.plan == "sequential" else np.full(len(effects), rule.pairs_used_at_most() or rule.n_max)
    )
    level = rule.alpha / family_size
    to_go = _pairs_to_go(sd_diff, margin, rule, effects, family_size, seed)
    return Power(
        sd_diff=sd_diff,
        margin=margin,
        level=level,
        studies=studies,
        seed=seed,
        effects=tuple(
            _effect_power(
                effect, looks, shares[i], float(mean_pairs[i]), to_go[i], required_n(effect / sd_diff, level), rule
            )
            for i, effect in enumerate(effects)
        ),
    )


def _fixed(rule: Rule) -> Rule:
    """The rule as a plan that is fixed at whatever number of pairs is at hand."""
    return rule.model_copy(update={"plan": "fixed", "fixed_n": "at_hand"})


def _stopped(said: NDArray[np.str_]) -> tuple[NDArray[np.str_], NDArray[np.int_]]:
    """Verdicts [S, L] of a plan that stops at its first decision, and the look [S] at which it stops."""
    decided = said != Verdict.INCONCLUSIVE.value
    first = np.where(decided.any(axis=1), decided.argmax(axis=1), said.shape[1] - 1)
    at = np.minimum(np.arange(said.shape[1]), first[:, np.newaxis])
    return np.take_along_axis(said, at, axis=1), first


def _pairs_to_go(
    sd_diff: float, margin: float, rule: Rule, effects: Sequence[float], family_size: int, seed: int
) -> list[int | None]:
    looks = np.arange(rule.n_min, N_LIMIT + 1)
    noise = sd_diff * np.random.default_rng(seed).standard_normal((SEARCH_STUDIES, N_LIMIT, 1))
    found: list[int | None] = []
    for effect in effects:
        if effect <= margin:  # the mean reaches min_effect in at most half of the studies
            found.append(None)
            continue
        said = verdicts(noise + effect, margin, _fixed(rule), looks, family_size=family_size)[..., 0]
        enough = np.flatnonzero((said == Verdict.GO.value).mean(axis=0) >= POWER)
        found.append(int(looks[enough[0]]) if enough.size else None)
    return found


def _effect_power(
    effect: float,
    looks: NDArray[np.int_],
    shares: NDArray[np.float64],
    pairs: float,
    to_go: int | None,
    to_detect: int | None,
    rule: Rule,
) -> EffectPower:
    undefined: dict[str, str] = {}
    if to_detect is None:
        undefined["pairs_to_detect"] = "the effect is not an improvement, or needs more than 10,000 pairs"
    if to_go is None:
        undefined["pairs_to_go"] = f"no number of pairs up to {N_LIMIT} gives an 80% chance of GO"
    return EffectPower(
        effect=effect,
        chances=tuple(
            Chances(
                n=int(n),
                go=float(go),
                no_go=float(no_go),
                equivalent=float(equivalent),
                inconclusive=float(inconclusive),
                cost_usd=float(n * rule.price_per_pair_usd),
            )
            for n, (go, no_go, equivalent, inconclusive) in zip(looks, shares, strict=True)
        ),
        expected_pairs=pairs,
        expected_cost_usd=pairs * rule.price_per_pair_usd,
        pairs_to_detect=to_detect,
        pairs_to_go=to_go,
        undefined=undefined,
    )
