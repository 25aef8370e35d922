"""What a comparison's report says of how its arms' options were chosen: each arm's tuning budget, or that it has none.

An arm is tuned when the study that `tuning:` names has tried it and chosen, and the arm runs with what was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from muonlab.registry.snapshot import ArmTuning, Snapshot
from muonlab.reporting.blocks import Block, Bullets, Paragraph
from muonlab.reporting.wording import count, listed

UNTUNED = "untuned"


def tuned_by(snapshot: Snapshot, arm: str) -> str:
    """The study whose choice the arm runs with, or `untuned`."""
    its = snapshot.tuning.get(arm)
    return its.study if its is not None and its.in_use else UNTUNED


def tuning_section(snapshot: Snapshot) -> tuple[Block, ...]:
    """Every arm's tuning budget; nothing where no tuning study is named, which the limits say."""
    study = snapshot.study
    if study.tuning == UNTUNED:
        return ()
    intro = f"By the tuning study {study.tuning}, on seeds that this study does not use."
    options = {arm: spec.get("options") for arm, spec in snapshot.optimizers.items()}
    sentences = tuning_sentences(study.tuning, study.arms, snapshot.tuning, options)
    return (Paragraph(intro), Bullets(tuple(sentences)))


def tuning_sentences(
    named: str, arms: Iterable[str], tunings: Mapping[str, ArmTuning], options: Mapping[str, object]
) -> list[str]:
    """One sentence an arm; `named` is the declared tuning study, `options` what each arm runs with."""
    return [
        f"{arm}: {_sentence(named, tunings[arm], options.get(arm))}"
        if arm in tunings
        else f"{arm}: untuned, {named} has no run of it."
        for arm in arms
    ]


def _sentence(named: str, its: ArmTuning, options: object) -> str:
    made = f"{count(its.runs, 'run')} ({_grid(its)}) by {named}"
    if not its.chosen:
        return f"untuned, {made} and nothing chosen."
    if its.in_use:
        edge = f", at the edge of what was tried for {listed(its.at_edge)}" if its.at_edge else ""
        return f"{made}, {_spell(its.chosen)} chosen and used{edge}."
    return f"untuned as it runs here, {made} chose {_spell(its.chosen)} and it has {_spell(_here(its, options))}."


def _here(its: ArmTuning, options: object) -> dict[str, object]:
    """What the arm has in place of the chosen values."""
    held = options if isinstance(options, dict) else {}
    return {option: held.get(option, "none") for option, value in its.chosen.items() if held.get(option) != value}


def _grid(its: ArmTuning) -> str:
    tried = [
        count(len(values), "learning rate") if option == "lr" else f"{count(len(values), 'value')} of {option}"
        for option, values in its.tried.items()
    ]
    return " x ".join([*tried, count(len(its.seeds), "seed")])


def _spell(options: Mapping[str, object]) -> str:
    return ", ".join(f"{option} {value}" for option, value in options.items())


def tuning_limits(snapshot: Snapshot) -> list[str]:
    """What the tuning leaves open, in sentences; nothing where no tuning study is named, which says so itself."""
    study = snapshot.study
    if study.tuning == UNTUNED:
        return []
    untuned = [arm for arm in study.arms if tuned_by(snapshot, arm) == UNTUNED]
    found = []
    if untuned:
        found.append(
            f"Untuned: {listed(untuned)} {'runs' if len(untuned) == 1 else 'run'} with values that {study.tuning} did "
            "not choose, so that a difference may be one of tuning."
        )
    if len(untuned) < len(study.arms):
        found.append(
            f"Tuning: the learning rates are those of the tuning study {study.tuning}"
            f"{', but for the untuned arms' if untuned else ''}; its grid bounds how well each arm could do."
        )
    runs = {arm: snapshot.tuning[arm].runs if arm in snapshot.tuning else 0 for arm in study.arms}
    if len(set(runs.values())) > 1:
        spelt = listed(f"{arm} {count(number, 'run')}" for arm, number in runs.items())
        found.append(f"Unequal tuning: {spelt}; an arm that was tried more often was given more chances to do well.")
    edges = [arm for arm, its in snapshot.tuning.items() if its.in_use and its.at_edge]
    if edges:
        found.append(
            f"Edge of the grid: the values of {listed(edges)} are the smallest or largest that were tried, so that "
            "better ones may lie beyond."
        )
    return found
