"""The loss curves as a table, for `dvc plots`: figures/val_loss.csv, a row a line and step.

    a study          one line an arm, y_k = mean over its n runs at the steps k > 0 where all n have a loss, with the
                     lowest and the highest run: never a mean over survivors
    one experiment   one line, its run

A run's own curve.csv is no such table: it has rows without an evaluation, and DVC's templates draw an empty field as
zero. Losses in nats/token.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from muonlab.registry.files import write_atomically
from muonlab.registry.record import RunRecord
from muonlab.reporting.figures.lines import loss_curves, mean
from muonlab.reporting.standing import Standing

NAME = "val_loss.csv"
COLUMNS = ("run", "seeds", "step", "val_loss", "lowest", "highest")


def write_loss_table(standing: Standing, folder: Path, *, cell: RunRecord | None = None) -> None:
    """Write val_loss.csv into `folder`: of the study's arms, or of the one run `cell`; none where there is no curve."""
    rows = list(_run_rows(cell) if cell is not None else _arm_rows(standing))
    if not rows:
        (folder / NAME).unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    write_atomically(folder / NAME, text.getvalue(), durable=False)


def _arm_rows(standing: Standing) -> Iterator[tuple[object, ...]]:
    for arm in standing.snapshot.study.arms:
        curves = list(loss_curves(standing, arm).values())
        for step, loss in mean(curves).items() if curves else ():
            values = [curve[step] for curve in curves]
            yield arm, len(curves), step, loss, min(values), max(values)


def _run_rows(cell: RunRecord) -> Iterator[tuple[object, ...]]:
    for point in cell.curve:
        if point.step > 0 and point.val_loss is not None:
            yield f"{cell.arm}, seed {cell.seed}", 1, point.step, *([point.val_loss] * 3)
