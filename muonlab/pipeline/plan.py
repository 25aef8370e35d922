"""What a run of a study would do, and what it would cost, without doing any of it.

    seconds of a cell = steps * median seconds a step of the finished cells of its arm on its workload
    cost              = seconds / 3600 * price of a GPU hour

A cell is in place, restored (its outputs come back from DVC's run cache), waiting (trained, and taken over by DVC at
the next run) or to train. Finished cells are those of the ledger and of scratch/; of another arm where its own has
none, of another machine where this one has none, and the plan says so. Without any, the price is unknown.

The question goes to DVC in a shadow of the repository: a temporary folder that links to its data, code and outputs,
and in which what `muon study run` would first bring up to date (grid, fingerprints) is written.
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from muonlab.pipeline import doors
from muonlab.pipeline.answer import Answer, Facts
from muonlab.pipeline.attempts import CellScratch, Purpose
from muonlab.pipeline.evaluations import read_record
from muonlab.pipeline.fingerprint import write_fingerprints
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.processes import device_name
from muonlab.pipeline.resolve import grid_points, study_cells
from muonlab.pipeline.running import ended_attempts, running
from muonlab.pipeline.study_run import check
from muonlab.registry.cell import Cell
from muonlab.registry.errors import OverBudgetError
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import Params
from muonlab.registry.study import Study
from muonlab.reporting.wording import count, duration, money

State = Literal["in_place", "restored", "waiting", "to_train"]
WORDS: dict[State, str] = {
    "in_place": "in place",
    "restored": "would be restored from DVC's cache",
    "waiting": "trained, waiting to be taken over",
    "to_train": "to train",
}


class PlannedCell(Facts):
    """One declared cell."""

    arm: str
    seed: int
    options: dict[str, float | int | str | bool | None] = {}
    """Of a tuning study: the point of its grid."""
    state: State
    """`in_place`, `restored`, `waiting` or `to_train`; in a tuning study `in_place` is a recorded result."""
    expected_seconds: float | None
    """Of training it; null where it is not trained, or no finished cell tells."""


class Plan(Answer):
    """What `muon study run` would do. Cost in USD."""

    study: str
    cells: list[PlannedCell]
    counts: dict[str, int]
    """State -> number of cells."""
    jobs: int
    """Cells trained side by side."""
    expected_seconds: float | None
    """Of computing, over all cells to train; null: unknown, no finished cell tells."""
    elapsed_seconds: float | None
    """On the clock, with `jobs` cells side by side."""
    gpu_hours: float | None
    expected_cost_usd: float | None
    estimated_from: str
    """Which finished cells the estimate rests on."""
    price_usd_per_gpu_hour: float
    spent_usd: float
    """By all attempts at the study's cells and in its name, failed ones included."""
    budget_usd: float
    budget_left_usd: float | None
    """Null where the study has no price, so that no budget holds."""
    max_cost_usd: float | None
    """The limit that --max-cost sets."""
    over_budget: str | None
    """Why the run would not be finished within its limits."""
    notes: list[str]
    exit_code: int
    """0, or 4 where the limits do not suffice."""

    def lines(self) -> Iterator[str]:
        """The plan for a reader."""
        yield f"{self.study}: {count(len(self.cells), 'cell')}"
        for state, words in WORDS.items():
            found = [cell for cell in self.cells if cell.state == state]
            if found:
                yield f"  {len(found):4} {words}: {_named(found)}"
        for note in self.notes:
            yield f"  {note}"
        if not self.counts["to_train"]:
            yield "Nothing to train."
        elif self.expected_seconds is None or self.elapsed_seconds is None or self.gpu_hours is None:
            yield f"Expected time and cost: unknown: {self.estimated_from}."
        else:
            yield (
                f"Expected: {duration(self.expected_seconds)} of computing{self._dollars(self.gpu_hours)}, about "
                f"{duration(self.elapsed_seconds)} with {self.jobs} side by side; from {self.estimated_from}."
            )
        yield self._budget()
        if self.over_budget:
            yield self.over_budget

    def _dollars(self, gpu_hours: float) -> str:
        if self.expected_cost_usd is None or self.price_usd_per_gpu_hour == 0:
            return ""
        price = self.price_usd_per_gpu_hour
        return f" ({gpu_hours:.3g} GPU hours, {money(self.expected_cost_usd)} at ${price:g} an hour)"

    def _budget(self) -> str:
        limit = "" if self.max_cost_usd is None else f" --max-cost: {money(self.max_cost_usd)}."
        if self.budget_left_usd is None:
            return f"Budget: none, since the study declares no price.{limit}"
        return (
            f"Budget: {money(self.budget_usd)}, of which {money(self.spent_usd)} are spent and "
            f"{money(self.budget_left_usd)} are left.{limit}"
        )


def make_plan(layout: Layout, slug: str, *, jobs: int, max_cost_usd: float | None = None) -> Plan:
    """Say what running the study would do. Trains nothing and writes nothing in the repository.

    Raises UsageError where the run would be refused, and for results reported by others, of which nothing is trained.
    """
    params, study = check(layout, slug)
    records = ended_attempts(layout)
    pace = Pace.of(records, study.workload)
    steps = params.workloads[study.workload].settings.steps
    notes = []
    with _shadow(layout, params, study) as shadow:
        asked = doors.in_place(shadow, study)
        cells = study_cells(shadow, params, study) if asked.data else []
    if not asked.data:
        notes.append(
            f"The data of {study.workload} are not prepared here; the run prepares them first, and may then find that "
            "some of these cells need no training."
        )
    digests = {cell.digest for cell in cells}
    if now := sum(cell.digest in digests for cell in running(layout, gpu=False).cells):
        notes.append(f"Of the cells to train, {now} {'is' if now == 1 else 'are'} being trained now: `muon status`.")
    known = {r.cell_digest for r in records if r.is_result} if study.kind == "tuning" else set()
    planned = []
    for index, (arm, seed, options) in enumerate(declared_grid(study)):
        state = _state(layout, study, cells[index], asked.cells, known) if cells else "to_train"
        expected = pace.seconds(arm, steps) if state == "to_train" else None
        planned.append(PlannedCell(arm=arm, seed=seed, options=options, state=state, expected_seconds=expected))
    spent = math.fsum(r.cost_usd for r in records if r.study == slug or r.cell_digest in digests)
    return _priced(study, planned, pace.source, notes, spent=spent, jobs=jobs, max_cost_usd=max_cost_usd)


def declared_grid(study: Study) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(arm, seed, tuned options) of every cell, in the order of `study_cells`."""
    for seed in study.seeds:
        for arm in study.arms:
            for point in grid_points(study) if study.kind == "tuning" else [{}]:
                yield arm, seed, point


class Pace(NamedTuple):
    """How fast finished cells were: seconds a step of each arm, and where that is from."""

    by_arm: dict[str, float]
    overall: float | None
    source: str

    @classmethod
    def of(cls, records: Iterable[RunRecord], workload: str) -> Pace:
        """The pace of the finished attempts on a workload; those made on this machine's device, if there are any."""
        found = [r for r in records if r.workload == workload and r.is_result and r.final_step > r.resumed_from_step]
        if not found:
            return cls({}, None, f"no run of {workload} is recorded yet")
        device = device_name()
        here = [r for r in found if r.provenance.device == device]
        by_arm: dict[str, list[float]] = defaultdict(list)
        for r in here or found:
            by_arm[r.arm].append(r.wall_seconds / (r.final_step - r.resumed_from_step))
        others = ", ".join(sorted({r.provenance.device for r in found}))
        where = "on this device" if here else f"on another device than this one ({others})"
        return cls(
            {arm: statistics.median(found) for arm, found in by_arm.items()},
            statistics.median(pace for found in by_arm.values() for pace in found),
            f"the median pace of {count(len(here or found), 'finished run')} of {workload} {where}",
        )

    def seconds(self, arm: str, steps: int) -> float | None:
        """Seconds to expect for `steps` steps of the arm; at the pace of all arms where it has no run."""
        pace = self.by_arm.get(arm, self.overall)
        return None if pace is None else steps * pace


def _state(layout: Layout, study: Study, cell: Cell, in_dvc: set[str], known: set[str]) -> State:
    if study.kind == "tuning":
        if cell.digest in known:
            return "in_place"
    elif cell.key in in_dvc:
        record = read_record(layout.runs(study.slug) / cell.key)
        return "in_place" if record is not None and record.cell_digest == cell.digest else "restored"
    return "to_train" if CellScratch(layout, cell.digest).finished() is None else "waiting"


def _priced(
    study: Study,
    cells: list[PlannedCell],
    source: str,
    notes: list[str],
    *,
    spent: float,
    jobs: int,
    max_cost_usd: float | None,
) -> Plan:
    price = study.price_usd_per_gpu_hour
    times = [cell.expected_seconds for cell in cells if cell.state == "to_train"]
    seconds = None if None in times else math.fsum(time for time in times if time is not None)
    cost = None if seconds is None else Purpose(study.slug, None, price).cost_usd(seconds)
    left = max(0.0, study.budget_usd - spent) if price > 0 else None
    over = _over_budget(study, cost, left, max_cost_usd) if times else None
    longest = max((time for time in times if time is not None), default=0.0)
    return Plan(
        study=study.slug,
        cells=cells,
        counts={state: sum(cell.state == state for cell in cells) for state in WORDS},
        jobs=jobs,
        expected_seconds=seconds,
        elapsed_seconds=None if seconds is None else max(longest, seconds / jobs),
        gpu_hours=None if seconds is None else seconds / 3600,
        expected_cost_usd=cost,
        estimated_from=source,
        price_usd_per_gpu_hour=price,
        spent_usd=spent,
        budget_usd=study.budget_usd,
        budget_left_usd=left,
        max_cost_usd=max_cost_usd,
        over_budget=over,
        notes=notes,
        exit_code=OverBudgetError.exit_code if over else 0,
    )


def _over_budget(study: Study, cost: float | None, left: float | None, max_cost_usd: float | None) -> str | None:
    if left == 0:
        return (
            f"Over budget: all of the {money(study.budget_usd)} are spent; going on takes a larger budget_usd, which "
            "amends the plan."
        )
    for limit, name in ((left, "left of the budget"), (max_cost_usd, "of --max-cost")):
        if cost is not None and limit is not None and cost > limit:
            return f"Over budget: {money(cost)} are more than the {money(limit)} {name}; the run would stop there."
    return None


def _named(cells: list[PlannedCell]) -> str:
    """`muon 0-4, nolah 0 2`: the seeds of each arm; of a tuning study, the number of its cells."""
    seeds: dict[str, list[int]] = defaultdict(list)
    for cell in cells:
        seeds[cell.arm].append(cell.seed)
    if any(cell.options for cell in cells):
        return ", ".join(f"{arm} {len(found)}" for arm, found in seeds.items())
    return ", ".join(f"{arm} {_ranges(found)}" for arm, found in seeds.items())


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


@contextmanager
def _shadow(layout: Layout, params: Params, study: Study) -> Iterator[Layout]:
    """A temporary tree in which DVC sees the study as its run would, brought up to date; removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="muonlab-plan-") as name:
        shadow = Layout(root=Path(name), main=layout.main)
        for path in ("params.yaml", "data/dvc.yaml", "data/dvc.lock", f"experiments/{study.slug}/dvc.lock"):
            if (layout.root / path).exists():
                (shadow.root / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(layout.root / path, shadow.root / path)
        for path in ("optim", "muonlab"):
            (shadow.root / path).symlink_to(layout.root / path)
        _link_files(layout.data(study.workload), shadow.data(study.workload))
        if study.kind == "comparison":
            shadow.study(study.slug).mkdir(parents=True, exist_ok=True)
            doors.write_grid(shadow, study)
            doors.make_folders(shadow, study)
            for arm, seed, _ in declared_grid(study):
                cell = f"{arm}-{seed}"
                _link_files(layout.runs(study.slug) / cell, shadow.runs(study.slug) / cell)
        write_fingerprints(shadow, params)
        doors.shadow_dvc(layout, shadow)
        yield shadow


def _link_files(source: Path, target: Path) -> None:
    # Files, not the folder: DVC refuses to work in a folder that leads out of its repository.
    for path in source.glob("*"):
        target.mkdir(parents=True, exist_ok=True)
        (target / path.name).symlink_to(path)
