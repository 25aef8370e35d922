"""Error rates of the decision procedure over simulated studies, with the functions that decide real ones.

100,000 studies per null, looks after every pair from 4 to 12, one verdict per look from
`kernel.decide_moments`. A study counts as false if any look is: nobody waits for the last one. Limits are the
protocol's; the binomial standard error of 5 % is 0.07 points.
"""

import numpy as np
import pytest
from scipy import stats

from muonlab.registry.verdict import Verdict
from muonlab.stats.cost import cost_per_point
from muonlab.stats.effect import t_interval
from muonlab.stats.evidence import critical_t
from muonlab.stats.kernel import decide_moments
from muonlab.stats.rule import Rule

STUDIES = 100_000
MARGIN = 0.5  # in sd of a difference; any, the procedure is scale free
RULE = Rule(min_effect=MARGIN, min_effect_unit="nats")
PURE = RULE.model_copy(update={"amended": True})

pytestmark = pytest.mark.slow


def normal(rng, shape):
    return rng.standard_normal(shape)


def t3(rng, shape):
    return rng.standard_t(3, shape) / np.sqrt(3)


def left_skewed(rng, shape):
    """Rare bad challenger seeds: mean 0, most differences slightly positive."""
    return 1 - rng.exponential(size=shape)


NOISE = pytest.mark.parametrize("noise", [normal, t3])


def moments_at_looks(d):
    """n [L], mean and ss [..., L, K] after each of the first n_min to n_max pairs of d [..., n_max, K]."""
    n = np.arange(1, RULE.n_max + 1)[:, np.newaxis]
    total, squares = d.cumsum(axis=-2), (d**2).cumsum(axis=-2)
    looks = slice(RULE.n_min - 1, None)
    return n[looks], (total / n)[..., looks, :], (squares - total**2 / n)[..., looks, :]


def share_ever(d, verdicts, rule, *, margin=MARGIN, arms=slice(None)):
    """Share of studies d [S, n_max, K] in which one of these arms got one of these verdicts at some look."""
    n, mean, ss = moments_at_looks(d)
    outcome = decide_moments(n, mean, ss, margin, rule, family_size=d.shape[-1])
    return float(np.isin(outcome.verdict[..., arms], verdicts).any(axis=(1, 2)).mean())


def studies(noise, seed, arms=1):
    return noise(np.random.default_rng(seed), (STUDIES, RULE.n_max, arms))


@NOISE
def test_false_go_with_the_hybrid_plan(noise, record_property):
    """Effect 0 and min_effect -> 0: the hardest null for GO."""
    rate = share_ever(studies(noise, 1), [Verdict.GO], RULE, margin=0.0)
    record_property("false_go", rate)
    assert 0.025 < rate <= 0.052


@NOISE
def test_false_go_with_the_pure_e_process(noise, record_property):
    rate = share_ever(studies(noise, 2), [Verdict.GO], PURE, margin=0.0)
    record_property("false_go_pure", rate)
    assert 0.01 < rate <= 0.035


@NOISE
def test_false_archive_at_the_smallest_effect_worth_having(noise, record_property):
    d = studies(noise, 3) + MARGIN
    rate = share_ever(d, [Verdict.NO_GO, Verdict.EQUIVALENT], RULE)
    record_property("false_no_go_or_equivalent", rate)
    assert rate <= 0.052


def test_holm_family_with_unequal_variances(record_property):
    """Three null arms against one shared baseline, sd 0.3 to 3: false GO of any of them."""
    rng = np.random.default_rng(4)
    shape = (STUDIES, RULE.n_max)
    baseline = rng.standard_normal((*shape, 1))
    d = baseline - rng.standard_normal((*shape, 3)) * np.array([0.3, 1.0, 3.0])
    rate = share_ever(d, [Verdict.GO], RULE, margin=0.0)
    record_property("false_go_family", rate)
    assert rate <= 0.055


def test_holm_steps_down_past_a_true_effect(record_property):
    """Two null arms beside one that is certainly better: step-down spends alpha/2 on each, no more than
    alpha."""
    d = studies(normal, 5, arms=3) + np.array([0.0, 0.0, 8.0])
    rate = share_ever(d, [Verdict.GO], RULE, margin=0.0, arms=slice(0, 2))
    record_property("false_go_step_down", rate)
    assert 0.03 < rate <= 0.052


def test_false_go_of_the_fixed_plan():
    fixed = Rule(min_effect=MARGIN, min_effect_unit="nats", plan="fixed", fixed_n=8)
    d = studies(normal, 6)[:, :8, 0]
    mean, ss = d.mean(axis=1), d.var(axis=1) * 8
    outcome = decide_moments(8, mean[:, np.newaxis], ss[:, np.newaxis], 0.0, fixed, family_size=1)
    rate = (outcome.verdict == Verdict.GO).mean()
    assert rate == pytest.approx(0.05, abs=0.003)  # four binomial standard errors


@pytest.mark.parametrize("n", [4, 8, 12])
def test_coverage_of_the_t_and_fieller_intervals(n):
    """The interval of dollars per point covers the price of the true effect as often as the t interval covers
    it."""
    true_pct, price, count = 0.5, 7.0, 20_000
    rel = true_pct + 0.3 * np.random.default_rng(7).standard_normal((count, n))
    covered_t = covered_cost = 0
    for row in rel:
        low, high = t_interval(row)
        covered_t += low <= true_pct <= high
        cost = cost_per_point(float(row.mean()), (low, high), price)
        above = cost.low is not None and cost.low <= price / true_pct
        covered_cost += above and (cost.high is None or price / true_pct <= cost.high)
    assert covered_t / count == pytest.approx(0.95, abs=0.01)
    assert covered_cost / count == pytest.approx(0.95, abs=0.01)


@NOISE
def test_simultaneous_coverage_of_the_confidence_sequence(noise, record_property):
    """The truth is inside at every n up to 12, in at least 90 % of the studies."""
    n, mean, ss = moments_at_looks(studies(noise, 8))
    t_limit = np.array([critical_t(int(k), 0.05, RULE.g) for k in n[:, 0]])[:, np.newaxis]
    inside = np.abs(mean) <= t_limit * np.sqrt(ss / (n - 1) / n)
    rate = float(inside.all(axis=(1, 2)).mean())
    record_property("confidence_sequence_coverage", rate)
    assert rate >= 0.9


def test_left_skewed_noise_is_measured_not_promised(record_property, capsys):
    """No method protects the mean when rare bad challenger seeds hide in the tail: the rate is printed."""
    rate = share_ever(studies(left_skewed, 9), [Verdict.GO], RULE, margin=0.0)
    record_property("false_go_left_skewed", rate)
    with capsys.disabled():
        print(f"\nfalse GO with left-skewed noise: {rate:.1%} (not promised; the divergence gate is the guard)")
    assert rate > 0.052  # should this fail, the warning in the documents is out of date


def test_a_plain_t_test_after_every_seed_is_what_this_replaces(record_property):
    d = studies(normal, 10)[..., 0]
    n = np.arange(3, 13)
    total, squares = d.cumsum(axis=1)[:, 2:], (d**2).cumsum(axis=1)[:, 2:]
    t = total / np.sqrt(n) / np.sqrt((squares - total**2 / n) / (n - 1))
    rate = float((t >= stats.t.ppf(0.95, n - 1)).any(axis=1).mean())
    record_property("false_go_naive_t", rate)
    assert rate == pytest.approx(0.16, abs=0.005)
