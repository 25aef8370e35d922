"""Laws of the comparison without pairs: agreement with scipy and statsmodels, symmetries, censoring, error rates."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower

from muonlab.registry.verdict import Verdict
from muonlab.stats.effect import required_n
from muonlab.stats.rule import Rule
from muonlab.stats.speed import unpaired_speed_p
from muonlab.stats.unpaired import UnpairedSample, decide_unpaired, median_of_steps, runs_per_arm

RULE = Rule(min_effect=0.01, min_effect_unit="nats", plan="fixed", fixed_n="at_hand")
BASE = (2.012, 2.031, 1.995, 2.044, 2.018, 2.009)
CHAL = (1.981, 2.004, 1.977, 2.013)
NEVER = math.inf


def losses(baseline=BASE, challenger=CHAL, margin=0.01, **given):
    return UnpairedSample(arm="arm", baseline=baseline, challenger=challenger, outcome="loss", margin=margin, **given)


def steps(baseline, challenger, margin=0.01, end=4000.0, **given):
    ends = {"baseline_ends": (end,) * len(baseline), "challenger_ends": (end,) * len(challenger)} | given
    return UnpairedSample(arm="arm", baseline=baseline, challenger=challenger, outcome="steps", margin=margin, **ends)


def decide(sample, rule=RULE):
    return decide_unpaired([sample], rule)[0]


floats = st.lists(st.floats(1.0, 4.0), min_size=2, max_size=12)
outcomes = pytest.mark.parametrize("outcome", ["loss", "steps"])


@settings(max_examples=30, deadline=None)
@given(x=floats, y=floats, margin=st.floats(0.001, 0.5))
def test_welch_is_scipys(x, y, margin):
    if np.std(x) + np.std(y) < 1e-3:
        return
    found = decide(losses(tuple(x), tuple(y), margin))
    theirs = stats.ttest_ind(x, y, equal_var=False)
    assert found.method == "welch"
    assert found.t == pytest.approx(theirs.statistic, rel=1e-9, abs=1e-9)
    assert found.df == pytest.approx(theirs.df)
    assert found.p_two_sided == pytest.approx(theirs.pvalue, abs=1e-12)
    assert found.ci95 == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    shifted = {"p_improves": 0.0, "p_below_margin": margin, "p_above_minus_margin": -margin}
    for name, null in shifted.items():
        side = "less" if name == "p_below_margin" else "greater"
        expected = stats.ttest_ind(np.array(x) - null, y, equal_var=False, alternative=side).pvalue
        assert getattr(found, name) == pytest.approx(expected, abs=1e-12)


def test_steps_are_compared_as_logs():
    base, chal = (3100.0, 3150.0, 3080.0, 3120.0), (2900.0, 3000.0, 2950.0, 2990.0, 2940.0)
    found = decide(steps(base, chal))
    theirs = stats.ttest_ind(np.log(base), np.log(chal), equal_var=False)
    assert found.p_two_sided == pytest.approx(theirs.pvalue)
    ratio = stats.gmean(chal) / stats.gmean(base)
    assert found.effect_pct == pytest.approx(100 * (1 - ratio))
    assert found.effect_margin == pytest.approx(-math.log(0.99))
    low, high = theirs.confidence_interval(0.95)
    assert found.ci95_pct == pytest.approx((100 * (1 - math.exp(-low)), 100 * (1 - math.exp(-high))))


def test_one_run_that_never_arrives_makes_it_mann_whitney_with_that_run_last():
    base, chal = (3100.0, 3150.0, 3080.0, 3120.0, NEVER), (2900.0, 3000.0, 3111.0, 2990.0, 2940.0)
    found = decide(steps(base, chal))
    last = tuple(9e9 if x == NEVER else x for x in base)
    assert found.method == "mann-whitney"
    assert found.baseline_never == 1
    for name, slow, fast in (
        ("p_improves", last, chal),
        ("p_below_margin", chal, np.multiply(last, 0.99)),
        ("p_above_minus_margin", np.divide(last, 0.99), chal),
    ):
        exact = stats.mannwhitneyu(fast, slow, alternative="less", method="exact").pvalue
        assert getattr(found, name) == pytest.approx(exact, abs=1e-12)
    assert found.ci95 is None
    assert "median" in found.undefined["ci95"]


def test_a_run_that_never_arrives_is_never_dropped():
    base, chal = (3100.0, 3150.0, 3080.0, 3120.0, 3105.0), (2900.0, 3000.0, 2950.0, 2990.0, 2940.0)
    p = [decide(steps(base, (*chal[: 5 - k], *[NEVER] * k))).p_improves for k in range(1, 5)]
    assert p == sorted(p)
    assert p[-1] > 0.5
    assert decide(steps(base, (*chal, NEVER))).n_challenger == 6


def test_a_short_run_that_never_arrives_proves_nothing_about_one_that_arrived_later():
    # Every baseline run ended at 120 and every challenger run arrived after it: nothing was seen of the difference.
    base, chal = (NEVER,) * 8, tuple(150.0 + i for i in range(8))
    literal = unpaired_speed_p(base, chal)
    found = decide(steps(base, chal, baseline_ends=(120.0,) * 8, challenger_ends=(200.0,) * 8))
    assert literal < 0.001
    assert found.p_improves == 1
    assert found.verdict is Verdict.INCONCLUSIVE
    same_length = decide(steps(base, chal, end=200.0))
    assert same_length.p_improves == pytest.approx(literal)
    assert same_length.verdict is Verdict.GO


def test_go_counts_on_no_more_than_the_baselines_last_steps_allow():
    # It arrives half a percent before the baseline's runs end without arriving: better, by an unknown amount.
    base, chal = (NEVER,) * 8, tuple(199.0 + i / 100 for i in range(8))
    found = decide(steps(base, chal, end=200.0))
    assert found.p_adjusted < 0.05
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "at least 0.48" in found.reasons[0]
    diverged = decide(steps(base, chal, end=200.0, baseline_ends=(math.inf,) * 8, baseline_diverged=8))
    assert diverged.verdict is Verdict.GO


@outcomes
def test_exchanging_the_arms_turns_the_effect_and_the_tests(outcome):
    make = losses if outcome == "loss" else lambda x, y: steps(tuple(1000 * v for v in x), tuple(1000 * v for v in y))
    one, two = decide(make(BASE, CHAL)), decide(make(CHAL, BASE))
    assert two.effect == pytest.approx(-one.effect)
    assert two.p_improves == pytest.approx(1 - one.p_improves)
    assert two.p_below_margin == pytest.approx(one.p_above_minus_margin)


def test_order_of_the_runs_changes_nothing():
    one, two = decide(losses()), decide(losses(BASE[::-1], CHAL[::-1]))
    assert two.p_improves == pytest.approx(one.p_improves)
    assert two.verdict is one.verdict


def test_family_is_corrected_by_holm():
    rng = np.random.default_rng(3)
    base = tuple(2 + 0.01 * rng.standard_normal(6))
    samples = [
        losses(base, tuple(2 - shift + 0.01 * rng.standard_normal(6))).model_copy(update={"arm": f"arm {shift}"})
        for shift in (0.0, 0.01, 0.02, 0.03)
    ]
    found = decide_unpaired(samples, RULE)
    expected = multipletests([f.p_improves for f in found], method="holm")[1]
    assert [f.p_adjusted for f in found] == pytest.approx(list(expected))
    alone = [decide(sample).p_adjusted for sample in samples]
    assert alone == [f.p_improves for f in found]


@pytest.mark.parametrize(
    ("challenger", "verdict"),
    [
        ((1.95, 1.951, 1.949, 1.952), Verdict.GO),
        ((2.0, 2.001, 1.999, 2.002), Verdict.EQUIVALENT),
        ((2.05, 2.051, 2.049, 2.052), Verdict.NO_GO),
        ((1.95, 2.04, 1.99, 2.0), Verdict.INCONCLUSIVE),
    ],
)
def test_verdicts_are_those_of_pairs(challenger, verdict):
    assert decide(losses((2.0, 2.001, 1.9995, 2.0015), challenger)).verdict is verdict


GOOD = {"baseline": (2.0, 2.001, 1.9995, 2.0015), "challenger": (1.95, 1.951, 1.949, 1.952)}


def test_what_forbids_a_go():
    assert decide(losses(**GOOD, early_regress=0.03)).verdict is Verdict.NO_GO
    assert decide(losses(**GOOD, challenger_diverged=1)).verdict is Verdict.NO_GO
    capped = decide(losses(**GOOD, provenance="reported"))
    assert capped.verdict is Verdict.INCONCLUSIVE
    assert "uncapped: GO" in " ".join(capped.reasons)
    assert decide(losses(**GOOD, integrity_failures=("a digest differs",))).verdict is Verdict.INVALID
    assert decide(losses((2.0, 2.001, 2.002), GOOD["challenger"])).verdict is Verdict.INCONCLUSIVE
    assert decide(losses((2.0,) * 4, GOOD["challenger"])).verdict is Verdict.INVALID


def test_equal_rates_of_divergence_are_not_instability():
    # 2 of 8 against 1 of 4: the same rate, so that the verdict is not NO_GO for instability, and no GO either.
    found = decide(losses(GOOD["baseline"] * 2, GOOD["challenger"], baseline_diverged=2, challenger_diverged=1))
    assert not any("instability" in reason for reason in found.reasons)
    assert found.verdict is Verdict.NO_GO
    worse = decide(losses(GOOD["baseline"] * 2, GOOD["challenger"], baseline_diverged=1, challenger_diverged=1))
    assert "instability" in worse.reasons[1]


def test_only_a_fixed_plan_and_a_proper_family_are_accepted():
    with pytest.raises(ValueError, match="fixed plan"):
        decide(losses(), RULE.model_copy(update={"plan": "sequential", "fixed_n": None}))
    with pytest.raises(ValueError, match="each once"):
        decide_unpaired([losses(), losses()], RULE)
    with pytest.raises(ValueError, match="diverged loss"):
        losses((2.0, NEVER), (2.0, 2.1))
    with pytest.raises(ValueError, match="last step"):
        steps((2.0, 2.5), (2.0, 2.1), baseline_ends=())


@pytest.mark.parametrize(("sd", "effect"), [(0.01, 0.01), (0.01, 0.004), (0.02, 0.05)])
def test_runs_per_arm_agree_with_statsmodels_at_equal_variances(sd, effect):
    theirs = TTestIndPower().solve_power(effect / sd, alpha=0.05, power=0.8, alternative="larger")
    assert runs_per_arm(sd, sd, effect, 0.05) == math.ceil(theirs)


def test_runs_per_arm_fall_as_the_effect_grows():
    # The library's noncentral t is nan in places far out, where the search must not get lost.
    for sd in (0.0015, 0.01):
        runs = [runs_per_arm(0.005, sd, effect, 0.05) for effect in np.geomspace(0.002, 0.5, 400)]
        assert runs == sorted(runs, reverse=True)
        assert runs[-1] == 2


def test_what_pairing_would_save_is_said_for_both_correlations():
    found = decide(losses())
    x, y = np.std(BASE, ddof=1), np.std(CHAL, ddof=1)
    expected = tuple(required_n(0.01 / math.sqrt(x * x + y * y - 2 * rho * x * y), 0.05) for rho in (0.5, 0.9))
    assert found.pairs_80 == expected
    assert found.runs_per_arm_80 > found.pairs_80[0] > found.pairs_80[1]
    sentence = found.reasons[-1]
    assert sentence.startswith("unpaired: ")
    assert f"{found.runs_per_arm_80} runs per arm" in sentence
    assert f"{expected[0]} at 0.5 and {expected[1]} at 0.9" in sentence
    assert "assumed" in sentence


def test_what_pairing_would_save_is_said_from_the_quartiles_where_a_run_never_arrives():
    base, chal = (3000.0, 3010.0, 3020.0, 3030.0, NEVER), (2900.0, 2910.0, 2920.0, 2930.0, 2940.0)
    found = decide(steps(base, chal))
    spread = [np.log(3030 / 3010) / 1.349, np.std(np.log(chal), ddof=1)]
    assert found.runs_per_arm_80 == runs_per_arm(*spread, -math.log(0.99), 0.05)
    assert "quartiles" in found.reasons[-1]
    unknown = decide(steps((3000.0, 3010.0, 3020.0, NEVER, NEVER), chal))
    assert unknown.runs_per_arm_80 is None
    assert "unknown" in unknown.reasons[-1]


@pytest.mark.parametrize("n", [6, 9, 10, 30])
def test_interval_of_the_median_covers_95_percent_and_one_rank_less_would_not(n):
    found = median_of_steps(np.arange(1.0, n + 1))
    k = int(found.low) - 1
    assert found.high == n - k
    assert 2 * stats.binom.cdf(k, n, 0.5) <= 0.05 < 2 * stats.binom.cdf(k + 1, n, 0.5)


def test_median_with_runs_that_never_arrive():
    few = median_of_steps([1.0, 2.0, 3.0, NEVER, 5.0])
    assert (few.median, few.low, few.never) == (3.0, None, 1)
    assert "needs 6 runs" in few.undefined["low"]
    some = median_of_steps([*range(1, 9), NEVER, NEVER])
    assert (some.median, some.low, some.high) == (5.5, 2.0, None)
    most = median_of_steps([1.0, *[NEVER] * 7])
    assert (most.median, most.low, most.high) == (None, 1.0, None)


def test_false_go_of_unpaired_arms_of_unequal_size_and_spread_is_at_most_alpha():
    # The hardest setting: no effect, and hardly any is asked for. 4 binomial standard errors over 5 %.
    rng = np.random.default_rng(0)
    studies = 600
    samples = [
        losses(tuple(2 + 0.01 * rng.standard_normal(6)), tuple(2 + 0.003 * rng.standard_normal(9)), 1e-9)
        for _ in range(studies)
    ]
    go = sum(decide(sample).verdict is Verdict.GO for sample in samples)
    assert go / studies <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / studies)
    assert go / studies >= 0.05 - 4 * math.sqrt(0.05 * 0.95 / studies)


@pytest.mark.slow
def test_false_go_of_censored_arms_is_at_most_alpha():
    # 5 against 5 runs, a third of which never arrive: Mann-Whitney, exact over 252 splits.
    rng = np.random.default_rng(1)
    studies = 80
    go = 0
    for _ in range(studies):
        drawn = 1000 * np.exp(0.01 * rng.standard_normal((2, 5)))
        base, chal = (tuple(np.where(side > 1004, NEVER, side)) for side in drawn)
        go += decide(steps(base, chal, margin=1e-9, end=1004.0)).p_improves <= 0.05
    assert go / studies <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / studies)
