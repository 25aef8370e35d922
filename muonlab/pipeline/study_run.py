"""Run a declared study to its verdict: train what is missing, let DVC take it over, judge, report.

    1. check the declaration, register it, prepare data and fingerprints
    2. train the missing cells side by side, outside DVC's lock, each in scratch/<digest>
    3. one serial `dvc repro` of the study's grid, whose `train` stages adopt what step 2 made
    4. say the verdict

A cell that failed, or a limit of cost, leaves the grid incomplete: the report is then made without DVC, and names what
is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from filelock import FileLock, Timeout

from muonlab.pipeline import doors, parts
from muonlab.pipeline.attempts import CellScratch, Purpose
from muonlab.pipeline.collect import collect
from muonlab.pipeline.conclude import is_current, judge_into, keep_snapshot, read_standing, report_into
from muonlab.pipeline.declare import declared_params, has_results, refuse_uncommitted, register
from muonlab.pipeline.fingerprint import write_fingerprints
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.pool import Job, Place, PoolState, TrainingStoppedError, train_all
from muonlab.pipeline.price import refuse_small_budget
from muonlab.pipeline.processes import difference, dirty_text
from muonlab.pipeline.registered import read_registration
from muonlab.pipeline.resolve import check_study, load_params, load_study, read_declaration, study_cells
from muonlab.pipeline.selection import refuse_unpicked
from muonlab.pipeline.tuning_checks import check_seeds, check_tuning, refuse_mixed, refuse_untuned
from muonlab.registry.errors import OverBudgetError, UsageError
from muonlab.registry.settings import Params
from muonlab.registry.snapshot import Snapshot
from muonlab.registry.study import Study
from muonlab.reporting.standing import Standing
from muonlab.reporting.wording import count
from muonlab.tracking import start_follower

Watch = Callable[[PoolState], None]
"""Shown the pool's state about once a second."""


class RunOutcome(NamedTuple):
    """What a run of a study did and where the study stands now."""

    standing: Standing
    trained: int
    restored: int
    """Cells that needed no training: DVC had them in place or in its run cache, or a bundle waited in scratch."""
    failed: dict[str, str]
    seconds: float
    over_budget: str | None = None
    """Why training was stopped before its end, where a limit of cost stopped it."""


def check(layout: Layout, slug: str) -> tuple[Params, Study]:
    """Load and check a study that is to be run or registered: `check_names`, that its budget pays for a pair, that no
    seed was seen in tuning, and that it uses what its tuning chose."""
    params, study = check_names(layout, slug)
    refuse_small_budget(layout, params, study)
    for refuse in _refusals(layout, params, study):
        refuse()
    return params, study


def obstacles(layout: Layout, params: Params, study: Study) -> Iterator[str]:
    """Why a run of a study that `check_names` lets through would be refused, but for its budget and gates."""
    refusals = _refusals(layout, params, study)
    held = read_registration(layout, study.slug)
    if study.selected_from is not None and not has_results(layout, held):
        refusals.append(partial(refuse_unpicked, layout, study, partial(read_declaration, layout)))
    for refuse in refusals:
        try:
            refuse()
        except UsageError as error:
            yield str(error)


def _refusals(layout: Layout, params: Params, study: Study) -> list[Callable[[], None]]:
    refusals: list[Callable[[], None]] = [
        partial(check_seeds, layout, study),
        partial(refuse_untuned, layout, params, study),
    ]
    if study.kind == "tuning":
        refusals.append(partial(refuse_mixed, layout, study))
    return refusals


def say_dirt(layout: Layout, say: Callable[[str], None]) -> None:
    """Say what of code and declarations is not as committed, and what the records will hold of it."""
    if (text := dirty_text(difference(layout.root))) is not None:
        say(f"muon: {text}")


@contextmanager
def only_driver(layout: Layout, slug: str) -> Iterator[None]:
    """Run a study alone in this checkout. Raises UsageError where another process does; a killed one is none."""
    layout.scratch.mkdir(parents=True, exist_ok=True)
    lock = FileLock(layout.scratch / f"run-{slug}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"experiments/{slug}: another `muon study run` of it is at work in this checkout; follow it with "
            f"`muon study status {slug}` or `muon logs --follow`, or stop it: what it has trained is kept."
        ) from None
    try:
        yield
    finally:
        lock.release()


def begin(layout: Layout, slug: str, *, override: bool) -> None:
    """Register a study that is to be run, before anything is prepared for it. Raises UsageError at a closed gate."""
    params, study = check(layout, slug)
    register(layout, params, study, override=override)


def check_names(layout: Layout, slug: str) -> tuple[Params, Study]:
    """Load and check a study and everything it names, against the last commit too. Raises UsageError."""
    params = load_params(layout.params)
    study = load_study(layout, slug)
    check_study(params, study)
    check_tuning(layout, study)
    refuse_uncommitted(params, declared_params(layout), study)
    return params, study


def run_study(
    layout: Layout, slug: str, *, place: Place, watch: Callable[[int, int], Watch], say: Callable[[str], None],
    max_cost_usd: float | None = None, only: Sequence[str] = (),
) -> RunOutcome:  # fmt: skip
    """Run a comparison to its report, training only what is missing, and nothing where others report its results.

    `place`: where cells are trained.
    `only`: shell patterns of the cells to train; the study is concluded where all others are in place. `watch` is told
    how many steps and cells there are and returns the function that is shown the pool's state. Raises UsageError,
    OverBudgetError, or CellsFailedError when a stage of DVC fails.
    """
    began = time.monotonic()
    chosen = parts.chosen_cells(declared := load_study(layout, slug), only)
    if declared.provenance == "reported":
        standing = report_without_dvc(layout, collect(layout, slug))
        return RunOutcome(standing, trained=0, restored=0, failed={}, seconds=time.monotonic() - began)
    params, study = check(layout, slug)
    if study.kind != "comparison":
        raise UsageError(f"experiments/{slug}: kind is {study.kind!r}; this runs comparisons.")
    say_dirt(layout, say)
    in_place = prepare(layout, params, study)
    cells = study_cells(layout, params, study)
    place.gather(cells)
    waiting = [cell for cell in cells if cell.key not in in_place.cells]
    untrained = [cell for cell in waiting if CellScratch(layout, cell.digest).finished() is None]
    missing = [cell for cell in untrained if cell.key in chosen]
    left = [cell.key for cell in untrained if cell.key not in chosen]
    say(
        f"{slug}: {len(cells)} cells, {len(in_place.cells)} in place or restored from cache, "
        f"{len(waiting) - len(untrained)} waiting to be taken over, {len(missing)} to train"
        f"{f', {len(left)} left out by --only' if left else ''}."
    )
    purpose = Purpose(
        study=slug,
        registration=register(layout, params, study).registration,
        price_usd_per_gpu_hour=study.price_usd_per_gpu_hour,
        device_count=place.devices,
    )
    over_budget = None
    try:
        state = train_missing(
            layout,
            study,
            [Job(cell, purpose) for cell in missing],
            place=place,
            watch=watch,
            max_cost_usd=max_cost_usd,
        )
        place.gather(cells)
    except TrainingStoppedError as stop:
        state, over_budget = stop.state, str(stop)
    if state.failed or left or over_budget is not None:
        if only and over_budget is None:
            parts.take_over(layout, study, [key for key in chosen if key not in state.failed])
        standing = report_without_dvc(layout, collect(layout, slug))
        if left:
            say(parts.left_text(standing, left))
    else:
        if waiting or not in_place.concluded or not _nothing_new(layout, slug, say):
            say(f"{slug}: bringing {count(len(waiting), 'cell')} into DVC, then evaluating, judging and reporting.")
            doors.dvc(layout, "repro", str(layout.study(slug) / "dvc.yaml"), show=_is_news)
        standing = read_standing(layout, slug)
    return RunOutcome(
        standing=standing,
        trained=len(state.done) + len(state.diverged),
        restored=len(cells) - len(untrained),
        failed=state.failed,
        seconds=time.monotonic() - began,
        over_budget=over_budget,
    )


def _nothing_new(layout: Layout, slug: str, say: Callable[[str], None]) -> bool:
    """Whether the evidence, looked at again, is what the report was made from; says what is wrong with it."""
    snapshot = collect(layout, slug)
    current = is_current(layout, snapshot)
    # What was mended now is not seen again by the stages; what is wrong is, and they say it.
    for sentence in [*snapshot.notes, *(snapshot.findings if current else [])]:
        say(f"muon: {sentence}")
    return current


def prepare(layout: Layout, params: Params, study: Study) -> doors.InPlace:
    """Bring grid file, folders, fingerprints and data up to date; return what DVC has of the study."""
    if study.kind == "comparison":
        doors.write_grid(layout, study)
        doors.make_folders(layout, study)
        # The default study stays open, so that its grid can be reproduced by DVC alone; any other is closed.
        doors.set_open_studies(layout, sorted({params.study, study.slug}))
    write_fingerprints(layout, params)
    found = doors.in_place(layout, study)
    if not found.data:
        doors.dvc(layout, "repro", f"data/dvc.yaml:prepare_data@{study.workload}", show=_is_news)
        found = doors.in_place(layout, study)
    return found


def train_missing(
    layout: Layout,
    study: Study,
    jobs: list[Job],
    *,
    place: Place,
    watch: Callable[[int, int], Watch],
    max_cost_usd: float | None,
) -> PoolState:
    """Train these cells in the pool, within the study's budget, with MLflow following."""
    if not jobs:
        return PoolState(waiting=[])
    limit = max_cost_usd
    if study.price_usd_per_gpu_hour > 0:
        spent = sum(r.cost_usd for r in collect(layout, study.slug).records)
        left = study.budget_usd - spent
        if left <= 0:
            place.stop_left()
            raise OverBudgetError(
                f"experiments/{study.slug}: ${spent:.2f} of the budget of ${study.budget_usd:.2f} are spent and "
                f"{len(jobs)} cells are missing; going on takes a larger budget_usd, which amends the plan."
            )
        limit = left if limit is None else min(limit, left)
    steps = sum(job.cell.settings.steps for job in jobs)
    with start_follower(layout.main):
        try:
            return train_all(jobs, place=place, on_change=watch(steps, len(jobs)), max_cost_usd=limit)
        except TrainingStoppedError:
            place.stop_left()
            raise


def report_without_dvc(layout: Layout, snapshot: Snapshot) -> Standing:
    """Judge and report what was collected of a study that is incomplete, or was not run here."""
    slug = snapshot.study.slug
    keep_snapshot(layout, snapshot, slug)
    standing = judge_into(layout, slug)
    report_into(layout, slug)
    return standing


def _is_news(line: str) -> bool:
    # A stage `train` only takes over what was trained before.
    if line.startswith("Running stage "):
        return ":train@" not in line
    return line.startswith(("muonlab: ", "evaluated ", "loading ", "reading ", "training a ", "encoding "))
