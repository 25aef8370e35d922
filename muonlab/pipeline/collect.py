"""Gather every attempt there is into the ledger, and take the snapshot of one study from it.

Sources: the ledger and its git history, the attempts in `scratch/` (failed and killed ones too), the outputs
under `runs/`, and the experiments that DVC keeps as git refs (a queue's, a colleague's).
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from muonlab.pipeline.attempts import CellScratch
from muonlab.pipeline.declare import current_registration, declared_params, read_registration
from muonlab.pipeline.gates import gate_states
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.reported import reported_snapshot
from muonlab.pipeline.resolve import (
    check_study,
    load_study,
    read_declaration,
    resolve_cell,
    resolve_optimizer,
    study_cells,
)
from muonlab.pipeline.selection import state_of
from muonlab.pipeline.tuning_checks import check_tuning
from muonlab.pipeline.tuning_results import arm_tunings
from muonlab.pipeline.verify import agree_to_rounding
from muonlab.registry import ledger
from muonlab.registry.acceptance import mislabelled, older_digests, refuted
from muonlab.registry.canonical import sha256_of
from muonlab.registry.files import file_sha256
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import Params
from muonlab.registry.snapshot import DeclaredCell, KnownRun, Snapshot
from muonlab.registry.study import Study
from muonlab.reporting.carried import carried_notes
from muonlab.reporting.standing import SAME_START

EXPERIMENT_SNAPSHOT = "reports/exp/registry.json"
"""Where an experiment's commit holds the snapshot with its cell's record."""


def collect(layout: Layout, slug: str, *, sweep: bool = True, anew: bool = True) -> Snapshot:
    """Bring the ledger up to date and return the snapshot of the study `slug`.

    `sweep`: attempts that were killed are recorded in `scratch/` on the way; without it nothing is written there.
    `anew`: nothing that was remembered of the ledger's committed versions is trusted.
    What others report is read from beside its declaration, and leaves the ledger alone. Raises UsageError for a
    declaration that cannot be read; what is wrong with the evidence goes into the snapshot's findings.
    """
    study = load_study(layout, slug)
    if study.provenance == "reported":
        return reported_snapshot(layout, study, judged_by=_judging_code(layout.root))
    params = declared_params(layout)
    check_study(params, study)
    check_tuning(layout, study)
    findings: list[str] = []
    held = ledger.append(layout.ledger, _all_records(layout, findings, sweep=sweep), anew=anew)
    # In an order of their own: that of the lines is another one in a clone that has merged them otherwise.
    known = sorted(held.records, key=lambda r: (r.started_at, r.attempt_id))
    older = older_digests(held.acceptances)
    resolved = study_cells(layout, params, study)
    cells = [
        DeclaredCell(arm=cell.arm, seed=cell.seed, digest=cell.digest, older=older.get(cell.digest, []))
        for cell in resolved
    ]
    digests = {digest for cell in cells for digest in cell.digests}
    records = [r for r in known if r.cell_digest in digests or r.study == slug]
    tuned, edited = arm_tunings(layout, params, study, known)
    findings += [*held.findings, *edited]
    findings += _contradictions(records, cells, study)
    findings += [*mislabelled(held.acceptances, resolved), *refuted(held.acceptances, digests)]
    registration = read_registration(layout, slug)
    if registration is not None and not registration.is_whole:
        findings.append(
            f"experiments/{slug}/registration.json: its declaration does not hash to its registration; it was edited."
        )
    acceptances = [a for a in held.acceptances if any(c.digest in digests for c in a.carried)]
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
        registration=registration,
        current_registration=current_registration(params, study),
        findings=sorted(set(findings)),
        notes=[
            *held.notes,
            *_rounded(records, cells),
            *_without_outputs(layout, study, cells, records),
            *carried_notes(acceptances, digests),
        ],
        left_out=_left_out(layout, params, study, known, older),
        outside=_outside(study, cells, known),
        tuning=tuned,
        acceptances=acceptances,
        ledger_sha256=ledger.content_sha256(layout.ledger),
        gates=gate_states(layout, study),
        selection=state_of(layout, study, functools.partial(read_declaration, layout)),
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


def _all_records(layout: Layout, findings: list[str], *, sweep: bool) -> Iterator[RunRecord]:
    for folder in sorted(layout.scratch.glob("[0-9a-f]*/")):
        scratch = CellScratch(layout, folder.name)
        if sweep:
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


def _without_outputs(
    layout: Layout, study: Study, cells: list[DeclaredCell], records: list[RunRecord]
) -> Iterator[str]:
    """Which results of a study that was concluded here have lost their weights, so that nothing checks their record."""
    if study.kind == "tuning" or not (layout.reports(study.slug) / "stats.json").exists():
        return
    results = {r.cell_digest for r in records if r.is_result}
    lost = [
        f"{cell.arm}-{cell.seed}"
        for cell in cells
        if not results.isdisjoint(cell.digests)
        and not (layout.runs(study.slug) / f"{cell.arm}-{cell.seed}" / "train.json").exists()
        and not any((CellScratch(layout, digest).bundle / "manifest.json").exists() for digest in cell.digests)
    ]
    if lost:
        yield (
            f"{', '.join(lost)}: the result stands in the ledger, but the outputs in runs/{study.slug} are gone, so "
            f"that nothing checks it; `muon study run {study.slug}` brings them back."
        )


def _left_out(
    layout: Layout, params: Params, study: Study, records: list[RunRecord], older: dict[str, list[str]]
) -> list[KnownRun]:
    """Results at the study's arms on other seeds than the declared: found by digest, whatever name they bear."""
    if study.kind == "tuning":
        return []
    # The seeds of the tuning study chose the arms' options; no comparison may use them.
    known = {
        r.cell_digest: r
        for r in reversed(records)
        if r.is_result and r.workload == study.workload and r.study != study.tuning and r.seed not in study.seeds
    }
    cells = [
        resolve_cell(layout, params, study.workload, arm, seed)
        for seed in sorted({r.seed for r in known.values()})
        for arm in study.arms
    ]
    return [
        KnownRun(arm=cell.arm, seed=cell.seed, digest=cell.digest, study=known[found[0]].study)
        for cell in cells
        if (found := [d for d in (cell.digest, *older.get(cell.digest, [])) if d in known])
    ]


def _outside(study: Study, cells: list[DeclaredCell], records: list[RunRecord]) -> list[KnownRun]:
    """Results of undeclared arms and variants that are comparable with the study's baseline on a declared seed."""
    if study.kind == "tuning":
        return []
    declared = {digest for cell in cells for digest in cell.digests}
    ours = {digest for cell in cells if cell.arm == study.baseline for digest in cell.digests}
    baselines = {r.seed: r for r in records if r.is_result and r.cell_digest in ours}

    def comparable(record: RunRecord) -> bool:
        baseline = baselines.get(record.seed)
        if baseline is None or record.workload != study.workload or record.cell_digest in declared:
            return False
        # The baseline under other code or libraries is no candidate: it is the baseline of another time.
        if record.arm == study.baseline and any(
            getattr(record.hashes, name) != getattr(baseline.hashes, name) for name in ("code", "environment")
        ):
            return False
        return all(getattr(record.hashes, name) == getattr(baseline.hashes, name) for name in SAME_START)

    found = {
        r.cell_digest: KnownRun(arm=r.arm, seed=r.seed, digest=r.cell_digest, study=r.study)
        for r in reversed(records)
        if r.is_result and comparable(r)
    }
    return sorted(found.values(), key=lambda run: (run.arm, run.seed, run.digest))


def _repeated(records: list[RunRecord], cells: list[DeclaredCell]) -> Iterator[tuple[RunRecord, RunRecord]]:
    """A cell's first result with each later one that is not the same; `records` by their start."""
    results: dict[str, RunRecord] = {}
    now = {digest: cell.digest for cell in cells for digest in cell.older}
    for record in records:
        if record.is_result:
            first = results.setdefault(now.get(record.cell_digest, record.cell_digest), record)
            if first.outcome() != record.outcome():
                yield first, record


def _differ_by_rounding(first: RunRecord, again: RunRecord) -> bool:
    """Whether both completed, say of themselves that they repeat to rounding only, and agree that far."""
    return all(r.status == "completed" and r.repeats == "to rounding" for r in (first, again)) and agree_to_rounding(
        first.val_loss, again.val_loss
    )


def _rounded(records: list[RunRecord], cells: list[DeclaredCell]) -> Iterator[str]:
    """Which cells were trained more than once and agree to rounding; the first counts, whatever the others gave."""
    for first, record in _repeated(records, cells):
        if _differ_by_rounding(first, record):
            yield (
                f"cell {record.arm}-{record.seed} ({record.cell_digest[:12]}): a second attempt agrees with the first "
                f"to rounding, as such runs do (val_loss {first.val_loss} and {record.val_loss}); the first counts."
            )


def _contradictions(records: list[RunRecord], cells: list[DeclaredCell], study: Study) -> Iterator[str]:
    """Cells with two different outcomes, and cells recorded in the study's name under other inputs."""
    for first, record in _repeated(records, cells):
        if not _differ_by_rounding(first, record):
            yield (
                f"cell {record.arm}-{record.seed} ({record.cell_digest[:12]}): two attempts at the same cell ended "
                f"differently (val_loss {first.val_loss} and {record.val_loss}); one machine or file is not as "
                "recorded."
            )
    if study.kind == "tuning":
        return  # one arm and seed stands for a whole grid of cells there
    declared = {(cell.arm, cell.seed): cell for cell in cells}
    for record in records:
        cell = declared.get((record.arm, record.seed))
        if record.study == study.slug and record.is_result and cell and record.cell_digest not in cell.digests:
            current = next((r for r in records if r.cell_digest in cell.digests and r.is_result), None)
            changed = (
                [n for n, v in record.hashes if n in _INPUTS and v != getattr(current.hashes, n)] if current else []
            )
            yield (
                f"cell {record.arm}-{record.seed}: recorded in this study under other inputs "
                f"({', '.join(changed) or 'parameters, model, code, environment or data'} changed; digest "
                f"{record.cell_digest[:12]}, now {cell.digest[:12]}); choosing between the two would be a selection, "
                "so declare a new study (`muon study new`) for the new inputs, or, where nothing but code was changed "
                f"and no number should be, `muon accept {study.slug}`."
            )


_INPUTS = ("data", "tokenizer", "code", "environment")
