"""Results that somebody else reports, as a study: read, described, never counted as runs made here.

`experiments/<study>/finals.csv` holds a row a run, `curves.csv` its evaluations. The experiment that the declaration
names as its workload is judged, one pair of runs, and capped at INCONCLUSIVE; the others are described in sentences.
Nothing is trained and the ledger is not touched: the records live in `reports/<study>/registry.json` alone.

    E of two experiments = E_1 * E_2                                  one pair each; independent E-values multiply
    steps saved, from the evaluation grid: a plateau at step T was reached in (T - grid, T]

Losses in nats/token, differences baseline - challenger (positive: challenger better), cost in USD. A point of a curve
that is marked approximate, in any arm, is neither judged nor drawn; it stays in curves.csv.
Sources: `muonlab.stats.evidence`, `muonlab.stats.speed`, `muonlab.stats.selection`.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from muonlab.pipeline.layout import Layout
from muonlab.registry.canonical import sha256_of
from muonlab.registry.errors import UsageError, explain, unknown_name
from muonlab.registry.files import file_sha256
from muonlab.registry.record import CurvePoint, Hashes, Provenance, RunRecord
from muonlab.registry.settings import Closed, Name
from muonlab.registry.snapshot import DeclaredCell, Snapshot
from muonlab.registry.study import Reported, Study
from muonlab.reporting.wording import count, duration, listed, money, plain
from muonlab.stats.evidence import e_from_log, log_e_value
from muonlab.stats.selection import expected_maximum
from muonlab.stats.speed import speed_to_target

FINALS, CURVES = "finals.csv", "curves.csv"
NOT_RECORDED = "not recorded"


def _no_seed(text: object) -> None:
    if text != "":
        raise ValueError(
            f"found {text!r}; a reported study holds runs whose seed was not recorded, so leave it empty (runs with "
            "known seeds are for `muon compare`)."
        )


NoSeed = Annotated[None, BeforeValidator(_no_seed)]
Optional = BeforeValidator(lambda text: None if text == "" else text)
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Step = Annotated[int, Field(ge=0)]


class FinalRow(Closed):
    """One run of finals.csv."""

    study: Name
    model: str
    arm: Name
    config: str
    """Options as `name=value`, apart by spaces."""
    seed: NoSeed
    steps: Step
    final_val_loss: Positive
    steps_to_plateau: Annotated[Step | None, Optional]
    wall_minutes: Positive
    cost_usd: Annotated[Finite, Field(ge=0)]

    @property
    def options(self) -> dict[str, str]:
        """The options of the arm, as they were reported."""
        return {name: value for name, _, value in (part.partition("=") for part in self.config.split())}


class CurveRow(Closed):
    """One evaluation of curves.csv."""

    study: Name
    model: str
    arm: Name
    seed: NoSeed
    step: Step
    val_loss: Positive
    perplexity: Annotated[Positive | None, Optional]
    approximate: bool


Row = TypeVar("Row", FinalRow, CurveRow)


def reported_snapshot(layout: Layout, study: Study, *, judged_by: str) -> Snapshot:
    """The snapshot of a study of provenance `reported`, from the files beside its declaration.

    Raises UsageError, naming file and line, for rows that are not what the declaration describes.
    """
    assert study.reported is not None
    folder = layout.study(study.slug)
    finals = _rows(folder / FINALS, FinalRow, study)
    curves = _rows(folder / CURVES, CurveRow, study)
    judged = {arm: _one_run(study, finals, arm) for arm in study.arms}
    for name, rows in ((FINALS, finals), (CURVES, curves)):
        if extra := sorted({row.arm for row in rows} - set(judged)):
            raise unknown_name(f"experiments/{study.slug}/{name}", "arm", extra[0], study.arms)
    points = {arm: _points(study, curves, arm) for arm in study.arms}
    # A step that one arm has approximately would be a missing evaluation of that arm.
    measured = set.intersection(*({p.step for p in own if not p.approximate} for own in points.values()))
    records = [_record(study, row, points[arm], measured) for arm, row in judged.items()]
    optimizers: dict[Name, dict[str, object]] = {
        arm: {"kind": arm, "options": row.options} for arm, row in judged.items()
    }
    settings = study.reported.workloads[study.workload]
    return Snapshot(
        study=study,
        settings=settings,
        optimizers=optimizers,
        cells=[DeclaredCell(arm=record.arm, seed=record.seed, digest=record.cell_digest) for record in records],
        records=records,
        registration=None,
        current_registration=study.registration({"arms": optimizers, "settings": settings.model_dump(mode="json")}),
        findings=[],
        notes=list(_notes(folder, study.reported, points, measured)),
        described=list(_described(study, study.reported, judged, finals)),
        ledger_sha256="",
        judged_by=judged_by,
    )


def _rows(path: Path, kind: type[Row], study: Study) -> list[Row]:
    """The checked rows of one of the files."""
    where = f"experiments/{study.slug}/{path.name}"
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        lines = [(reader.line_num, line) for line in reader]
    except FileNotFoundError:
        raise UsageError(f"{where}: it is missing; a study of provenance reported keeps its results there.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{where}: is not a CSV file of UTF-8 text ({error}).") from None
    columns = list(kind.model_fields)
    if reader.fieldnames != columns:
        raise UsageError(f"{where}: found the columns {reader.fieldnames}; they should be {columns}.")
    assert study.reported is not None
    rows: list[Row] = []
    for number, line in lines:
        at = f"{where} line {number}"
        if None in line:
            raise UsageError(f"{at}: found more than {len(columns)} cells; quote a cell that holds a comma.")
        try:
            row = kind.model_validate(line)
        except ValidationError as error:
            raise explain(error, at) from None
        if row.study not in study.reported.workloads:
            raise unknown_name(at, "experiment", row.study, study.reported.workloads)
        setting = study.reported.workloads[row.study]
        if row.model != setting.model:
            raise UsageError(f"{at}: model is {row.model!r}, but {row.study} is declared with {setting.model!r}.")
        steps = row.steps if isinstance(row, FinalRow) else row.step
        if steps > setting.steps or (isinstance(row, FinalRow) and steps != setting.steps):
            raise UsageError(f"{at}: found step {steps}, but {row.study} is declared with {setting.steps} steps.")
        plateau = row.steps_to_plateau if isinstance(row, FinalRow) else None
        if plateau is not None and (plateau % setting.eval_every or not 0 < plateau <= setting.steps):
            raise UsageError(
                f"{at}: steps_to_plateau is {plateau}, but {row.study} is declared with an evaluation every "
                f"{setting.eval_every} of {setting.steps} steps; a plateau is first seen at one of them."
            )
        if isinstance(row, FinalRow) and any(_setting(row) == _setting(other) for other in rows):
            raise UsageError(
                f"{at}: {row.arm} {row.config or 'without options'} stands twice in {row.study}; a reported study "
                "takes one run a setting, since no seed tells which of several are a pair (with seeds: `muon compare`)."
            )
        rows.append(row)
    return rows


def _setting(row: FinalRow | CurveRow) -> tuple[object, ...]:
    assert isinstance(row, FinalRow)
    return (row.study, row.arm, row.options)


def _one_run(study: Study, finals: Sequence[FinalRow], arm: str) -> FinalRow:
    found = [row for row in finals if (row.study, row.arm) == (study.workload, arm)]
    if len(found) != 1:
        raise UsageError(
            f"experiments/{study.slug}/{FINALS}: found {count(len(found), 'run')} of {arm!r} in {study.workload}; a "
            "comparison of reported runs takes one an arm, since no seed tells which of several are a pair."
        )
    return found[0]


def _points(study: Study, curves: Sequence[CurveRow], arm: str) -> list[CurveRow]:
    """The points of an arm's curve in the judged experiment, by step; one step is one point."""
    own = sorted((p for p in curves if (p.study, p.arm) == (study.workload, arm)), key=lambda p: p.step)
    for one, next_ in itertools.pairwise(own):
        if one.step == next_.step:
            raise UsageError(
                f"experiments/{study.slug}/{CURVES}: step {one.step} of {arm} in {study.workload} stands twice; keep "
                "one of them."
            )
    return own


def _record(study: Study, row: FinalRow, curve: Sequence[CurveRow], measured: Set[int]) -> RunRecord:
    """The record of a reported run, its curve at the `measured` steps; what it does not tell is not recorded."""
    end = [point for point in curve if point.step == row.steps and not point.approximate]
    if any(point.val_loss != row.final_val_loss for point in end):
        raise UsageError(
            f"experiments/{study.slug}/{CURVES}: {row.arm} ends at {end[0].val_loss}, and at {row.final_val_loss} in "
            f"{FINALS}; one of the two is wrong."
        )
    unknown = dict.fromkeys(("data", "tokenizer", "code", "environment"), NOT_RECORDED)
    made_with = dict.fromkeys(("python", "torch", "transformers", "device", "host_os"), NOT_RECORDED)
    digest = sha256_of({"run": row.model_dump(mode="json"), "curve": [p.model_dump(mode="json") for p in curve]})
    return RunRecord(
        study=study.slug,
        workload=study.workload,
        arm=row.arm,
        seed=study.seeds[0],
        cell_digest=digest,
        registration=None,
        status="completed",
        attempt=1,
        attempt_id=f"reported-{digest}",
        started_at=NOT_RECORDED,
        resumed_from_step=0,
        val_loss=row.final_val_loss,
        perplexity=math.exp(row.final_val_loss),
        final_step=row.steps,
        tokens=0,
        wall_seconds=60 * row.wall_minutes,
        device_count=1,
        cost_usd=row.cost_usd,
        curve=[CurvePoint(step=p.step, val_loss=p.val_loss) for p in curve if p.step in measured],
        hashes=Hashes(init=None, order=None, weights=None, **unknown),
        provenance=Provenance(commit=None, dirty=None, **made_with),
    )


def _notes(
    folder: Path, reported: Reported, points: Mapping[str, Sequence[CurveRow]], measured: Set[int]
) -> Iterator[str]:
    hashes = " and ".join(f"{name} (SHA-256 {file_sha256(folder / name)[:12]})" for name in (FINALS, CURVES))
    yield f"reported, not run here: {reported.source}; read from {hashes}"
    yield "seed not recorded: 0 numbers the one run of each arm, and that the two share a seed cannot be checked"
    yield "the rule was declared here after the results were known; it describes them and decides nothing"
    curves = [point for own in points.values() for point in own]
    if approximate := sum(point.approximate for point in curves):
        yield (
            f"{approximate} of the {len(curves)} points of the curves are approximate, marked so in {CURVES}; judged "
            f"and drawn are the {count(len(measured), 'step')} that no arm has approximately"
        )
    yield from (f"known to be wrong with these runs: {flaw}" for flaw in reported.flaws)


def _described(
    study: Study, reported: Reported, judged: dict[str, FinalRow], finals: Sequence[FinalRow]
) -> Iterator[str]:
    """What the other experiments show, how strong all are together, and what everything cost."""
    assert study.decision is not None
    g = study.decision.g
    for arm in study.challengers:
        log_e = [_log_e(judged[study.baseline], judged[arm], g)]
        seen = [study.workload]
        for name, setting in reported.workloads.items():
            if name == study.workload:
                continue
            base = [row for row in finals if (row.study, row.arm) == (name, study.baseline)]
            runs = [row for row in finals if (row.study, row.arm) == (name, arm)]
            if len(base) != 1 or not runs:
                yield (
                    f"{name}: not described for {arm}, since it holds {count(len(base), 'run')} of {study.baseline} "
                    f"and {count(len(runs), 'run')} of {arm}"
                )
                continue
            yield f"{name}, one run each: {'; '.join(_difference(base[0], run, several=len(runs) > 1) for run in runs)}"
            if len(runs) > 1:
                yield _selection(name, arm, runs)
                continue
            log_e.append(_log_e(base[0], runs[0], g))
            seen.append(name)
            yield from _plateau(name, base[0], runs[0], setting.eval_every)
        if len(seen) > 1:
            limit = len(study.challengers) / study.decision.alpha
            yield (
                f"{listed(seen)} together: E-values of independent experiments multiply, here {arm}'s to "
                f"{plain(math.prod(map(e_from_log, log_e)))}, where {limit:g} is needed; an experiment of one "
                f"pair gives {plain(e_from_log(log_e_value(1, 1.0, 0.0, g)))} at most, whatever its difference"
            )
    yield (
        f"everything that was reported: {count(len(finals), 'run')}, "
        f"{money(math.fsum(row.cost_usd for row in finals))} and "
        f"{duration(60 * math.fsum(row.wall_minutes for row in finals))} of computing; no arm was run twice in one "
        "setting, so that how much a run differs from its repetition is not known"
    )


def _log_e(baseline: FinalRow, challenger: FinalRow, g: float) -> float:
    """Log E of one pair: at n = 1 only the sign of the difference counts."""
    return float(log_e_value(1, baseline.final_val_loss - challenger.final_val_loss, 0.0, g))


def _difference(baseline: FinalRow, run: FinalRow, *, several: bool) -> str:
    better = baseline.final_val_loss - run.final_val_loss
    which = f"{run.arm} ({run.config})" if several else run.arm
    if better == 0:
        return f"{which} ends at {baseline.arm}'s {baseline.final_val_loss:.5g} nats/token"
    share = 100 * abs(better) / baseline.final_val_loss
    return (
        f"{which} ends {abs(better):.4g} nats/token {'better' if better > 0 else 'worse'} than {baseline.arm} "
        f"({plain(share)}% of {baseline.final_val_loss:.5g})"
    )


def _selection(name: str, arm: str, runs: Sequence[FinalRow]) -> str:
    best = min(runs, key=lambda run: run.final_val_loss)
    return (
        f"{name}: {best.config} was picked there as the best of {len(runs)} settings of {arm}; were all the same in "
        f"truth, the best would be expected to look {expected_maximum(len(runs)):.2f} standard deviations of a run too "
        "good, so that this experiment does not count as evidence for it"
    )


def _plateau(name: str, baseline: FinalRow, run: FinalRow, grid: int) -> Iterator[str]:
    """What the evaluation grid leaves of a reported speedup."""
    slow, fast = baseline.steps_to_plateau, run.steps_to_plateau
    if slow is None or fast is None:
        return
    steps = list(range(grid, max(slow, fast) + 1, grid))
    # Only when the plateau was reached is known: curves that are 1 before it and 0 from there on.
    base, ours = ([float(step < reached) for step in steps] for reached in (slow, fast))
    speed = speed_to_target(steps, [base], [ours], target=0.0)
    left = speed.undefined.get("grid_saved_pct")
    if speed.grid_saved_pct is not None:
        low, high = speed.grid_saved_pct
        left = f"anything from above {low:.0f}% to {high:.0f}% fits"
    saved = speed.steps_saved_pct or 0.0
    steps_saved = f"{abs(saved):.0f}% {'of the steps saved' if saved >= 0 else 'more steps'}"
    yield (
        f"{name}: {baseline.arm} was on its plateau at step {slow} and {run.arm} at step {fast}, that is "
        f"{steps_saved}; it was evaluated every {grid} steps, so that {left}"
    )
