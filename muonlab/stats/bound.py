"""One-sided confidence bound of a paired mean under a study's plan: the largest value that the plan's test rules out.

    H0(c): E x <= c, tested on x_i - c   [n pairs; x in any unit]
    bound = max{c : H0(c) is rejected} = mean(x) - t_limit s / sqrt(n)
    t_limit of a fixed plan:       the 1 - level quantile of Student's t with n - 1 degrees of freedom
    t_limit of a sequential plan:  where E = 1/level; at the last planned pair the smaller of it and t*
    of an amended plan:            where E = 1/level

s has ddof 1. A t quantile keeps its level in one look only: looked at after every pair, its bound is wrong at some look
in far more than `level` of all studies. So a fixed plan has a bound at the number of pairs that it declared and at no
other, and a sequential plan, which may be looked at after every pair from n_min on, has the bound of its e-process:
with probability 1 - level no look ever shows one above E x. These are the tests of `kernel.rejects`, inverted.
Assumes independent, normal x. Sources: Student (1908) doi:10.2307/2331554, and those of `evidence.py`, `threshold.py`.
"""

import numpy as np

from muonlab.stats.evidence import Floats, critical_t
from muonlab.stats.kernel import decides_by_t, is_last_look
from muonlab.stats.rule import Rule
from muonlab.stats.sample import moments
from muonlab.stats.threshold import t_star


def t_limit(n: int, level: float, rule: Rule) -> float | None:
    """The paired t from which the plan's test rejects at `level` with n pairs; None where it cannot reject."""
    if n < rule.n_min:
        return None
    last = bool(is_last_look(n, rule))
    if decides_by_t(rule):
        from scipy.special import stdtrit

        return float(stdtrit(n - 1, 1 - level)) if last else None
    limits = [critical_t(n, level, rule.g)]
    if last and not rule.amended:
        limits.append(t_star(rule.n_max, level, n_min=rule.n_min, g=rule.g))
    return min((limit for limit in limits if limit is not None), default=None)


def lower_bound(x: Floats, level: float, rule: Rule) -> float | None:
    """The bound under E x, from x [n], in its unit.

    None where the plan's test cannot reject at n pairs, or all x are the same, which training noise never is.
    """
    limit = t_limit(x.size, level, rule)
    if limit is None:
        return None
    mean, ss = moments(x)
    if ss == 0:
        return None
    return float(mean - limit * np.sqrt(ss / (x.size - 1) / x.size))
