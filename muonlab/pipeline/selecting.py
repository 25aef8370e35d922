"""`muon study select`: write the challenger that another study's results pick into the study that confirms it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import yaml
from pydantic import ValidationError

from muonlab.pipeline import doors, selection
from muonlab.pipeline.answer import Answer
from muonlab.pipeline.collect import collect
from muonlab.pipeline.conclude import read_evaluations
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import check_study, declared_slugs, load_params, load_study, read_declaration
from muonlab.registry import ledger
from muonlab.registry.errors import UsageError, explain
from muonlab.registry.files import write_atomically
from muonlab.registry.study import Study
from muonlab.reporting.standing import judge
from muonlab.reporting.wording import count, outcomes_text


class Selected(Answer):
    """What a study's results have picked for the study that confirms it. Losses in nats/token."""

    study: str
    selected_from: str
    picked: str
    """Now the study's only challenger."""
    means: dict[str, float]
    """Challenger of the selecting study -> mean final loss over its seeds, lowest first."""
    seeds: int
    """Over how many seeds."""
    changed: bool
    """Whether study.yaml said otherwise before."""

    def lines(self) -> Iterator[str]:
        """The pick, what it was picked from, and what to do next."""
        yield (
            f"{self.picked}: the lowest mean final loss of {count(len(self.means), 'challenger')} of "
            f"{self.selected_from}, over {count(self.seeds, 'seed')}."
        )
        width = max(map(len, self.means))
        for arm, mean in self.means.items():
            yield f"  {arm:<{width}}  {mean:.4f}"
        path = f"experiments/{self.study}/study.yaml"
        if self.changed:
            yield f"{path}: challengers: [{self.picked}] now; commit it, then `muon study run {self.study}`."
        else:
            yield f"{path}: it declares {self.picked} already."


def select_challenger(layout: Layout, slug: str) -> Selected:
    """Make the pick of the selecting study's results the challenger of the study `slug`; only its study.yaml changes.

    Its grid is made anew where there is one. Raises UsageError, before anything is written: for a study that is not
    selected from another or has results, and while the selecting one lacks a run or contradicts itself.
    """
    declared = declared_slugs(layout)
    if slug not in declared:
        twin = load_study(layout, slug)  # UsageError where it is none either
        raise UsageError(f"{slug} is a rehearsal and has no study.yaml; `muon study select {twin.twin_of}`.")
    study = read_declaration(layout, slug)
    selecting = selection.selecting_study(study, declared, functools.partial(read_declaration, layout))
    if any(r.study == slug and r.is_result for r in ledger.read(layout.ledger).records):
        raise UsageError(
            f"experiments/{slug}: it has results, so that its challengers stay as they were registered; declare a new "
            "study for another pick (`muon study new`)."
        )
    standing = judge(collect(layout, selecting.slug), read_evaluations(layout, selecting.slug))
    means = selection.mean_losses(standing)
    if means is None:
        found = "its evidence contradicts itself" if standing.integrity else outcomes_text(standing)
        raise UsageError(
            f"experiments/{selecting.slug}: {found}, and it selects only when all of its declared runs have an "
            f"outcome; `muon study run {selecting.slug}` comes first."
        )
    picked = selection.pick(means)
    changed = study.challengers != [picked]
    if changed:
        _write_challenger(layout, study, picked)
    return Selected(
        study=slug,
        selected_from=selecting.slug,
        picked=picked,
        means=dict(sorted(means.items(), key=lambda item: item[1])),
        seeds=len(selecting.seeds),
        changed=changed,
    )


def _write_challenger(layout: Layout, study: Study, picked: str) -> None:
    path = layout.study(study.slug) / "study.yaml"
    where = f"experiments/{study.slug}/study.yaml"
    try:
        now = Study.model_validate({**study.model_dump(mode="json"), "challengers": [picked]})
    except ValidationError as error:
        raise explain(error, where, prefix="study") from None
    check_study(load_params(layout.params), now)
    write_atomically(path, with_challenger(path.read_text(encoding="utf-8"), picked))
    if (layout.study(study.slug) / "dvc.yaml").exists():
        doors.write_grid(layout, now)


def with_challenger(text: str, picked: str) -> str:
    """A study.yaml with this one challenger, and every other character of it, comments too, as it is."""
    at = yaml.compose(text, Loader=yaml.SafeLoader)
    for key in ("study", "challengers"):
        assert isinstance(at, yaml.MappingNode)  # it was read as a declaration before
        at = next(value for name, value in at.value if name.value == key)
    assert isinstance(at, yaml.SequenceNode)
    if at.flow_style:
        start, end, put = at.start_mark.index, at.end_mark.index, f"[{picked}]"
    else:  # a block ends where the next key begins, after its comments
        start, end, put = at.start_mark.index, at.value[-1].end_mark.index, f"- {picked}"
    return text[:start] + put + text[end:]
