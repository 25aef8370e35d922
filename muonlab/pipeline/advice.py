"""The next pairs worth running: which seeds, why, their price and seconds, and the chance that they decide.

    seeds = the next k of the plan, k the most that an INCONCLUSIVE challenger asks for (`muonlab.stats.predict`)
    price = all arms of the study on these seeds, at the mean of each arm's finished runs

A new seed is run by every arm: no verdict is latched, and an arm that lacks the seed would be INCOMPLETE. Adding the
next seeds is part of a sequential plan, so that the registration stays; raising the budget changes the declaration.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from muonlab.pipeline.answer import Answer, Facts
from muonlab.pipeline.collect import collect
from muonlab.pipeline.conclude import read_evaluations
from muonlab.pipeline.declare import declared_params
from muonlab.pipeline.layout import Layout
from muonlab.registry.errors import IntegrityError, OverBudgetError
from muonlab.registry.settings import Params
from muonlab.registry.verdict import Verdict
from muonlab.reporting.standing import Standing, exit_code, judge
from muonlab.reporting.wording import count, duration, expected, listed, money


class ArmAdvice(Facts):
    """One challenger: its verdict, and the pairs that an INCONCLUSIVE one asks for. USD, seconds of computing."""

    verdict: Verdict
    reasons: list[str]
    next_pairs: int | None
    """Further pairs it asks for; null where it asks for none."""
    decision_chance: float | None
    """Predictive chance that these pairs decide."""
    cost_usd: float | None
    """Of its own pairs alone: its runs and the baseline's."""
    seconds: float | None


class Advice(Answer):
    """What `muon next` says. Empty `seeds`: stop, and `why` says for what reason."""

    study: str
    stop: bool
    """Run nothing now."""
    why: list[str]
    """Sentences."""
    challengers: dict[str, ArmAdvice]
    seeds: list[int]
    """To be run by every arm; empty: none."""
    cost_usd: float | None
    """Of every arm on these seeds."""
    seconds: float | None
    """The same in seconds of computing."""
    budget_left_usd: float | None
    """None where the study has no price."""
    edit: str | None
    """The line of study.yaml to be changed first."""
    commands: list[str]
    """To be run then."""
    pairs_alone: list[str]
    """Commands that train the undecided challengers' pairs only, before anything is declared."""
    exit_code: int
    """0; 3 where runs are missing; 4 where the seeds are over the budget; 5 where the evidence contradicts itself."""

    def lines(self) -> Iterator[str]:
        """The advice for a reader."""
        for arm, its in self.challengers.items():
            yield f"{arm}: {its.verdict.value}"
        yield from self.why
        if self.stop and not self.commands:
            return
        if self.edit:
            yield f"In {self.edit}"
        yield from (f"    {command}" for command in self.commands)
        if self.pairs_alone:
            yield "Or first the undecided pairs alone, before that edit:"
            yield from (f"    {command}" for command in self.pairs_alone)


def advise(layout: Layout, slug: str) -> Advice:
    """Look at the evidence of a comparison again and say what to run next.

    Raises UsageError for a study that is not a comparison, or whose data or fingerprints are not prepared.
    """
    return advice_on(judge(collect(layout, slug), read_evaluations(layout, slug)), declared_params(layout))


def advice_on(standing: Standing, params: Params) -> Advice:
    """What to run next where a study stands so; `params` says which names DVC's lines need not repeat."""
    study = standing.snapshot.study
    priced = study.price_usd_per_gpu_hour > 0
    left = max(0.0, study.budget_usd - standing.total_cost_usd) if priced else None
    challengers = {}
    for c in standing.decided:
        assert c.decision is not None
        pairs = c.decision.next_pairs
        challengers[c.arm] = ArmAdvice(
            verdict=c.decision.verdict,
            reasons=list(c.decision.reasons),
            next_pairs=pairs,
            decision_chance=c.decision.decision_chance,
            cost_usd=c.decision.next_cost_usd,
            seconds=None if pairs is None else pairs * c.pair_seconds,
        )
    blank = Advice(
        study=study.slug, stop=True, why=[], challengers=challengers, seeds=[], cost_usd=None, seconds=None,
        budget_left_usd=left, edit=None, commands=[], pairs_alone=[], exit_code=exit_code(standing),
    )  # fmt: skip
    if blank.exit_code == IntegrityError.exit_code:
        return blank.model_copy(update={"why": _mend(challengers, Verdict.INVALID)})
    if blank.exit_code != 0:
        return blank.model_copy(update=_finish_first(standing, challengers))
    return blank.model_copy(update=_next_seeds(standing, params, challengers, left))


def _mend(challengers: dict[str, ArmAdvice], verdict: Verdict) -> list[str]:
    reasons = dict.fromkeys(r for its in challengers.values() if its.verdict is verdict for r in its.reasons)
    return ["Mend first, before any further run is paid for:", *(f"- {reason}" for reason in reasons)]


def _finish_first(standing: Standing, challengers: dict[str, ArmAdvice]) -> dict[str, object]:
    """The declared runs come before any further seed."""
    study = standing.snapshot.study
    lacking = [cell for cell in standing.cells if cell.state not in ("completed", "diverged")]
    if not lacking:
        return {"why": _mend(challengers, Verdict.INCOMPLETE)}
    seconds, usd = expected(standing, [cell.arm for cell in lacking])
    cells = ", ".join(f"{cell.arm}-{cell.seed} {cell.state}" for cell in lacking)
    failed = [f"- {cell.arm}-{cell.seed} failed: {cell.error}" for cell in lacking if cell.state == "failed"]
    why = [f"First the {count(len(lacking), 'declared run')} without an outcome: {cells}.", *failed]
    # Without a finished run there is nothing to expect a price from.
    known = {"cost_usd": usd, "seconds": seconds} if seconds > 0 else {}
    if known:
        why.append(f"They take about {duration(seconds)} of computing{_dollars(standing, usd)}.")
    seeds = sorted({cell.seed for cell in lacking})
    return {"stop": False, "why": why, "seeds": seeds, "commands": [f"muon study run {study.slug}"], **known}


def _next_seeds(
    standing: Standing, params: Params, challengers: dict[str, ArmAdvice], left: float | None
) -> dict[str, object]:
    study = standing.snapshot.study
    if study.twin_of is not None:
        stop = "Stop: a rehearsal decides nothing, and asks for no further pair"
        return {"why": [f"{stop}; `muon study plan {study.twin_of}` prices the study itself."]}
    undecided = {arm: its for arm, its in challengers.items() if its.verdict is Verdict.INCONCLUSIVE}
    if not undecided:
        return {"why": ["Stop: every challenger is decided, and no further pair is asked for."]}
    if study.provenance == "reported":
        return {"why": ["Stop: these results were reported by others; declare a study of provenance run to decide."]}
    asking = {arm: its.next_pairs for arm, its in undecided.items() if its.next_pairs is not None}
    if not asking:
        names = listed(undecided)
        return {
            "why": [
                f"Stop: the plan has ended with all its pairs and {names} undecided; keep {study.baseline}, which is "
                "not evidence of no effect."
            ]
        }
    more = max(asking.values())
    following = study.first_seed + len(study.seeds)
    seeds = list(range(following, following + more))
    seconds, usd = expected(standing, study.arms * more)
    why = []
    for arm, its in undecided.items():
        chance = its.decision_chance
        decides = "" if chance is None else f", which decide with a predictive chance of {chance:.0%}"
        if chance is None:
            decides = ", which make a first decision possible; one pair has no spread to predict from"
        why.append(f"{arm} asks for {count(its.next_pairs or 0, 'more pair')}{decides}.")
    why.append(
        f"Next: seeds {', '.join(map(str, seeds))} of all {len(study.arms)} arms, about {duration(seconds)} of "
        f"computing{_dollars(standing, usd)}."
    )
    found: dict[str, object] = {"cost_usd": usd, "seconds": seconds, "seeds": seeds}
    if left is not None and usd > left:
        affordable = int(left // (usd / more))
        pays = count(affordable, "seed") if affordable else "no further seed"
        stop = (
            f"Stop: {money(usd)} are more than the {money(left)} left of the budget of {money(study.budget_usd)}, "
            f"which pay for {pays}; raising budget_usd changes the declaration, so that the plan counts as amended."
        )
        return {**found, "why": [*why, stop], "exit_code": OverBudgetError.exit_code}
    return {
        **found,
        "stop": False,
        "why": why,
        "edit": f"experiments/{study.slug}/study.yaml: seeds: {[*study.seeds, *seeds]}   (the registration stays)",
        "commands": [f"muon study run {study.slug}"],
        "pairs_alone": _by_queue(params, standing, list(asking), seeds),
    }


def _by_queue(params: Params, standing: Standing, arms: list[str], seeds: list[int]) -> list[str]:
    """DVC's lines for these arms and the baseline on these seeds, recorded in the study's name."""
    study = standing.snapshot.study
    chosen = {
        **({"study": study.slug} if params.study != study.slug else {}),
        **({"workload": study.workload} if params.workload != study.workload else {}),
        "optimizer": ",".join([study.baseline, *arms]),
        "seed": f"range({seeds[0]},{seeds[-1] + 1})" if len(seeds) > 1 else str(seeds[0]),
    }
    settings = " ".join(f"-S {shlex.quote(f'{key}={value}')}" for key, value in chosen.items())
    return [f"dvc exp run --queue {settings}", "dvc queue start"]


def _dollars(standing: Standing, usd: float) -> str:
    return f", {money(usd)}" if standing.snapshot.study.price_usd_per_gpu_hour > 0 else ""
