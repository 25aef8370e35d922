"""Simulated verdicts against their definition, resampled noise, and power."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from muonlab.stats.calibration import NULLS, measure, resampled
from muonlab.stats.decision import decide
from muonlab.stats.effect import power as t_power
from muonlab.stats.effect import required_n
from muonlab.stats.power import power_of_plan, sd_interval, sd_of_difference
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample
from muonlab.stats.simulate import false_go_rate, looks_of, verdicts

RULE = Rule(min_effect=0.5, min_effect_unit="nats")
FIXED = RULE.model_copy(update={"plan": "fixed", "fixed_n": 8})


def test_simulated_verdicts_are_those_of_decide():
    rule = RULE.model_copy(update={"n_max": 7, "min_effect": 1.5})
    rng = np.random.default_rng(0)
    d = 0.6 * rng.standard_normal((16, rule.n_max, 1)) + rng.choice([-2.0, 0.0, 3.0], size=(16, 1, 1))
    d[0, :6] = 0.25  # all the same so far: suspect
    looks = looks_of(rule, rule.n_max)
    said = verdicts(d, rule.min_effect, rule, looks, family_size=1)[..., 0]
    for study, row in zip(d[..., 0], said, strict=True):
        for n, verdict in zip(looks, row, strict=True):
            assert decide(PairedSample.of("arm", study[:n] + 8.0, np.full(n, 8.0)), rule).verdict == verdict
    assert len(set(said.ravel())) == 5


def test_looks_of_plans():
    assert list(looks_of(RULE, 3)) == list(range(4, 13))
    assert list(looks_of(FIXED, 3)) == [8]
    at_hand = RULE.model_copy(update={"plan": "fixed", "fixed_n": "at_hand"})
    assert list(looks_of(at_hand, 6)) == [6]
    assert list(looks_of(at_hand, 3)) == []
    assert false_go_rate(np.arange(3.0), at_hand, family_size=1).value == 0


def test_false_go_rate_is_free_of_scale_and_centre_and_deterministic():
    x = np.array([0.3, -0.2, 0.5, 0.1, -0.7])
    here = false_go_rate(x, RULE, family_size=1, studies=2_000, seed=3)
    assert false_go_rate(4 * x, RULE, family_size=1, studies=2_000, seed=3) == here
    assert false_go_rate(x, RULE, family_size=1, studies=2_000, seed=4).value != here.value
    assert here.standard_error == pytest.approx(np.sqrt(here.value * (1 - here.value) / 2_000), rel=0.01)
    assert here.usual_low < here.value
    assert "5 pairs are a rough picture" in here.sentence


def test_a_larger_family_says_go_more_rarely_to_one_of_its_arms():
    x = np.random.default_rng(5).standard_normal(30)
    alone, among = (false_go_rate(x, RULE, family_size=k, studies=20_000).value for k in (1, 3))
    assert among < 0.6 * alone


def test_a_rate_of_zero_is_not_called_certain():
    never = false_go_rate(
        np.array([1.0, -1.0, 0.5]), FIXED.model_copy(update={"n_min": 9}), family_size=1, studies=1_000
    )
    assert never.value == 0
    assert 0 < never.standard_error < 0.002


@pytest.mark.parametrize("x", [[1.0], [1.0, np.nan], [2.0, 2.0, 2.0], [[1.0, 2.0], [3.0, 2.0]]])
def test_residuals_without_noise_are_refused(x):
    with pytest.raises(ValueError, match="residuals of shape"):
        false_go_rate(np.array(x), RULE, family_size=2)


def test_what_is_not_simulated_is_refused():
    x = np.arange(6.0)
    with pytest.raises(ValueError, match="family_size 1 is under the 2 arms"):
        false_go_rate(np.column_stack([x, x**2]), RULE, family_size=1)
    with pytest.raises(ValueError, match="only Holm's"):
        false_go_rate(x, FIXED.model_copy(update={"correction": "dunnett"}), family_size=2)


def test_an_amended_dunnett_rule_errs_as_holms_does():
    x = np.random.default_rng(1).standard_normal((8, 2))
    amended = FIXED.model_copy(update={"amended": True})
    dunnett = amended.model_copy(update={"correction": "dunnett"})
    theirs, ours = (false_go_rate(x, rule, family_size=2, studies=1_000) for rule in (amended, dunnett))
    assert ours == theirs


# --- calibration


def test_a_null_is_measured_alike_alone_and_in_company():
    here, again = (measure(NULLS[0], RULE, studies=2_000, seed=9) for _ in range(2))
    assert here == again
    assert measure(NULLS[0], RULE, studies=2_000, seed=10) != here


def test_the_measured_error_of_resampled_noise_is_false_go_rate():
    x = np.random.default_rng(2).standard_t(3, 40)
    go = measure(resampled(x), RULE, studies=40_000).errors[0]
    rate = false_go_rate(x, RULE, family_size=1, studies=40_000)
    assert go.wrong == "GO"
    assert go.promise is None
    assert "40 pairs" in go.undefined["promise"]
    assert go.rate.value == pytest.approx(rate.value, abs=5 * rate.standard_error)


def test_a_lax_rule_breaks_its_promise():
    """Heavier than promised: skewed noise under the normal null's promise."""
    lax = NULLS[2].__class__(**{**vars(NULLS[2]), "promises": NULLS[0].promises})
    assert measure(lax, RULE, studies=2_000).errors[0].outcome == "broken"


@pytest.mark.parametrize(("n_max", "ends"), [(12, [12, 20]), (96, [96, 100]), (100, [100])])
def test_a_raised_plan_goes_on_with_the_e_process_alone_up_to_the_limit(n_max, ends):
    raised = next(null for null in NULLS if null.raised_by)
    stages = raised.stages(RULE.model_copy(update={"n_max": n_max}), n_max)
    assert [looks[-1] for _, looks in stages] == ends
    assert [rule.amended for rule, _ in stages] == [False, True][: len(ends)]
    for (_, before), (_, after) in pairwise(stages):
        assert after[0] == before[-1] + 1


# --- power


def test_required_n_survives_the_gaps_of_the_library():
    """scipy's noncentral CDF is nan at n = 625, d_z = 1.5, which bisection from 10,000 pairs met on its way."""
    assert t_power(625, 1.5, 0.05) == 1.0
    assert required_n(1.5, 0.05) == 5
    for d_z in np.geomspace(0.05, 50, 60):
        assert required_n(d_z, 0.05) == next(n for n in range(2, 10_000) if t_power(n, d_z, 0.05) >= 0.8)


def test_fixed_plans_have_the_power_of_the_t_test():
    """With a margin that the mean always reaches, GO is the t-test's rejection."""
    p = power_of_plan(1.0, 1e-9, FIXED, [0.8], studies=20_000)
    for c in p.effects[0].chances:
        assert c.go == pytest.approx(t_power(c.n, 0.8, 0.05), abs=0.015)  # four binomial standard errors
    assert p.effects[0].pairs_to_detect == required_n(0.8, 0.05)
    assert abs(p.effects[0].pairs_to_go - required_n(0.8, 0.05)) <= 1


def test_chances_add_up_and_stopping_is_for_good():
    p = power_of_plan(0.002, 0.0015, RULE.model_copy(update={"price_per_pair_usd": 7.0}), [0.0, 0.003], studies=4_000)
    for e in p.effects:
        for c in e.chances:
            assert c.go + c.no_go + c.equivalent + c.inconclusive == pytest.approx(1)
            assert c.cost_usd == 7 * c.n
        for name in ("go", "no_go", "equivalent"):
            assert np.all(np.diff([getattr(c, name) for c in e.chances]) >= 0)
        # E[N] = n_min + sum over looks before the last of the chance to go on.
        assert e.expected_pairs == pytest.approx(4 + sum(c.inconclusive for c in e.chances[:-1]))
    none, twice = p.effects
    assert none.chances[-1].go < 0.05 < 0.9 < twice.chances[-1].go
    assert none.pairs_to_go is None


def test_power_depends_on_ratios_only():
    here = power_of_plan(1.0, 0.5, RULE, [1.0], studies=2_000)
    there = power_of_plan(4.0, 2.0, RULE, [4.0], studies=2_000)
    assert here.effects[0].chances == there.effects[0].chances


def test_sd_interval_and_sd_of_a_difference():
    assert sd_interval(2.0, 7) == pytest.approx(2 * np.sqrt(6 / stats.chi2.ppf([0.975, 0.025], 6)))
    assert sd_of_difference(3.0, 0.5) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="correlation"):
        sd_of_difference(3.0, 1.0)


def test_a_margin_of_nothing_is_refused():
    with pytest.raises(ValueError, match="both should be positive"):
        power_of_plan(1.0, 0.0, RULE, [0.0])
