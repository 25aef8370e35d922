"""How many more pairs until a decision is likely: the Jeffreys posterior predictive.

    sigma^2 | d ~ ss / chi^2_{n-1},   effect | sigma, d ~ N(mean, sigma^2 / n),   new d ~ N(effect, sigma^2)

The smallest k for which at least 80 % of the drawn continuations reach a verdict at some look within the next
k pairs; all pairs that the plan has left where no k does. Deterministic: the generator's seed is fixed.
Assumes that further pairs behave like those at hand, margin included. Source: Jeffreys prior, Gelman et al.,
Bayesian Data Analysis, section 3.2.
"""

import numpy as np

from muonlab.registry.verdict import Verdict
from muonlab.stats.kernel import Cache, classify, gather, is_last_look, rejects
from muonlab.stats.rule import Rule

DECISION_CHANCE = 0.8
N_DRAWS = 4_000  # binomial standard error 0.006 at 80 %
SEED = 20240602


def decision_chances(
    n: int,
    mean: float,
    ss: float,
    margin: float,
    rule: Rule,
    levels: tuple[float, float, float],
    *,
    more_divergences: bool = False,
    blocked: bool = False,
    cache: Cache | None = None,
) -> list[float]:
    """Predictive chance of a decision within the next 1, 2, ..., n_max - n pairs of a sequential plan.

    n >= 2 pairs so far; levels: one-sided levels of A, B and C, held as they are now.
    """
    rng = np.random.default_rng(SEED)
    k_max = rule.n_max - n
    sigma = np.sqrt(ss / rng.chisquare(n - 1, size=N_DRAWS))
    effect = mean + sigma / np.sqrt(n) * rng.standard_normal(N_DRAWS)
    new = effect[:, np.newaxis] + sigma[:, np.newaxis] * rng.standard_normal((N_DRAWS, k_max))

    k = np.arange(1, k_max + 1)
    # Deviations from the present mean keep the sums of squares free of cancellation.
    shift = np.cumsum(new - mean, axis=1)
    squares = ss + np.cumsum((new - mean) ** 2, axis=1)
    n_then = n + k
    mean_then = mean + shift / n_then
    ss_then = np.maximum(squares - shift**2 / n_then, 0.0)

    tests = gather(n_then, mean_then, ss_then, margin, rule.g)
    a, b, c = (rejects(test, n_then, level, rule, cache) for test, level in zip(tests, levels, strict=True))
    unstable = is_last_look(n_then, rule) & more_divergences
    verdict = classify((a, b, c), mean_then, margin, unstable=unstable, blocked=blocked)
    decided = np.maximum.accumulate(verdict != Verdict.INCONCLUSIVE.value, axis=1)
    return [float(chance) for chance in decided.mean(axis=0)]


def next_pairs(chances: list[float]) -> int:
    """The smallest k whose chance of a decision reaches 80 %, capped at what the plan has left."""
    return next((k for k, chance in enumerate(chances, start=1) if chance >= DECISION_CHANCE), len(chances))
