"""Error rates of the decision procedure: the engine behind `muon calibrate`, against the protocol's promises.

100,000 studies per null, one verdict per look from `kernel.decide_moments`; the binomial standard error of 5 % is 0.07
points. A study counts as false if any look is: nobody waits for the last one.
"""

import numpy as np
import pytest
from scipy import stats

from muonlab.registry.verdict import Verdict
from muonlab.stats.calibration import NULLS, measure
from muonlab.stats.cost import cost_per_point
from muonlab.stats.effect import t_interval
from muonlab.stats.evidence import log_e_value
from muonlab.stats.kernel import decide_moments
from muonlab.stats.rule import Rule
from muonlab.stats.simulate import false_go_rate, looks_of, moments_after, verdicts

STUDIES = 100_000
RULE = Rule(min_effect=0.5, min_effect_unit="nats")
FIXED = Rule(min_effect=0.5, min_effect_unit="nats", plan="fixed", fixed_n=8)
BY_NAME = {null.name: null for null in NULLS}
GO, ARCHIVE, EQUIVALENT, SEQUENCE = "GO", "NO_GO or EQUIVALENT", "EQUIVALENT", "confidence sequence"

# Limits of the protocol; the lower ones show that alpha is spent, not wasted.
LIMITS = {
    "normal": {GO: (0.045, 0.052), ARCHIVE: (0.045, 0.052), EQUIVALENT: (0.045, 0.052), SEQUENCE: (0.0, 0.1)},
    "t3": {GO: (0.025, 0.052), ARCHIVE: (0.025, 0.052), EQUIVALENT: (0.025, 0.052), SEQUENCE: (0.0, 0.1)},
    "unequal family": {GO: (0.025, 0.055), ARCHIVE: (0.025, 0.055), EQUIVALENT: (0.025, 0.055)},
    "early looks": {GO: (0.045, 0.052), ARCHIVE: (0.045, 0.052), EQUIVALENT: (0.045, 0.052), SEQUENCE: (0.0, 0.1)},
    "amended": {GO: (0.01, 0.035), ARCHIVE: (0.01, 0.035), EQUIVALENT: (0.01, 0.035), SEQUENCE: (0.0, 0.1)},
    "divergence": {GO: (0.0, 0.052), EQUIVALENT: (0.0, 0.052)},
}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", LIMITS)
def test_promise(name, record_property):
    errors = {error.wrong: error for error in measure(BY_NAME[name], RULE, studies=STUDIES, seed=1).errors}
    assert {wrong for wrong, error in errors.items() if error.promise is not None} == set(LIMITS[name])
    for wrong, (low, high) in LIMITS[name].items():
        record_property(wrong, errors[wrong].rate.value)
        assert low <= errors[wrong].rate.value <= high, wrong
        assert errors[wrong].promise == pytest.approx(high)
        assert errors[wrong].outcome == "kept"


def test_e_process_alone_under_heavy_tails():
    amended = RULE.model_copy(update={"amended": True})
    errors = {error.wrong: error for error in measure(BY_NAME["t3"], amended, studies=STUDIES, seed=2).errors}
    assert 0.005 < errors[GO].rate.value <= 0.035


def test_skewed_noise_is_measured_not_promised(capsys):
    """No method protects the mean when rare bad challenger seeds hide in the tail: the rate is printed."""
    errors = {error.wrong: error for error in measure(BY_NAME["skewed left"], RULE, studies=STUDIES, seed=3).errors}
    with capsys.disabled():
        rate = errors[GO].rate.value
        print(f"\nfalse GO with left-skewed noise: {rate:.1%} (not promised; the divergence gate is the guard)")
    assert all(error.outcome == "not promised" for error in errors.values())
    assert rate > 0.052  # should this fail, the warning in the documents is out of date


def test_raising_the_plan_after_its_end_gains_next_to_nothing():
    errors = {error.wrong: error for error in measure(BY_NAME["plan raised"], RULE, studies=STUDIES, seed=4).errors}
    assert errors[GO].rate.value < 0.055


def test_the_fixed_plan_errs_by_alpha():
    errors = {error.wrong: error for error in measure(BY_NAME["normal"], FIXED, studies=STUDIES, seed=5).errors}
    for wrong in (GO, ARCHIVE, EQUIVALENT):
        assert errors[wrong].rate.value == pytest.approx(0.05, abs=0.003)  # four binomial standard errors


def test_holm_steps_down_past_a_true_effect(record_property):
    """Two null arms beside one that is certainly better: step-down spends alpha/2 on each, no more than alpha."""
    d = np.random.default_rng(5).standard_normal((STUDIES, RULE.n_max, 3)) + np.array([0.0, 0.0, 8.0])
    said = verdicts(d, 0.0, RULE, looks_of(RULE, RULE.n_max), family_size=3)
    rate = float((said[..., :2] == Verdict.GO).any(axis=(1, 2)).mean())
    record_property("false_go_step_down", rate)
    assert 0.03 < rate <= 0.052


def test_large_samples_of_own_noise_give_the_rate_of_their_distribution():
    rng = np.random.default_rng(6)
    normal = false_go_rate(3e-4 * rng.standard_normal(5_000), RULE, family_size=1, studies=STUDIES)
    assert normal.value == pytest.approx(0.05, abs=0.006)
    skewed = false_go_rate(-rng.exponential(size=5_000), RULE, family_size=1, studies=STUDIES)
    assert skewed.value == pytest.approx(0.185, abs=0.02)


@pytest.mark.parametrize("n", [4, 8, 12])
def test_coverage_of_the_t_and_fieller_intervals(n):
    """The interval of dollars per point covers the price of the true effect as often as the t interval covers it."""
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


def test_a_plain_t_test_after_every_seed_is_what_this_replaces(record_property):
    n = np.arange(3, 13)
    mean, ss = moments_after(np.random.default_rng(10).standard_normal((STUDIES, 12, 1)), n)
    t = mean[..., 0] * np.sqrt(n * (n - 1) / ss[..., 0])
    rate = float((t >= stats.t.ppf(0.95, n - 1)).any(axis=1).mean())
    record_property("false_go_naive_t", rate)
    assert rate == pytest.approx(0.16, abs=0.005)


def test_the_critical_t_rejects_where_e_does():
    """The kernel compares t with the t at which E = 1/level; the definition compares E."""
    rng = np.random.default_rng(11)
    n = RULE.n_min + np.arange(RULE.n_max - RULE.n_min + 1)
    mean, ss = moments_after(rng.standard_normal((20_000, RULE.n_max, 1)) + rng.normal(size=(20_000, 1, 1)), n)
    amended = RULE.model_copy(update={"amended": True})
    outcome = decide_moments(n[:, np.newaxis], mean, ss, 0.3, amended, family_size=1)
    for rejected, shifted in zip(outcome.rejected, (mean, 0.3 - mean, mean + 0.3), strict=True):
        by_e = log_e_value(n[:, np.newaxis], shifted, ss, RULE.g) >= np.log(20)
        assert 0.1 < by_e.mean() < 0.9
        np.testing.assert_array_equal(rejected, by_e)
