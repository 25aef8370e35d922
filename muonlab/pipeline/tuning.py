"""Run a tuning study: the same grid and the same seeds for every arm, and the choice written where studies read it.

The option values with the lowest mean final validation loss over the seeds win; a diverged run counts with
ln(vocabulary size). The choice goes to `workloads.<workload>.tuned.<arm>` in params.yaml, every run to
`experiments/<study>/results.csv` and to the ledger. No DVC grid is made: nothing is compared here.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from muonlab.pipeline.attempts import CellScratch, Purpose
from muonlab.pipeline.collect import collect
from muonlab.pipeline.declare import register
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.pool import Job
from muonlab.pipeline.resolve import grid_points, resolve_cell
from muonlab.pipeline.study_run import Watch, check, prepare, train_missing
from muonlab.registry.errors import UsageError
from muonlab.registry.record import RunRecord
from muonlab.registry.study import Study

Point = tuple[tuple[str, Any], ...]


class Choice(NamedTuple):
    """What a tuning study chose for one arm."""

    arm: str
    point: dict[str, Any]
    mean_loss: float
    at_edge: list[str]
    """Options whose chosen value is the smallest or largest that was tried: the best may lie beyond."""


def run_tuning(
    layout: Layout, slug: str, *, workers: int, watch: Callable[[int, int], Watch], say: Callable[[str], None],
    max_cost_usd: float | None = None,
) -> int:  # fmt: skip
    """Run a tuning study; return the exit code (0, or 3 when cells failed). Raises UsageError, OverBudgetError."""
    params, study = check(layout, slug)
    if study.kind != "tuning":
        raise UsageError(f"experiments/{slug}: kind is {study.kind!r}; run it with `muon study run {slug}`.")
    prepare(layout, params, study)
    cells = {
        (arm, seed, tuple(point.items())): resolve_cell(layout, params, study.workload, arm, seed, overrides=point)
        for seed in study.seeds
        for arm in study.arms
        for point in grid_points(study)
    }
    known = _results(collect(layout, slug).records)
    purpose = Purpose(slug, register(layout, params, study).registration, study.price_usd_per_gpu_hour)
    jobs = [
        Job(cell, purpose, label=f"{cell.key} {_spell(point)}")
        for (_, _, point), cell in cells.items()
        if cell.digest not in known
    ]
    say(f"{slug}: {len(cells)} cells, {len(cells) - len(jobs)} known, {len(jobs)} to train.")
    state = train_missing(layout, study, jobs, workers=workers, watch=watch, max_cost_usd=max_cost_usd)
    known = _results(collect(layout, slug).records)
    for cell in cells.values():
        if cell.digest in known:
            CellScratch(layout, cell.digest).discard()
    rows = {key: known[cell.digest] for key, cell in cells.items() if cell.digest in known}
    _write_results(layout.study(slug) / "results.csv", study, rows)
    for label, reason in state.failed.items():
        say(f"failed: {label}: {reason}")
    if len(rows) < len(cells):
        say(f"{slug}: {len(cells) - len(rows)} cells have no result; nothing is chosen until all have one.")
        return 3
    diverged = params.workloads[study.workload].settings.diverged_loss
    losses = {key: diverged if record.val_loss is None else record.val_loss for key, record in rows.items()}
    choices = choose(study, losses)
    write_choices(layout.params, study.workload, choices)
    for choice in choices:
        edge = f"  (at the edge of the grid: {', '.join(choice.at_edge)})" if choice.at_edge else ""
        say(f"{choice.arm}: {_spell(tuple(choice.point.items()))}, mean loss {choice.mean_loss:.4f}{edge}")
    say(f"params.yaml: workloads.{study.workload}.tuned holds these choices now; commit it to declare them.")
    return 0


def choose(study: Study, losses: dict[tuple[str, int, Point], float]) -> list[Choice]:
    """Pick, for every arm, the grid point with the lowest mean loss over the seeds; of equals, the first."""
    choices = []
    for arm in study.arms:
        by_point: dict[Point, list[float]] = defaultdict(list)
        for (name, _, point), loss in losses.items():
            if name == arm:
                by_point[point].append(loss)
        means = {point: math.fsum(found) / len(found) for point, found in by_point.items()}
        best = min(means, key=lambda point: means[point])
        at_edge = [
            key
            for key, value in best
            if len(study.grid[key]) > 1 and value in (study.grid[key][0], study.grid[key][-1])
        ]
        choices.append(Choice(arm, dict(best), means[best], at_edge))
    return choices


def write_choices(params_file: Path, workload: str, choices: list[Choice]) -> None:
    """Write the chosen options into params.yaml, leaving its comments and order as they are."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    content = yaml.load(params_file)
    tuned = content["workloads"][workload].setdefault("tuned", {})
    for choice in choices:
        tuned.setdefault(choice.arm, {}).update(choice.point)
    with params_file.open("w", encoding="utf-8") as file:
        yaml.dump(content, file)


def _results(records: list[RunRecord]) -> dict[str, RunRecord]:
    return {r.cell_digest: r for r in reversed(records) if r.is_result}


def _write_results(path: Path, study: Study, rows: dict[tuple[str, int, Point], RunRecord]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", *study.grid, "seed", "status", "val_loss", "wall_seconds", "cost_usd", "cell_digest"])
        for (arm, seed, point), r in sorted(
            rows.items(), key=lambda item: (study.arms.index(item[0][0]), item[0][2], item[0][1])
        ):
            values = [value for _, value in point]
            writer.writerow(
                [
                    arm,
                    *values,
                    seed,
                    r.status,
                    r.val_loss,
                    round(r.wall_seconds, 2),
                    r.cost_usd,
                    r.cell_digest,
                ]
            )


def _spell(point: Point) -> str:
    return " ".join(f"{key}={value}" for key, value in point)
