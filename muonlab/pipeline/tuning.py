"""Run a tuning study: the same grid and the same seeds for every arm, and the choice written where studies read it.

The option values with the lowest mean final validation loss over the seeds win; a diverged run counts with
ln(vocabulary size) (`muonlab.reporting.tuning_standing`). The choice goes to `workloads.<workload>.tuned.<arm>` in
params.yaml, every run to `experiments/<study>/results.csv` and to the ledger, what was found to `reports/<study>/`. No
DVC grid is made: nothing is compared here, and nothing is decided.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from muonlab.pipeline.attempts import CellScratch, Purpose
from muonlab.pipeline.collect import collect
from muonlab.pipeline.conclude import write_index
from muonlab.pipeline.declare import current_registration, declared_params, register
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.pool import Job, Place
from muonlab.pipeline.price import declared_grid
from muonlab.pipeline.registered import read_registration
from muonlab.pipeline.resolve import check_study, load_params, load_study, study_cells
from muonlab.pipeline.study_run import Watch, check, prepare, say_dirt, train_missing
from muonlab.pipeline.tuning_checks import refuse_mixed, users_of
from muonlab.pipeline.tuning_results import (
    disagreements,
    in_use,
    judge_arms,
    missing_run,
    read_results,
    write_results,
)
from muonlab.pipeline.watch import is_prepared
from muonlab.registry import ledger
from muonlab.registry.errors import CellsFailedError, IntegrityError, OverBudgetError, UsageError
from muonlab.registry.files import write_atomically
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import Params
from muonlab.registry.snapshot import Snapshot
from muonlab.registry.study import Study
from muonlab.reporting.tuning_report import warnings, write_tuning_report
from muonlab.reporting.tuning_standing import GridRun, TuningStanding, spell_options


def run_tuning(
    layout: Layout, slug: str, *, place: Place, watch: Callable[[int, int], Watch], say: Callable[[str], None],
    max_cost_usd: float | None = None,
) -> int:  # fmt: skip
    """Run a tuning study to its report, training only what is missing; return the exit code.

    0; 3 when cells failed, and then nothing is chosen; 5 when the evidence contradicts itself, likewise. Raises
    UsageError, OverBudgetError.
    """
    params, study = check(layout, slug)
    if study.kind != "tuning":
        raise UsageError(f"experiments/{slug}: kind is {study.kind!r}; run it with `muon study run {slug}`.")
    refuse_mixed(layout, study)
    say_dirt(layout, say)
    prepare(layout, params, study)
    grid = list(zip(declared_grid(study), study_cells(layout, params, study), strict=True))
    place.gather([cell for _, cell in grid])
    known = {r.cell_digest for r in collect(layout, slug).records if r.is_result}
    purpose = Purpose(
        slug, register(layout, params, study).registration, study.price_usd_per_gpu_hour, device_count=place.devices
    )
    jobs = [
        Job(cell, purpose, label=f"{cell.key} {spell_options(options)}")
        for (_, _, options), cell in grid
        if cell.digest not in known
    ]
    say(f"{slug}: {len(grid)} cells, {len(grid) - len(jobs)} known, {len(jobs)} to train.")
    try:
        state = train_missing(layout, study, jobs, place=place, watch=watch, max_cost_usd=max_cost_usd)
    except OverBudgetError:
        report_tuning(layout, slug)
        raise
    for label, reason in state.failed.items():
        say(f"failed: {label}: {reason}")
    standing = tuning_standing(layout, slug)
    for run in standing.runs:
        if run.has_outcome:
            CellScratch(layout, run.digest).discard()
    if standing.complete:
        write_results(layout, study, standing.runs)
    try:
        if standing.complete and not standing.findings:
            _choose(layout, params, standing, say)
    finally:
        standing = report_tuning(layout, slug)
    for sentence in [*warnings(standing), *standing.notes]:
        say(f"muon: {sentence}")
    if not standing.complete:
        left = sum(not run.has_outcome for run in standing.runs)
        say(f"{slug}: {left} cells have no result; nothing is chosen until all have one.")
    return tuning_exit_code(standing)


def tuning_exit_code(standing: TuningStanding) -> int:
    """What `muon` returns: 5 where the evidence contradicts itself, 3 where runs are missing or failed, else 0."""
    if standing.findings:
        return IntegrityError.exit_code
    return 0 if standing.complete else CellsFailedError.exit_code


def report_tuning(layout: Layout, slug: str) -> TuningStanding:
    """Report what there is of a tuning study: from the ledger, or from results.csv where the ledger has none of it.

    Writes reports/<slug>/ and the index; params.yaml stays as it is. Raises UsageError where nothing was run.
    """
    standing = tuning_standing(layout, slug)
    write_tuning_report(standing, layout.reports(slug))
    write_index(layout)
    return standing


def tuning_standing(layout: Layout, slug: str) -> TuningStanding:
    """Where a tuning study stands. Raises UsageError where neither the ledger nor results.csv has a run of it."""
    study = load_study(layout, slug)
    params = declared_params(layout)
    check_study(params, study)
    kept = read_results(layout, study)
    snapshot = collect(layout, slug) if is_prepared(layout, study) else None
    runs = _runs_of(snapshot) if snapshot is not None else []
    from_ledger = any(run.attempts for run in runs)
    if kept is None and not from_ledger:
        raise UsageError(f"{slug}: nothing of it has been prepared or run here yet; `muon study run {slug}` does both.")
    known = ledger.read(layout.ledger).records if snapshot is None else snapshot.records
    used = runs if from_ledger else kept or []
    counted = [r for r in known if r.is_result and r.cell_digest in {run.digest for run in used}] if from_ledger else []
    own = [r for r in known if r.study == slug or r.cell_digest in {run.digest for run in used}] if from_ledger else []
    lost = [r for r in own if not r.is_result]
    registration = read_registration(layout, slug)
    notes = list(snapshot.notes if snapshot else [])
    if registration is not None and registration.registration != current_registration(params, study):
        notes.append("The declaration was changed after it was registered, as by a grid that was extended.")
    arms = judge_arms(params, study, used)
    here = load_params(layout.params)
    return TuningStanding(
        study=study,
        settings=params.workloads[study.workload].settings,
        source="ledger" if from_ledger else "results.csv",
        made_under="" if from_ledger else _made_under(study, runs, used),
        runs=used,
        arms=arms,
        in_params={a.arm: _place(params, here, study, a.arm, a.choice.options) for a in arms if a.choice},
        used_by=[user.slug for user in users_of(layout, slug)],
        registration=registration.registration if registration else None,
        registered_at=registration.registered_at if registration else None,
        made_on=sorted({_made_on(record) for record in counted}),
        findings=[*(snapshot.findings if snapshot else []), *disagreements(study, kept or [], known)],
        notes=notes,
        total_seconds=sum(r.wall_seconds for r in own) if from_ledger else sum(r.wall_seconds for r in used),
        total_cost_usd=sum(r.cost_usd for r in own) if from_ledger else sum(r.cost_usd for r in used),
        lost_seconds=sum(r.wall_seconds for r in lost),
        lost_cost_usd=sum(r.cost_usd for r in lost),
    )


def _runs_of(snapshot: Snapshot) -> list[GridRun]:
    """Every declared run as the ledger has it, in the order of the grid."""
    attempts: dict[str, list[RunRecord]] = defaultdict(list)
    for record in snapshot.records:
        attempts[record.cell_digest].append(record)
    return [
        _run_of(arm, options, seed, cell.digest, attempts[cell.digest])
        for (arm, seed, options), cell in zip(declared_grid(snapshot.study), snapshot.cells, strict=True)
    ]


def _run_of(arm: str, options: dict[str, Any], seed: int, digest: str, attempts: list[RunRecord]) -> GridRun:
    if not attempts:
        return missing_run(arm, options, seed, digest)
    last = next((r for r in attempts if r.is_result), attempts[-1])
    return GridRun(
        arm=arm,
        options=options,
        seed=seed,
        digest=digest,
        state=last.status,
        val_loss=last.val_loss,
        attempts=len(attempts),
        wall_seconds=sum(r.wall_seconds for r in attempts),
        cost_usd=sum(r.cost_usd for r in attempts),
        error=None if last.is_result else last.error,
    )


def _made_under(study: Study, resolved: list[GridRun], kept: list[GridRun]) -> str:
    if not resolved:
        return f"under which code is not checked, since the data of {study.workload} are not prepared here"
    differ = sum(a.digest != b.digest for a, b in zip(resolved, kept, strict=True) if b.has_outcome)
    if differ:
        return "they were made under other code, options or data than today's"
    return "they were made under today's code, options and data"


def _place(
    committed: Params, here: Params, study: Study, arm: str, chosen: dict[str, Any]
) -> Literal["committed", "uncommitted", "other"]:
    if not in_use(here, study.workload, arm, chosen):
        return "other"
    return "committed" if in_use(committed, study.workload, arm, chosen) else "uncommitted"


def _made_on(record: RunRecord) -> str:
    its = record.provenance
    commit = f"commit {its.commit[:12]}{' with changes' if its.dirty else ''}" if its.commit else "no commit"
    return f"{commit}, {its.device}, torch {its.torch}"


def _choose(layout: Layout, params: Params, standing: TuningStanding, say: Callable[[str], None]) -> None:
    """Write what was chosen into params.yaml, and say what it means for the comparisons that use it."""
    study = standing.study
    refuse_mixed(layout, study)
    chosen = {result.arm: result.choice.options for result in standing.arms if result.choice}
    before = params.workloads[study.workload].tuned
    changed = [arm for arm, options in chosen.items() if {**before.get(arm, {}), **options} != before.get(arm, {})]
    if changed:
        write_choices(layout.params, study.workload, {arm: chosen[arm] for arm in changed})
    for result in standing.arms:
        if result.choice is None or result.choice.mean is None:
            say(f"{result.arm}: nothing is chosen, {result.why_none}")
            continue
        say(f"{result.arm}: {spell_options(result.choice.options)}, mean loss {result.choice.mean:.4f}")
    where = f"params.yaml: workloads.{study.workload}.tuned"
    if changed:
        say(f"{where} holds these choices now, new for {', '.join(changed)}; commit it to declare them.")
    else:
        say(f"{where} holds these choices already; nothing was changed.")
    for sentence in consequences(layout, study, changed):
        say(sentence)


def consequences(layout: Layout, study: Study, changed: list[str]) -> Iterator[str]:
    """Which comparisons use the choice, and whose results were made before it changed for these arms, in sentences."""
    users = users_of(layout, study.slug)
    if not users:
        yield f"No study uses them yet: `tuning: {study.slug}` in a comparison on {study.workload} does."
        return
    yield f"Used by {', '.join(user.slug for user in users)}."
    judged = {r.study for r in ledger.read(layout.ledger).records if r.is_result}
    for user in users:
        if user.slug in judged and set(changed) & set(user.arms):
            yield (
                f"muon: {user.slug} has results with the values that stood there before: once this is committed its "
                "plan counts as amended; a new study (`muon study new`) does not."
            )


def write_choices(params_file: Path, workload: str, choices: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the chosen options (arm -> option -> value) into params.yaml, leaving its comments and order alone."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    content = yaml.load(params_file)
    tuned = content["workloads"][workload].setdefault("tuned", {})
    for arm, options in choices.items():
        tuned.setdefault(arm, {}).update(options)
    text = io.StringIO()
    yaml.dump(content, text)
    write_atomically(params_file, text.getvalue())
