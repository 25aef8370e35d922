"""The arithmetic of the benchmarks' harness: ratios, rounds, goals, table and record. Nothing here is timed."""

import json

import pytest

from benchmarks.harness import (
    SHORTEST_S,
    WIDTH,
    Comparison,
    Row,
    cpu_field,
    ratio_row,
    record,
    run,
    save,
    summary,
    table,
    unmet,
    weighted,
)

ENVIRONMENT = {"date": "2026-01-02T03:04:05+00:00", "cpu": "a processor"}
OURS, PEER = [1.0, 2.0, 4.0], [3.0, 4.0, 4.0]


def row_of(value, *, low=None, high=None, goal=2.0, at_least=True):
    return Row("what", "peer", value=value, low=low, high=high, goal=goal, at_least=at_least, suite="optim")


def test_ratio_is_the_median_over_rounds_and_the_spread_their_range():
    row = ratio_row("what", "peer", OURS, PEER, goal=2.0)
    assert (row.value, row.low, row.high) == (2.0, 1.0, 3.0)
    assert row.seconds == {"ours": OURS, "peer": PEER}


def test_a_ratio_pairs_rounds_and_not_medians():
    # Both sides slow down in the second round: each round's ratio is 2, and so is the result.
    row = ratio_row("what", "peer", [1.0, 10.0, 1.0], [2.0, 20.0, 2.0], goal=None)
    assert (row.value, row.low, row.high) == (2.0, 2.0, 2.0)


def test_exchanging_the_sides_inverts_the_ratio():
    there, back = ratio_row("", "", OURS, PEER, None), ratio_row("", "", PEER, OURS, None)
    assert (back.value, back.low, back.high) == (1 / there.value, 1 / there.high, 1 / there.low)


def test_weighted_is_the_ratio_of_total_times_not_a_mean_of_ratios():
    small, large = ratio_row("", "svd", [1.0], [4.0], None), ratio_row("", "svd", [10.0], [10.0], None)
    row = weighted("all", [(10, small), (3, large)], goal=1.5)
    assert row.value == (10 * 4.0 + 3 * 10.0) / (10 * 1.0 + 3 * 10.0)
    assert row.peer == "svd"


class Machine:
    """A clock that only its own work moves, and a list of what was done."""

    def __init__(self):
        self.now, self.done = 0.0, []

    def clock(self):
        return self.now

    def work(self, name, seconds):
        def call():
            self.done.append(name)
            self.now += seconds

        return call


def test_rounds_alternate_ours_and_peer_after_a_warm_up_of_each():
    machine = Machine()
    sides = machine.work("ours", 2.0), machine.work("peer", 6.0)
    row = run(Comparison("what", *sides, "peer", rounds=3, clock=machine.clock))
    assert machine.done == ["ours", "peer"] + ["ours", "peer"] * 3
    assert row.seconds == {"ours": [2.0] * 3, "peer": [6.0] * 3}
    assert (row.value, row.low, row.high) == (3.0, 3.0, 3.0)


def test_setup_comes_before_every_call_and_is_not_timed():
    machine = Machine()
    call, setup = machine.work("call", 2.0), machine.work("setup", 50.0)
    row = run(Comparison("what", call, call, "peer", rounds=2, setup=setup, clock=machine.clock))
    assert machine.done == ["setup", "call"] * (len(machine.done) // 2)
    assert row.seconds == {"ours": [2.0] * 2, "peer": [2.0] * 2}


def test_a_peer_that_does_a_share_of_the_work_is_scaled_up():
    machine = Machine()
    sides = machine.work("ours", 2.0), machine.work("peer", 3.0)
    row = run(Comparison("what", *sides, "peer", rounds=1, clock=machine.clock, peer_share=0.25))
    assert (row.seconds["peer"], row.value) == ([12.0], 6.0)


def test_short_calls_are_repeated_until_they_can_be_timed():
    machine = Machine()
    tenth = SHORTEST_S / 10
    row = run(
        Comparison("what", machine.work("ours", tenth), machine.work("peer", 40 * tenth), "peer", clock=machine.clock)
    )
    assert machine.done[-11:] == ["ours"] * 10 + ["peer"]
    assert row.value == pytest.approx(40)


@pytest.mark.parametrize(
    ("row", "met", "verdict"),
    [
        (row_of(2.0), True, "yes"),
        (row_of(1.9), False, "no"),
        (row_of(2.1, low=1.5, high=2.5), True, "yes ~"),
        (row_of(1.9, low=1.5, high=2.5), False, "no ~"),
        (row_of(1.9, at_least=False), True, "yes"),
        (row_of(2.1, at_least=False), False, "no"),
        (row_of(None), None, "not measured"),
        (row_of(None, goal=None), None, "not measured"),
        (row_of(5.0, goal=None), None, "-"),
    ],
)
def test_goal(row, met, verdict):
    assert (row.met, row.verdict) == (met, verdict)


def test_summary_names_what_is_missed_and_what_is_not_known():
    rows = [row_of(1.0), row_of(3.0), row_of(None), row_of(1.0, goal=None)]
    assert unmet(rows) == rows[:1]
    assert summary(rows).splitlines() == [
        "3 goals: 1 met, 1 missed, 1 not measured.",
        "  missed: what (peer: peer): 1, goal >= 2",
        "  not measured: what (peer: peer)",
    ]


@pytest.mark.parametrize("value", [1e-9, 0.123456, 1.0, 99.99, 123456.7, None])
def test_the_table_fits(value):
    row = Row("a long name " * 9, "some peer 1.2.3.dev4 " * 5, value, value, value, goal=1000.0, note="word " * 60)
    lines = table([row, row_of(2.0)]).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "".join(table([row]).split()).count("word") == 60


def test_the_record_holds_every_round_and_every_verdict(tmp_path):
    rows = [ratio_row("what", "peer", OURS, PEER, goal=9.0), Row("other", note="not installed", goal=1.0)]
    path = save(rows, ENVIRONMENT, tmp_path / "bench")
    saved = json.loads(path.read_text())
    assert saved == json.loads(json.dumps(record(rows, ENVIRONMENT)))
    assert saved["schema"] == 1
    assert saved["environment"] == ENVIRONMENT
    assert saved["unmet"] == ["what"]
    first, second = saved["rows"]
    assert set(first) == set(second)
    assert (first["value"], first["met"], first["seconds"]["ours"]) == (2.0, False, OURS)
    assert (second["value"], second["met"], second["verdict"]) == (None, None, "not measured")


def test_what_is_not_finite_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save([row_of(float("nan"))], ENVIRONMENT, tmp_path)


def test_an_unknown_field_of_the_processor_is_empty():
    assert cpu_field("no such field") == ""
