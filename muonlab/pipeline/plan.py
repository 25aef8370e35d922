"""What a run of a study would do, and what it would cost, without doing any of it.

A cell is in place, restored (its outputs come back from DVC's run cache), waiting (trained, and taken over by DVC at
the next run) or to train. What the latter will take follows from the pace of finished runs, or else from the declared
one (`muonlab.pipeline.price`); what was spent includes attempts that failed or were killed.

The question goes to DVC in a shadow of the repository: a temporary folder that links to its data, code and outputs,
and in which what `muon study run` would first bring up to date (grid, fingerprints) is written.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from muonlab.pipeline import doors
from muonlab.pipeline.answer import Answer, Facts
from muonlab.pipeline.attempts import CellScratch, Purpose
from muonlab.pipeline.declare import current_registration
from muonlab.pipeline.evaluations import read_record
from muonlab.pipeline.fingerprint import write_fingerprints
from muonlab.pipeline.gates import gates_of
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.parts import chosen_cells
from muonlab.pipeline.price import (
    Pace,
    Price,
    by_run_length,
    declared_grid,
    hours,
    price_at_n_max,
    price_of_study,
    size_text,
    too_small_a_budget,
)
from muonlab.pipeline.reach import go_notes, pairs_paid_for
from muonlab.pipeline.registered import read_registration
from muonlab.pipeline.resolve import TRAINING_OPTIONS, resolve_settings, study_cells
from muonlab.pipeline.running import ended_attempts, running
from muonlab.pipeline.study_run import check_names, obstacles
from muonlab.registry import ledger
from muonlab.registry.acceptance import older_digests
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


class RunSize(Facts):
    """How much one run of the study trains."""

    steps: int
    batch_size: int
    """Sequences a step."""
    sequence_length: int
    """Tokens a sequence."""
    examples: int | None
    """Blocks of sequence_length tokens that are trained on; null: all."""
    by_run_length: list[str]
    """Which of batch_size and examples are those that the workload declares for so many steps."""
    warmup_steps: int
    own_warmup_steps: dict[str, int]
    """Arm -> its own warm-up, where it has one."""
    text: str
    """The same in words."""


class Plan(Answer):
    """What `muon study run` would do. Cost in USD."""

    study: str
    workload: str
    size: RunSize
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
    """Which finished runs, or whose declaration, the estimates rest on."""
    whole: Price
    """Of every declared run, whether it is done or not."""
    at_n_max: Price | None
    """Of all runs that a sequential plan can come to."""
    price_usd_per_gpu_hour: float
    spent_usd: float
    """By all attempts at the study's cells and in its name, failed and killed ones included."""
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
        yield f"Each run on {self.workload}: {self.size.text}."
        yield self._whole()
        if not self.counts["to_train"]:
            yield "Nothing to train."
        elif self.expected_seconds is None or self.elapsed_seconds is None or self.gpu_hours is None:
            yield f"Expected time and cost: unknown: {self.estimated_from}."
        else:
            yield (
                f"Expected: {duration(self.expected_seconds)} of computing{self._dollars(self.gpu_hours)}, about "
                f"{duration(self.elapsed_seconds)} with {self.jobs} side by side; {self.estimated_from}."
            )
        yield self._price()
        yield self._budget()
        if self.over_budget:
            yield self.over_budget

    def _whole(self) -> str:
        price = self.price_usd_per_gpu_hour
        rate = f" at {money(price)} an hour" if price > 0 and self.whole.cost_usd is not None else ""
        most = "" if self.at_n_max is None else f"; at n_max {self.at_n_max.text(price)}"
        return f"The whole study: {self.whole.text(price)}{rate}{most}."

    def _dollars(self, gpu_hours: float) -> str:
        if self.expected_cost_usd is None or self.price_usd_per_gpu_hour == 0:
            return ""
        price = self.price_usd_per_gpu_hour
        return f" ({hours(gpu_hours)}, {money(self.expected_cost_usd)} at {money(price)} an hour)"

    def _price(self) -> str:
        if self.price_usd_per_gpu_hour == 0:
            return "Price: none is declared; seconds are counted."
        return f"Price: {money(self.price_usd_per_gpu_hour)} a GPU hour."

    def _budget(self) -> str:
        limit = "" if self.max_cost_usd is None else f" --max-cost: {money(self.max_cost_usd)}."
        if self.budget_left_usd is None:
            return f"Budget: none, since the study declares no price.{limit}"
        return (
            f"Budget: {money(self.budget_usd)}, of which {money(self.spent_usd)} are spent and "
            f"{money(self.budget_left_usd)} are left.{limit}"
        )


def make_plan(
    layout: Layout, slug: str, *, jobs: int, max_cost_usd: float | None = None, only: Sequence[str] = ()
) -> Plan:
    """Say what running the study, or `only` some cells of it, would do. Trains nothing and writes nothing in it.

    What would make the run refuse is a note. Raises UsageError for a declaration that is wrong in itself or differs
    from the last commit, and for results reported by others, of which nothing is trained.
    """
    params, study = check_names(layout, slug)
    chosen = set(chosen_cells(study, only))
    held = ledger.read(layout.ledger)
    records = ended_attempts(layout, held)
    workload = params.workloads[study.workload]
    pace = Pace.of(records, study.workload, workload)
    steps = workload.settings.steps
    notes = [] if study.twin_of is None else [f"A rehearsal of {study.twin_of}, about which it decides nothing."]
    notes += [line for gate in gates_of(layout, study) for line in gate.lines()]
    notes += [f"The run would refuse: {sentence}" for sentence in obstacles(layout, params, study)]
    with shadow_of(layout, params, study) as shadow:
        asked = doors.in_place(shadow, study)
        cells = study_cells(shadow, params, study) if asked.data else []
    if not asked.data:
        notes.append(
            f"The data of {study.workload} are not prepared here; the run prepares them first, and may then find that "
            "some of these cells need no training."
        )
    older = older_digests(held.acceptances)
    digests = {digest for cell in cells for digest in (cell.digest, *older.get(cell.digest, []))}
    training = [cell for cell in running(layout, gpu=False).cells if cell.study == slug or cell.digest in digests]
    if now := sum(cell.digest in digests for cell in training):
        notes.append(f"Of the cells to train, {now} {'is' if now == 1 else 'are'} being trained now: `muon status`.")
    known = {r.cell_digest for r in records if r.is_result} if study.kind == "tuning" else set()
    if only:
        notes.append(f"Of the study's cells, --only chooses {len(chosen)} of {len(study.arms) * len(study.seeds)}.")
    planned: list[PlannedCell] = []
    to_train: list[tuple[str, int]] = []
    for index, (arm, seed, options) in enumerate(declared_grid(study)):
        state = _state(layout, study, cells[index], asked.cells, known, older) if cells else "to_train"
        if state == "to_train":
            to_train.append((arm, seed))
        if f"{arm}-{seed}" not in chosen:
            continue
        expected = pace.seconds(arm, steps) if state == "to_train" else None
        planned.append(PlannedCell(arm=arm, seed=seed, options=options, state=state, expected_seconds=expected))
    ended = [r.cost_usd for r in records if r.study == slug or r.cell_digest in digests]
    spent = math.fsum([*ended, *(cell.cost_usd for cell in training)])
    size = size_of_runs(params, study)
    small = too_small_a_budget(study, records, pace, steps)
    paid = pairs_paid_for(study, pace, steps, to_train, left_usd=max(0.0, study.budget_usd - spent))
    notes += go_notes(study, paid, amended=_is_amended(layout, params, study, records))
    return _priced(study, size, planned, pace, notes, small, spent=spent, jobs=jobs, max_cost_usd=max_cost_usd)


def _is_amended(layout: Layout, params: Params, study: Study, records: Sequence[RunRecord]) -> bool:
    """Whether results exist under another declaration than the one there is now."""
    held = read_registration(layout, study.slug)
    if held is None or held.registration == current_registration(params, study):
        return False
    return any(r.registration == held.registration and r.is_result for r in records)


def size_of_runs(params: Params, study: Study) -> RunSize:
    """How much one run trains, and which arms have a warm-up of their own."""
    settings = params.workloads[study.workload].settings
    own = {
        arm: resolve_settings(params, study.workload, arm).warmup_steps
        for arm in study.arms
        if "warmup_steps" in TRAINING_OPTIONS & params.optimizers[arm].keys()
    }
    apart = ", ".join(f"{arm} {steps}" for arm, steps in own.items())
    return RunSize(
        steps=settings.steps,
        batch_size=settings.batch_size,
        sequence_length=settings.data.sequence_length,
        examples=settings.examples,
        by_run_length=by_run_length(settings),
        warmup_steps=settings.warmup_steps,
        own_warmup_steps=own,
        text=f"{size_text(settings)}; {count(settings.warmup_steps, 'step')} of warm-up"
        + (f", but of {apart}" if own else ""),
    )


def _state(
    layout: Layout, study: Study, cell: Cell, in_dvc: set[str], known: set[str], older: dict[str, list[str]]
) -> State:
    if study.kind == "tuning":
        if cell.digest in known:
            return "in_place"
    elif cell.key in in_dvc:
        record = read_record(layout.runs(study.slug) / cell.key)
        own = (cell.digest, *older.get(cell.digest, ()))
        return "in_place" if record is not None and record.cell_digest in own else "restored"
    return "to_train" if CellScratch(layout, cell.digest).finished() is None else "waiting"


def _priced(
    study: Study,
    size: RunSize,
    cells: list[PlannedCell],
    pace: Pace,
    notes: list[str],
    small: str | None,
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
    over = None
    if small is not None:
        over = f"Over budget: {small}"
    elif times:
        over = over_limits(cost, left, budget_usd=study.budget_usd, max_cost_usd=max_cost_usd)
    longest = max((time for time in times if time is not None), default=0.0)
    return Plan(
        study=study.slug,
        workload=study.workload,
        size=size,
        cells=cells,
        counts={state: sum(cell.state == state for cell in cells) for state in WORDS},
        jobs=jobs,
        expected_seconds=seconds,
        elapsed_seconds=None if seconds is None else max(longest, seconds / jobs),
        gpu_hours=None if seconds is None else seconds / 3600,
        expected_cost_usd=cost,
        estimated_from=pace.source,
        whole=price_of_study(study, pace, size.steps),
        at_n_max=price_at_n_max(study, pace, size.steps),
        price_usd_per_gpu_hour=price,
        spent_usd=spent,
        budget_usd=study.budget_usd,
        budget_left_usd=left,
        max_cost_usd=max_cost_usd,
        over_budget=over,
        notes=notes,
        exit_code=OverBudgetError.exit_code if over else 0,
    )


def over_limits(cost: float | None, left: float | None, *, budget_usd: float, max_cost_usd: float | None) -> str | None:
    """Why cells of this cost, null where it is unknown, would not all be trained; None where they would.

    left: of the budget; null where the study has no price.
    """
    if left == 0:
        return (
            f"Over budget: all of the {money(budget_usd)} are spent; going on takes a larger budget_usd, which "
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
def shadow_of(layout: Layout, params: Params, study: Study) -> Iterator[Layout]:
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
