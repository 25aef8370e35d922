"""Pairing by seed: what is left out, what waits and what is refused."""

import pytest
from pydantic import ValidationError

from muonlab.registry.verdict import Verdict
from muonlab.stats.decision import decide
from muonlab.stats.effect import describe
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample, Run, pair

LOSSES = [2.062, 2.064, 2.061, 2.063, 2.0625, 2.0635, 2.0605, 2.0645]
GAINS = [0.0043, 0.0038, 0.0041, 0.0036, 0.0042, 0.0044, 0.0037, 0.0039]
SEQUENTIAL = Rule(min_effect=0.002, min_effect_unit="nats", diverged_loss=10.8)
FIXED = Rule(min_effect=0.002, min_effect_unit="nats", plan="fixed", fixed_n="at_hand")


def runs(seeds, gains=None):
    return tuple(Run(seed=s, loss=LOSSES[s] - (gains[s] if gains else 0.0)) for s in seeds)


def sample(baseline_seeds, challenger_seeds, **more):
    return PairedSample(arm="nolah", baseline=runs(baseline_seeds), challenger=runs(challenger_seeds, GAINS), **more)


def test_rows_are_paired_by_seed_not_by_position():
    shuffled = sample([3, 0, 2, 1, 4], [1, 4, 0, 3, 2])
    assert pair(shuffled, SEQUENTIAL).d == pytest.approx(GAINS[:5])
    assert decide(shuffled, SEQUENTIAL) == decide(sample(range(5), range(5)), SEQUENTIAL)


def test_a_finished_prefix_gets_a_verdict_and_the_rest_is_listed():
    decision = decide(sample(range(5), range(4)), SEQUENTIAL)
    assert decision.verdict is Verdict.GO
    assert decision.n == 4
    assert "unpaired seeds, left out: 4" in decision.reasons


def test_over_a_fifth_unpaired_is_invalid():
    for rule in (SEQUENTIAL, FIXED):
        decision = decide(sample(range(7), range(5)), rule)
        assert decision.verdict is Verdict.INVALID
        assert "seeds 5, 6 are in one arm only: 2 of 7, more than 20%" in decision.reasons[0]


def test_a_gap_is_incomplete_in_a_sequential_plan_and_left_out_of_a_fixed_one():
    gap = sample(range(6), [0, 1, 3, 4, 5])
    waiting = decide(gap, SEQUENTIAL)
    assert waiting.verdict is Verdict.INCOMPLETE
    assert "seeds 2 are missing before seed 5" in waiting.reasons[0]
    assert decide(gap, FIXED).verdict is Verdict.GO


def test_a_gap_in_both_arms_is_incomplete():
    assert decide(sample([0, 1, 3, 4], [0, 1, 3, 4]), SEQUENTIAL).verdict is Verdict.INCOMPLETE


def later(runs, by):
    return tuple(run.model_copy(update={"seed": run.seed + by}) for run in runs)


@pytest.mark.parametrize("first", [10, 100])
def test_where_the_seeds_begin_changes_no_number(first):
    """A study that confirms a selection begins at new seeds."""
    early = sample(range(6), range(6))
    moved = early.model_copy(
        update={"baseline": later(early.baseline, first), "challenger": later(early.challenger, first)}
    )
    rule = SEQUENTIAL.model_copy(update={"first_seed": first})
    assert decide(moved, rule).model_dump(exclude={"seeds"}) == decide(early, SEQUENTIAL).model_dump(exclude={"seeds"})
    assert pair(moved, rule).seeds == tuple(range(first, first + 6))
    # Without it the first of them would be waited for.
    assert decide(moved, SEQUENTIAL).verdict is Verdict.INCOMPLETE


def test_a_gap_is_counted_from_the_first_seed():
    rule = SEQUENTIAL.model_copy(update={"first_seed": 2})
    assert decide(sample(range(2, 7), range(2, 7)), rule).verdict is Verdict.GO
    waiting = decide(sample([3, 4, 5, 6], [3, 4, 5, 6]), rule)
    assert waiting.verdict is Verdict.INCOMPLETE
    assert "seeds 2 are missing before seed 6" in waiting.reasons[0]


def test_seeds_beyond_the_plan_are_left_out_and_listed():
    short = SEQUENTIAL.model_copy(update={"n_max": 5})
    decision = decide(sample(range(8), range(8)), short)
    assert decision.n == 5
    assert "seeds beyond the plan, left out: 5, 6, 7" in decision.reasons


def test_a_fixed_plan_takes_the_first_n_seeds():
    fixed = Rule(min_effect=0.002, min_effect_unit="nats", plan="fixed", fixed_n=5)
    decision = decide(sample(range(8), range(8)), fixed)
    assert decision.n == 5
    assert "seeds beyond the plan, left out: 5, 6, 7" in decision.reasons


def failing(side, *seeds):
    whole = sample(range(6), range(6))
    side_runs = tuple(Run(seed=r.seed, status="failed") if r.seed in seeds else r for r in getattr(whole, side))
    return whole.model_copy(update={side: side_runs})


def test_a_failed_cell_waits_in_a_sequential_plan():
    decision = decide(failing("challenger", 5), SEQUENTIAL)
    assert decision.verdict is Verdict.INCOMPLETE
    assert "failed cells (nolah: seeds 5)" in decision.reasons[0]


def test_unequal_failures_are_invalid_in_a_fixed_plan():
    decision = decide(failing("challenger", 5), FIXED)
    assert decision.verdict is Verdict.INVALID
    assert "unequal failures between the arms (nolah: seeds 5)" in decision.reasons[0]


def test_equal_failures_are_left_out_of_a_fixed_plan():
    both = failing("challenger", 5).model_copy(update={"baseline": failing("baseline", 5).baseline})
    decision = decide(both, FIXED)
    assert (decision.verdict, decision.n) == (Verdict.GO, 5)


def test_equal_duplicates_are_one_row_and_different_ones_invalid():
    whole = sample(range(5), range(5))
    twice = whole.model_copy(update={"challenger": whole.challenger + whole.challenger[:1]})
    assert decide(twice, SEQUENTIAL) == decide(whole, SEQUENTIAL)
    other = Run(seed=0, loss=2.0)
    decision = decide(whole.model_copy(update={"challenger": (*whole.challenger, other)}), SEQUENTIAL)
    assert decision.verdict is Verdict.INVALID
    assert "nolah, seed 0: two records with different values" in decision.reasons[0]


def test_every_pair_diverged_twice_is_invalid():
    diverged = tuple(Run(seed=s, status="diverged") for s in range(4))
    decision = decide(PairedSample(arm="nolah", baseline=diverged, challenger=diverged), SEQUENTIAL)
    assert decision.verdict is Verdict.INVALID
    assert "the workload is broken" in decision.reasons[0]


@pytest.mark.parametrize("rule", [SEQUENTIAL, FIXED, Rule(min_effect=0.5, min_effect_unit="percent")])
def test_no_pairs_at_all_is_described_and_incomplete(rule):
    empty = PairedSample(arm="nolah", baseline=(), challenger=())
    assert decide(empty, rule).verdict is Verdict.INCOMPLETE
    e = describe(empty, rule)
    assert e.n == 0
    assert e.undefined["mean_diff"] == "no pairs"


def test_a_control_arm_is_described_without_a_verdict():
    e = describe(sample(range(4), range(4)), SEQUENTIAL)
    assert e.n == 4
    assert not hasattr(e, "verdict")


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -1, "loss": 2.0},
        {"seed": 0},
        {"seed": 0, "loss": float("nan")},
        {"seed": 0, "loss": 2.0, "status": "ok"},
        {"seed": 0, "loss": 2.0, "extra": 1},
    ],
)
def test_a_wrong_run_cannot_be_built(fields):
    with pytest.raises(ValidationError):
        Run(**fields)


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match=r"arm 'nolah': 2 losses against 3"):
        PairedSample.of("nolah", LOSSES[:3], LOSSES[:2])
