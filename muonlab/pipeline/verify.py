"""Train a recorded cell again from its start, or its first steps, and hold it against its record.

    a record that says that it repeats bit for bit (`computing.repeats`, and one process), in its own environment
    (versions of Python and libraries, processor's architecture, accelerator):
        equal, bit for bit
    any other, such as of a run on CUDA or by several processes, which agree to rounding:
        |ours - recorded| <= TOLERANCE * |recorded|  for every training and validation loss

What is compared bit for bit: every column of curve.csv but `seconds`, at every row up to the last step, and of a whole
run its status, its final loss and its weights too; with the tolerance the losses and the status alone. Assumes that a
row of curve.csv holds its numbers to the last bit (Python writes the shortest decimals that read back the same). The
training happens in a temporary folder; it is no attempt, and nothing is recorded.
"""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from muonlab.pipeline.answer import Answer
from muonlab.pipeline.evaluations import read_record
from muonlab.pipeline.fingerprint import code_fingerprint
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_params, resolve_cell
from muonlab.registry import ledger
from muonlab.registry.acceptance import accepted_after
from muonlab.registry.cell import Cell
from muonlab.registry.errors import CellsFailedError, MuonlabError, UsageError
from muonlab.registry.record import RunRecord
from muonlab.reporting.wording import count

if TYPE_CHECKING:
    from muonlab.training.loop import TrainOutcome

TOLERANCE = 0.01
"""Relative, where runs agree to rounding: chosen wide, since such differences grow with the steps."""
LOSSES = ("train_loss", "val_loss")
NOT_COMPARED = ("seconds",)

Row = dict[str, float]


class Verification(Answer):
    """What came out when a recorded run was trained again."""

    run: str
    """`<study>/<arm>-<seed>`."""
    agrees: bool
    steps: int
    """Optimizer steps that were made again."""
    of_steps: int
    """Steps of the whole run."""
    rows: int
    """Rows of the curve that were compared."""
    weights_compared: bool
    """Whether the final weights were compared too: only a whole run that repeats bit for bit has the same."""
    same_environment: bool
    """Whether versions and kind of machine are those of the record."""
    same_code: bool
    """Whether the code that trains is that of the record."""
    accepted_after: int | None
    """Steps after which `muon accept` carried the record over to the code that trains; null where it has not."""
    tolerance: float | None
    """Relative, on losses; null where nothing may differ: in the environment of a record that repeats bit for bit."""
    difference: str | None
    """The first thing that is not as recorded, in words."""

    @property
    def exit_code(self) -> int:
        """0 where the run agrees with its record, else 5."""
        return 0 if self.agrees else 5

    def lines(self) -> Iterator[str]:
        """One sentence for a reader."""
        part = "all" if self.steps == self.of_steps else f"the first {self.steps} of {self.of_steps}"
        accepted = (
            "" if self.accepted_after is None else f" that was accepted after {count(self.accepted_after, 'step')}"
        )
        what = f"{self.run}: {part} steps trained again" + ("" if self.same_code else f", by other code{accepted},")
        why = "the record promises agreement to rounding only" if self.same_environment else "another environment"
        how = "bit for bit" if self.tolerance is None else f"within {self.tolerance:.0%} ({why})"
        if self.agrees:
            also = " and the final weights" if self.weights_compared else ""
            yield f"{what} agree with the record {how}: {count(self.rows, 'row')} of the curve{also}."
        else:
            yield f"{what} do not agree with the record {how}: {self.difference}."


class _Enough(Exception):
    """Ends a training after the last step that is compared."""


def verify(layout: Layout, run: str, *, steps: int | None) -> Verification:
    """Train a recorded run again, its first `steps` or all of it, and compare.

    `run` is `<arm>-<seed>` of the study that params.yaml names, or `<study>/<arm>-<seed>`. Raises UsageError where no
    such record is here, where parameters or data are no longer those of the record, and where the record has no row
    within `steps`.
    """
    study, _, key = run.rpartition("/")
    params = load_params(layout.params)
    study = study or params.study
    name, folder = f"{study}/{key}", layout.runs(study) / key
    record = read_record(folder) if key not in ("", ".", "..") and "/" not in study else None
    if record is None:
        raise UsageError(
            f"runs/{name}: there is no record of such a run here; a run is `<arm>-<seed>` or `<study>/<arm>-<seed>`, "
            f"and `muon download --run {run}` brings one from elsewhere."
        )
    cell = resolve_cell(layout, params, record.workload, record.arm, record.seed)
    _refuse_another_cell(name, cell, record)
    same = record.hashes.environment == cell.inputs.environment
    exact = same and record.repeats == "bit for bit"
    found = train_again(layout, cell, record, folder, steps=steps, exact=exact)
    code = code_fingerprint(layout.root, cell.optimizer.kind)
    return Verification(
        run=name,
        agrees=found.difference is None,
        steps=found.steps,
        of_steps=record.final_step,
        rows=found.rows,
        weights_compared=found.weights_compared,
        same_environment=same,
        same_code=record.hashes.code == code,
        accepted_after=accepted_after(ledger.read(layout.ledger).acceptances, record.cell_digest, code),
        tolerance=None if exact else TOLERANCE,
        difference=found.difference,
    )


class Again(NamedTuple):
    """What came out when steps of a recorded run were made again."""

    steps: int
    """Optimizer steps that were made."""
    rows: int
    """Rows of the curve that were compared."""
    weights_compared: bool
    """The final weights were compared, too."""
    difference: str | None
    """The first thing that is not as recorded, in words."""


def train_again(
    layout: Layout, cell: Cell, record: RunRecord, folder: Path, *, steps: int | None, exact: bool
) -> Again:
    """Train a cell from its start, its first `steps` or all of it, and compare it with the run recorded in `folder`.

    Bit for bit where `exact`, else within TOLERANCE. Raises UsageError where the record has no row within `steps`.
    """
    expected = _recorded_rows(folder / "curve.csv", record)
    last = record.final_step
    if steps is not None and steps < record.final_step:
        first = next((int(row["step"]) for row in expected if row["step"] > 0), record.final_step)
        if steps < first:
            raise UsageError(
                f"runs/{folder.parent.name}/{folder.name}: the record has no row within the first "
                f"{count(steps, 'step')}; its first is at step {first}, so give --steps at least that."
            )
        expected = [row for row in expected if row["step"] <= steps]
        last = int(expected[-1]["step"])
    found, outcome = _train(layout, cell, last if last < record.final_step else None)
    return Again(
        steps=last,
        rows=len(expected),
        weights_compared=outcome is not None and exact and record.hashes.weights is not None,
        difference=_difference(expected, found, record, outcome, exact=exact),
    )


def _refuse_another_cell(name: str, cell: Cell, record: RunRecord) -> None:
    """Raise UsageError unless the cell, code and environment aside, is the one that was recorded."""
    for what in ("data", "tokenizer"):
        if getattr(cell.inputs, what) != getattr(record.hashes, what):
            raise UsageError(
                f"runs/{name}: the {what} here is not that of the record; prepare the data that it was made with."
            )
    then = {what: getattr(record.hashes, what) for what in ("data", "tokenizer", "code", "environment")}
    # A record has no hash of the model it started from: its digest alone tells whether that is the one here.
    recorded = {**cell.model_dump(mode="json"), "inputs": {**cell.inputs.model_dump(), **then}}
    if Cell.model_validate(recorded).digest != record.cell_digest:
        model = ", or the model that it starts from is another," if cell.inputs.model else ""
        raise UsageError(
            f"runs/{name}: params.yaml now gives {record.arm} other options, or {record.workload} other settings{model}"
            " than the record was made with; check out the version that holds them."
        )


def _recorded_rows(path: Path, record: RunRecord) -> list[Row]:
    """The recorded curve: the rows of curve.csv, its validation losses as the record itself has them."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [_numbers(row) for row in csv.DictReader(file, strict=True)]
        steps = [row["step"] for row in rows]
    except (OSError, ValueError, TypeError, KeyError, csv.Error):
        raise UsageError(f"{path.parent.name}/curve.csv: it is not a curve that training wrote.") from None
    losses = {point.step: math.nan if point.val_loss is None else point.val_loss for point in record.curve}
    if missing := sorted(losses.keys() - set(steps)):
        raise UsageError(f"{path.parent.name}/curve.csv: it lacks step {missing[0]}, which the record has.")
    return [row | ({"val_loss": losses[int(row["step"])]} if row["step"] in losses else {}) for row in rows]


def _numbers(row: dict[str, str]) -> Row:
    return {column: float(text) for column, text in row.items() if text != "" and column not in NOT_COMPARED}


def _train(layout: Layout, cell: Cell, until: int | None) -> tuple[list[Row], TrainOutcome | None]:
    """The rows of a training from the start, and how it ended; with `until`, only those up to that step."""
    from muonlab.training.loop import CurveRow, train

    rows: list[Row] = []

    def keep(row: CurveRow) -> None:
        # As curve.csv has a row: what was not measured is not in it.
        measured = {name: float(value) for name, value in row.items() if value is not None}
        rows.append({name: value for name, value in measured.items() if name not in NOT_COMPARED})
        if until is not None and rows[-1]["step"] >= until:
            raise _Enough

    layout.scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=layout.scratch) as work:
        try:
            return rows, train(
                cell, layout.data(cell.workload), Path(work), on_point=keep, on_progress=lambda progress: None
            )
        except _Enough:
            return rows, None
        except MuonlabError:
            raise
        except Exception as error:  # whatever the code here does wrong, it is the answer
            at = f"after step {int(rows[-1]['step'])}" if rows else "before its first evaluation"
            raise CellsFailedError(
                f"{cell.key}: the code here does not train it again: {at} it ended with {type(error).__name__} "
                f"({' '.join(str(error).split())[:300]})."
            ) from error


def _difference(
    expected: list[Row], found: list[Row], record: RunRecord, outcome: TrainOutcome | None, *, exact: bool
) -> str | None:
    """The first thing that is not as recorded; None where all is."""
    for theirs, ours in zip(expected, found, strict=False):
        columns = sorted(theirs.keys() | ours.keys()) if exact else [c for c in ("step", *LOSSES) if c in theirs]
        for column in columns:
            before, again = theirs.get(column), ours.get(column)
            if not (_equal(before, again) if exact or column == "step" else agree_to_rounding(before, again)):
                return f"at step {int(theirs['step'])} {column} is {again}, recorded {before}"
    if len(expected) != len(found):
        return f"the curve has {len(found)} rows, recorded {len(expected)}"
    if outcome is not None and outcome.status != record.status:
        return f"it ended as {outcome.status}, recorded {record.status}"
    if outcome is not None and not (_equal if exact else agree_to_rounding)(record.val_loss, outcome.val_loss):
        return f"its final loss is {outcome.val_loss}, recorded {record.val_loss}"
    if outcome is not None and exact and outcome.weights_sha256 != record.hashes.weights:
        now, then = outcome.weights_sha256 or "nothing", record.hashes.weights or "nothing"
        return f"its final weights hash to {now[:12]}, recorded {then[:12]}"
    return None


def _equal(then: float | None, now: float | None) -> bool:
    if then is None or now is None:
        return then is now
    return then == now or (math.isnan(then) and math.isnan(now))


def agree_to_rounding(then: float | None, now: float | None) -> bool:
    """Whether two losses [nats/token] are within TOLERANCE of the first; what was not measured agrees with its like."""
    if then is None or now is None:
        return then is now
    return _equal(then, now) or abs(now - then) <= TOLERANCE * abs(then)
