"""Confirmed selections: a study whose challengers were picked by the results of another, on seeds that these never saw.

The best of K looks better than it is: its mean holds the luck that made it the best. A study that declares
`selected_from` runs the pick again on seeds of its own, so that its verdict is about the method and not about the luck.
What it was selected by is the lowest mean final loss among the challengers of the selecting study
[nats/token; a diverged run counts with ln(vocabulary size)].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from muonlab.pipeline.layout import Layout
from muonlab.registry.errors import UsageError, nearest, unknown_name
from muonlab.registry.snapshot import Selection
from muonlab.registry.study import Study

if TYPE_CHECKING:
    from muonlab.reporting.standing import Standing

Read = Callable[[str], Study]
"""From the slug of a declared study to its declaration; raises UsageError where that cannot be read."""


def selecting_study(study: Study, declared: Collection[str], read: Read) -> Study:
    """The comparison that `selected_from` names; raises UsageError where it names none that may select for the study.

    It may not where a seed that this plan can come to is one that the selecting study, or one that selected for that,
    can come to on the same workload.
    """
    where = f"experiments/{study.slug}/study.yaml: study.selected_from"
    chain = [study]
    while (name := chain[-1].selected_from) is not None:
        if name not in declared:
            raise unknown_name(where, "study", name, declared, all_in="`muon study list`")
        if name in [link.slug for link in chain]:
            circle = " <- ".join([*(link.slug for link in chain), name])
            raise UsageError(f"{where}: a circle, {circle}; a study selects for later ones only.")
        selecting = read(name)
        if selecting.kind != "comparison":
            raise UsageError(f"{where}: {name} is a {selecting.kind} study; only a comparison selects a challenger.")
        seen = sorted(set(study.possible_seeds) & set(selecting.possible_seeds))
        if seen and selecting.workload == study.workload:
            free = max(selecting.possible_seeds) + 1
            raise UsageError(
                f"{where}: the plan can come to the seed {seen[0]}, and so can that of {name}, by whose results the "
                f"challengers were picked; take seeds that it does not use, such as those from {free} on."
            )
        chain.append(selecting)
    if len(chain) == 1:
        raise UsageError(f"{where}: it names no study; declare the one whose results pick the challenger.")
    return chain[1]


def refuse_unfit(study: Study, declared: Collection[str], read: Read) -> None:
    """Raise UsageError where a study that was selected cannot have been: see `selecting_study`, and its challengers."""
    if study.selected_from is None:
        return
    selecting = selecting_study(study, declared, read)
    arms = [arm for arm in selecting.arms if arm != selecting.baseline]
    for arm in study.challengers:
        if arm not in arms:
            raise UsageError(
                f"experiments/{study.slug}/study.yaml: the challenger {arm!r} is no arm of {selecting.slug}, by whose "
                f"results it is selected; `muon study select {study.slug}` writes the one that they pick."
                f"{nearest(arm, arms)}"
            )


def refuse_unpicked(layout: Layout, study: Study, read: Read) -> None:
    """Raise UsageError where the selecting study's report here does not say that it picks the study's challengers."""
    its = state_of(layout, study, read)
    if its is None or study.challengers == [its.picked]:
        return
    where = f"experiments/{study.slug}/study.yaml: study.challengers"
    declared, select = " and ".join(study.challengers), f"`muon study select {study.slug}`"
    if its.picked is None:
        raise UsageError(
            f"{where}: {declared} cannot be checked to be what {its.study} picks, since "
            f"reports/{its.study} has no whole result of it; `muon study run {its.study}` first, then {select}."
        )
    raise UsageError(
        f"{where}: {declared} is declared, and the results of {its.study} pick {its.picked}; {select} writes that."
    )


def mean_losses(standing: Standing) -> dict[str, float] | None:
    """Challenger -> mean final loss over the declared seeds, in nats/token; None where the standing selects nothing.

    It selects only when all declared runs have an outcome and nothing contradicts itself.
    """
    snapshot = standing.snapshot
    diverged = snapshot.settings.diverged_loss
    losses = {
        arm: [diverged if cell.val_loss is None else cell.val_loss for cell in standing.cells if cell.arm == arm]
        for arm in snapshot.study.challengers
    }
    if not standing.complete or standing.integrity or any(None in found for found in losses.values()):
        return None
    return {arm: math.fsum(loss for loss in found if loss is not None) / len(found) for arm, found in losses.items()}


def pick(means: dict[str, float]) -> str:
    """The challenger with the lowest mean; of equals, the first that was declared."""
    return min(means, key=lambda arm: means[arm])


def state_of(layout: Layout, study: Study, read: Read) -> Selection | None:
    """By what the study's challengers were selected, of the selecting study's report here; None for other studies."""
    if study.selected_from is None:
        return None
    from pydantic import ValidationError

    from muonlab.reporting.standing import Standing

    selecting = read(study.selected_from)
    path = layout.reports(selecting.slug) / "stats.json"
    try:
        means = mean_losses(Standing.model_validate_json(path.read_text(encoding="utf-8")))
    except (OSError, ValidationError):  # not reported here, or by another version
        means = None
    return Selection(
        study=selecting.slug,
        out_of=len(selecting.challengers),
        same_workload=selecting.workload == study.workload,
        means=means or {},
        picked=None if means is None else pick(means),
    )
