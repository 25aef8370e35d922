"""What a run of a study on a cluster would take: the plan of `muonlab.pipeline.plan` with a schedule on its GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from muonlab.pipeline.attempts import Purpose
from muonlab.pipeline.plan import Plan, over_limits
from muonlab.pipeline.price import hours
from muonlab.pipeline.schedule import simulate
from muonlab.registry.errors import OverBudgetError, UsageError
from muonlab.reporting.wording import count, duration, money


class ClusterPlan(Plan):
    """What `muon study run --on ray` would do, and when. Seconds of wall time, cost in USD."""

    gpus: int
    gpus_per_cell: int
    step_seconds: float | None
    """As declared with --step-seconds; null: by the estimate."""
    start_seconds: float
    """Counted before every cell: `--start-seconds`."""
    makespan_seconds: float | None
    """Until the last cell ends; null where nothing tells how long a cell takes."""
    idle_gpu_hours: float | None
    """GPUs that train nothing until then, start-up included."""
    rent_usd: float | None
    """Of all GPUs until the last cell ends, busy or not."""

    def lines(self) -> Iterator[str]:
        """The plan for a reader."""
        yield from super().lines()
        where = f"On {count(self.gpus, 'GPU')}, {self.gpus_per_cell} a cell"
        if self.makespan_seconds is None or self.idle_gpu_hours is None or self.rent_usd is None:
            yield f"{where}: no schedule, {'nothing is to train' if self.expected_seconds == 0 else 'no known pace'}."
            return
        rent = f", {money(self.rent_usd)} for all GPUs until then" if self.price_usd_per_gpu_hour else ""
        started = f"{self.start_seconds:g} s of start-up before each cell" if self.start_seconds else "no start-up"
        yield (
            f"{where}: about {duration(self.makespan_seconds)} with {self.jobs} side by side, "
            f"{hours(self.idle_gpu_hours)} idle{rent}; {started} counted."
        )


def refuse_no_fit(gpus: int | None, gpus_per_cell: int, step_seconds: float | None) -> int:
    """The number of GPUs; UsageError where none is given, where no cell fits, or where nothing tells the step time."""
    if gpus is None:
        raise UsageError("--on ray: a schedule needs the number of GPUs; add --gpus, as in --gpus 8.")
    if gpus < gpus_per_cell:
        raise UsageError(f"--gpus-per-cell: {count(gpus_per_cell, 'GPU')} a cell do not fit on --gpus {gpus}.")
    if gpus_per_cell > 1 and step_seconds is None:
        raise UsageError(
            f"--gpus-per-cell: how long a step takes on {gpus_per_cell} GPUs is not known from runs on one; measure it "
            "(the smoke study does), and give it with --step-seconds."
        )
    return gpus


def schedule_of(plan: Plan, *, gpus: int, gpus_per_cell: int, step_seconds: float | None, start_seconds: float) -> (
    ClusterPlan
):  # fmt: skip
    """The plan with its schedule; exits with 4 where the cells, at the declared step time, come over a limit."""
    told: dict[str, object] = {name: getattr(plan, name) for name in Plan.model_fields}
    to_train = [cell for cell in plan.cells if cell.state == "to_train"]
    if step_seconds is not None:
        seconds = plan.size.steps * step_seconds
        cells = [cell.model_copy(update={"expected_seconds": seconds if cell.state == "to_train" else None})
                 for cell in plan.cells]  # fmt: skip
        told |= {"cells": cells, "estimated_from": f"at the declared {step_seconds:g} s a step"}
        times: list[float | None] = [seconds] * len(to_train)
    else:
        times = [cell.expected_seconds for cell in to_train]
    known = [time for time in times if time is not None]
    whole = len(known) == len(times)
    made = simulate(known, gpus=gpus, gpus_per_cell=gpus_per_cell, start_s=start_seconds, between_s=start_seconds)
    told["jobs"] = made.slots
    if whole:
        cost = Purpose(plan.study, None, plan.price_usd_per_gpu_hour, gpus_per_cell).cost_usd(sum(known))
        told |= {
            "expected_seconds": sum(known),
            "elapsed_seconds": made.makespan_s,
            "gpu_hours": made.busy_gpu_s / 3600,
            "expected_cost_usd": cost,
        }
        over = partial(
            over_limits, left=plan.budget_left_usd, budget_usd=plan.budget_usd, max_cost_usd=plan.max_cost_usd
        )
        if to_train and plan.over_budget == over(plan.expected_cost_usd):  # else the budget is too small for a pair
            told |= {"over_budget": over(cost), "exit_code": OverBudgetError.exit_code if over(cost) else 0}
    scheduled = whole and bool(times)
    return ClusterPlan.model_validate(
        {
            **told,
            "gpus": gpus,
            "gpus_per_cell": gpus_per_cell,
            "step_seconds": step_seconds,
            "start_seconds": start_seconds,
            "makespan_seconds": made.makespan_s if scheduled else None,
            "idle_gpu_hours": made.idle_gpu_s / 3600 if scheduled else None,
            "rent_usd": gpus * made.makespan_s / 3600 * plan.price_usd_per_gpu_hour if scheduled else None,
        }
    )
