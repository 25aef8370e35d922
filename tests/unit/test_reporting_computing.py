"""Where the time of runs went: shares of the wall time, in the report by arm and in a line for one run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reporting_studies import BASELINE, made_up, record

from muonlab.registry.record import RunRecord
from muonlab.reporting.computing import computing_line, percent, shares, where_the_time_went

SPENT = {"backward": 9.0, "forward": 6.0, "logging": 0.045}


def measured(arm: str, seed: int, *, wall_seconds: float = 22.5, gb: float = 0.5, **changes: object) -> RunRecord:
    computing = {"device": "cpu", "precision": "float32", "repeats": "bit for bit", "seconds_by_part": SPENT,
                 "peak_memory_bytes": round(gb * 1e9)}  # fmt: skip
    return record(arm, seed, 4.3, wall_seconds=wall_seconds, computing=computing, **changes)


@settings(deadline=None)  # a judged snapshot takes as long as the machine lets it
@given(st.lists(st.floats(20, 1e4), min_size=1, max_size=5))
def test_shares_of_all_parts_are_one_and_what_is_in_no_part_is_other(walls: list[float]) -> None:
    found = shares([measured("muon", seed, wall_seconds=wall) for seed, wall in enumerate(walls)])
    assert math.fsum(found.values()) == pytest.approx(1)
    assert list(found) == ["backward", "forward", "logging", "other"]
    assert found["backward"] == pytest.approx(len(walls) * 9.0 / math.fsum(walls))


def test_a_run_says_it_in_a_line_and_one_that_measured_nothing_says_nothing() -> None:
    assert computing_line(measured("muon", 0)) == (
        "time: backward 40%, forward 27%, logging 0.2%, other 33%; peak memory 0.50 GB; float32 on cpu"
    )
    assert "float32 on 4 x cpu" in str(computing_line(measured("muon", 0, device_count=4)))
    assert computing_line(record("muon", 0, 4.3)) is None
    assert (percent(0.005), percent(0.0991), percent(0.1), percent(0.996)) == ("0.5%", "9.9%", "10%", "100%")


def test_the_report_has_a_row_for_every_arm_that_measured_itself() -> None:
    assert where_the_time_went(made_up({"muon": BASELINE, "nolah": BASELINE})) == ()
    standing = made_up({"muon": BASELINE, "nolah": BASELINE})
    runs = [measured("muon", 0, gb=0.5), measured("muon", 1, gb=0.7), measured("nolah", 0), record("nolah", 1, 4.3)]
    snapshot = standing.snapshot.model_copy(update={"records": runs})
    _, table = where_the_time_went(standing.model_copy(update={"snapshot": snapshot}))
    assert [name for name, _ in table.columns] == ["arm", "backward", "forward", "logging", "other", "peak memory [GB]"]
    assert table.rows == (
        ("muon", "40%", "27%", "0.2%", "33%", "0.70"),
        ("nolah", "40%", "27%", "0.2%", "33%", "0.50"),
    )
