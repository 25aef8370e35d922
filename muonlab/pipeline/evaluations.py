"""Evaluate the saved weights of cells: the loss on the whole validation split, recomputed, and a sample of text.

An evaluation is a function of weights, settings and data, so it is kept by their hashes in
`scratch/evaluations/` and computed once, however often a study's grid grows. The series of a cell are copied from its
curve.csv, so that the report shows diagnostics without reading the runs.
"""

from __future__ import annotations

import csv
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from muonlab.pipeline.attempts import WEIGHTS
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.processes import die_with_parent
from muonlab.registry.canonical import sha256_of
from muonlab.registry.files import file_sha256, write_atomically
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import WorkloadSettings
from muonlab.reporting.standing import Evaluation

NOT_SERIES = ("step", "tokens", "seconds", "val_loss")
"""Columns of curve.csv that are no series: the axes, and the validation loss, which the record holds."""


def read_record(folder: Path) -> RunRecord | None:
    """The record in a cell's output folder, or None where the cell has left nothing."""
    path = folder / "train.json"
    return RunRecord.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def read_series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Column of a cell's curve.csv -> (step, value) of the rows that have a finite one, in the order of the file.

    Empty where the file is missing, or is not a table of numbers.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    try:
        with (folder / "curve.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, strict=True):
                step = int(row["step"])
                for column, text in row.items():
                    if column in NOT_SERIES or text == "":
                        continue
                    value = float(text)
                    if math.isfinite(value):
                        series.setdefault(column, []).append((step, value))
    # TypeError: a row with more or fewer cells than columns.
    except (OSError, ValueError, TypeError, KeyError, csv.Error):
        return {}
    return series


def evaluate_folders(
    layout: Layout, folders: Iterable[Path], settings: WorkloadSettings, data_dir: Path, *, workers: int
) -> Iterator[Evaluation]:
    """Evaluate the cells in these output folders, in order; folders without a record are passed over.

    A diverged cell has no weights and gets a line without a loss. `workers` processes share the work.
    """
    found = [(folder, record) for folder in folders if (record := read_record(folder)) is not None]
    wanted = {
        folder: _path(layout, folder, settings, record) for folder, record in found if record.status == "completed"
    }
    missing = [(folder / WEIGHTS, path) for folder, path in wanted.items() if not path.exists()]
    if len(missing) == 1 or workers == 1:
        for weights, path in missing:
            _evaluate_into(weights, path, settings, data_dir)
    elif missing:
        # Spawned, not forked: torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        # Else they would wait for ever for a parent that was killed.
        with ProcessPoolExecutor(min(workers, len(missing)), context, initializer=die_with_parent) as pool:
            tasks = [pool.submit(_evaluate_into, weights, path, settings, data_dir) for weights, path in missing]
            for number, task in enumerate(tasks, start=1):
                task.result()
                print(f"evaluated {number} of {len(tasks)}", flush=True)
    for folder, record in found:
        line = {
            "arm": record.arm,
            "seed": record.seed,
            "cell_digest": record.cell_digest,
            "series": read_series(folder),
        }
        if folder in wanted:
            scored = Evaluation.model_validate_json(wanted[folder].read_text(encoding="utf-8"))
            yield scored.model_copy(update=line)
        else:
            yield Evaluation.model_validate(
                {
                    **line,
                    "weights_sha256": None,
                    "val_loss": None,
                    "perplexity": None,
                    "prompt": "",
                    "sample": "",
                }
            )


def evaluate_now(layout: Layout, folder: Path, settings: WorkloadSettings, record: RunRecord, data_dir: Path) -> None:
    """Evaluate the weights that this process has just saved in `folder`, for the evaluate stage to find.

    They are read back from the file like any others; when they are bit for bit those that the training has scored,
    its loss stands.
    """
    if record.val_loss is not None and record.hashes.weights is not None:
        path = _path(layout, folder, settings, record)
        if not path.exists():
            _evaluate_into(folder / WEIGHTS, path, settings, data_dir, known={record.hashes.weights: record.val_loss})


def _path(layout: Layout, folder: Path, settings: WorkloadSettings, record: RunRecord) -> Path:
    # The file's own hash, not the one in its record: edited weights must be evaluated as they are.
    weights = file_sha256(folder / WEIGHTS)
    hashes = record.hashes
    key = sha256_of([weights, settings.model_dump(mode="json"), hashes.data, hashes.code, hashes.environment])
    return layout.scratch / "evaluations" / f"{key}.json"


def _evaluate_into(
    weights: Path, path: Path, settings: WorkloadSettings, data_dir: Path, known: dict[str, float] | None = None
) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from muonlab.training.evaluate import evaluate

    scored = evaluate(weights, settings, data_dir, known=known)
    line = Evaluation(
        arm="-",
        seed=0,
        cell_digest="-",
        weights_sha256=scored.weights_sha256,
        val_loss=scored.val_loss,
        perplexity=scored.perplexity,
        prompt=scored.prompt,
        sample=scored.sample,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, line.model_dump_json())
