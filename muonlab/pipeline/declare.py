"""Registration: a study's declaration is hashed into a file that git keeps, before its first result.

What an arm's name stands for is part of the declaration. It is read from the last commit, so that a value tried
with `dvc exp run -S` (which leaves params.yaml edited) never becomes the declared one unnoticed.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from muonlab.pipeline import selection
from muonlab.pipeline.attempts import Purpose
from muonlab.pipeline.gates import archived_arm_states, gate_states, refuse_closed
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.processes import git_state
from muonlab.pipeline.registered import read_registration as read_registration
from muonlab.pipeline.registered import write_registration
from muonlab.pipeline.resolve import (
    check_study,
    load_params,
    load_study,
    read_declaration,
    resolve_optimizer,
    resolve_settings,
    resolved_arms,
    study_cells,
)
from muonlab.registry import ledger
from muonlab.registry.cell import Cell
from muonlab.registry.errors import UsageError
from muonlab.registry.settings import Params
from muonlab.registry.snapshot import Registration
from muonlab.registry.study import Study


def declared_params(layout: Layout) -> Params:
    """params.yaml as the last commit has it, or as it lies here where there is no such commit."""
    with committed_params(layout) as committed:
        return load_params(committed or layout.params)


@contextlib.contextmanager
def committed_params(layout: Layout) -> Iterator[Path | None]:
    """A copy of params.yaml as the last commit has it, for as long as the context lasts; None without such a commit."""
    shown = subprocess.run(["git", "show", "HEAD:./params.yaml"], cwd=layout.root, capture_output=True, check=False)
    if shown.returncode != 0:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        committed = Path(folder) / "params.yaml"
        committed.write_bytes(shown.stdout)
        yield committed


def refuse_uncommitted(params: Params, declared: Params, study: Study) -> None:
    """Raise UsageError when an arm or the workload of a study reads otherwise here than in the last commit."""
    ours, theirs = (
        {"settings": p.workloads[study.workload].settings, **{a: _spec(p, study, a) for a in study.arms}}
        if study.workload in p.workloads
        else {}
        for p in (params, declared)
    )
    for name in ours:
        if ours[name] != theirs.get(name):
            what = f"workloads.{study.workload}.settings" if name == "settings" else f"the optimizer {name!r}"
            raise UsageError(
                f"params.yaml: {what} of {study.slug} reads otherwise here than in the last commit; commit it to "
                "declare it, or take it back with `git checkout HEAD params.yaml` "
                "(`dvc exp run -S` leaves its values in the file)."
            )


def _spec(params: Params, study: Study, arm: str) -> object:
    if study.kind == "tuning":
        return params.optimizers.get(arm)
    if arm not in params.optimizers:
        return None
    return resolve_optimizer(params, study.workload, arm), resolve_settings(params, study.workload, arm)


def current_registration(params: Params, study: Study) -> str:
    """Hash of a study's declaration as it reads now."""
    return study.registration(resolved_arms(params, study))


def register_now(layout: Layout, params: Params, study: Study, *, override: bool = False) -> tuple[Registration, bool]:
    """Register a declaration before its first run; returns the registration and whether it was made just now.

    Raises UsageError when results exist under another declaration, which stays, and at a closed gate (`register`).
    """
    now = current_registration(params, study)
    others = {
        r.registration
        for r in ledger.read(layout.ledger).records
        if r.study == study.slug and r.is_result and r.registration not in (None, now)
    }
    if others:
        listed = ", ".join(sorted(str(other)[:12] for other in others))
        raise UsageError(
            f"experiments/{study.slug}: results exist under the registration {listed}, which stays, and the "
            f"declaration now reads otherwise ({now[:12]}): plan amended, only the E-value decides and the report says "
            "so; take the change back, or declare a new study (`muon study new`)."
        )
    before = read_registration(layout, study.slug)
    made = register(layout, params, study, override=override)
    return made, made != before


def register(layout: Layout, params: Params, study: Study, *, override: bool = False) -> Registration:
    """Register the declaration unless it is registered; before any result, a changed declaration replaces it.

    Once the ledger holds a result of the study, the first registration stays for good, and only its overrides grow.
    Raises UsageError where a gate of the study is closed, unless `override`, which the registration then holds; and
    where it is to start with another challenger than the one that was selected for it, whatever `override` says.
    """
    held = read_registration(layout, study.slug)
    now = current_registration(params, study)
    if study.selected_from is not None and not has_results(layout, held):
        selection.refuse_unpicked(layout, study, functools.partial(read_declaration, layout))
    if held is not None and held.registration == now:
        return held
    commit = git_state(layout.main)[0]
    given = held.overrides if held is not None else []
    if held is not None and has_results(layout, held):
        added = archived_arm_states(layout, study)
        if new := refuse_closed(study, added, commit, override=override, given=given):
            held = held.model_copy(update={"overrides": [*given, *new]})
            write_registration(layout, study.slug, held)
        return held
    new = refuse_closed(study, gate_states(layout, study), commit, override=override, given=given)
    made = Registration(
        registration=now,
        registered_at=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit,
        declaration={"study": study.declaration(), **resolved_arms(params, study)},
        overrides=[*given, *new],
    )
    write_registration(layout, study.slug, made)
    return made


def has_results(layout: Layout, held: Registration | None) -> bool:
    """Whether the ledger holds a result under this registration."""
    if held is None:
        return False
    return any(r.registration == held.registration and r.is_result for r in ledger.read(layout.ledger).records)


def purpose_of(layout: Layout, cell: Cell, slug: str) -> Purpose:
    """On whose behalf a cell is trained: the study `slug` when its declared grid holds the cell, else exploration.

    The price is the study's in both cases. Registers the study when its first cell is about to be trained.
    """
    study = load_study(layout, slug)
    declared = declared_params(layout)
    check_study(declared, study)
    if study.kind == "comparison":
        belongs = (
            cell.workload == study.workload
            and cell.arm in study.arms
            and cell.seed in study.possible_seeds
            and cell.optimizer == resolve_optimizer(declared, study.workload, cell.arm)
            and cell.settings == resolve_settings(declared, study.workload, cell.arm)
        )
    else:
        belongs = any(cell.digest == declared_cell.digest for declared_cell in study_cells(layout, declared, study))
    return Purpose(
        study=slug if belongs else None,
        registration=register(layout, declared, study).registration if belongs else None,
        price_usd_per_gpu_hour=study.price_usd_per_gpu_hour,
    )
