"""What a comparison and the study that tuned its arms must have in common, and what they must not.

The tuning study that `tuning:` names exists, is one, and ran on the comparison's workload. No seed that a tuning study
uses is one that a comparison on the same workload can come to: a learning rate that was chosen on a seed has seen its
noise, and the comparison on that seed would favour the arm that was chosen best. A comparison starts only with the
options that were chosen for its arms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from muonlab.pipeline.declare import committed_params
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import declared_slugs, load_study, read_declaration, resolve_optimizer
from muonlab.pipeline.tuning_results import arm_tunings, read_results
from muonlab.registry import ledger
from muonlab.registry.errors import UsageError, unknown_name
from muonlab.registry.settings import Params
from muonlab.registry.study import Study
from muonlab.registry.yamlfile import read_yaml
from muonlab.reporting.tuning_standing import spell_options
from muonlab.reporting.tuning_wording import UNTUNED

ONE_CELL = ("optimizer", "seed", "workload", "study")
"""Keys of params.yaml that `dvc exp run` leaves edited, and that declare nothing."""


def check_tuning(layout: Layout, study: Study) -> None:
    """Check what `tuning:` of a comparison and of its twins names; raises UsageError with one sentence.

    Also where the results.csv of the study that it names cannot be read: before anything is run for the comparison.
    """
    if study.kind == "tuning" and study.tuning != UNTUNED:
        raise UsageError(f"{_where(study, 'tuning')}: a tuning study chooses its arms' options itself; remove the key.")
    for one in with_twins(study):
        if one.kind == "comparison" and one.provenance == "run" and one.tuning != UNTUNED:
            _check_named(layout, one)


def check_seeds(layout: Layout, study: Study) -> None:
    """Check the seeds of a study, and of its twins, against every declared study on their workload.

    Raises UsageError for a seed that both a tuning and a comparison can come to. A declaration that cannot be read is
    passed over: whoever asks for that study is told.
    """
    ours = list(with_twins(study))
    if study.provenance == "reported":
        return
    for slug in declared_slugs(layout):
        if slug == (study.twin_of or study.slug):
            continue
        try:
            theirs = list(with_twins(read_declaration(layout, slug)))
        except UsageError:
            continue
        for one in ours:
            for other in theirs:
                if other.provenance == "run" and {one.kind, other.kind} == {"tuning", "comparison"}:
                    tuning, comparison = (one, other) if one.kind == "tuning" else (other, one)
                    _refuse_shared_seeds(tuning, comparison, where=_where(one, "seeds"))


def why_untuned(layout: Layout, params: Params, study: Study) -> str | None:
    """Why a comparison must not start yet: its tuning study lacks results, or an arm runs with other options than it
    chose. None where neither is so, and once the comparison has results, whose report says it.

    An arm that the tuning study does not try, or of which every best run diverged, has no chosen options to differ
    from.
    """
    if study.kind != "comparison" or study.provenance != "run" or study.tuning == UNTUNED:
        return None
    where, again = _where(study, "tuning"), f"`muon study run {study.tuning}`"
    runs = read_results(layout, load_study(layout, study.tuning))
    if runs is None or not all(run.has_outcome for run in runs):
        what = "has no results yet" if runs is None else "lacks some of its results"
        why = f"{where}: {study.tuning} {what}, so that nothing is chosen for its arms; {again} first."
    elif differ := list(_other_options(layout, params, study)):
        why = (
            f"{where}: {'; '.join(differ)}; {again} writes its choice into params.yaml, which is then committed, or "
            f"declare `tuning: {UNTUNED}`."
        )
    else:
        return None
    started = any(r.study == study.slug and r.is_result for r in ledger.read(layout.ledger).records)
    return None if started else why


def _other_options(layout: Layout, params: Params, study: Study) -> Iterator[str]:
    for arm, its in arm_tunings(layout, params, study)[0].items():
        if its.chosen and not its.in_use:
            options = resolve_optimizer(params, study.workload, arm).options
            here = {option: options.get(option) for option in its.chosen}
            yield f"{study.tuning} chose {spell_options(its.chosen)} for {arm}, which runs with {spell_options(here)}"


def refuse_untuned(layout: Layout, params: Params, study: Study) -> None:
    """Raise UsageError where a comparison must not start yet (`why_untuned`)."""
    if (why := why_untuned(layout, params, study)) is not None:
        raise UsageError(why)


def users_of(layout: Layout, tuning: str) -> list[Study]:
    """The comparisons, twins included, that name this tuning study; what cannot be read is passed over."""
    found = []
    for slug in declared_slugs(layout):
        try:
            studies = list(with_twins(read_declaration(layout, slug)))
        except UsageError:
            continue
        found += [study for study in studies if study.kind == "comparison" and study.tuning == tuning]
    return found


def with_twins(study: Study) -> Iterator[Study]:
    """A study, then its rehearsals."""
    yield study
    for name in study.twins:
        yield study.twin(name)


def refuse_mixed(layout: Layout, study: Study) -> None:
    """Raise UsageError when params.yaml has uncommitted changes that this study's choice would be committed with.

    Its own earlier choice is none of them, nor is the one cell that `dvc exp run` leaves in the file.
    """
    with committed_params(layout) as path:
        if path is None:
            return
        committed = read_yaml(path, where="params.yaml of the last commit")
    here = read_yaml(layout.params, where="params.yaml")
    changed = sorted(set(_leaves(_without_own(here, study))) ^ set(_leaves(_without_own(committed, study))))
    if changed:
        raise UsageError(
            f"params.yaml: {changed[0][0]} differs from the last commit, and the choice of {study.slug} would be "
            "committed together with it; commit it first, or take it back with `git checkout HEAD params.yaml`."
        )


def _without_own(content: Mapping[str, Any], study: Study) -> dict[str, Any]:
    """The content of params.yaml without the one cell and without what the study's choice takes the place of."""
    workloads = {}
    for name, workload in content["workloads"].items():
        tuned = dict(workload.get("tuned") or {})
        if name == study.workload:
            own = {arm: {k: v for k, v in tuned.get(arm, {}).items() if k not in study.grid} for arm in study.arms}
            tuned = {arm: options for arm, options in {**tuned, **own}.items() if options or arm not in own}
        workloads[name] = {**workload, "tuned": tuned}
    return {**{key: value for key, value in content.items() if key not in ONE_CELL}, "workloads": workloads}


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, value as text) of everything in a YAML mapping."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, repr(value)


def _check_named(layout: Layout, study: Study) -> None:
    where = _where(study, "tuning")
    try:
        tuning = load_study(layout, study.tuning)
    except UsageError:
        if study.tuning in declared_slugs(layout):
            raise
        known = [slug for slug in declared_slugs(layout) if _is_tuning(layout, slug)]
        raise unknown_name(where, "tuning study", study.tuning, [*known, UNTUNED]) from None
    if tuning.kind != "tuning":
        raise UsageError(
            f"{where}: {study.tuning!r} is a {tuning.kind}, and its runs choose nothing; name a study of kind tuning, "
            f"or {UNTUNED}."
        )
    if tuning.workload != study.workload:
        raise UsageError(
            f"{where}: {study.tuning} tunes on the workload {tuning.workload}, and this study runs on "
            f"{study.workload}, where other values can be best; name a study that tunes on {study.workload}, or "
            f"{UNTUNED}."
        )
    _refuse_shared_seeds(tuning, study, where=where)
    read_results(layout, tuning)


def _refuse_shared_seeds(tuning: Study, comparison: Study, *, where: str) -> None:
    shared = sorted(set(tuning.possible_seeds) & set(comparison.possible_seeds))
    if not shared or tuning.workload != comparison.workload:
        return
    seeds = f"the seed {shared[0]}" if len(shared) == 1 else f"the seeds {', '.join(map(str, shared))}"
    raise UsageError(
        f"{where}: the tuning study {tuning.slug} and the comparison {comparison.slug} can both come to {seeds} on "
        f"{tuning.workload}, and what was chosen on a seed must not be judged on it; give the tuning seeds of its own, "
        f"such as 1000 and 1001."
    )


def _where(study: Study, field: str) -> str:
    if study.twin_of is None:
        return f"experiments/{study.slug}/study.yaml: study.{field}"
    return f"experiments/{study.twin_of}/study.yaml: study.twins.{study.slug.removeprefix(f'{study.twin_of}-')}.{field}"


def _is_tuning(layout: Layout, slug: str) -> bool:
    try:
        return read_declaration(layout, slug).kind == "tuning"
    except UsageError:
        return False
