"""From names in params.yaml to a cell with every option filled in, or one sentence on what is wrong.

The stages, the study driver and the tests all resolve cells here, so that a name means the same everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import optim
from muonlab.pipeline import gates, selection, twins
from muonlab.pipeline.grid_check import check_grid
from muonlab.pipeline.layout import Layout
from muonlab.registry.cell import Cell, Inputs, OptimizerSpec
from muonlab.registry.errors import UsageError, explain, unknown_name
from muonlab.registry.settings import ModelSettings, Params, PretrainedSettings, Seed, Workload, WorkloadSettings
from muonlab.registry.study import Study
from muonlab.registry.yamlfile import read_yaml

RUN_OPTIONS = frozenset({"seed", "diagnose_every"})
"""Options of an optimizer that come from the cell and the workload, not from its entry in params.yaml."""

TRAINING_OPTIONS = frozenset({"warmup_steps"})
"""Settings of a workload that an optimizer's entry in params.yaml may have its own value of."""


def load_params(path: Path) -> Params:
    """Read and check params.yaml: every optimizer and workload in it, and the one cell it names.

    Raises UsageError with one sentence: where, what was found, what is allowed.
    """
    where = path.name
    try:
        params = Params.model_validate(read_yaml(path, where=where))
    except ValidationError as error:
        raise explain(error, where) from None
    for arm in params.optimizers:
        _kind(params, arm, where=where)
        for workload in params.workloads:
            if arm in params.workloads[workload].tuned:
                resolve_optimizer(params, workload, arm)
    for name, workload_entry in params.workloads.items():
        for arm in workload_entry.tuned:
            if arm not in params.optimizers:
                raise unknown_optimizer(params, arm, where=f"{where}: workloads.{name}.tuned")
    find_workload(params, params.workload)
    resolve_optimizer(params, params.workload, params.optimizer)
    return params


def find_workload(params: Params, name: str, *, where: str = "params.yaml: workload") -> Workload:
    """Return the named workload; raises UsageError that lists the declared ones."""
    if name not in params.workloads:
        raise unknown_name(where, "workload", name, params.workloads, all_in="params.yaml")
    return params.workloads[name]


def _kind(params: Params, arm: str, *, where: str) -> str:
    kind = params.optimizers[arm].get("kind", arm)
    if not isinstance(kind, str) or not _is_kind(kind):
        raise unknown_name(f"{where}: optimizers.{arm}.kind", "kind of optimizer", str(kind), optim.names())
    return kind


@functools.cache
def _is_kind(kind: str) -> bool:
    """Whether there is a file for it; one command asks for the same few hundreds of times."""
    return kind in optim.names()


def unknown_optimizer(params: Params, arm: str, *, where: str) -> UsageError:
    """Build the error for an optimizer that params.yaml does not name, and say how one is added."""
    refusal = unknown_name(where, "optimizer", arm, params.optimizers, all_in="params.yaml")
    return UsageError(
        f"{refusal} A new one is named under `optimizers:` in params.yaml (CONTRIBUTING.md, Add an optimizer)."
    )


def resolve_optimizer(
    params: Params,
    workload: str,
    arm: str,
    *,
    overrides: dict[str, Any] | None = None,
    where: str = "params.yaml: optimizer",
) -> OptimizerSpec:
    """Merge an arm's options with those tuned for it on the workload, and fill in the defaults.

    `overrides` (a tuning study's grid point) take the place of tuned options. Raises UsageError for unknown
    names, options out of range, and an option that is set in both places.
    """
    if arm not in params.optimizers:
        raise unknown_optimizer(params, arm, where=where)
    kind = _kind(params, arm, where="params.yaml")
    own = {key: value for key, value in params.optimizers[arm].items() if key not in {"kind", *TRAINING_OPTIONS}}
    tuned = params.workloads[workload].tuned.get(arm, {})
    for key in sorted(RUN_OPTIONS & (own.keys() | tuned.keys())):
        raise UsageError(f"params.yaml: optimizers.{arm}: {key!r} is set by the cell, not by the optimizer; remove it.")
    both = sorted(own.keys() & tuned.keys())
    if both:
        key = both[0]
        raise UsageError(
            f"params.yaml: {key!r} stands in optimizers.{arm} and in workloads.{workload}.tuned.{arm}; "
            f"keep one of them (to try a value once: -S workloads.{workload}.tuned.{arm}.{key}=...)."
        )
    chosen = tuned if overrides is None else overrides
    prefix = f"optimizers.{arm}" if not chosen else f"optimizers.{arm} with workloads.{workload}.tuned.{arm}"
    if "lr" not in own and "lr" not in chosen:
        raise UsageError(
            f"params.yaml: {arm!r} has no learning rate on {workload!r}; `muon study new SLUG --kind tuning "
            f"--challenger {arm} ...` declares a study that chooses one, or add one that you know as "
            f"workloads.{workload}.tuned.{arm}: {{lr: ...}}."
        )
    try:
        options = optim.parse_options(kind, {**own, **chosen})
    except optim.OptimError as error:
        raise UsageError(f"params.yaml: {prefix}: {error}") from None
    return OptimizerSpec(kind=kind, options=options.model_dump(mode="json", exclude=set(RUN_OPTIONS)))


def resolve_settings(params: Params, workload: str, arm: str) -> WorkloadSettings:
    """The workload's settings with the arm's own values of TRAINING_OPTIONS. Raises UsageError for wrong ones."""
    settings = find_workload(params, workload).settings
    own = {key: value for key, value in params.optimizers[arm].items() if key in TRAINING_OPTIONS}
    if not own:
        return settings
    try:
        return WorkloadSettings.model_validate({**settings.model_dump(), **own})
    except ValidationError as error:
        raise explain(error, f"params.yaml: optimizers.{arm} on {workload}") from None


def parse_seed(text: str) -> int:
    """Return the seed that a command line names; raises UsageError for anything but an integer in range."""
    try:
        return TypeAdapter(Seed).validate_python(int(text))
    except ValueError:
        raise UsageError(f"seed: found {text!r}; it should be an integer from 0 to {2**31 - 1}.") from None


def load_study(layout: Layout, slug: str) -> Study:
    """Read and check a study's declaration, or derive the twin that the slug names; UsageError with one sentence."""
    declared = declared_slugs(layout)
    read = functools.partial(read_declaration, layout)
    if slug not in declared:
        twin = twins.find_twin(slug, declared, read)
        if twin is None:
            raise unknown_name("experiments", "study", slug, declared, all_in="`muon study list`")
        return twin
    study = read(slug)
    twins.refuse_unfit(study, declared, read)
    gates.refuse_unfit(study, declared, read)
    selection.refuse_unfit(study, declared, read)
    return study


def declared_slugs(layout: Layout) -> list[str]:
    """The studies that have a study.yaml, by name: twins, which have none, are not among them."""
    return sorted(path.parent.name for path in (layout.root / "experiments").glob("*/study.yaml"))


def studies_on(layout: Layout, workload: str) -> list[str]:
    """The declared studies that train on a workload, by name. A declaration that cannot be read is none of them."""
    found = []
    for slug in declared_slugs(layout):
        with contextlib.suppress(UsageError):
            study = read_declaration(layout, slug)
            if study.provenance == "run" and study.workload == workload:
                found.append(slug)
    return found


def check_reported(layout: Layout, params: Params) -> None:
    """Refuse the one cell of params.yaml where its study could not report: on another workload, its data not prepared.

    Raises UsageError. Without it the cell would be trained first, and the stage `collect` would fail.
    """
    study = load_study(layout, params.study)
    if study.workload == params.workload or (layout.data(study.workload) / "meta.json").is_file():
        return
    fitting = studies_on(layout, params.workload)
    name = f"name a study on it, say -S study={fitting[0]}, or " if fitting else ""
    raise UsageError(
        f"params.yaml: study {study.slug!r} is to report on this run of {params.workload!r}, and its own data, of "
        f"workload {study.workload!r}, is not prepared; {name}prepare that first "
        f"(`dvc repro data/dvc.yaml:prepare_data@{study.workload}`)."
    )


def read_declaration(layout: Layout, slug: str) -> Study:
    """What a study.yaml says, whatever other studies say; raises UsageError with one sentence."""
    where = f"experiments/{slug}/study.yaml"
    content = read_yaml(layout.study(slug) / "study.yaml", where=where)
    if not isinstance(content.get("study"), dict) or set(content) != {"study"}:
        raise UsageError(f"{where}: the file holds one mapping, `study:`; found the keys {sorted(map(str, content))}.")
    try:
        study = Study.model_validate(content["study"])
    except ValidationError as error:
        raise explain(error, where, prefix="study") from None
    if study.slug != slug:
        if study.slug in declared_slugs(layout):
            raise UsageError(
                f"{where}: slug is {study.slug!r}, which is the study in experiments/{study.slug}; two studies cannot "
                f"share a slug: give this one its folder's name, {slug!r}."
            )
        raise UsageError(f"{where}: slug is {study.slug!r} but the folder is {slug!r}; make them equal.")
    return study


def check_study(params: Params, study: Study) -> None:
    """Check that the names in a study are declared in params.yaml, and that its arms can be built; its twins' likewise.

    Raises UsageError with one sentence, also for a study of reported results: no cell of it can be made.
    """
    where = f"experiments/{study.twin_of or study.slug}/study.yaml"
    if study.provenance == "reported":
        raise UsageError(
            f"{where}: provenance is 'reported': its runs were made elsewhere, so that there is nothing to register, "
            f"train or restore; `muon study run {study.slug}` reads and reports them."
        )
    field = "workload" if study.twin_of is None else f"twins.{study.slug.removeprefix(f'{study.twin_of}-')}.workload"
    find_workload(params, study.workload, where=f"{where}: study.{field}")
    if study.kind == "tuning":
        check_grid(params, study, grid_points(study), where=where)
    for arm in study.arms:
        role = study.role(arm)
        overrides = {key: values[0] for key, values in study.grid.items()} if study.kind == "tuning" else None
        resolve_optimizer(params, study.workload, arm, overrides=overrides, where=f"{where}: study.{role}")
        resolve_settings(params, study.workload, arm)
    if study.on_archive is not None and study.on_archive not in params.optimizers:
        raise unknown_optimizer(params, study.on_archive, where=f"{where}: study.on_archive")
    for name in study.twins:
        check_study(params, study.twin(name))


def resolve_cell(
    layout: Layout,
    params: Params,
    workload: str,
    arm: str,
    seed: int,
    *,
    overrides: dict[str, Any] | None = None,
) -> Cell:
    """Resolve one cell to every input of its result.

    Needs the fingerprint and the data to be there (stages `fingerprint` and `prepare_data`), and a model that settings
    take from a folder or a package; raises UsageError with one sentence when a name is unknown, a value out of range or
    one of them is missing.
    """
    optimizer = resolve_optimizer(params, workload, arm, overrides=overrides)
    settings = resolve_settings(params, workload, arm)
    code = _read_json(layout.fingerprint(arm), "fingerprint")
    data = _read_json(layout.data(workload) / "meta.json", f"data/dvc.yaml:prepare_data@{workload}")
    try:
        return Cell(
            workload=workload,
            arm=arm,
            seed=seed,
            settings=settings,
            optimizer=optimizer,
            inputs=Inputs(
                data=data["sha256"]["tokens"],
                tokenizer=data["sha256"]["tokenizer"],
                code=code["code"],
                environment=code["environment"],
                model=_model_input(layout, settings.model),
            ),
        )
    except ValidationError as error:
        raise explain(error, f"the cell {workload}/{arm}") from None


def _model_input(layout: Layout, model: ModelSettings | PretrainedSettings) -> str:
    if isinstance(model, ModelSettings):
        return ""
    from muonlab.training.model_inputs import model_input

    # In DVC's temporary copy a folder that git does not hold is missing; the trainer finds it in the same place.
    root = layout.root if (layout.root / model.pretrained).is_dir() else layout.main
    return model_input(model, root)


def grid_points(study: Study) -> list[dict[str, Any]]:
    """Every combination of a tuning study's grid, in the order of its declaration."""
    points: list[dict[str, Any]] = [{}]
    for key, values in study.grid.items():
        points = [{**point, key: value} for point in points for value in values]
    return points


def study_cells(layout: Layout, params: Params, study: Study) -> list[Cell]:
    """All cells of a study's grid, seed by seed, so that an interrupted study holds whole pairs."""
    return [
        resolve_cell(layout, params, study.workload, arm, seed, overrides=point)
        for seed in study.seeds
        for arm in study.arms
        for point in (grid_points(study) if study.kind == "tuning" else [None])
    ]


def resolved_arms(params: Params, study: Study) -> dict[str, Any]:
    """What the names in a study stand for: the plain data that its registration hashes beside the declaration."""
    arms = {arm: _resolved_arm(params, study, arm) for arm in study.arms} if study.kind == "comparison" else {}
    return {"arms": arms, "settings": params.workloads[study.workload].settings.model_dump(mode="json")}


def _resolved_arm(params: Params, study: Study, arm: str) -> dict[str, Any]:
    own = {key: value for key, value in params.optimizers[arm].items() if key in TRAINING_OPTIONS}
    resolved = resolve_optimizer(params, study.workload, arm).model_dump(mode="json")
    return {**resolved, "settings": own} if own else resolved


@functools.cache
def _read_cached(path: Path, mtime_ns: int) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _read_json(path: Path, stage: str) -> dict[str, Any]:
    try:
        return _read_cached(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise UsageError(f"{path.name}: not prepared yet ({path.parent.name}); run `dvc repro {stage}`.") from None
