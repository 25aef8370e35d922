"""Laws of the schedule of a study on a cluster: what no schedule can beat, and what list scheduling promises."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muonlab.pipeline.schedule import simulate

TIMES = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=30)
GPUS = st.integers(1, 16)
NEAR = 1 + 1e-9


@given(TIMES, GPUS)
def test_it_ends_no_sooner_than_work_and_longest_cell_allow_and_within_grahams_bound(
    times: list[float], gpus: int
) -> None:
    made = simulate(times, gpus=gpus, gpus_per_cell=1)
    least = max(max(times), math.fsum(times) / gpus)
    assert least <= made.makespan_s * NEAR
    assert made.makespan_s <= (2 - 1 / gpus) * least * NEAR


@given(TIMES, GPUS, st.integers(1, 4), st.floats(0, 100))
def test_every_gpu_second_is_busy_or_idle(times: list[float], gpus: int, each: int, start: float) -> None:
    made = simulate(times, gpus=gpus * each, gpus_per_cell=each, start_s=start)
    assert made.busy_gpu_s == pytest.approx(each * math.fsum(times))
    assert made.busy_gpu_s + made.idle_gpu_s == pytest.approx(gpus * each * made.makespan_s)
    assert made.idle_gpu_s >= -1e-6 * made.busy_gpu_s


@given(TIMES, st.floats(0, 100), st.floats(0, 100))
def test_one_slot_runs_them_one_after_another(times: list[float], start: float, between: float) -> None:
    made = simulate(times, gpus=3, gpus_per_cell=2, start_s=start, between_s=between)
    assert made.slots == 1
    assert made.makespan_s == pytest.approx(start + between * (len(times) - 1) + math.fsum(times))


@given(TIMES)
def test_with_a_slot_for_every_cell_all_begin_at_once(times: list[float]) -> None:
    assert list(simulate(times, gpus=40, gpus_per_cell=1).ends) == times


def test_a_worked_case() -> None:
    # Slot 1: 3, then 2 (ends 5); slot 2: 1, then 2 (ends 3), then 4 (ends 7).
    made = simulate([3, 1, 2, 2, 4], gpus=2, gpus_per_cell=1)
    assert made.ends == (3, 1, 3, 5, 7)
    assert made.idle_gpu_s == 2


def test_a_cell_that_fits_nowhere_is_no_schedule() -> None:
    with pytest.raises(ValueError, match="do not hold"):
        simulate([1.0], gpus=1, gpus_per_cell=2)
