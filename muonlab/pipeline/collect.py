"""Gather every attempt there is into the ledger, and take the snapshot of one study from it.

Sources: the ledger and its git history, the attempts in `scratch/` (failed and killed ones too), the outputs
under `runs/`, and the experiments that DVC keeps as git refs (a queue's, a colleague's).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from muonlab.pipeline.attempts import CellScratch
from muonlab.pipeline.declare import current_registration, declared_params, read_registration
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import check_study, load_study, resolve_optimizer, study_cells
from muonlab.registry import ledger
from muonlab.registry.canonical import sha256_of
from muonlab.registry.files import file_sha256
from muonlab.registry.record import RunRecord
from muonlab.registry.snapshot import DeclaredCell, Snapshot
from muonlab.registry.study import Study

EXPERIMENT_SNAPSHOT = "reports/exp/registry.json"
"""Where an experiment's commit holds the snapshot with its cell's record."""


def collect(layout: Layout, slug: str) -> Snapshot:
    """Bring the ledger up to date and return the snapshot of the study `slug`.

    Raises UsageError for a declaration that cannot be read; what is wrong with the evidence goes into the
    snapshot's findings.
    """
    study = load_study(layout, slug)
    params = declared_params(layout)
    check_study(params, study)
    findings: list[str] = []
    held = ledger.append(layout.ledger, _all_records(layout, findings))
    cells = [
        DeclaredCell(arm=cell.arm, seed=cell.seed, digest=cell.digest) for cell in study_cells(layout, params, study)
    ]
    digests = {cell.digest for cell in cells}
    records = [r for r in held.records if r.cell_digest in digests or r.study == slug]
    findings += held.findings
    findings += _contradictions(records, cells, study)
    return Snapshot(
        study=study,
        settings=params.workloads[study.workload].settings,
        optimizers={
            arm: resolve_optimizer(params, study.workload, arm).model_dump(mode="json")
            for arm in study.arms
            if study.kind == "comparison"
        },
        cells=cells,
        records=sorted(records, key=lambda r: (r.seed, r.arm, r.started_at, r.attempt_id)),
        registration=read_registration(layout, slug),
        current_registration=current_registration(params, study),
        findings=sorted(set(findings)),
        notes=held.notes,
        ledger_sha256=file_sha256(layout.ledger) if layout.ledger.exists() else "",
        judged_by=_judging_code(layout.root),
    )


def _judging_code(root: Path) -> str:
    files = sorted(
        path
        for package in ("stats", "reporting")
        for path in (root / "muonlab" / package).rglob("*")
        if path.suffix in (".py", ".j2")
    )
    return sha256_of({str(path.relative_to(root)): file_sha256(path) for path in files})


def _all_records(layout: Layout, findings: list[str]) -> Iterator[RunRecord]:
    for folder in sorted(layout.scratch.glob("[0-9a-f]*/")):
        scratch = CellScratch(layout, folder.name)
        scratch.sweep_unless_held()
        yield from scratch.records()
    for root in {layout.root, layout.main}:
        for path in sorted((root / "runs").glob("*/*/train.json")):
            try:
                yield RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
            except (ValidationError, OSError):
                findings.append(f"{path.relative_to(root)}: is not a record that training wrote.")
    yield from _experiment_records(layout.main)


def _experiment_records(main: Path) -> Iterator[RunRecord]:
    """Records in the snapshots of DVC's experiments; refs that are not one of ours are passed over."""
    refs = subprocess.run(
        ["git", "for-each-ref", "--format=%(refname)", "refs/exps/"],
        cwd=main, capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    for ref in refs:
        if ref.startswith(("refs/exps/exec/", "refs/exps/celery/")):
            continue
        shown = subprocess.run(
            ["git", "show", f"{ref}:{EXPERIMENT_SNAPSHOT}"],
            cwd=main,
            capture_output=True,
            text=True,
            check=False,
        )
        if shown.returncode != 0:
            continue
        try:
            for content in json.loads(shown.stdout)["records"]:
                yield RunRecord.model_validate(content)
        except (json.JSONDecodeError, KeyError, TypeError, ValidationError):
            continue


def _contradictions(records: list[RunRecord], cells: list[DeclaredCell], study: Study) -> Iterator[str]:
    """Cells with two different outcomes, and cells recorded in the study's name under other inputs."""
    outcomes: dict[str, RunRecord] = {}
    for record in records:
        if record.is_result:
            first = outcomes.setdefault(record.cell_digest, record)
            if first.outcome() != record.outcome():
                yield (
                    f"cell {record.arm}-{record.seed} ({record.cell_digest[:12]}): two attempts at the same cell ended "
                    f"differently (val_loss {first.val_loss} and {record.val_loss}); one machine or file is not as "
                    "recorded."
                )
    if study.kind == "tuning":
        return  # one arm and seed stands for a whole grid of cells there
    declared = {(cell.arm, cell.seed): cell.digest for cell in cells}
    for record in records:
        digest = declared.get((record.arm, record.seed))
        if record.study == study.slug and record.is_result and digest not in (None, record.cell_digest):
            current = next((r for r in records if r.cell_digest == digest and r.is_result), None)
            changed = (
                [n for n, v in record.hashes if n in _INPUTS and v != getattr(current.hashes, n)] if current else []
            )
            yield (
                f"cell {record.arm}-{record.seed}: recorded in this study under other inputs "
                f"({', '.join(changed) or 'parameters, code, environment or data'} changed; digest "
                f"{record.cell_digest[:12]}, now {str(digest)[:12]}); choosing between the two would be a selection, "
                "so declare a new study (`muon study new`) for the new inputs."
            )


_INPUTS = ("data", "tokenizer", "code", "environment")
