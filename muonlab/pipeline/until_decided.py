"""Run a sequential study to a decision: look, add the seeds that are worth their price, run, look again.

    look     `muon study run`, and what `muon next` says of it
    go on    while a challenger is INCONCLUSIVE and the advice asks for further seeds that the budget and --max-cost pay
    stop     a verdict for every challenger, or all pairs of the plan (0); over budget or --max-cost (4); cells that
             failed (3); evidence that contradicts itself (5)

The rule may be looked at after every pair (docs/protocol.md), so that a loop of looks keeps its error rate as long as
nothing but the rule says when to stop: whether to go on and with which seeds is read from the advice, and from nothing
else. The seeds are added to study.yaml before they are run. They are no part of a sequential plan's declaration, so
that the registration stays; and interrupted, the same line goes on with the seeds that it had added.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from muonlab.pipeline.advice import Advice, advice_on
from muonlab.pipeline.answer import Facts
from muonlab.pipeline.declare import declared_params
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_study
from muonlab.pipeline.running import ended_attempts
from muonlab.pipeline.studies import StudyRun, run_answer
from muonlab.pipeline.study_run import RunOutcome
from muonlab.registry.errors import OverBudgetError, UsageError
from muonlab.registry.files import write_atomically
from muonlab.registry.study import Study
from muonlab.reporting.wording import count, listed, money

Run = Callable[[float | None], RunOutcome]
"""Runs the study as it is declared now, for at most so many dollars."""


class Look(Facts):
    """One look at the evidence, and the seeds that were added after it."""

    pairs: int
    """Of the challenger that has the fewest."""
    verdicts: dict[str, str]
    """Challenger -> verdict."""
    seeds_added: list[int]
    """None after the last look."""
    cost_usd: float
    """Of the attempts that were made for this look."""


class DecidedRun(StudyRun):
    """How a run until a decision ended; `trained` and `seconds` are those of all its looks."""

    looks: list[Look]
    stopped: list[str]
    """Why it went no further, in sentences."""


class Step(NamedTuple):
    """What follows a look: the seeds to add, none to stop."""

    seeds: list[int]
    why: list[str]
    exit_code: int


class Loop(NamedTuple):
    """How the loop went."""

    outcomes: list[RunOutcome]
    looks: list[Look]
    last: Step


def run_until_decided(
    layout: Layout, slug: str, run: Run, *, say: Callable[[str], None], max_cost_usd: float | None
) -> Loop:
    """Run the study with `run`, adding seeds to its declaration for as long as the advice asks for them.

    `max_cost_usd` is a limit of the whole loop. Raises UsageError for a study that no further seed may decide.
    """
    refuse_undecidable(load_study(layout, slug))
    before = {record.attempt_id for record in ended_attempts(layout)}

    def spent() -> float:
        made = (r for r in ended_attempts(layout) if r.study == slug and r.attempt_id not in before)
        return math.fsum(record.cost_usd for record in made)

    return loop(
        run,
        advise=lambda outcome: advice_on(outcome.standing, declared_params(layout)),
        add=lambda seeds: add_seeds(layout.study(slug) / "study.yaml", seeds),
        spent=spent,
        say=say,
        max_cost_usd=max_cost_usd,
    )


def once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Says a sentence the first time only: what every run of a loop would say again."""
    said: set[str] = set()

    def tell(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    return tell


def loop(
    run: Run,
    *,
    advise: Callable[[RunOutcome], Advice],
    add: Callable[[list[int]], None],
    spent: Callable[[], float],
    say: Callable[[str], None],
    max_cost_usd: float | None,
) -> Loop:
    """Look, add, look again. `spent`: dollars since the loop began."""
    outcomes: list[RunOutcome] = []
    looks: list[Look] = []
    while True:
        paid = spent()
        outcome = run(None if max_cost_usd is None else max_cost_usd - paid)
        outcomes.append(outcome)
        if outcome.over_budget is not None:
            step = Step([], [outcome.over_budget], OverBudgetError.exit_code)
        else:
            step = next_step(advise(outcome), None if max_cost_usd is None else max_cost_usd - spent())
        looks.append(look_at(outcome, step, spent() - paid))
        for sentence in step.why:
            say(f"muon: {sentence}")
        if not step.seeds:
            return Loop(outcomes, looks, step)
        add(step.seeds)
        slug = outcome.standing.snapshot.study.slug
        say(f"muon: experiments/{slug}/study.yaml: {_seeds(step.seeds)} added; the registration stays.")


def next_step(advice: Advice, left_usd: float | None) -> Step:
    """What follows from the advice, with so much left of --max-cost (None: no limit)."""
    if advice.stop or advice.exit_code != 0:
        return Step([], advice.why, advice.exit_code)
    if left_usd is not None and advice.cost_usd is not None and advice.cost_usd > left_usd:
        stop = f"Stop: {money(advice.cost_usd)} are more than the {money(max(0.0, left_usd))} left of --max-cost."
        return Step([], [*advice.why, stop], OverBudgetError.exit_code)
    return Step(advice.seeds, advice.why, 0)


def look_at(outcome: RunOutcome, step: Step, cost_usd: float) -> Look:
    """What is kept of a look."""
    decided = outcome.standing.decided
    return Look(
        pairs=min((c.estimates.n for c in decided), default=0),
        verdicts={c.arm: c.decision.verdict.value for c in decided if c.decision is not None},
        seeds_added=step.seeds,
        cost_usd=cost_usd,
    )


def refuse_undecidable(study: Study) -> None:
    """Raise UsageError for a study whose plan adds no seeds."""
    where = f"experiments/{study.slug}: --until-decided adds the next seeds of a sequential plan, and"
    if study.twin_of is not None:
        raise UsageError(
            f"{where} this is a rehearsal of {study.twin_of}, which decides nothing; leave the option out."
        )
    if study.provenance == "reported":
        raise UsageError(f"{where} these results were reported by others; leave the option out.")
    if study.kind == "tuning":
        raise UsageError(f"{where} this is a tuning study, which chooses and decides nothing; leave the option out.")
    if study.decision is None or study.decision.plan != "sequential":
        raise UsageError(f"{where} this plan is fixed at {count(len(study.seeds), 'seed')}; leave the option out.")


def add_seeds(path: Path, seeds: list[int]) -> None:
    """Write further seeds behind the last one of a study.yaml and leave every other character as it is.

    Raises UsageError where the seeds do not stand there as a list of their own.
    """
    from ruamel.yaml import YAML

    text = path.read_text(encoding="utf-8")
    held: Any = YAML().load(text)["study"]["seeds"]
    line, column = held.lc.item(len(held) - 1)
    lines = text.splitlines(keepends=True)
    last = lines[line]
    if held.fa.flow_style():
        end = re.compile(r"[,\]\s]|$").search(last, column)
        at = len(last) if end is None else end.start()
        lines[line] = last[:at] + "".join(f", {seed}" for seed in seeds) + last[at:]
    else:
        lines.insert(line + 1, "".join(f"{last[:column]}{seed}\n" for seed in seeds))
    longer, expected = "".join(lines), [*map(int, held), *seeds]
    try:
        added = yaml.safe_load(longer)["study"]["seeds"] == expected
    except yaml.YAMLError:
        added = False
    if not added:
        where = f"experiments/{path.parent.name}/study.yaml"
        raise UsageError(f"{where}: further seeds could not be added to its list; write seeds: {expected} there.")
    write_atomically(path, longer)


def _seeds(seeds: list[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)} {'is' if len(seeds) == 1 else 'are'}"


def decided_answer(layout: Layout, slug: str, its: Loop, *, fail_on_no_go: bool) -> DecidedRun:
    """The answer of `muon study run --until-decided`."""
    trained = sum(outcome.trained for outcome in its.outcomes)
    last = its.outcomes[-1]
    whole = last._replace(
        trained=trained,
        restored=max(0, len(last.standing.cells) - trained - len(last.failed)),
        seconds=math.fsum(outcome.seconds for outcome in its.outcomes),
    )
    answer = run_answer(layout, slug, whole, fail_on_no_go=fail_on_no_go)
    code = max(its.last.exit_code, answer.exit_code)  # the higher, the graver
    return DecidedRun(**{**answer.model_dump(), "exit_code": code}, looks=its.looks, stopped=its.last.why)
