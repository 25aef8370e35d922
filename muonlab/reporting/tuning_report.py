"""The report of a tuning study: what was tried, what each arm's losses were, what was chosen, and how sure that is.

It has no verdict: a tuning study chooses option values for every arm and compares nothing. Losses in nats/token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from muonlab.registry.errors import UsageError
from muonlab.registry.files import write_atomically
from muonlab.reporting.blocks import (
    MOST_ROWS,
    Block,
    Bullets,
    Document,
    Kind,
    Paragraph,
    Pictures,
    Section,
    Table,
    one_line,
)
from muonlab.reporting.figures.tuning import swept, tuning
from muonlab.reporting.report import colours, write_document
from muonlab.reporting.tuning_standing import ArmResult, Edge, GridRun, PointResult, TuningStanding, spell_options
from muonlab.reporting.wording import ABSENT, count, duration, listed, moment, money, plain

FIGURE = "tuning"
LOSS_DIGITS = 5
MOST_CLOSE = 3
"""A warning names at most as many points that are as good as the chosen one."""


class TunedStudy(BaseModel):
    """What is read of tuning.json; its other keys are for others."""

    model_config = ConfigDict(frozen=True)

    slug: str
    question: str
    outcome: str
    chosen: dict[str, dict[str, Any]]
    """Arm -> option -> value."""
    twin_of: str | None


def write_tuning_report(standing: TuningStanding, out: Path) -> None:
    """Write report.md, report.html, figures/tuning.svg and tuning.json into the folder `out`."""
    found = {FIGURE: tuning(standing)}
    narrow = tuning(standing, narrow=True)
    write_document(
        tuning_document(standing, drawn=found[FIGURE] is not None),
        found,
        {FIGURE: _alternative(standing)},
        out,
        narrow={FIGURE: narrow} if narrow else {},
        arms=colours(standing.study),
    )
    named = {name: getattr(standing.study, name) for name in ("slug", "question", "twin_of")}
    content = {
        **named,
        "outcome": outcome(standing),
        "chosen": {r.arm: r.choice.options for r in standing.arms if r.choice and not standing.findings},
        "warnings": warnings(standing),
        "complete": standing.complete,
        **standing.model_dump(mode="json"),
    }
    write_atomically(out / "tuning.json", json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_tuned(folder: Path) -> TunedStudy | None:
    """What reports/<study>/tuning.json says, None before there is one.

    Raises UsageError for a file that this version has not written for this study.
    """
    path = folder / "tuning.json"
    try:
        found = TunedStudy.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError, OSError):
        found = None
    if found is None or found.slug != folder.name:
        raise UsageError(
            f"reports/{folder.name}/tuning.json: another version or study wrote it, or it was edited; "
            f"`muon report {folder.name}` makes it anew."
        )
    return found


def tuning_document(standing: TuningStanding, *, drawn: bool) -> Document:
    """The document of a tuning study; `drawn`: its figure has something to show."""
    study = standing.study
    sections = [
        Section("What was asked", (Paragraph(_asked(standing)),)),
        Section(f"Loss by {'learning rate' if swept(standing) == 'lr' else swept(standing)}", _figure(drawn)),
        Section("Mean loss by arm", _by_arm(standing)),
        Section("Every grid point", _every_point(standing)),
        Section("Runs without a loss", _without_loss(standing)),
        Section("Where the choice goes", (Bullets(tuple(_uses(standing))),)),
        Section("Cost", (_cost(standing),)),
        Section("Limits of this study", (Bullets(tuple(_limits(standing))),)),
        Section("Provenance", tuple(_provenance(standing))),
    ]
    return Document(
        slug=study.slug,
        question=one_line(study.question),
        headline=f"Rehearsal of {study.twin_of}. {_headline(standing)}" if study.twin_of else _headline(standing),
        lead=(_quote(standing), f"Next: {_next(standing)}", _status(standing)),
        warnings=tuple(warnings(standing)),
        cell=None,
        sections=tuple(section for section in sections if section.blocks),
    )


# Sentences


def outcome(standing: TuningStanding) -> str:
    """What came out, in one sentence, for lists of studies."""
    if standing.findings:
        return f"Contradiction, nothing is chosen: {one_line(standing.findings[0])}"
    if not standing.complete:
        return f"Nothing is chosen yet: {_outcomes(standing)}."
    doubts = [
        *(["at the edge of the grid"] if any(r.edges for r in standing.arms) else []),
        *(["closer to another than the seeds can tell"] if any(r.close for r in standing.arms) else []),
    ]
    return f"{_headline(standing)}{f' Some {listed(doubts)}.' if doubts else ''}"


def warnings(standing: TuningStanding) -> list[str]:
    """What must be known before the choice is used, in sentences."""
    found = [f"Contradiction: {one_line(reason)}" for reason in standing.findings]
    if standing.study.twin_of is not None:
        found.append(f"A rehearsal of {standing.study.twin_of}: what is chosen here says nothing about that study's.")
    if not standing.complete:
        found.append(
            f"This report is partial: {_outcomes(standing)}, and nothing is chosen before all have one, so that every "
            "arm is tuned with as many runs."
        )
    runs = {result.arm: result.runs for result in standing.arms}
    if len(set(runs.values())) > 1:
        spelt = listed(f"{arm} {number}" for arm, number in runs.items())
        found.append(f"Unequal numbers of runs have an outcome: {spelt}.")
    if standing.source == "results.csv":
        where = f"experiments/{standing.study.slug}/results.csv"
        found.append(f"From {where}, since the ledger has none of these runs; {standing.made_under}.")
    at_edge = [(edge_text(edge), result.arm) for result in standing.arms for edge in result.edges]
    if at_edge:
        texts = dict.fromkeys(text for text, _ in at_edge)
        spelt = "; ".join(f"{listed(arm for other, arm in at_edge if other == text)}: {text}" for text in texts)
        found.append(f"At the edge of the grid, so that the best may lie beyond it: {spelt}.")
    close = [result for result in standing.arms if result.close]
    if close:
        spelt = "; ".join(_close_text(result) for result in close)
        found.append(f"A coin toss, closer on the same seeds than the spread of the seeds: {spelt}.")
    found += _diverged_choices(standing)
    return found


def edge_text(edge: Edge) -> str:
    """`lr 0.04 is the largest that was tried: try larger ones, such as 0.08`."""
    direction = "smaller" if edge.side == "smallest" else "larger"
    such = "" if edge.next_value is None else f", such as {edge.next_value:g}"
    return f"{edge.option} {edge.value:g} is the {edge.side} that was tried: try {direction} ones{such}"


def _close_text(result: ArmResult) -> str:
    assert result.choice is not None
    near = sorted(result.close, key=lambda close: close.gap)
    nearest, more = near[0], len(near) - MOST_CLOSE
    others = " or ".join(spell_options(close.options) for close in near[:MOST_CLOSE])
    others += f" or {count(more, 'other')}" if more > 0 else ""
    gap = f"{plain(nearest.gap, 2)} against a spread of {plain(nearest.spread, 2)} nats/token"
    gap += " for the first" if len(near) > 1 else ""
    return f"{result.arm}: {spell_options(result.choice.options)} or {others} ({gap})"


def _diverged_choices(standing: TuningStanding) -> Iterator[str]:
    for result in standing.arms:
        if result.choice is not None and result.choice.diverged:
            seeds = listed(result.choice.diverged)
            yield (
                f"{result.arm} diverged at the chosen {spell_options(result.choice.options)} with the "
                f"{'seed' if len(result.choice.diverged) == 1 else 'seeds'} {seeds}: every other point was worse on "
                "average."
            )


def _outcomes(standing: TuningStanding) -> str:
    states = [run.state for run in standing.runs]
    done = sum(run.has_outcome for run in standing.runs)
    rest = [f"{states.count(s)} {s}" for s in ("diverged", "failed", "abandoned", "missing") if s in states]
    return f"{done} of {len(states)} declared runs have an outcome" + (f" ({', '.join(rest)})" if rest else "")


def _headline(standing: TuningStanding) -> str:
    if standing.findings:
        return "Contradiction: nothing is chosen."
    if not standing.complete:
        return "Nothing is chosen yet."
    chosen = [(spell_options(r.choice.options), r.arm) for r in standing.arms if r.choice]
    none = [r.arm for r in standing.arms if r.choice is None]
    parts = [
        f"{point} for {listed(arm for other, arm in chosen if other == point)}"
        for point in dict.fromkeys(point for point, _ in chosen)
    ]
    parts += [f"nothing for {listed(none)}"] if none else []
    return f"Chosen: {'; '.join(parts)}."


def _quote(standing: TuningStanding) -> str:
    if not standing.complete:
        return f"Partial, {_outcomes(standing)}: nothing is chosen."
    parts = [
        f"{r.arm} {spell_options(r.choice.options)} ({plain(r.choice.mean, LOSS_DIGITS)})"
        if r.choice and r.choice.mean is not None
        else f"{r.arm} nothing ({r.why_none})"
        for r in standing.arms
    ]
    return f"Lowest mean final validation loss [nats/token] over {_seeds(standing)}: {listed(parts)}."


def _seeds(standing: TuningStanding) -> str:
    return count(len(standing.study.seeds), "seed")


def _next(standing: TuningStanding) -> str:
    study = standing.study
    if standing.findings:
        return "find out which of the two is right; the ledger's lines carry their own hash."
    if not standing.complete:
        return f"`muon study run {study.slug}` runs what is missing."
    steps = []
    if any(result.edges for result in standing.arms):
        steps.append("extend the grid in study.yaml beyond the edge and run it again (what is there is not run anew)")
    held = standing.in_params
    if unused := [arm for arm, state in held.items() if state == "other"]:
        steps.append(f"`muon study run {study.slug}` writes the choice for {listed(unused)} into params.yaml")
    elif "uncommitted" in held.values():
        steps.append("commit params.yaml, which declares the choice")
    return f"{'; '.join(steps)}." if steps else "nothing to do, the choice is in the last commit's params.yaml."


def _status(standing: TuningStanding) -> str:
    source = "the ledger" if standing.source == "ledger" else f"experiments/{standing.study.slug}/results.csv"
    spent = duration(standing.total_seconds)
    if standing.study.price_usd_per_gpu_hour > 0:
        spent += f", {money(standing.total_cost_usd)}"
    return f"{_outcomes(standing)}; {spent} of computing; from {source}. A tuning study has no verdict."


def _asked(standing: TuningStanding) -> str:
    study, settings = standing.study, standing.settings
    grid = "; ".join(f"{option} in {', '.join(map(str, values))}" for option, values in study.grid.items())
    points = math.prod(len(values) for values in study.grid.values())
    return (
        f"Every arm ({listed(study.arms)}) was given the same {count(points, 'grid point')} ({grid}) and the same "
        f"{_seeds(standing)} ({', '.join(map(str, study.seeds))}), which no comparison on {study.workload} may use: "
        f"{count(points * len(study.seeds), 'run')} an arm, {settings.steps} steps each. Chosen is the point with the "
        f"lowest mean final validation loss over the seeds; a run that diverged counts with "
        f"{plain(settings.diverged_loss, LOSS_DIGITS)}, the loss of uniform guessing."
    )


def _alternative(standing: TuningStanding) -> str:
    chosen = "; ".join(f"{r.arm} {spell_options(r.choice.options)}" for r in standing.arms if r.choice)
    x = "the learning rate" if swept(standing) == "lr" else swept(standing)
    return f"Final validation loss by {x}, a panel an arm. Chosen: {chosen or 'nothing yet'}."


# Blocks


def _figure(drawn: bool) -> tuple[Block, ...]:
    text = (
        "A line is the mean over the seeds, a dash one run, the ring the chosen point; a cross at the upper edge is a "
        "run that diverged, a triangle there one beyond the scale."
    )
    return (Pictures((FIGURE,)), Paragraph(text)) if drawn else ()


def _by_arm(standing: TuningStanding) -> tuple[Block, ...]:
    """Means in one table where one option was tuned; of several, each arm's choice."""
    if len(standing.study.grid) > 1:
        return (_choices(standing),)
    ((option, values),) = standing.study.grid.items()
    columns: tuple[tuple[str, Kind], ...] = (("arm", "arm"), *((f"{option} {value}", "number") for value in values))
    rows = [(r.arm, *(_mean(standing, point) for point in r.points)) for r in standing.arms]
    strong = {(y, 1 + r.chosen) for y, r in enumerate(standing.arms) if r.chosen is not None}
    note = "Mean final validation loss over the seeds [nats/token]; the chosen one in bold."
    return (Table(columns, tuple(rows), strong=frozenset(strong)), Paragraph(note))


def _choices(standing: TuningStanding) -> Table:
    options = list(standing.study.grid)
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"), *((option, "number") for option in options), ("mean loss [nats/token]", "number"),
        ("runs", "number"),
    )  # fmt: skip
    rows = []
    for r in standing.arms:
        point = r.choice
        values = [str(point.options[option]) for option in options] if point else [ABSENT] * len(options)
        rows.append((r.arm, *values, _mean(standing, point) if point else ABSENT, str(r.runs)))
    strong = {(y, 1 + x) for y, r in enumerate(standing.arms) if r.choice for x in range(len(options))}
    return Table(columns, tuple(rows), strong=frozenset(strong))


def _mean(standing: TuningStanding, point: PointResult) -> str:
    if point.mean is None:
        return ABSENT
    diverged = f" ({len(point.diverged)} diverged)" if point.diverged else ""
    return plain(point.mean, LOSS_DIGITS) + diverged


def _every_point(standing: TuningStanding) -> tuple[Block, ...]:
    study = standing.study
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"), *((option, "number") for option in study.grid), ("mean", "number"),
        *((f"seed {seed}", "number") for seed in study.seeds),
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    strong: set[tuple[int, int]] = set()
    for result in standing.arms:
        for index, point in enumerate(result.points):
            if index == result.chosen:
                strong |= {(len(rows), x) for x in range(1, 2 + len(study.grid))}
            losses = [_loss(standing, result.arm, point, i) for i in range(len(study.seeds))]
            rows.append((result.arm, *map(str, point.options.values()), _mean(standing, point), *losses))
    table = Table(columns, tuple(rows), collapsed=len(rows) > MOST_ROWS, strong=frozenset(strong))
    return (table, Paragraph("Final validation loss [nats/token]; the chosen points in bold."))


def _loss(standing: TuningStanding, arm: str, point: PointResult, index: int) -> str:
    seed = standing.study.seeds[index]
    if seed in point.diverged:
        return "diverged"
    loss = point.losses[index]
    if loss is not None:
        return plain(loss, LOSS_DIGITS)
    return next(r.state for r in standing.runs if (r.arm, r.seed, r.options) == (arm, seed, point.options))


def _without_loss(standing: TuningStanding) -> tuple[Block, ...]:
    lacking = [run for run in standing.runs if run.state != "completed"]
    if not lacking:
        return ()
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"), ("point", "text"), ("seed", "number"), ("status", "text"), ("attempts", "number"),
        ("error", "prose"),
    )  # fmt: skip
    rows = tuple(
        (r.arm, spell_options(r.options), str(r.seed), r.state, str(r.attempts), one_line(r.error or ""))
        for r in lacking
    )
    return (Table(columns, rows, collapsed=len(rows) > MOST_ROWS),)


def _uses(standing: TuningStanding) -> Iterator[str]:
    where = f"workloads.{standing.study.workload}.tuned"
    said = {
        "committed": f"`{where}` of the last commit's params.yaml holds what was chosen for",
        "uncommitted": f"`{where}` of params.yaml holds, not yet committed, what was chosen for",
        "other": f"`{where}` of params.yaml holds other values than were chosen for",
    }
    for state, words in said.items():
        if arms := [arm for arm, its in standing.in_params.items() if its == state]:
            yield f"{words} {listed(arms)}."
    if standing.used_by:
        yield f"Named as their tuning study by {listed(standing.used_by)}."
    else:
        yield f"No comparison names it; `tuning: {standing.study.slug}` in one on {standing.study.workload} does."


def _cost(standing: TuningStanding) -> Table:
    price = standing.study.price_usd_per_gpu_hour
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"), ("runs", "number"), ("attempts", "number"), ("computing", "number"),
        *((("cost", "number"),) if price > 0 else ()),
    )  # fmt: skip

    def row(name: str, runs: list[GridRun], seconds: float, usd: float) -> tuple[str, ...]:
        own = (name, str(sum(r.has_outcome for r in runs)), str(sum(r.attempts for r in runs)), duration(seconds))
        return (*own, money(usd)) if price > 0 else own

    rows = []
    for result in standing.arms:
        own = [run for run in standing.runs if run.arm == result.arm]
        rows.append(row(result.arm, own, sum(r.wall_seconds for r in own), sum(r.cost_usd for r in own)))
    rows.append(row("in all", standing.runs, standing.total_seconds, standing.total_cost_usd))
    return Table(columns, tuple(rows), strong=frozenset((len(rows) - 1, x) for x in range(len(columns))))


def _limits(standing: TuningStanding) -> Iterator[str]:
    study = standing.study
    yield (
        "The lowest of several noisy means lies below what its point would give on new seeds: a mean in bold is no "
        "estimate of what a comparison will find."
    )
    if len(study.seeds) == 1:
        yield "One seed: how far chance moves these losses was not measured, and neighbours may change places."
    else:
        yield (
            f"Few seeds: with {len(study.seeds)} the spread is itself known roughly; a choice that is not called a "
            "coin toss here is not established."
        )
    yield "The grid bounds how well each arm could do; the same grid need not be equally fine for every arm."
    yield f"One workload: {study.workload}. What is best there need not be best on another model, data or run length."


def _provenance(standing: TuningStanding) -> Iterator[Block]:
    if standing.registration is None:
        yield Paragraph("No registration of it is kept here.")
    else:
        when = moment(standing.registered_at or "")
        yield Paragraph(f"Registered {when}, hash `{standing.registration}`.")
    if standing.made_on:
        yield Bullets(tuple(map(one_line, standing.made_on)), "The runs that count were made on")
    if standing.lost_seconds:
        spent = duration(standing.lost_seconds)
        paid = f", {money(standing.lost_cost_usd)}" if standing.study.price_usd_per_gpu_hour > 0 else ""
        yield Paragraph(f"Attempts that became no outcome took {spent}{paid} of the computing.")
    if standing.notes:
        yield Bullets(tuple(map(one_line, standing.notes)), "Noted")
