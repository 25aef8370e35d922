"""Whether a study as a whole has passed what it declared under `passes`: passed, failed, or open as yet.

    x_i = 100 (baseline_i - challenger_i) / baseline_i      [%; positive = challenger better; pairs: `stats/sample.py`]
    finished       every declared run ended with a loss
    within W%      for every challenger, bound(x) >= -W     [bound: one-sided, `stats/bound.py`]
    go             some challenger is GO
    control_worse  for some challenger k that is GO and every control c, bound(loss_c,i - loss_k,i) >= 0

Each of them holds, has failed (the contrary is shown) or is open; all must hold, and one that failed fails the study.
The levels, with K challengers and U undeclared arms that may have been picked in their place (docs/adr/0006):

- within holds wrongly only if a challenger that is outside passes its own test, so that each is tested at alpha, and no
  correction for K is needed (intersection-union; Berger 1982, doi:10.2307/1267823); a pick raises the number of arms
  that could err to U + 1, hence alpha / (U + 1). It failed where one challenger is shown to be outside, at alpha / K.
- control_worse holds where one of K is better than all controls: alpha / (K + U) for each challenger, and no correction
  for the controls (intersection-union). It failed where each GO challenger is shown to be worse than some control.

What is shown is shown by the test of the study's plan: the t bound of a fixed plan is exact in its one look, at the
number of pairs that was declared; a sequential plan is looked at after every seed, so that its bound is that of the
e-process, and t decides with its last pair only. Each criterion holds wrongly with chance alpha at most, and passes the
study only where all the others hold.

A diverged run counts with the diverged loss, and a challenger with one is never shown to be within: a mean of what
converged would be flattering, and where both runs of a seed diverged the difference is 0. A study that is incomplete,
INVALID, or reported by others has not passed, whatever its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from muonlab.registry.settings import Closed
from muonlab.registry.study import Study
from muonlab.registry.verdict import Verdict
from muonlab.stats.bound import lower_bound
from muonlab.stats.decision import Decision
from muonlab.stats.evidence import Floats, first_attainable_n
from muonlab.stats.kernel import decides_by_t
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample, Pairs, pair

if TYPE_CHECKING:
    from muonlab.reporting.standing import CellStanding

State = Literal["holds", "failed", "open"]
ENDED = ("completed", "diverged")


class Passed(Closed):
    """Whether a study has passed what it declared under `passes`."""

    verdict: bool | None
    """True: passed; False: failed; None: open."""
    reasons: list[str]
    """A sentence for each thing that was asked, and for what else keeps the study from passing."""

    @property
    def word(self) -> Literal["passed", "failed", "open"]:
        """The verdict in a word."""
        if self.verdict is None:
            return "open"
        return "passed" if self.verdict else "failed"

    @property
    def sentence(self) -> str:
        """The outcome and its reasons in one sentence."""
        return f"Pass criterion of the study: {self.word} ({'; '.join(self.reasons)})."


class _Criterion(NamedTuple):
    state: State
    reason: str


def judge_passes(
    study: Study,
    rule: Rule,
    samples: Mapping[str, PairedSample],
    decisions: Mapping[str, Decision],
    cells: Sequence[CellStanding],
) -> Passed | None:
    """Whether the study has passed, None where it declares no criterion.

    samples: every arm but the baseline; decisions: every challenger; cells: the declared grid.
    """
    asked = study.passes
    if asked is None:
        return None
    pairs = {arm: pair(sample, rule) for arm, sample in samples.items()}
    found: list[_Criterion] = []
    if asked.finished:
        found.append(_finished(cells))
    if asked.within is not None:
        found.append(_within(study, float(asked.within.rstrip("% ")), rule, pairs, _undeclared(study, decisions)))
    if asked.go:
        found.append(_go(decisions))
    if asked.control_worse:
        found.append(_control_worse(study, rule, pairs, decisions))
    reasons = [criterion.reason for criterion in found]
    states = [criterion.state for criterion in found]
    if nothing := _shows_nothing(study, decisions):
        return Passed(verdict=None, reasons=[nothing, *reasons])
    if lacking := _lacks(decisions, cells):
        return Passed(verdict=False if "failed" in states else None, reasons=[lacking, *reasons])
    return Passed(verdict={"failed": False, "open": None, "holds": True}[_all(states)], reasons=reasons)


def _shows_nothing(study: Study, decisions: Mapping[str, Decision]) -> str:
    """Why the numbers show nothing, neither that the study has passed nor that it has failed."""
    if any(decision.verdict is Verdict.INVALID for decision in decisions.values()):
        return "the study is INVALID"
    return "its runs are reported by others" if study.provenance == "reported" else ""


def _lacks(decisions: Mapping[str, Decision], cells: Sequence[CellStanding]) -> str:
    """What the study lacks before it can have passed; it may have failed before."""
    lacking = sum(cell.state not in ENDED for cell in cells)
    if lacking:
        return f"the study is not complete, {lacking} of {len(cells)} declared runs have no outcome"
    incomplete = any(decision.verdict is Verdict.INCOMPLETE for decision in decisions.values())
    return "the study is INCOMPLETE" if incomplete else ""


def _undeclared(study: Study, decisions: Mapping[str, Decision]) -> int:
    """How many arms count in the family beside the challengers."""
    return max((decision.family_size for decision in decisions.values()), default=0) - len(study.challengers)


def _finished(cells: Sequence[CellStanding]) -> _Criterion:
    states = [cell.state for cell in cells]
    if diverged := states.count("diverged"):
        return _Criterion("failed", f"finished: failed, {diverged} of {len(cells)} declared runs diverged")
    if any(state not in ENDED for state in states):
        return _Criterion("open", "finished: open, until every declared run has ended")
    return _Criterion("holds", f"finished: holds, all {len(cells)} declared runs ended with a loss")


def _within(study: Study, width: float, rule: Rule, pairs: Mapping[str, Pairs], undeclared: int) -> _Criterion:
    """Whether every challenger is shown to be at most `width` percent worse than the baseline."""
    level = rule.alpha / (undeclared + 1)
    outside_level = rule.alpha / (len(study.challengers) + undeclared)
    states: list[State] = []
    clauses = []
    for arm in study.challengers:
        its = pairs[arm]
        if its.invalid or its.incomplete:
            states.append("open")
            clauses.append(f"{arm} has no complete set of pairs")
            continue
        worst, best = lower_bound(its.rel_pct, level, rule), lower_bound(-its.rel_pct, outside_level, rule)
        mean = f"{_worse(float(its.rel_pct.mean()))} on average"
        if best is not None and best >= width:
            states.append("failed")
            clauses.append(
                f"{arm} is at best {_worse(-best)} than {study.baseline} ({mean}, {_at(outside_level, its)})"
            )
        elif worst is None:
            states.append("open")
            clauses.append(f"{arm} has no bound at {_pairs(its.n)}, {_first_look(rule, level)} ({mean})")
        elif worst < -width:
            states.append("open")
            clauses.append(f"{arm} may be {_worse(worst)} than {study.baseline} ({mean}, {_at(level, its)})")
        elif its.challenger_diverged.any():
            states.append("open")
            clauses.append(f"{arm} has a diverged run, so that nothing is shown of its mean")
        else:
            states.append("holds")
            clauses.append(f"{arm} is at worst {_worse(worst)} than {study.baseline} ({mean}, {_at(level, its)})")
    state = _all(states)
    return _Criterion(state, f"within {width:g}%: {state}, {', '.join(clauses)}")


def _go(decisions: Mapping[str, Decision]) -> _Criterion:
    adopted = [arm for arm, decision in decisions.items() if decision.verdict is Verdict.GO]
    if adopted:
        return _Criterion("holds", f"go: holds, {', '.join(adopted)} GO")
    listed = ", ".join(f"{arm} {decision.verdict.value}" for arm, decision in decisions.items())
    decided = all(decision.verdict in (Verdict.NO_GO, Verdict.EQUIVALENT) for decision in decisions.values())
    return _Criterion("failed" if decided else "open", f"go: {'failed' if decided else 'open'}, {listed}")


def _control_worse(
    study: Study, rule: Rule, pairs: Mapping[str, Pairs], decisions: Mapping[str, Decision]
) -> _Criterion:
    """Whether a challenger that is GO is shown to be better than every control."""
    adopted = [arm for arm, decision in decisions.items() if decision.verdict is Verdict.GO]
    if not adopted:
        state: State = "failed" if _go(decisions).state == "failed" else "open"
        return _Criterion(state, f"control_worse: {state}, no challenger is GO")
    level = rule.alpha / (len(study.challengers) + _undeclared(study, decisions))
    states: list[State] = []
    clauses = []
    for arm in adopted:
        against = []
        for control in study.control:
            one, clause = _better(arm, control, rule, pairs, level, rule.alpha / len(study.control))
            against.append(one)
            clauses.append(clause)
        states.append(_all(against))
    state = "holds" if "holds" in states else "failed" if set(states) == {"failed"} else "open"
    return _Criterion(state, f"control_worse: {state}, {', '.join(clauses)}")


def _better(
    arm: str, control: str, rule: Rule, pairs: Mapping[str, Pairs], level: float, worse_level: float
) -> tuple[State, str]:
    """Whether one arm is shown to be better than another on the seeds that they share, or to be worse."""
    ours, theirs = pairs[arm], pairs[control]
    if theirs.invalid or theirs.incomplete:
        return "open", f"{control} has no complete set of pairs"
    shared = sorted(set(ours.seeds) & set(theirs.seeds))
    d = _losses(theirs, shared) - _losses(ours, shared)
    if not shared:
        return "open", f"{arm} and {control} share no seed"
    better, worse = lower_bound(d, level, rule), lower_bound(-d, worse_level, rule)
    mean = f"by {abs(d.mean()):.3g} nats/token on average, {_pairs(d.size)}"
    if better is not None and better >= 0:
        return "holds", f"{arm} is better than {control} {mean}, level {level:.3g}"
    if worse is not None and worse >= 0:
        return "failed", f"{arm} is worse than {control} {mean}, level {worse_level:.3g}"
    return "open", f"{arm} is not shown to be better than {control} ({'better' if d.mean() > 0 else 'worse'} {mean})"


def _losses(pairs: Pairs, seeds: Sequence[int]) -> Floats:
    """The arm's own losses [len(seeds)] on these seeds, a diverged run with the diverged loss."""
    by_seed = dict(zip(pairs.seeds, pairs.challenger, strict=True))
    return np.array([by_seed[seed] for seed in seeds])


def _all(states: Sequence[State]) -> State:
    """The state of what holds only where all of these do."""
    if "failed" in states:
        return "failed"
    return "open" if "open" in states else "holds"


def _worse(percent: float) -> str:
    """A relative difference in percent, positive for better, in words."""
    return f"{abs(percent):.3g}% {'worse' if percent < 0 else 'better'}"


def _at(level: float, pairs: Pairs) -> str:
    return f"one-sided level {level:.3g}, {_pairs(pairs.n)}"


def _pairs(n: int) -> str:
    return "1 pair" if n == 1 else f"{n} pairs"


def _first_look(rule: Rule, level: float) -> str:
    if decides_by_t(rule):
        return f"the plan looks once, at {rule.fixed_n}"
    first = max(rule.n_min, first_attainable_n(level, rule.g))
    return f"a plan that may look after every seed has one from {first if rule.amended else min(first, rule.n_max)} on"
