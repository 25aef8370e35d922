"""What a study is expected to take and to cost, from the pace of finished runs or the declared one.

    seconds of a run = steps * median seconds a step of the finished runs of its arm on its workload, each times the
                       devices that it had: a study's runs have one
    cost             = seconds / 3600 * price of a GPU hour

Finished runs are those of the ledger and of scratch/ with as many tokens a step: of another arm where its own has none,
of another machine where this one has none. Where there are none at all, the workload's declared `pace` takes their
place, which somebody else measured; without it the price is unknown. What an estimate rests on is said with it.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from muonlab.pipeline.answer import Facts
from muonlab.pipeline.attempts import Purpose
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.processes import device_name
from muonlab.pipeline.resolve import grid_points
from muonlab.pipeline.running import ended_attempts
from muonlab.registry.errors import UsageError
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import Params, Workload, WorkloadSettings
from muonlab.registry.study import Study
from muonlab.reporting.wording import count, duration, listed, money


class Price(Facts):
    """Of so many runs, done or not. Seconds of computing, cost in USD; null where nothing tells the pace."""

    runs: int
    seconds: float | None
    gpu_hours: float | None
    cost_usd: float | None
    """0 where no price is declared."""

    def text(self, usd_per_gpu_hour: float) -> str:
        """`25 runs, about 33 GPU hours, $92.36`; in seconds where there is no price."""
        runs = count(self.runs, "run")
        if self.seconds is None or self.gpu_hours is None or self.cost_usd is None:
            return f"{runs}, at an unknown pace"
        if usd_per_gpu_hour == 0:
            return f"{runs}, about {duration(self.seconds)} of computing"
        return f"{runs}, about {hours(self.gpu_hours)}, {money(self.cost_usd)}"


def hours(gpu_hours: float) -> str:
    """GPU hours to three digits, or to the hour."""
    return f"{gpu_hours:,.0f} GPU hours" if gpu_hours >= 100 else f"{gpu_hours:.3g} GPU hours"


class Pace(NamedTuple):
    """How long a step takes: seconds a step of each arm, and where that is from."""

    by_arm: dict[str, float]
    overall: float | None
    source: str

    @classmethod
    def of(cls, records: Iterable[RunRecord], name: str, workload: Workload) -> Pace:
        """The pace of the finished runs of the workload `name`, on this machine's device if there are any, or else
        the declared one."""
        tokens_a_step = workload.settings.batch_size * workload.settings.data.sequence_length
        found = [
            r
            for r in records
            if r.workload == name
            and r.is_result
            and r.final_step > r.resumed_from_step
            # A run with another batch, by another number of steps, has another pace.
            and r.tokens == r.final_step * tokens_a_step
        ]
        if not found:
            declared = workload.pace
            if declared is None:
                return cls({}, None, f"no run of {name} is recorded yet")
            return cls({}, declared.seconds_per_step, f"as declared: {declared.source}, not measured here")
        device = device_name()
        here = [r for r in found if r.provenance.device == device]
        by_arm: dict[str, list[float]] = defaultdict(list)
        for r in here or found:
            by_arm[r.arm].append(r.device_seconds / (r.final_step - r.resumed_from_step))
        others = ", ".join(sorted({r.provenance.device for r in found}))
        where = "on this device" if here else f"on another device than this one ({others})"
        return cls(
            {arm: statistics.median(found) for arm, found in by_arm.items()},
            statistics.median(pace for found in by_arm.values() for pace in found),
            f"by the median pace of {count(len(here or found), 'finished run')} of {name} {where}",
        )

    def seconds(self, arm: str, steps: int) -> float | None:
        """Seconds to expect for `steps` steps of the arm; at the pace of all arms where it has no run."""
        pace = self.by_arm.get(arm, self.overall)
        return None if pace is None else steps * pace

    def price(self, study: Study, arms: Iterable[str], steps: int) -> Price:
        """Of one run of each of these arms at the study's price."""
        times = [self.seconds(arm, steps) for arm in arms]
        known = [time for time in times if time is not None]
        if len(known) < len(times):
            return Price(runs=len(times), seconds=None, gpu_hours=None, cost_usd=None)
        seconds = math.fsum(known)
        purpose = Purpose(study.slug, None, study.price_usd_per_gpu_hour)
        return Price(
            runs=len(times),
            seconds=seconds,
            gpu_hours=seconds * purpose.device_count / 3600,
            cost_usd=purpose.cost_usd(seconds),
        )


def declared_grid(study: Study) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(arm, seed, tuned options) of every cell, in the order of `study_cells`."""
    for seed in study.seeds:
        for arm in study.arms:
            for point in grid_points(study) if study.kind == "tuning" else [{}]:
                yield arm, seed, point


def price_of_study(study: Study, pace: Pace, steps: int) -> Price:
    """Of every declared run, whether it is done or not."""
    return pace.price(study, [arm for arm, _, _ in declared_grid(study)], steps)


def price_at_n_max(study: Study, pace: Pace, steps: int) -> Price | None:
    """Of all runs that a sequential plan can come to; None for other plans, and for a rehearsal, which stays short."""
    if study.kind == "tuning" or study.decision is None or study.decision.plan != "sequential":
        return None
    if study.twin_of is not None:
        return None
    return pace.price(study, study.arms * study.decision.n_max, steps)


def too_small_a_budget(study: Study, records: Iterable[RunRecord], pace: Pace, steps: int) -> str | None:
    """Why the budget does not pay for one pair, the baseline and a challenger; None where it does, or nothing tells.

    Only for a study without a result of its own: later on what is left of the budget decides, and a finished study
    can be run again where it is slower.
    """
    if study.price_usd_per_gpu_hour == 0 or any(r.study == study.slug and r.is_result for r in records):
        return None
    pairs = {arm: pace.price(study, [study.baseline, arm], steps).cost_usd for arm in study.challengers}
    costs = {arm: cost for arm, cost in pairs.items() if cost is not None}
    if not costs or min(costs.values()) <= study.budget_usd:
        return None
    cheapest = min(costs, key=lambda arm: costs[arm])
    return (
        f"budget_usd is {study.budget_usd:g}, less than one pair of {study.baseline} and {cheapest}, which takes about "
        f"{money(costs[cheapest])} at {money(study.price_usd_per_gpu_hour)} a GPU hour ({pace.source}); declare a "
        "budget of at least one pair."
    )


def refuse_small_budget(layout: Layout, params: Params, study: Study) -> None:
    """Raise UsageError for a budget that is too small for one pair."""
    if study.price_usd_per_gpu_hour == 0:
        return  # before the ledger is read for nothing
    records = ended_attempts(layout)
    workload = params.workloads[study.workload]
    pace = Pace.of(records, study.workload, workload)
    if (why := too_small_a_budget(study, records, pace, workload.settings.steps)) is not None:
        raise UsageError(f"experiments/{study.slug}/study.yaml: {why}")


def by_run_length(settings: WorkloadSettings) -> list[str]:
    """Which of batch_size and examples are those that the workload declares for its number of steps."""
    rows = settings.by_run_length
    row = next((row for row in rows if row.up_to_steps is None or settings.steps <= row.up_to_steps), None)
    return [] if row is None else [k for k in ("batch_size", "examples") if getattr(settings, k) == getattr(row, k)]


def size_text(settings: WorkloadSettings) -> str:
    """`500 steps of 8 x 512 tokens, on 10,000 examples (batch and examples by run length)`."""
    batch = f"{settings.steps} steps of {settings.batch_size} x {settings.data.sequence_length} tokens"
    examples = "all examples" if settings.examples is None else f"{settings.examples:,} examples"
    words = {"batch_size": "batch", "examples": "examples"}
    follows = [words[key] for key in by_run_length(settings)]
    return f"{batch}, on {examples}{f' ({listed(follows)} by run length)' if follows else ''}"
