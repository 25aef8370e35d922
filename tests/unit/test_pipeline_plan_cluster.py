"""Laws of the plan for a cluster: the declared step time replaces the estimate in all that follows from it."""

from __future__ import annotations

from typing import Any

import pytest

from muonlab.pipeline.plan import Plan, over_limits
from muonlab.pipeline.plan_cluster import ClusterPlan, schedule_of

SMALL = "Over budget: budget_usd is 2, less than one pair of muon and nolah"
STEPS = 100


def plan(*, estimate: float, left: float = 10.0, max_cost: float | None = None, over: str | None = None) -> Plan:
    """Of two cells that are estimated at so many seconds each; a GPU hour costs $3.60, a second $0.001."""
    cost = 2 * estimate / 1000
    over = over or over_limits(cost, left, budget_usd=10.0, max_cost_usd=max_cost)
    whole: dict[str, Any] = {"runs": 2, "seconds": 2 * estimate, "gpu_hours": 2 * estimate / 3600, "cost_usd": cost}
    cells = [{"arm": arm, "seed": 0, "state": "to_train", "expected_seconds": estimate} for arm in ("muon", "nolah")]
    size = {"steps": STEPS, "batch_size": 1, "sequence_length": 1, "examples": None, "by_run_length": [],
            "warmup_steps": 0, "own_warmup_steps": {}, "text": ""}  # fmt: skip
    return Plan.model_validate(
        {
            "study": "001-x", "workload": "toy", "size": size, "cells": cells, "jobs": 1, "estimated_from": "",
            "counts": {"in_place": 0, "restored": 0, "waiting": 0, "to_train": 2}, "expected_seconds": 2 * estimate,
            "elapsed_seconds": 2 * estimate, "gpu_hours": 2 * estimate / 3600, "expected_cost_usd": cost,
            "whole": whole, "at_n_max": None, "price_usd_per_gpu_hour": 3.6, "spent_usd": 10.0 - left,
            "budget_usd": 10.0, "budget_left_usd": left, "max_cost_usd": max_cost, "over_budget": over, "notes": [],
            "exit_code": 4 if over else 0,
        }
    )  # fmt: skip


def scheduled(made: Plan, seconds: float) -> ClusterPlan:
    """At so many seconds a cell, declared by the step."""
    return schedule_of(made, gpus=2, gpus_per_cell=1, step_seconds=seconds / STEPS, start_seconds=0)


@pytest.mark.parametrize("estimate", [1.0, 1e5])
def test_limits_are_held_against_the_declared_step_time_alone(estimate: float) -> None:
    fits, exceeds = scheduled(plan(estimate=estimate), 4000), scheduled(plan(estimate=estimate), 6000)
    assert (fits.over_budget, fits.exit_code) == (None, 0)
    assert exceeds.exit_code == 4
    assert exceeds.over_budget is not None
    assert "$12.00 are more than the $10.00 left of the budget" in exceeds.over_budget
    least = scheduled(plan(estimate=estimate, max_cost=5.0), 4000)
    assert least.over_budget is not None
    assert "of --max-cost" in least.over_budget


def test_no_step_time_mends_a_budget_that_is_spent_or_too_small() -> None:
    for made in (plan(estimate=1e5, left=0.0), plan(estimate=1.0, over=SMALL)):
        told = scheduled(made, 1.0)
        assert (told.over_budget, told.exit_code) == (made.over_budget, 4)
