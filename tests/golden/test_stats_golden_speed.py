"""Golden numbers of speed to target and of the blocked Dunnett test; origin: the protocol's worked examples."""

import numpy as np
import pytest
from scipy import stats

from muonlab.stats.dunnett import blocked_dunnett, dunnett_p
from muonlab.stats.selection import expected_maximum
from muonlab.stats.speed import grid_bracket, speed_to_target, steps_to_target

STEPS = [50, 100, 150, 200]
BASELINE = [2.60, 2.40, 2.30, 2.24]
CHALLENGER = [2.70, 2.35, 2.26, 2.20]


@pytest.mark.parametrize(
    ("target", "baseline", "challenger"),
    [(2.30, 150, 127.778), (2.24, 200, 166.667), (2.22, float("inf"), 183.333)],
)
def test_steps_to_target(target, baseline, challenger):
    assert steps_to_target(STEPS, BASELINE, target) == pytest.approx(baseline, rel=1e-12)
    assert steps_to_target(STEPS, CHALLENGER, target) == pytest.approx(challenger, abs=5e-4)


@pytest.mark.parametrize("target", [2.30, 2.24, 2.45])
def test_steps_to_target_dense_grid_route(target):
    """A line of a million points instead of the interpolation formula."""
    fine = np.linspace(50, 200, 1_500_001)
    for losses in (BASELINE, CHALLENGER):
        first = fine[np.argmax(np.interp(fine, STEPS, losses) <= target + 1e-12)]
        assert steps_to_target(STEPS, losses, target) == pytest.approx(first, abs=2e-4)


def test_the_reported_33_percent_is_one_cell_of_the_grid():
    # Reported: a plateau at step 150 against step 100, evaluated every 50 steps.
    steps, target = [50, 100, 150], 2.3
    baseline, challenger = [2.5, 2.4, 2.3], [2.4, 2.3, 2.3]
    assert grid_bracket(steps, baseline, target) == (100, 150)
    assert grid_bracket(steps, challenger, target) == (50, 100)
    speed = speed_to_target(steps, [baseline], [challenger], target=target)
    assert speed.steps_saved_pct == pytest.approx(100 / 3)
    assert speed.grid_saved_pct == pytest.approx((0, 200 / 3))


def losses(*x):
    return 2 + 1e-4 * np.array(x)


G1_BASELINE = losses(623, 641, 610, 635, 618)
ARMS = np.array([losses(602, 637, 575, 624, 609), losses(590, 601, 588, 602, 581), losses(630, 633, 617, 641, 611)])


def test_blocked_dunnett():
    result = blocked_dunnett(G1_BASELINE, ARMS)
    assert result.df == 12
    for p, printed, unit in zip(result.p_adjusted, [0.0211448, 0.0001304, 0.8075], [1e-7, 1e-7, 1e-4], strict=True):
        assert p == pytest.approx(printed, rel=0, abs=unit / 2)


def test_blocked_dunnett_multivariate_t_route():
    result = blocked_dunnett(G1_BASELINE, ARMS)
    joint = stats.multivariate_t(shape=(np.eye(3) + 1) / 2, df=12, seed=0)
    for t, p in zip(result.t, result.p_adjusted, strict=True):
        # The library integrates by quasi-Monte-Carlo, to about 1e-5 with these points.
        assert p == pytest.approx(1 - joint.cdf([t] * 3, maxpts=200_000), abs=5e-5)


def test_blocked_dunnett_variance_route():
    """Residual mean square from a regression on arm and seed indicators."""
    y = np.vstack([G1_BASELINE, ARMS])
    arm, seed = np.indices(y.shape)
    design = np.column_stack([*(arm.ravel() == a for a in range(4)), *(seed.ravel() == s for s in range(1, 5))])
    residual = y.ravel() - design @ np.linalg.lstsq(design.astype(float), y.ravel(), rcond=None)[0]
    mean_square = residual @ residual / 12
    t = (y[0].mean() - y[1:].mean(axis=1)) / np.sqrt(2 * mean_square / 5)
    assert blocked_dunnett(G1_BASELINE, ARMS).t == pytest.approx(t, rel=1e-9)


def test_one_challenger_is_a_t_test():
    assert dunnett_p(1.7, 1, 9) == pytest.approx(stats.t.sf(1.7, 9), rel=1e-6)


@pytest.mark.parametrize(("seeds", "bias"), [(1, 1.4), (6, 0.58)])
def test_selection_bias_of_eight_null_arms(seeds, bias):
    assert expected_maximum(8) / np.sqrt(seeds) == pytest.approx(bias, abs=0.03)
