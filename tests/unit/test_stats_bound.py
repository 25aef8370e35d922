"""The one-sided bound under a study's plan: the inverse of the test that decides, and its calibration at every look."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from muonlab.stats.bound import lower_bound
from muonlab.stats.kernel import Evidence, rejects
from muonlab.stats.rule import Rule
from muonlab.stats.sample import moments

ALPHA = 0.05
SEQUENTIAL = Rule(min_effect=1.0, min_effect_unit="nats", n_max=8)
FIXED_2 = Rule(min_effect=1.0, min_effect_unit="nats", plan="fixed", fixed_n=2, n_min=2)
FIXED_6 = Rule(min_effect=1.0, min_effect_unit="nats", plan="fixed", fixed_n=6)
AMENDED = Rule(min_effect=1.0, min_effect_unit="nats", plan="fixed", fixed_n=6, amended=True)
LATE = SEQUENTIAL.model_copy(update={"n_min": 6, "amended": True})  # amended: no t* to simulate
RULES = [SEQUENTIAL, LATE, FIXED_2, FIXED_6, AMENDED]

values = st.lists(st.integers(-1000, 1000), min_size=2, max_size=9).filter(lambda x: len(set(x)) > 1)


@settings(deadline=None)
@given(x=values, c=st.integers(-2000, 2000), rule=st.sampled_from(RULES), level=st.sampled_from([ALPHA, ALPHA / 2]))
def test_a_value_is_under_the_bound_where_the_plans_test_rejects_it(
    x: list[int], c: int, rule: Rule, level: float
) -> None:
    d = np.array(x, dtype=float)
    mean, ss = moments(d - c)
    rejected = bool(rejects(Evidence(n=d.size, mean=np.array(mean), ss=ss, g=rule.g), d.size, level, rule))
    bound = lower_bound(d, level, rule)
    if bound is None:
        assert not rejected
    elif abs(bound - c) > 1e-9 * (1 + abs(c)):
        assert (bound >= c) == rejected


@settings(deadline=None)
@given(x=values, shift=st.integers(-1000, 1000))
def test_it_moves_with_the_values_and_scales_with_them(x: list[int], shift: int) -> None:
    d = np.array(x, dtype=float)
    for rule in RULES:
        bound = lower_bound(d, ALPHA, rule)
        if bound is not None:
            assert lower_bound(d + shift, ALPHA, rule) == pytest.approx(bound + shift, abs=1e-6)
            assert lower_bound(3 * d, ALPHA, rule) == pytest.approx(3 * bound, abs=1e-6)
            assert bound < d.mean()


def test_a_fixed_plan_has_the_t_bound_at_its_own_number_of_pairs_and_no_other() -> None:
    d = np.array([0.3, -0.1, 0.2, 0.4, 0.1, 0.2])
    expected = ttest_1samp(d, 0.0, alternative="greater").confidence_interval(0.95).low
    assert lower_bound(d, ALPHA, FIXED_6) == pytest.approx(expected, rel=1e-12)
    assert lower_bound(d[:5], ALPHA, FIXED_6) is None
    two = ttest_1samp(d[:2], 0.0, alternative="greater").confidence_interval(0.95).low
    assert lower_bound(d[:2], ALPHA, FIXED_2) == pytest.approx(two, rel=1e-12)


def test_a_sequential_plan_has_no_bound_before_its_first_look_and_a_sharper_one_at_its_last() -> None:
    d = np.array([0.3, -0.1, 0.2, 0.4, 0.1, 0.2, 0.15, 0.25])
    assert all(lower_bound(d[:n], ALPHA, SEQUENTIAL) is None for n in (1, 2, 3))
    assert lower_bound(d[:4], ALPHA, SEQUENTIAL) is not None
    assert lower_bound(d[:5], ALPHA, LATE) is None
    last = lower_bound(d, ALPHA, SEQUENTIAL)
    amended = lower_bound(d, ALPHA, SEQUENTIAL.model_copy(update={"amended": True}))
    assert last is not None
    assert amended is not None
    assert last > amended


def test_equal_values_have_none() -> None:
    assert lower_bound(np.full(6, 0.3), ALPHA, FIXED_6) is None
    assert lower_bound(np.full(8, 0.3), ALPHA, SEQUENTIAL) is None


def ever_wrong(rule: Rule, looks: range, studies: int) -> float:
    """In which share of studies the bound lies above the true mean 0 at some look."""
    rng = np.random.default_rng(20240605)
    wrong = 0
    for d in rng.standard_normal((studies, looks[-1])):
        bounds = (lower_bound(d[:n], ALPHA, rule) for n in looks)
        wrong += any(bound is not None and bound > 0 for bound in bounds)
    return wrong / studies


def test_it_is_wrong_in_one_of_twenty_studies_however_often_one_looks() -> None:
    studies = 6000
    error = 3 * np.sqrt(ALPHA * (1 - ALPHA) / studies)  # three standard errors of a rate of 5 %
    assert ever_wrong(SEQUENTIAL, range(2, 9), studies) < ALPHA + error
    assert abs(ever_wrong(FIXED_2, range(2, 3), studies) - ALPHA) < error


def test_the_bound_of_one_look_taken_after_every_pair_is_not_one() -> None:
    """Why a sequential plan has no t bound before its last pair: a fixed plan declared anew at every look errs."""
    rng = np.random.default_rng(20240606)
    plans = {n: FIXED_6.model_copy(update={"fixed_n": n, "n_min": 2}) for n in range(2, 9)}
    wrong = sum(
        any(bound > 0 for n in plans if (bound := lower_bound(d[:n], ALPHA, plans[n])) is not None)
        for d in rng.standard_normal((2000, 8))
    )
    assert wrong / 2000 > 0.12
