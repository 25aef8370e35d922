"""Undefined values and their reasons, and the small laws of cost, evidence and power."""

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from muonlab.stats.cost import cost_per_point
from muonlab.stats.effect import (
    describe,
    divergence_bound,
    hedges_g,
    power,
    required_n,
    sign_flip_p,
)
from muonlab.stats.evidence import (
    confidence_sequence,
    critical_t,
    first_attainable_n,
    log_e_value,
)
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample
from muonlab.stats.speed import speed_to_target, steps_to_target
from muonlab.stats.spending import cost_difference, cost_to_target
from muonlab.stats.threshold import t_star

RULE = Rule(min_effect=0.002, min_effect_unit="nats", price_per_pair_usd=7)
BASELINE = 2.06 + np.array([2, 4, 1, 3, 2, 3, 0, 4, 2, 1, 3, 2, 1, 4, 2, 3, 0]) * 1e-3
NOISE = np.array([3, -2, 1, -4, 2, 4, -3, -1, 2, -2, 1, -1, 3, -3, 2, -1, 1]) * 1e-4


def estimates(n, effect=0.004, rule=RULE):
    return describe(PairedSample.of("arm", BASELINE[:n], BASELINE[:n] - effect - NOISE[:n]), rule)


def test_one_pair_has_no_p_interval_or_effect_size():
    e = estimates(1)
    undefined = {"p_one_sided", "p_two_sided", "ci95", "d_z", "g_z", "t", "tost_p", "confidence_sequence"}
    assert undefined <= set(e.undefined)
    assert e.e_value == pytest.approx(1.608, abs=5e-4)


@pytest.mark.parametrize("n", [2, 3])
def test_two_and_three_pairs_have_a_t_interval_and_a_blocked_go(n):
    e = estimates(n)
    assert e.ci95[0] < e.mean_diff < e.ci95[1]
    assert any("GO is blocked" in note for note in e.notes)
    assert "bounded from 4 pairs on" in e.undefined["confidence_sequence"]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_exact_tests_are_unattainable_below_five_pairs(n):
    e = estimates(n)
    for name in ("wilcoxon_p_one_sided", "signflip_p_one_sided"):
        assert getattr(e, name) is None
        assert e.undefined[name] == f"unattainable (smallest p = 2^-{n})"


def test_exact_tests_stop_at_sixteen_pairs():
    rule = RULE.model_copy(update={"n_max": 20})
    assert estimates(16, rule=rule).signflip_p_one_sided == pytest.approx(2.0**-16)
    assert "up to 16 pairs" in estimates(17, rule=rule).undefined["signflip_p_one_sided"]


def test_ties_that_float_subtraction_hides_are_ties():
    d = np.array([0.3 - 0.2, 0.1, 0.2 - 0.1, -0.1, 0.2])  # four differences of 0.1, unequal in float64
    assert len(set(d[:3])) > 1
    sample = PairedSample.of("arm", np.full(5, 2.0) + d, np.full(5, 2.0))
    e = describe(sample, RULE)
    assert e.signflip_p_one_sided == sign_flip_p(np.array([1.0, 1.0, 1.0, -1.0, 2.0]))[0]
    assert e.wilcoxon_p_one_sided == pytest.approx(5 / 32)


def test_a_tie_with_the_observed_sum_counts_despite_float_order():
    """0.3 = 0.1 + 0.2 only on paper: the sign pattern (+0.3, -0.1, -0.2) has the sum 0 that was observed."""
    d = np.array([0.1, 0.2, -0.3, 0.1, -0.1])
    exact = sign_flip_p(np.array([1.0, 2.0, -3.0, 1.0, -1.0]))
    e = describe(PairedSample.of("arm", np.full(5, 2.0) + d, np.full(5, 2.0)), RULE)
    assert (e.signflip_p_one_sided, e.signflip_p_two_sided) == exact
    assert exact[1] == 1.0


def test_a_wide_margin_is_named():
    assert any(
        "run-sd of the baseline" in note
        for note in estimates(5, rule=RULE.model_copy(update={"min_effect": 0.02})).notes
    )


def test_a_worsening_needs_no_pairs_to_be_detected_as_improvement():
    assert estimates(6, effect=-0.004).undefined["required_n_80"] == "the estimated effect is not an improvement"


def test_a_result_refuses_an_unexplained_none_and_nan():
    e = estimates(5)
    with pytest.raises(ValidationError, match="every None needs one reason"):
        type(e)(**{**e.model_dump(), "t": None})
    with pytest.raises(ValidationError, match="finite"):
        type(e)(**{**e.model_dump(), "t": float("nan")})


# --- power


@pytest.mark.parametrize("d_z", [0.3, 0.62, 1.3, 4.0, 9.8, 1e9])
def test_required_n_is_the_smallest_with_80_percent(d_z):
    n = required_n(d_z, 0.05)
    assert power(n, d_z, 0.05) >= 0.8
    assert n == 2 or power(n - 1, d_z, 0.05) < 0.8


def test_power_against_simulation():
    d = np.random.default_rng(0).standard_normal((40_000, 6)) + 1.3
    share = np.mean(stats.ttest_1samp(d, 0, axis=1, alternative="greater").pvalue <= 0.05)
    assert power(6, 1.3, 0.05) == pytest.approx(share, abs=0.008)  # four binomial standard errors


def test_hedges_g_is_unbiased():
    d = np.random.default_rng(1).standard_normal((200_000, 5)) + 0.8
    d_z = d.mean(axis=1) / d.std(axis=1, ddof=1)
    assert np.mean([hedges_g(1.0, 5)]) * d_z.mean() == pytest.approx(0.8, abs=0.008)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (1, 5), (3, 12), (5, 5)])
def test_divergence_bound_is_clopper_pearson(k, n):
    library = stats.binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact").high
    assert divergence_bound(k, n) == pytest.approx(library)


# --- evidence


def test_e_rises_with_t():
    mean = np.linspace(-5, 5, 201)
    log_e = log_e_value(6, mean, 5.0, 2.0)
    assert np.all(np.diff(log_e) > 0)


def test_e_has_mean_one_at_the_border_of_the_null():
    d = np.random.default_rng(2).standard_normal((400_000, 3))
    e_value = np.exp(log_e_value(3, d.mean(axis=1), d.var(axis=1) * 3, 2.0))
    assert e_value.mean() == pytest.approx(1.0, abs=4 * e_value.std() / np.sqrt(len(d)))


def test_critical_t_inverts_e():
    t = critical_t(7, 0.05, 2.0)
    assert np.exp(log_e_value(7, t / np.sqrt(7), 6.0, 2.0)) == pytest.approx(20)
    assert critical_t(3, 0.05, 2.0) is None
    assert first_attainable_n(0.05, 2.0) == 4


def test_a_level_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="larger g or level"):
        first_attainable_n(0.05, 1e-9)


def test_the_confidence_sequence_holds_what_neither_side_rejects():
    n, mean, sd = 6, 0.4, 0.3
    low, high = confidence_sequence(n, mean, sd, level=0.05, g=2.0)
    ss = sd**2 * (n - 1)
    assert np.exp(log_e_value(n, mean - low, ss, 2.0)) == pytest.approx(20)
    assert np.exp(log_e_value(n, high - mean, ss, 2.0)) == pytest.approx(20)


# --- cost


def test_a_free_workload_costs_nothing_per_point():
    cost = cost_per_point(0.5, (0.4, 0.6), 0.0)
    assert (cost.point, cost.low, cost.high) == (0, 0, 0)


def test_no_improvement_has_no_price():
    for interval in ((-0.4, -0.1), None):
        cost = cost_per_point(-0.2, interval, 7.0)
        assert (cost.point, cost.low, cost.high) == (None, None, None)
        assert "no improvement to divide by" in cost.sentence


def test_an_interval_that_touches_zero_is_unbounded():
    assert cost_per_point(0.2, (0.0, 0.4), 7.0).high is None


def test_cost_difference_is_the_paired_t():
    base, chal = np.array([3.1, 2.9, 3.4, 3.0]), np.array([3.5, 3.6, 3.5, 3.7])
    library = stats.ttest_rel(base, chal)
    cost = cost_difference(base, chal)
    assert cost.ci95 == pytest.approx(tuple(library.confidence_interval(0.95)))
    assert cost.p_two_sided == pytest.approx(library.pvalue)
    assert cost.rel_diff_pct == pytest.approx(100 * (base - chal).mean() / base.mean())
    assert cost_difference(chal, base).mean_diff == -cost.mean_diff


def test_cost_difference_says_what_is_undefined():
    assert "one pair" in cost_difference([1.0], [2.0]).undefined["ci95"]
    assert "s = 0" in cost_difference([1.0, 1.0], [2.0, 2.0]).undefined["ci95"]
    assert cost_difference([0.0, 0.0], [0.0, 1.0]).rel_diff_pct is None
    for bad in ([], [-1.0], [np.nan]):
        with pytest.raises(ValueError, match="cost difference"):
            cost_difference(bad, bad)


STEPS = [50, 100, 150, 200]
BASE = np.array([[2.60, 2.40, 2.30, 2.24], [2.62, 2.41, 2.31, 2.25], [2.61, 2.43, 2.29, 2.23]])
CHAL = np.array([[2.70, 2.35, 2.26, 2.20], [2.71, 2.38, 2.25, 2.21], [2.69, 2.36, 2.27, 2.19]])


def cost_until(target, baseline, challenger, **prices):
    arrivals = ([steps_to_target(STEPS, curve, target) for curve in arm] for arm in (baseline, challenger))
    return cost_to_target(*arrivals, target=target, **prices)


def test_cost_to_target_is_speed_at_equal_prices_and_divides_by_the_price_of_a_step():
    speed = speed_to_target(STEPS, BASE, CHAL, target=2.3)
    same = cost_until(2.3, BASE, CHAL, baseline_per_step=0.01, challenger_per_step=0.01)
    dearer = cost_until(2.3, BASE, CHAL, baseline_per_step=0.01, challenger_per_step=[0.015] * 3)
    assert same.geometric_mean_ratio == pytest.approx(speed.geometric_mean_ratio)
    assert same.ratio_ci95 == pytest.approx(speed.ratio_ci95)
    assert dearer.geometric_mean_ratio == pytest.approx(speed.geometric_mean_ratio / 1.5)
    assert dearer.p_two_sided != speed.p_two_sided
    # The first pair arrives at steps 150 and 127.778: the protocol's worked example, at a cent a step.
    first = cost_until(2.3, BASE[:1], CHAL[:1], baseline_per_step=0.01, challenger_per_step=0.01)
    assert (first.baseline_mean, first.challenger_mean) == pytest.approx((1.5, 1.27778), abs=5e-6)
    assert first.difference.mean_diff == pytest.approx(0.22222, abs=5e-6)


def test_a_run_that_never_arrives_leaves_no_mean_cost():
    cost = cost_until(2.24, BASE, CHAL, baseline_per_step=0.01, challenger_per_step=0.01)
    assert (cost.baseline_never, cost.challenger_never) == (1, 0)
    assert (cost.baseline_mean, cost.difference, cost.geometric_mean_ratio) == (None, None, None)
    assert cost.challenger_mean > 0
    assert cost.median_ratio > 1
    assert cost.sign_p_one_sided == pytest.approx(1 / 8)
    neither = cost_until(1.0, BASE, CHAL, baseline_per_step=0.01, challenger_per_step=0.01)
    assert neither.undefined["sign_p_one_sided"] == "every pair is a tie"
    with pytest.raises(ValueError, match="prices above 0"):
        cost_until(2.3, BASE, CHAL, baseline_per_step=0.0, challenger_per_step=0.01)


# --- t*


def test_a_cached_t_star_is_taken_unless_no_t_star_can_be_so():
    """Below the t of a single look, a cached value would reject more often than alpha allows."""
    arguments = {"n_min": 4, "g": 1.5}
    cache: dict[str, float] = {}
    value = t_star(5, 0.1, cache=cache, **arguments)
    (key,) = cache
    cache[key] = value + 0.001
    assert t_star(5, 0.1, cache=cache, **arguments) == value + 0.001
    for forged in (0.5, float(stats.t.ppf(0.9, 4)) - 0.01, 1e3, float("nan")):
        cache[key] = forged
        assert t_star(5, 0.1, cache=cache, **arguments) == value
        assert cache[key] == value
