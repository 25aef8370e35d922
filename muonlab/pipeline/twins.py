"""Twins: a study's rehearsals on another workload, made of its declaration and of no file of their own.

    study 010-x with twins: {tiny: {workload: tiny-100, seeds: 3}}   ->   the study 010-x-tiny

A twin has the same arms and the same rule, on the first seeds of its study, without price, budget or requirements. Its
grid, lock file and registration lie in experiments/<slug>/ as those of any study, and no study.yaml: what it declares
cannot drift from what it rehearses. A verdict of it decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from muonlab.registry.errors import UsageError, nearest, unknown_name
from muonlab.registry.study import Study

Read = Callable[[str], Study]
"""From the slug of a declared study to its declaration; raises UsageError where that cannot be read."""


def twin_slug(study: Study, name: str) -> str:
    """The slug of the study that `--workload name` stands for; raises UsageError that lists the declared twins."""
    where = f"experiments/{study.slug}/study.yaml: study.twins"
    if study.twin_of is not None:
        raise UsageError(
            f"--workload {name}: {study.slug} is a rehearsal of {study.twin_of} and has no twins; leave the option "
            f"out, or name {study.twin_of}."
        )
    if not study.twins:
        runs = f"declares no rehearsal and runs on the workload {study.workload} itself"
        raise UsageError(f"--workload {name}: {study.slug} {runs}; leave the option out.")
    if name not in study.twins:
        raise unknown_name(where, "twin", name, study.twins)
    return f"{study.slug}-{name}"


def find_twin(slug: str, declared: Collection[str], read: Read) -> Study | None:
    """The twin with this slug, of the studies that are declared; None where no declared study has such a name.

    Raises UsageError where a study of that name has no such twin, and where two have one.
    """
    parents = {parent: slug.removeprefix(f"{parent}-") for parent in declared if slug.startswith(f"{parent}-")}
    found = [(study, name) for parent, name in parents.items() if name in (study := read(parent)).twins]
    if len(found) > 1:
        named = " and ".join(f"{name!r} of {study.slug}" for study, name in found)
        raise UsageError(f"experiments: {slug!r} stands for two twins, {named}; rename one of them.")
    if found:
        study, name = found[0]
        _refuse_twin(study, name, declared, read)
        return study.twin(name)
    if not parents:
        return None
    parent = max(parents, key=len)
    twins = sorted(read(parent).twins)
    has = f"its twins are {', '.join(twins)}" if twins else "it declares no twins"
    close = nearest(slug, [*declared, *(f"{parent}-{name}" for name in twins)])
    raise UsageError(
        f"experiments: {slug!r} is no declared study, and no twin of {parent}: {has} (--workload NAME).{close}"
    )


def refuse_unfit(study: Study, declared: Collection[str], read: Read) -> None:
    """Raise UsageError for what a declaration must not say of twins: `study` is as its own file declares it.

    That it is itself a twin; twins of reported results; a slug that a twin and a declared study share; a twin that
    would look at real runs, or that is none of its study.
    """
    where = f"experiments/{study.slug}/study.yaml"
    if study.twin_of is not None:
        raise UsageError(
            f"{where}: twin_of is {study.twin_of!r}; a twin has no file of its own: declare it under `twins` of the "
            f"study that it rehearses, and remove {where}."
        )
    if study.twins and study.provenance == "reported":
        raise UsageError(f"{where}: twins are declared, and provenance is 'reported': there is nothing to rehearse.")
    for name in study.twins:
        if (slug := f"{study.slug}-{name}") in declared:
            raise _shared(slug, study.slug, name)
        _refuse_twin(study, name, declared, read)
    for parent in declared:
        name = study.slug.removeprefix(f"{parent}-")
        if name == study.slug:
            continue
        try:
            its = read(parent)
        except UsageError:
            continue  # whoever asks for that study is told
        if name in its.twins:
            raise _shared(study.slug, parent, name)


def _refuse_twin(study: Study, name: str, declared: Collection[str], read: Read) -> None:
    """Raise UsageError for a twin with real runs, more seeds than its study, or a grid that its study does not have."""
    twin, where = study.twins[name], f"experiments/{study.slug}/study.yaml: study.twins.{name}"
    if twin.workload == study.workload:
        raise UsageError(
            f"{where}.workload: {twin.workload} is the workload of {study.slug} itself, and a rehearsal there would be "
            "a free look at its runs; name a smaller one."
        )
    if twin.seeds > len(study.seeds):
        raise UsageError(
            f"{where}.seeds: found {twin.seeds}, and {study.slug} declares {len(study.seeds)}, of which a twin has the "
            f"first; give at most {len(study.seeds)}."
        )
    if twin.grid and study.kind != "tuning":
        raise UsageError(f"{where}.grid: {study.slug} is a comparison, which tries no grid; remove it.")
    for option in twin.grid:
        if option not in study.grid:
            raise unknown_name(f"{where}.grid", "option", option, study.grid)
    for slug in declared:
        try:
            other = read(slug)
        except UsageError:
            continue  # whoever asks for that study is told
        if (other.provenance, other.workload) == ("run", twin.workload) and other.price_usd_per_gpu_hour > 0:
            raise UsageError(
                f"{where}.workload: {slug} pays for its runs on {twin.workload}, and a rehearsal there would be a free "
                "look at them; name a workload that no study with a price uses."
            )


def _shared(slug: str, parent: str, name: str) -> UsageError:
    return UsageError(
        f"experiments/{slug}/study.yaml: the twin {name!r} of {parent} has the same slug; rename the study, or the "
        f"twin in experiments/{parent}/study.yaml."
    )
