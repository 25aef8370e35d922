"""Speed to target with censoring, instability, selection and meta-analysis."""

import numpy as np
import pytest
from scipy import stats

from muonlab.stats.dunnett import blocked_dunnett
from muonlab.stats.instability import instability
from muonlab.stats.meta import across_sizes
from muonlab.stats.selection import expected_maximum, selection_note
from muonlab.stats.speed import (
    log_ratio_over_levels,
    speed_to_target,
    steps_to_target,
    unpaired_speed_p,
)

STEPS = np.arange(50, 501, 50)


def curve(speed=1.0, offset=0.0):
    """A power law in steps; `speed` times as fast means the same loss at step / speed."""
    return 2.0 + 4.0 * (STEPS * speed) ** -0.5 + offset


def curves(*speeds):
    return np.array([curve(speed) for speed in speeds])


# --- speed


def test_a_uniform_speedup_is_found_by_both_definitions():
    base, chal = curves(1, 1, 1), curves(1.25, 1.3, 1.2)
    for target in (None, float(curve()[-2])):
        speed = speed_to_target(STEPS, base, chal, target=target)
        # Linear interpolation of a convex curve overestimates both times alike: 1 % remains.
        assert speed.geometric_mean_ratio == pytest.approx((1.25 * 1.3 * 1.2) ** (1 / 3), rel=0.01)
        assert speed.p_one_sided < 0.01
        assert speed.ratio_ci95[0] < speed.geometric_mean_ratio < speed.ratio_ci95[1]


def test_swapping_the_arms_inverts_the_ratio_at_a_target():
    base, chal, target = curves(1, 1.02, 0.97), curves(1.3, 1.2, 1.4), float(curve(0.9)[-1])
    here = speed_to_target(STEPS, base, chal, target=target)
    there = speed_to_target(STEPS, chal, base, target=target)
    assert there.geometric_mean_ratio == pytest.approx(1 / here.geometric_mean_ratio)
    assert there.sign_p_two_sided == here.sign_p_two_sided


def test_p_is_the_paired_t_on_log_steps():
    base, chal, target = curves(1, 1.02, 0.97), curves(1.3, 1.2, 1.4), float(curve(0.9)[-1])
    times = [[steps_to_target(STEPS, c, target) for c in arm] for arm in (base, chal)]
    library = stats.ttest_rel(np.log(times[0]), np.log(times[1]), alternative="greater")
    assert speed_to_target(STEPS, base, chal, target=target).p_one_sided == pytest.approx(library.pvalue, rel=1e-9)


def test_a_censored_pair_is_counted_not_dropped():
    base, chal = curves(1, 1, 1, 1, 1), curves(1.2, 1.3, 1.2, 1.25, 0.5)
    target = float(curve()[-1])
    speed = speed_to_target(STEPS, base, chal, target=target)
    assert (speed.challenger_never, speed.baseline_never) == (1, 0)
    assert speed.geometric_mean_ratio is None
    assert "0 baseline and 1 challenger runs never arrive" in speed.undefined["geometric_mean_ratio"]
    assert speed.median_ratio == pytest.approx(1.2, rel=0.01)
    assert speed.sign_p_one_sided == pytest.approx(stats.binomtest(4, 5, alternative="greater").pvalue)


def test_neither_arriving_is_a_tie():
    speed = speed_to_target(STEPS, curves(1, 1), curves(1.1, 1.1), target=1.0)
    assert (speed.baseline_never, speed.challenger_never) == (2, 2)
    assert speed.sign_p_one_sided is None
    assert speed.undefined["sign_p_one_sided"] == "every pair is a tie"


def test_a_challenger_that_ends_far_behind_is_censored_over_levels():
    broken = np.full(STEPS.size, np.nan)
    assert log_ratio_over_levels(STEPS, curve(), curve(offset=1.0)) == -np.inf
    assert log_ratio_over_levels(STEPS, curve(), broken) == -np.inf
    assert log_ratio_over_levels(STEPS, broken, curve()) == np.inf
    assert log_ratio_over_levels(STEPS, broken, broken) == 0


def test_a_bounce_does_not_undo_an_arrival_and_nan_never_arrives():
    assert steps_to_target([1, 2, 3, 4], [4.0, 2.0, 5.0, 1.0], 2.0) == 2
    assert steps_to_target([1, 2, 3], [4.0, np.nan, np.nan], 2.0) == np.inf
    assert steps_to_target([1, 2, 3], [np.nan, 2.0, 1.0], 2.0) == 2


def test_unpaired_censored_runs_rank_last():
    base, chal = [400, 450, np.inf, np.inf], [300, 310, 320, 330]
    assert unpaired_speed_p([400, 410, 420, 430], chal) == pytest.approx(1 / 70)
    assert unpaired_speed_p(base, chal) == pytest.approx(1 / 70)
    assert unpaired_speed_p(chal, base) == pytest.approx(1.0)


def test_curves_of_other_seeds_are_refused():
    with pytest.raises(ValueError, match="same seeds and steps"):
        speed_to_target(STEPS, curves(1, 1), curves(1, 1, 1))


# --- instability


def noisy(seed, scale=1e-3, n=3):
    return curve() + scale * np.random.default_rng(seed).standard_normal((n, STEPS.size))


def test_regress_by_seed_mean_and_worst():
    base = np.full((2, STEPS.size), 2.0)
    base += 1e-3 * np.random.default_rng(0).standard_normal(base.shape)
    chal = base.copy()
    chal[0, 1] = base[0, 1] * 1.08
    chal[1, 2] = base[1, 2] * 1.02
    result = instability(STEPS, base, chal, total_steps=500)
    assert result.regress_by_seed == pytest.approx((0.08, 0.02))
    assert (result.worst_regress, result.mean_regress) == pytest.approx((0.08, 0.05))


def test_a_spike_is_counted_and_raises_the_variance():
    base, chal = noisy(1), noisy(2)
    before = instability(STEPS, base, chal, total_steps=500)
    chal[1, 6] += 0.1
    after = instability(STEPS, base, chal, total_steps=500)
    assert after.challenger_spikes == before.challenger_spikes + 1
    assert after.baseline_spikes == before.baseline_spikes
    assert after.residual_variance_ratio > 10 * before.residual_variance_ratio


def test_an_arm_against_itself_is_as_stable_as_itself():
    base = noisy(3)
    result = instability(STEPS, base, base, total_steps=500)
    assert (result.worst_regress, result.residual_variance_ratio) == (0, 1)


def test_too_few_evaluations_are_named():
    result = instability(STEPS[:4], noisy(3)[:1, :4], noisy(4)[:1, :4], total_steps=500)
    assert "fewer than 5 residuals" in result.undefined["residual_variance_ratio"]
    late = instability(STEPS[5:], noisy(3)[:, 5:], noisy(4)[:, 5:], total_steps=500)
    assert late.undefined["worst_regress"] == "no evaluation in the first 30% of the steps"


def test_losses_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite losses"):
        instability(STEPS, noisy(1), np.full((3, STEPS.size), np.nan), total_steps=500)


# --- selection


@pytest.mark.parametrize("k", [2, 3, 8, 20])
def test_expected_maximum_against_simulation(k):
    x = np.random.default_rng(k).standard_normal((200_000, k)).max(axis=1)
    assert expected_maximum(k) == pytest.approx(x.mean(), abs=0.01)
    assert expected_maximum(2) == pytest.approx(1 / np.sqrt(np.pi))


def test_a_pick_is_not_confirmed_on_its_own_seeds():
    note = selection_note(8, range(3), range(2, 6))
    assert note.reused_seeds == (2,)
    assert "seeds 2 picked it and cannot confirm it" in note.sentence
    assert "confirm it on seeds" in selection_note(8, range(3), []).sentence
    with pytest.raises(ValueError, match="two arms"):
        selection_note(1, range(3), [])


# --- Dunnett and the meta-analysis


def test_dunnett_holds_its_level_under_equal_variances():
    rng = np.random.default_rng(5)
    p = [min(blocked_dunnett(y[0], y[1:]).p_adjusted) for y in rng.standard_normal((600, 4, 5))]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.036)  # four binomial standard errors


@pytest.mark.parametrize("challengers", [np.ones((2, 3)), np.ones((2, 5))])
def test_dunnett_refuses_other_seeds_and_no_variance(challengers):
    with pytest.raises(ValueError, match="dunnett"):
        blocked_dunnett(np.full(5, 2.0), challengers)


def test_a_gain_that_fades_with_scale_is_not_called_surviving():
    fading = across_sizes([0.5, 0.1, -0.2], [0.03, 0.03, 0.03])
    assert fading.p_heterogeneity < 0.001
    assert "the sizes disagree" in fading.sentence
    assert "not established" in fading.sentence
    steady = across_sizes([0.50, 0.52, 0.49], [0.03, 0.03, 0.03])
    assert steady.ci95[0] > 0
    assert "no disagreement between the sizes is established" in steady.sentence


def test_random_effects_second_route():
    """Paule-Mandel by bisection: tau^2 at which the weighted sum of squares equals its J - 1 degrees of freedom."""
    effect, variance = np.array([0.5, 0.1, 0.3, 0.7]), np.array([0.04, 0.06, 0.05, 0.08]) ** 2
    low, high = 0.0, 10.0
    for _ in range(200):
        tau2 = (low + high) / 2
        w = 1 / (variance + tau2)
        mean = (w * effect).sum() / w.sum()
        low, high = (tau2, high) if (w * (effect - mean) ** 2).sum() > 3 else (low, tau2)
    result = across_sizes(effect, np.sqrt(variance))
    assert result.pooled == pytest.approx(mean, rel=1e-5)
    assert result.tau == pytest.approx(np.sqrt(tau2), rel=1e-4)
    half = stats.t.ppf(0.975, 3) / np.sqrt(w.sum())
    assert result.ci95 == pytest.approx((mean - half, mean + half), rel=1e-4)
    w = 1 / variance
    q = (w * (effect - (w * effect).sum() / w.sum()) ** 2).sum()
    assert result.q == pytest.approx(q)
    assert result.p_heterogeneity == pytest.approx(stats.chi2.sf(q, 3))


def test_agreeing_sizes_do_not_shrink_the_interval_below_their_variances():
    result = across_sizes([0.5, 0.5, 0.5001], [0.1, 0.1, 0.1])
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    assert result.ci95[1] - result.ci95[0] >= 2 * half * 0.999
