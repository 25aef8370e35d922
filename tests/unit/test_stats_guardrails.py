"""Early regress, divergence and identical curves on small curves worked out by hand."""

import numpy as np
import pytest

from muonlab.stats.guardrails import diverged, early_regress, identical_curves

STEPS = [50, 100, 150, 200, 500]


def test_the_reported_early_instability():
    # The reported 1B runs: step 100 of 500 is 9.38 % worse, the end 0.1 % better.
    regress = early_regress([100, 500], [[2.1059, 2.0623]], [[2.3034, 2.0602]], total_steps=500)
    assert regress == pytest.approx(0.0938, abs=5e-5)


def test_it_is_the_largest_over_evaluations_of_the_mean_over_seeds():
    baseline = np.full((2, 5), 2.0)
    challenger = baseline.copy()
    challenger[0, 0], challenger[1, 0] = 2.4, 1.8  # +20 % and -10 %: mean +5 %
    challenger[:, 1] = 2.06  # +3 %
    challenger[:, 3] = 4.0  # step 200 is after 30 % of 500 steps
    assert early_regress(STEPS, baseline, challenger, total_steps=500) == pytest.approx(0.05)


def test_the_evaluation_at_30_percent_counts():
    challenger = [[2.0, 2.0, 2.2, 2.0, 2.0]]
    assert early_regress(STEPS, [[2.0] * 5], challenger, total_steps=500) == pytest.approx(0.1)


def test_without_early_evaluations_it_is_undefined():
    assert early_regress([400, 500], [[2.0, 2.0]], [[3.0, 2.0]], total_steps=500) is None


def test_a_loss_that_is_not_finite_counts_as_the_diverged_loss_or_is_refused():
    baseline, challenger = [[2.0] * 5], [[float("nan")] * 5]
    assert early_regress(STEPS, baseline, challenger, total_steps=500, diverged_loss=10.0) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="diverged_loss"):
        early_regress(STEPS, baseline, challenger, total_steps=500)


def test_curves_of_different_seeds_are_refused():
    with pytest.raises(ValueError, match="same seeds and steps"):
        early_regress(STEPS, np.ones((2, 5)), np.ones((3, 5)), total_steps=500)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([10, 6, 4, 3.5], False),
        ([10, 6, 4, 6.1], False),  # one evaluation above 1.5 times the running minimum is a spike
        ([10, 4, 6.1, 4, 6.1], True),
        ([10, 4, 6.0, 6.0], False),  # exactly 1.5 times is not above
        ([10, float("nan"), 4], True),
        ([10, 4, float("inf")], True),
        ([4, 6.1, 6.2], True),
        ([], False),
    ],
)
def test_divergence(losses, expected):
    assert diverged(losses) is expected


def test_identical_curves():
    assert identical_curves([3.0, 2.0], [3.0, 2.0])
    assert not identical_curves([3.0, 2.0], [3.0, 2.0000001])
    assert not identical_curves([2.0], [2.0])  # equal finals alone happen by rounding
