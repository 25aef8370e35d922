"""Carry a study's recorded runs over to code that was changed and should compute the same: `muon accept`.

Code is part of a cell's digest, so that a refactoring makes other cells of all. For every arm and every older code of
its records, one recorded run is trained again by the code here and held against its record:

    the first steps, or all     every number in curve.csv but `seconds`, bit for bit; after all steps status, final loss
                                and final weights too
    all steps                   the order of the batches, by its hash
    the end                     the loss of the recorded weights on the whole validation split, bit for bit

Where all is equal, the ledger gets a row that says which digests are one cell on what evidence (muonlab.registry.
acceptance), and DVC is told by `dvc commit` that the outputs are those of the new code. One bit of difference and
nothing is carried over; the ledger keeps that too, so that fewer steps are no second chance. No tolerance: a change of
code within rounding cannot be told from rounding. Assumes that what differs shows in the compared steps of the compared
cells: what acts later, or in other cells, is not seen.
"""

from __future__ import annotations

import math
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import muonlab
import optim
from muonlab.pipeline import doors
from muonlab.pipeline.answer import Answer, Facts
from muonlab.pipeline.attempts import WEIGHTS, CellScratch, Purpose
from muonlab.pipeline.evaluations import read_record
from muonlab.pipeline.fingerprint import code_fingerprint
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.plan import shadow_of
from muonlab.pipeline.price import Pace
from muonlab.pipeline.processes import difference, dirty_text, git_state, provenance
from muonlab.pipeline.resolve import resolve_cell, study_cells
from muonlab.pipeline.running import ended_attempts
from muonlab.pipeline.study_run import check_names, prepare
from muonlab.pipeline.verify import train_again
from muonlab.registry import ledger
from muonlab.registry.acceptance import Acceptance, CarriedCell, Retrained, differences, under_code
from muonlab.registry.cell import Cell
from muonlab.registry.errors import IntegrityError, UsageError
from muonlab.registry.ledger import Ledger
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import Params, WorkloadSettings
from muonlab.registry.study import Study
from muonlab.reporting.carried import compared_text
from muonlab.reporting.wording import count, duration, listed, money

Steps = int | Literal["all"] | None
"""Of a run: so many, all, or as many as `enough_steps` says."""
Say = Callable[[str], None]

SHARE_OF_RUN = 0.1
"""Of a run's steps that are compared at least, where nothing else is asked."""


class ComparedRun(Facts):
    """One recorded run that is trained again."""

    run: str
    """`<arm>-<seed>`."""
    from_code: str
    """SHA-256 of the code that made its record."""
    steps: int
    """Optimizer steps to make again."""
    of_steps: int
    """Steps of the whole run."""
    expected_seconds: float | None
    """By the pace of finished runs; null where nothing tells."""
    expected_cost_usd: float | None
    rows: int | None
    """Rows of the curve that were compared; null where nothing was trained."""


class Accepted(Answer):
    """What `muon accept` has carried over, or would."""

    study: str
    dry_run: bool
    compared: list[ComparedRun]
    """The runs that were trained again, or would be; empty where earlier comparisons suffice."""
    carried: list[str]
    """`<arm>-<seed>` of the cells whose records now count for the code here, or would."""
    without_outputs: list[str]
    """Those of them whose outputs are not in runs/: the next run of the study trains them unless they are brought."""
    difference: str | None
    """The first thing that is not as recorded, in words; then nothing is carried over."""
    acceptance: str | None
    """Name of the ledger's new row; null where none was written."""
    evidence: str | None
    """What was compared and what was not, in words; null on a difference and where nothing was carried over."""
    spent_seconds: float
    """Of training again and evaluating, just now. It is not charged to the study's budget."""
    spent_cost_usd: float
    expected_seconds: float | None
    expected_cost_usd: float | None

    @property
    def exit_code(self) -> int:
        """0, or 5 where a difference was found."""
        return 0 if self.difference is None else IntegrityError.exit_code

    def lines(self) -> Iterator[str]:
        """What was compared, what came out, and what now counts."""
        if not self.carried and self.difference is None:
            yield f"{self.study}: nothing to carry over, no result of its declared cells is of other code."
            return
        if self.dry_run:
            yield from self._plan()
        elif self.difference is not None:
            yield f"{self.study}: {self.difference}; the code here computes otherwise, and nothing is carried over."
        else:
            yield f"{self.study}: {self.evidence}"
            cells = f"{count(len(self.carried), 'cell')}: {', '.join(self.carried)}"
            yield f"Carried over to the code here: {cells}."
        if self.spent_seconds > 0:
            cost = f", {money(self.spent_cost_usd)}" if self.spent_cost_usd else ""
            yield f"The comparison took {duration(self.spent_seconds)}{cost}, which no study is charged."
        if self.without_outputs and self.difference is None:
            yield (
                f"Not in runs/{self.study}: {', '.join(self.without_outputs)}; `muon download --run '{self.study}/*'` "
                "brings what DVC's remote has, and `muon study run` trains the rest again, to the same outcome."
            )

    def _plan(self) -> Iterator[str]:
        if self.compared:
            runs = [f"{run.run} (the first {run.steps} of {run.of_steps})" for run in self.compared]
            if self.expected_seconds is None:
                price = "at an unknown pace"
            else:
                price = f"about {duration(self.expected_seconds)}, {money(self.expected_cost_usd or 0.0)}"
            yield (
                f"{self.study}: {count(len(runs), 'run')} would be trained again, {price} and an evaluation each: "
                f"{', '.join(runs)}."
            )
        else:
            yield f"{self.study}: no run would be trained again, since the ledger holds as long a comparison."
        yield (
            f"If all that is recorded of these steps comes out the same bit for bit, "
            f"{count(len(self.carried), 'cell')} would be carried over: {', '.join(self.carried)}."
        )


class _Old(NamedTuple):
    """A cell of the code here that has records under other code."""

    cell: Cell
    from_code: str
    from_digest: str
    has_result: bool

    def carried(self) -> CarriedCell:
        return CarriedCell(
            arm=self.cell.arm,
            seed=self.cell.seed,
            from_code=self.from_code,
            from_digest=self.from_digest,
            code=self.cell.inputs.code,
            digest=self.cell.digest,
        )


class _Test(NamedTuple):
    """The recorded run that stands for all of one arm and one older code."""

    old: _Old
    record: RunRecord
    steps: int
    """To be made again."""


def enough_steps(settings: WorkloadSettings) -> int:
    """How many steps show every phase of a run: warm-up and a step at the full learning rate, and SHARE_OF_RUN of it.

    Up to the next evaluation.
    """
    least = max(settings.warmup_steps + 1, math.ceil(SHARE_OF_RUN * settings.steps))
    return min(settings.steps, math.ceil(least / settings.eval_every) * settings.eval_every)


def accept(layout: Layout, slug: str, *, steps: Steps, dry_run: bool, command: str, say: Say) -> Accepted:
    """Compare the code here with that of a study's records and, where it computes the same, carry them over.

    Raises UsageError, before anything is trained, for a dirty tree, a study that keeps no curves, records of other
    settings, data or environment, and runs of several processes; IntegrityError where the evidence contradicts itself
    already, or the same code was found to compute otherwise before; CellsFailedError where DVC fails.
    """
    params, study = check_names(layout, slug)
    _refuse_unfit(layout, study)
    prepared = None if dry_run else prepare(layout, params, study)
    with shadow_of(layout, params, study) if dry_run else nullcontext(layout) as seen:
        in_place = prepared or doors.in_place(seen, study)
        if not in_place.data:
            raise UsageError(f"data/{study.workload}: not prepared for this code; without --dry-run it is prepared.")
        kept = doors.kept_outputs(seen, study)
        held = _whole_ledger(layout)
        records = ended_attempts(layout, held)
        cells = study_cells(seen, params, study)
        olds = _olds(seen, params, study, cells, records)
    outputs = _outputs(layout, study, olds, records, kept)
    tests = _tests(layout, study, olds, outputs, held, steps)
    without = [old.cell.key for old in olds if _counts(old, study) and old.cell.key not in outputs]
    pace = Pace.of(records, study.workload, params.workloads[study.workload])
    purpose = Purpose(slug, None, study.price_usd_per_gpu_hour)
    carried = [old.carried() for old in olds]
    retrained: list[Retrained] = []
    acceptance = None
    if not dry_run:
        for number, test in enumerate(tests, start=1):
            key = test.old.cell.key
            say(f"{slug}: {key} ({number} of {len(tests)}): training {test.steps} of {test.record.final_step} steps.")
            retrained.append(_compare(layout, study, test, purpose))
            if retrained[-1].difference is not None:
                break
        if tests:
            _refuse_moved(layout, study, cells)
            differs = any(run.difference is not None for run in retrained)
            tested = {(test.old.cell.arm, test.old.from_code) for test in tests}
            acceptance = Acceptance(
                acceptance_id=secrets.token_hex(8),
                study=slug,
                workload=study.workload,
                command=command,
                made_at=datetime.now(UTC).isoformat(timespec="seconds"),
                environment=cells[0].inputs.environment,
                provenance=provenance(layout.root),
                retrained=retrained,
                carried=[] if differs else [cell for cell in carried if (cell.arm, cell.from_code) in tested],
            )
            # Before DVC: what a kill leaves undone then, the next start does without training.
            ledger.append(layout.ledger, [acceptance])
        if not any(run.difference for run in retrained):
            _commit(layout, study, sorted(outputs.keys() - in_place.cells))
    return _answer(study, tests, retrained, carried, without, acceptance, pace, purpose, dry_run=dry_run)


def _refuse_unfit(layout: Layout, study: Study) -> None:
    """Raise UsageError for a study, a tree or an installation of which no comparison of code can be made."""
    if study.kind != "comparison":
        raise UsageError(
            f"experiments/{study.slug}: kind is {study.kind!r}, which keeps no curves to compare; its results.csv "
            "stands, and `muon accept` takes comparisons."
        )
    if git_state(layout.root)[0] is None:
        raise UsageError(f"{layout.root}: there is no commit here to name the code by; commit it first.")
    if (dirt := dirty_text(difference(layout.root))) is not None:
        raise UsageError(f"{dirt.partition(';')[0]}; commit it first: what is accepted is a commit.")
    for package in (muonlab, optim):
        assert package.__file__ is not None
        if (found := Path(package.__file__).resolve().parents[1]) != layout.root:
            raise UsageError(
                f"{package.__name__}: this command runs the code in {found}, not that of the repository, which it is "
                "to compare; run it by the repository's own environment (`source .venv/bin/activate`)."
            )


def _whole_ledger(layout: Layout) -> Ledger:
    # With the lines that were taken out since they were committed: a difference among them still stands.
    held = ledger.append(layout.ledger, [])
    if held.findings:
        raise IntegrityError(f"{held.findings[0]} Nothing is carried over before that is mended.")
    return held


def _olds(layout: Layout, params: Params, study: Study, cells: list[Cell], records: list[RunRecord]) -> list[_Old]:
    """The study's cells, and those of its arms on seeds left out, that have attempts under other code.

    Raises UsageError for a result in the study's name that differs in more than code; IntegrityError where older and
    newer code have different results already.
    """
    by_digest: dict[str, list[RunRecord]] = {}
    for record in records:
        by_digest.setdefault(record.cell_digest, []).append(record)
    codes = sorted({r.hashes.code for r in records if r.workload == study.workload})
    # The tuning study's seeds are no comparison's; any other seed that was run must stay visible as left out.
    other_seeds = {r.seed for r in records if r.workload == study.workload and r.study != study.tuning}
    left_out = [
        resolve_cell(layout, params, study.workload, arm, seed)
        for seed in sorted(other_seeds - set(study.seeds))
        for arm in study.arms
    ]
    found = []
    for cell in (*cells, *left_out):
        for code in codes:
            digest = under_code(cell, code).digest
            attempts = by_digest.get(digest, [])
            if code == cell.inputs.code or not attempts:
                continue
            results = [r for r in attempts if r.is_result]
            for new in by_digest.get(cell.digest, []):
                if new.is_result and any(old.outcome() != new.outcome() for old in results):
                    raise IntegrityError(
                        f"cell {cell.key}: its recorded run ended with val_loss {results[0].val_loss}, and one made by "
                        f"the code here with {new.val_loss}; it computes otherwise, and nothing is carried over."
                    )
            found.append(_Old(cell, code, digest, has_result=bool(results)))
    _refuse_others(study, cells, records, {old.from_digest for old in found})
    # What an arm has left under a code is carried over if a declared run of it is there to be compared.
    comparable = {(old.cell.arm, old.from_code) for old in found if _counts(old, study)}
    return [old for old in found if (old.cell.arm, old.from_code) in comparable]


def _refuse_others(study: Study, cells: list[Cell], records: list[RunRecord], ours: set[str]) -> None:
    by_key = {cell.key: cell for cell in cells}
    for record in sorted(records, key=lambda r: (r.seed, r.arm)):
        cell = by_key.get(f"{record.arm}-{record.seed}")
        if record.study != study.slug or not record.is_result or cell is None:
            continue
        if record.cell_digest in ours or record.cell_digest == cell.digest:
            continue
        what = {
            "environment": "in another environment (libraries or kind of machine), where nothing is equal bit for bit",
            "data": "on other data",
            "tokenizer": "with another tokenizer",
        }
        changed = [how for name, how in what.items() if getattr(record.hashes, name) != getattr(cell.inputs, name)]
        how = changed[0] if changed else f"with other options of {record.arm}, other settings or another model"
        raise UsageError(
            f"{study.slug}: {cell.key} was recorded {how}; only a change of code can be accepted: go back to what it "
            "was made with, or declare a new study (`muon study new`)."
        )


def _outputs(
    layout: Layout, study: Study, olds: list[_Old], records: list[RunRecord], kept: set[str]
) -> dict[str, RunRecord]:
    """Key of a declared cell -> its record in runs/, of the cells whose outputs are there as training left them.

    Raises IntegrityError where they are not as their lock file, or the ledger, has them.
    """
    found = {}
    for old in olds:
        key = old.cell.key
        record = read_record(layout.runs(study.slug) / key) if _counts(old, study) else None
        if record is None or record.cell_digest not in (old.from_digest, old.cell.digest):
            continue
        same = [r for r in records if r.cell_digest == record.cell_digest and r.outcome() == record.outcome()]
        if key not in kept or not any(r.curve == record.curve for r in same):
            raise IntegrityError(
                f"runs/{study.slug}/{key}: its files are not those that its training left; `dvc checkout "
                f"experiments/{study.slug}/dvc.yaml:train@{key}` brings them back."
            )
        found[key] = record
    return found


def _counts(old: _Old, study: Study) -> bool:
    """Whether the declared grid holds the cell, and a result of it is recorded under the older code."""
    return old.has_result and old.cell.seed in study.seeds


def _tests(
    layout: Layout, study: Study, olds: list[_Old], outputs: dict[str, RunRecord], held: Ledger, steps: Steps
) -> list[_Test]:
    """One recorded run for every arm and older code that has not been compared over as many steps already."""
    groups: dict[tuple[str, str], list[_Old]] = {}
    for old in olds:
        groups.setdefault((old.cell.arm, old.from_code), []).append(old)
    tests = []
    for group in groups.values():
        _refuse_refuted(held, study, group[0])
        wanted = _wanted(held, study, group[0], steps)
        if not all(_is_compared(held, old, wanted) for old in group):
            tests.append(_test_of(layout, study, group, outputs, wanted))
    return tests


def _refuse_refuted(held: Ledger, study: Study, old: _Old) -> None:
    """Raise IntegrityError where the same two codes were compared before and differed."""
    run = differences(held.acceptances).get((study.workload, old.from_code, old.cell.inputs.code))
    if run is not None:
        raise IntegrityError(
            f"{study.slug}: this code was compared before, and came out otherwise ({run.difference}); fewer steps are "
            "no second chance, and nothing is carried over."
        )


def _wanted(held: Ledger, study: Study, old: _Old, steps: Steps) -> int:
    """How many steps to compare: as asked, and as many as it took to find a difference of other code from this one.

    Else what was found out once could be hidden by one more change. Raises UsageError where fewer are asked for.
    """
    settings = old.cell.settings
    if steps == "all":
        return settings.steps
    of_same = [run for key, run in differences(held.acceptances).items() if key[:2] == (study.workload, old.from_code)]
    least = max((run.steps for run in of_same), default=0)
    if steps is not None and steps < least:
        raise UsageError(
            f"--steps {steps}: other code was compared with the same records before and differed within "
            f"{count(least, 'step')}; compare at least as many."
        )
    return min(settings.steps, steps or max(least, enough_steps(settings)))


def _is_compared(held: Ledger, old: _Old, steps: int) -> bool:
    """Whether the ledger holds a comparison over as many steps, up to an evaluation, that carries the cell over."""
    settings, cell = old.cell.settings, old.carried()
    least = steps if steps == settings.steps else max(1, steps // settings.eval_every * settings.eval_every)
    runs = [a.evidence(cell) for a in held.acceptances if cell in a.carried]
    return any(run.steps >= least or run.steps == run.of_steps for run in runs)


def _test_of(layout: Layout, study: Study, group: list[_Old], outputs: dict[str, RunRecord], steps: int) -> _Test:
    """The first run in the order of seeds whose outputs are here, a completed one where there is one.

    Raises UsageError where there is none.
    """
    tests = [
        _Test(old, record, min(steps, record.final_step))
        for old in group
        if (record := outputs.get(old.cell.key)) and record.cell_digest == old.from_digest and record.device_count == 1
    ]
    if not tests:
        arm = group[0].cell.arm
        waiting = [old.cell.key for old in group if CellScratch(layout, old.from_digest).finished() is not None]
        if waiting:
            raise UsageError(
                f"{study.slug}: {listed(waiting)} wait in scratch/ to be taken over; go back to the code that made "
                f"them (`git switch --detach COMMIT`), let `muon study run {study.slug} --only '{arm}-*'` take them "
                "over, and come back."
            )
        raise UsageError(
            f"{study.slug}: of {arm} no run by one process has its outputs here, so that there is no curve to compare "
            f"with; `muon download --run '{study.slug}/{arm}-*'` brings them (runs by several processes agree to "
            "rounding only, and are never carried over)."
        )
    return next((test for test in tests if test.record.status == "completed"), tests[0])


def _compare(layout: Layout, study: Study, test: _Test, purpose: Purpose) -> Retrained:
    """Train a recorded run again and hold all evidence against it."""
    cell, record = test.old.cell, test.record
    folder = layout.runs(study.slug) / cell.key
    began = time.monotonic()
    again = train_again(layout, cell, record, folder, steps=test.steps, exact=True)
    differs = again.difference or _order_difference(layout, cell, record)
    whole = again.steps == record.final_step
    if differs is None and record.status == "completed" and not whole:
        differs = _loss_difference(layout, cell, record, folder)
    if differs is not None and record.repeats != "bit for bit":
        differs += " (its record promises agreement to rounding only, from which a change of code cannot be told)"
    seconds = time.monotonic() - began
    return Retrained(
        arm=cell.arm,
        seed=cell.seed,
        attempt_id=record.attempt_id,
        from_code=test.old.from_code,
        code=cell.inputs.code,
        steps=again.steps,
        of_steps=record.final_step,
        rows=again.rows,
        weights_compared=again.weights_compared,
        loss_compared=differs is None and record.status == "completed",
        difference=None if differs is None else f"{cell.key}: {differs}",
        wall_seconds=seconds,
        cost_usd=purpose.cost_usd(seconds),
    )


def _order_difference(layout: Layout, cell: Cell, record: RunRecord) -> str | None:
    from muonlab.training.data import TokenData, order_sha256

    settings = cell.settings
    blocks = min(TokenData.open(layout.data(cell.workload)).block_count("training"), settings.examples or sys.maxsize)
    found = order_sha256(seed=cell.seed, steps=settings.steps, batch_size=settings.batch_size, blocks=blocks)
    if found == record.hashes.order:
        return None
    return f"the order of its batches hashes to {found[:12]}, recorded {str(record.hashes.order)[:12]}"


def _loss_difference(layout: Layout, cell: Cell, record: RunRecord, folder: Path) -> str | None:
    from muonlab.training.evaluate import evaluate

    scored = evaluate(folder / WEIGHTS, cell.settings, layout.data(cell.workload))
    if scored.weights_sha256 != record.hashes.weights:
        return f"its weights hash to {scored.weights_sha256[:12]}, recorded {str(record.hashes.weights)[:12]}"
    if scored.val_loss != record.val_loss:
        then = f"after step {record.final_step}, the last,"
        return f"{then} its weights score {scored.val_loss}, recorded {record.val_loss}"
    return None


def _refuse_moved(layout: Layout, study: Study, cells: list[Cell]) -> None:
    """Raise UsageError where the tree is no longer the one that the comparison began with."""
    codes = {cell.optimizer.kind: cell.inputs.code for cell in cells}
    moved = any(code_fingerprint(layout.root, kind) != code for kind, code in codes.items())
    if moved or dirty_text(difference(layout.root)) is not None:
        raise UsageError(f"{study.slug}: the code was changed while it was compared; commit it, and start again.")


def _commit(layout: Layout, study: Study, keys: Iterable[str]) -> None:
    """Tell DVC that these outputs, which are in place, are those of the code here."""
    targets = [f"experiments/{study.slug}/dvc.yaml:train@{key}" for key in keys]
    if targets:
        doors.dvc(layout, "commit", "--force", *targets)


def _answer(
    study: Study, tests: list[_Test], retrained: list[Retrained], carried: list[CarriedCell], without: list[str],
    acceptance: Acceptance | None, pace: Pace, purpose: Purpose, *, dry_run: bool,
) -> Accepted:  # fmt: skip
    times = [pace.seconds(test.old.cell.arm, test.steps) for test in tests]
    known = [time for time in times if time is not None]
    seconds = math.fsum(known) if len(known) == len(times) else None
    differs = next((run.difference for run in retrained if run.difference is not None), None)
    names = dict.fromkeys(f"{cell.arm}-{cell.seed}" for cell in carried)
    spent = math.fsum(run.wall_seconds for run in retrained)
    if differs is not None or not carried or (dry_run and tests):
        evidence = None
    elif retrained:
        evidence = compared_text(retrained)
    else:
        evidence = "the ledger holds as long a comparison, so that nothing was trained again."
    return Accepted(
        study=study.slug,
        dry_run=dry_run,
        compared=[
            ComparedRun(
                run=test.old.cell.key,
                from_code=test.old.from_code,
                steps=test.steps,
                of_steps=test.record.final_step,
                expected_seconds=expected,
                expected_cost_usd=None if expected is None else purpose.cost_usd(expected),
                rows=retrained[index].rows if index < len(retrained) else None,
            )
            for index, (test, expected) in enumerate(zip(tests, times, strict=True))
        ],
        carried=[] if differs else list(names),
        without_outputs=without,
        difference=differs,
        acceptance=acceptance.acceptance_id if acceptance else None,
        evidence=evidence,
        spent_seconds=spent,
        spent_cost_usd=purpose.cost_usd(spent),
        expected_seconds=seconds,
        expected_cost_usd=None if seconds is None else purpose.cost_usd(seconds),
    )
