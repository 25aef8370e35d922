"""From finished cells to a report, in four steps that DVC runs as stages: evaluate, collect, stats, report.

`place` is the folder under reports/ (and runs/) that is written: a study's slug, or `exp` for the one cell.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pydantic import ValidationError

from muonlab.pipeline.attempts import CellScratch
from muonlab.pipeline.cells import CURRENT
from muonlab.pipeline.evaluations import evaluate_folders, read_record
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import find_workload, load_params, load_study
from muonlab.registry.errors import IntegrityError, MuonlabError, UsageError
from muonlab.registry.files import write_atomically
from muonlab.registry.snapshot import Snapshot
from muonlab.registry.study import Study
from muonlab.reporting.index import IndexEntry, read_judged, render_index, summarize
from muonlab.reporting.standing import Evaluation, Standing, judge, verdict_json, with_false_go
from muonlab.reporting.tuning_report import read_tuned
from muonlab.tracking import sync_once

MLFLOW_LIMIT_S = 60.0
MOST_EVALUATORS = 4


def mark(folder: Path, name: str) -> None:
    """Write the constant file by which DVC orders its stages."""
    write_atomically(folder / name, "done\n", durable=False)


def _mark_stage(folder: Path, name: str, study: Study) -> None:
    """Mark the end of a stage; results that others report pass through no stage of DVC."""
    if study.provenance == "run":
        mark(folder, name)


def evaluate_into(layout: Layout, slug: str) -> None:
    """Score the saved weights of a study's cells; write evaluations.jsonl, one line a cell that has run."""
    study = load_study(layout, slug)
    settings = find_workload(load_params(layout.params), study.workload).settings
    folders = [layout.runs(slug) / f"{arm}-{seed}" for seed in study.seeds for arm in study.arms]
    lines = evaluate_folders(
        layout, folders, settings, layout.data(study.workload), workers=min(MOST_EVALUATORS, os.cpu_count() or 1)
    )
    folder = layout.reports(slug)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "evaluations.jsonl", "".join(line.model_dump_json() + "\n" for line in lines))
    mark(folder, ".evaluated")


def keep_snapshot(layout: Layout, snapshot: Snapshot, place: str) -> None:
    """Write what was collected to reports/<place>/registry.json, and show MLflow what it has not seen.

    DVC holds the cells' outputs by now, so the scratch copies of finished cells are dropped here.
    """
    folder = layout.reports(place)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "registry.json", _spell(snapshot))
    for sentence in [*snapshot.findings, *snapshot.notes]:
        print(f"muonlab: {sentence}", file=sys.stderr)
    _mark_stage(folder, ".collected", snapshot.study)
    for cell in layout.runs(place).glob("*/"):
        if (record := read_record(cell)) is not None:
            CellScratch(layout, record.cell_digest).discard()
    _show_mlflow(layout)


def is_current(layout: Layout, snapshot: Snapshot) -> bool:
    """Whether the results in reports/<study> were made from exactly this snapshot."""
    path = layout.reports(snapshot.study.slug) / "registry.json"
    return path.exists() and path.read_text(encoding="utf-8") == _spell(snapshot)


def _spell(snapshot: Snapshot) -> str:
    return snapshot.model_dump_json(indent=1) + "\n"


def judge_into(layout: Layout, place: str) -> Standing:
    """Judge the snapshot in reports/<place>; write stats.json and verdict.json."""
    from muonlab.reporting.wording import decision_sentence

    folder = layout.reports(place)
    standing = with_false_go(judge(read_snapshot(layout, place), read_evaluations(layout, place)))
    write_atomically(folder / "stats.json", standing.model_dump_json(indent=1) + "\n")
    summary = summarize(standing).model_dump(mode="json")
    verdict = {**verdict_json(standing, decision_sentence(standing)), "summary": summary}
    write_atomically(folder / "verdict.json", json.dumps(verdict, indent=2, allow_nan=False) + "\n")
    _mark_stage(folder, ".judged", standing.snapshot.study)
    return standing


def report_into(layout: Layout, place: str) -> None:
    """Render the standing in reports/<place>; write report.md, report.html, figures/ and the index of all studies."""
    from muonlab.reporting.loss_table import write_loss_table
    from muonlab.reporting.report import write_report

    cell = read_record(layout.runs(CURRENT) / "current") if place == CURRENT else None
    standing = read_standing(layout, place)
    write_report(standing, layout.reports(place), cell=cell)
    write_loss_table(standing, layout.reports(place) / "figures", cell=cell)
    if place != CURRENT:
        write_index(layout)
        _show_mlflow(layout)


def read_snapshot(layout: Layout, place: str) -> Snapshot:
    """The snapshot that the collect stage has last written."""
    return Snapshot.model_validate_json((layout.reports(place) / "registry.json").read_text(encoding="utf-8"))


def read_evaluations(layout: Layout, place: str) -> list[Evaluation]:
    """What the evaluate stage has last written; nothing where it has not run. Raises IntegrityError on other lines."""
    path = layout.reports(place) / "evaluations.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return [Evaluation.model_validate_json(line) for line in lines]
    except ValidationError:
        raise IntegrityError(
            f"reports/{place}/evaluations.jsonl: it holds lines that no evaluation wrote; `muon study run {place}` "
            "makes it anew."
        ) from None


def read_standing(layout: Layout, place: str) -> Standing:
    """The standing that the stats stage has last written."""
    path = layout.reports(place) / "stats.json"
    try:
        return Standing.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        raise UsageError(
            f"reports/{place}/stats.json: it is missing, or another version wrote it; run `muon study run {place}`."
        ) from None


def verdict_sentence(layout: Layout, place: str) -> str | None:
    """The decision in reports/<place>/verdict.json, or None before there is one. Raises UsageError on other files."""
    judged = read_judged(layout.reports(place))
    return judged.decision if judged is not None else None


def index_entries(layout: Layout) -> list[IndexEntry]:
    """Every study that is declared or has a verdict, by name; a declaration is read only where there is no verdict."""
    declared = {path.parent.name for path in (layout.root / "experiments").glob("*/study.yaml")}
    judged = {path.parent.name for path in (layout.root / "reports").glob("*/verdict.json")} - {CURRENT}
    tuned = {path.parent.name for path in (layout.root / "reports").glob("*/tuning.json")}
    return [_index_entry(layout, slug) for slug in sorted(declared | judged | tuned)]


def _index_entry(layout: Layout, slug: str) -> IndexEntry:
    try:
        if (judged := read_judged(layout.reports(slug))) is not None:
            return IndexEntry(slug, judged.summary.question, "judged", judged)
        if (tuned := read_tuned(layout.reports(slug))) is not None:
            return IndexEntry(slug, tuned.question, "tuning", tuned=tuned)
        study = load_study(layout, slug)
    except MuonlabError as error:
        return IndexEntry(slug, "", "foreign", reason=str(error))
    return IndexEntry(slug, study.question, "tuning" if study.kind == "tuning" else "waiting")


def write_index(layout: Layout) -> None:
    """Write reports/README.md, the index of all studies, where it reads otherwise.

    It is no output of a DVC stage: every study's report writes it, and DVC allows a file one stage. A temporary copy,
    in which DVC runs an experiment, holds the reports of some studies only and writes none.
    """
    if layout.root != layout.main:
        return
    path = layout.root / "reports" / "README.md"
    text = render_index(index_entries(layout))
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text, durable=False)


def _show_mlflow(layout: Layout) -> None:
    if (silence := sync_once(layout.main, MLFLOW_LIMIT_S)) is not None:
        print(f"muonlab: {silence}", file=sys.stderr)
