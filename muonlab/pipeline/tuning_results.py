"""results.csv of a tuning study, every declared run of it in a row, and what a comparison takes from it.

The file is written when every declared run has an outcome, and committed: it is what the choice in params.yaml was made
from, and stands for the runs where the ledger does not have them, as in a fresh clone. Where the ledger has a row's
cell, the two must agree. Losses in nats/token; a diverged run has none.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from muonlab.pipeline.layout import Layout
from muonlab.pipeline.price import declared_grid
from muonlab.pipeline.resolve import load_study, resolve_optimizer
from muonlab.registry.errors import UsageError
from muonlab.registry.files import write_atomically
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import Params
from muonlab.registry.snapshot import ArmTuning
from muonlab.registry.study import Study
from muonlab.reporting.tuning_standing import ArmResult, GridRun, judge_arm, spell_options
from muonlab.reporting.tuning_wording import UNTUNED

RESULTS = "results.csv"


def write_results(layout: Layout, study: Study, runs: Iterable[GridRun]) -> None:
    """Write results.csv: the runs that have an outcome, arm by arm as declared, point by point of the grid."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_columns(study))
    points = [options for arm, seed, options in declared_grid(study) if (arm, seed) == (study.arms[0], study.seeds[0])]
    order = {arm: index for index, arm in enumerate(study.arms)}
    for run in sorted(runs, key=lambda r: (order[r.arm], points.index(r.options), study.seeds.index(r.seed))):
        if run.has_outcome:
            spent = (round(run.wall_seconds, 2), run.cost_usd)
            writer.writerow([run.arm, *run.options.values(), run.seed, run.state, run.val_loss, *spent, run.digest])
    write_atomically(layout.study(study.slug) / RESULTS, text.getvalue(), durable=False)


def _columns(study: Study) -> list[str]:
    return ["arm", *study.grid, "seed", "status", "val_loss", "wall_seconds", "cost_usd", "cell_digest"]


def read_results(layout: Layout, study: Study) -> list[GridRun] | None:
    """Every declared run as results.csv has it, in the order of the grid, `missing` without a row; None without a file.

    Raises UsageError, with the line, for a row that the declaration does not have, that stands twice, or that no run
    can have left.
    """
    path = layout.study(study.slug) / RESULTS
    where = f"experiments/{study.slug}/{RESULTS}"
    again = f"`muon study run {study.slug}` makes it anew"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: is not UTF-8 text (byte {error.start}); {again}.") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if reader.fieldnames != _columns(study):
        raise UsageError(f"{where}: found the columns {reader.fieldnames}; they should be {_columns(study)}; {again}.")
    spelt = {option: {str(value): value for value in values} for option, values in study.grid.items()}
    found: list[GridRun] = []
    keys = []
    for row in reader:
        at = f"{where} line {reader.line_num}"
        run = _run_of(study, row, spelt, at, again)
        if (run.arm, run.seed, run.options) in keys:
            raise UsageError(f"{at}: {_spell(run)} stands there twice; {again}.")
        keys.append((run.arm, run.seed, run.options))
        found.append(run)
    return [
        found[keys.index(key)] if (key := (arm, seed, options)) in keys else missing_run(arm, options, seed)
        for arm, seed, options in declared_grid(study)
    ]


def missing_run(arm: str, options: dict[str, Any], seed: int, digest: str = "") -> GridRun:
    """A declared run of which there is no attempt."""
    return GridRun(
        arm=arm, options=options, seed=seed, digest=digest, state="missing", val_loss=None, attempts=0,
        wall_seconds=0.0, cost_usd=0.0,
    )  # fmt: skip


def _run_of(
    study: Study, row: dict[str, Any], spelt: dict[str, dict[str, Any]], at: str, again: str
) -> GridRun:  # fmt: skip
    if None in row or None in row.values():
        raise UsageError(f"{at}: it has another number of cells than the first line; {again}.")
    declared = {"arm": study.arms, "seed": [str(seed) for seed in study.seeds], **spelt}
    for column, allowed in declared.items():
        if row[column] not in allowed:
            raise UsageError(
                f"{at}: {column} is {row[column]!r}, and the study declares {', '.join(map(str, allowed))}; {again}."
            )
    try:
        loss = float(row["val_loss"]) if row["val_loss"] else None
        seconds, cost = float(row["wall_seconds"]), float(row["cost_usd"])
    except ValueError as error:
        raise UsageError(f"{at}: {error}; {again}.") from None
    status = row["status"]
    whole = status in ("completed", "diverged") and (status == "completed") == (loss is not None)
    if not whole or not all(math.isfinite(number) for number in (loss or 0.0, seconds, cost)):
        raise UsageError(f"{at}: no run ends as {status!r} with the loss {row['val_loss']!r}; {again}.")
    return GridRun(
        arm=row["arm"], options={option: values[row[option]] for option, values in spelt.items()},
        seed=int(row["seed"]), digest=row["cell_digest"], state=status, val_loss=loss, attempts=1,
        wall_seconds=seconds, cost_usd=cost,
    )  # fmt: skip


def disagreements(study: Study, runs: Iterable[GridRun], records: Iterable[RunRecord]) -> list[str]:
    """The rows whose cell the ledger has with another outcome: one of the two was edited."""
    recorded: dict[str, set[tuple[str, float | None]]] = {}
    for record in records:
        if record.is_result:
            recorded.setdefault(record.cell_digest, set()).add((record.status, record.val_loss))
    return [
        f"experiments/{study.slug}/{RESULTS}: {_spell(run)} has the loss {run.val_loss}, and the ledger another for "
        f"the same cell ({run.digest[:12]}); one of the two was edited."
        for run in runs
        if run.digest in recorded and (run.state, run.val_loss) not in recorded[run.digest]
    ]


def _spell(run: GridRun) -> str:
    return f"{run.arm} with {spell_options(run.options)}, seed {run.seed},"


def judge_arms(params: Params, study: Study, runs: Sequence[GridRun]) -> list[ArmResult]:
    """What the runs of a tuning study say of each of its arms."""
    complete = all(run.has_outcome for run in runs)
    loss = params.workloads[study.workload].settings.diverged_loss
    return [
        judge_arm(
            study, arm, [run for run in runs if run.arm == arm],
            diverged_loss=loss, complete=complete, allowed=_allowed(params, study, arm),
        )
        for arm in study.arms
    ]  # fmt: skip


def _allowed(params: Params, study: Study, arm: str) -> Callable[[dict[str, Any]], bool]:
    def allowed(options: dict[str, Any]) -> bool:
        try:
            resolve_optimizer(params, study.workload, arm, overrides=options)
        except UsageError:
            return False
        return True

    return allowed


def in_use(params: Params, workload: str, arm: str, chosen: dict[str, Any]) -> bool:
    """Whether params.yaml has an arm run with these values on a workload."""
    try:
        options = resolve_optimizer(params, workload, arm).options
    except UsageError:  # nothing is tuned for it yet, so that it has no learning rate
        return False
    return all(option in options and options[option] == value for option, value in chosen.items())


def arm_tunings(
    layout: Layout, params: Params, study: Study, records: Iterable[RunRecord] = ()
) -> tuple[dict[str, ArmTuning], list[str]]:
    """How the arms of a comparison were tuned, by the results.csv of the study it names, and what contradicts it.

    An arm that this study has not tried is not among them. `records`: those of the ledger, with which the rows must
    agree. Raises UsageError for a results.csv that cannot be read.
    """
    if study.tuning == UNTUNED:
        return {}, []
    tuning = load_study(layout, study.tuning)
    runs = read_results(layout, tuning)
    if runs is None:
        return {}, []
    found = {}
    for result in judge_arms(params, tuning, runs):
        if result.arm not in study.arms or result.runs == 0:
            continue
        chosen = result.choice.options if result.choice else {}
        found[result.arm] = ArmTuning(
            study=tuning.slug,
            runs=result.runs,
            seeds=tuning.seeds,
            tried=tuning.grid,
            chosen=chosen,
            in_use=bool(chosen) and in_use(params, study.workload, result.arm, chosen),
            at_edge=[edge.option for edge in result.edges],
        )
    return found, disagreements(tuning, runs, records)
