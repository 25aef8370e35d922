"""Every sentence of a report that carries a number, made from the objects that hold the number.

Rules of the wording: the verdict first; a difference that is not established is never called no difference; a
percentage says of what; a broken guardrail stands beside the verdict; what is partial, INVALID or INCOMPLETE
says so before anything else. Differences are baseline - challenger in nats/token: positive is better.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from muonlab.registry.settings import PretrainedSettings
from muonlab.registry.study import ReportedWorkload
from muonlab.registry.verdict import Verdict
from muonlab.reporting.blocks import one_line
from muonlab.reporting.selected import selection_notes
from muonlab.reporting.standing import ArmComparison, CellStanding, Standing
from muonlab.stats.decision import Decision
from muonlab.stats.predict import DECISION_CHANCE

ABSENT = "–"
"""Stands where a number does not exist; why it does not is said beside it."""

DETAILED_CLAUSES = 3
"""With more challengers the quotable sentence names them by verdict, and the table holds each one's effect."""

MOST_TITLED = 6
"""A title names at most as many arms of one verdict."""

Finding = Literal[
    "invalid", "incomplete", "go", "ruled_out", "guardrail", "unstable", "equivalent", "open", "ended", "reported"
]
ORDER: tuple[Finding, ...] = (
    "invalid",
    "incomplete",
    "go",
    "ruled_out",
    "guardrail",
    "unstable",
    "equivalent",
    "open",
    "ended",
    "reported",
)
ARCHIVED: tuple[Finding, ...] = ("ruled_out", "guardrail", "unstable", "equivalent")
UNDECIDED: tuple[Finding, ...] = ("open", "ended", "reported")


# Numbers


def plain(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, without an exponent where that stays short."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -6 < exponent < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def signed(value: float, scale: float) -> str:
    """A difference with its sign, to two or three significant digits of `scale` (its interval's half width)."""
    if scale == 0:
        return f"{value:+g}"
    decimals = round(2 - math.log10(scale))
    if not -4 <= decimals <= 9:
        return f"{value:+.2e}"
    text = f"{value:+,.{max(0, decimals)}f}"
    return text if float(text.replace(",", "")) else text[1:]


def half_width(interval: tuple[float, float] | None, value: float) -> float:
    """The scale at which an estimate is worth printing: its uncertainty, or itself where there is none."""
    return (interval[1] - interval[0]) / 2 if interval else abs(value)


def bracket(interval: tuple[float, float], unit: str = "") -> str:
    """An interval as `[-0.0267, -0.0012]`, both ends to the same digit."""
    scale = half_width(interval, 0.0)
    return f"[{signed(interval[0], scale)}{unit}, {signed(interval[1], scale)}{unit}]"


def percent_of(fraction: float) -> str:
    """A fraction as a percentage with a sign, to two decimals, or to two digits where these would be 0."""
    percent = 100 * fraction
    if percent == 0 or abs(percent) >= 0.01:
        return f"{percent:+,.2f}%" if percent else "0%"
    return f"{signed(percent, abs(percent))}%"


def money(usd: float) -> str:
    """An amount in USD; what is under a cent shows its first digits."""
    return f"${usd:,.2f}" if usd == 0 or usd >= 0.01 else f"${usd:.2g}"


def duration(seconds: float) -> str:
    """A time span in the unit people would use for it."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"


def moment(iso: str) -> str:
    """A UTC time stamp as people read it, to the minute; another spelling as it is."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d(\.\d+)?)?(Z|\+00:00)", iso)
    return f"{match[1]} {match[2]} UTC" if match else iso


def count(number: int, noun: str) -> str:
    """`1 pair`, `5 pairs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Iterable[object]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = [str(name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"


def loss_digits(standing: Standing, fewest: int) -> int:
    """Significant digits at which the losses of a pair can be told apart where they differ; 12 at most."""
    losses = [pair.baseline for c in standing.comparisons for pair in c.differences]
    apart = [abs(pair.difference) for c in standing.comparisons for pair in c.differences if pair.difference]
    if not losses or not apart or not max(losses) > 0:
        return fewest
    typical = sorted(apart)[len(apart) // 2]
    return min(12, max(fewest, math.floor(math.log10(max(losses))) - math.floor(math.log10(typical)) + 2))


def price(standing: Standing, usd: float, seconds: float) -> str:
    """What something costs: dollars where the study has a price, and time in any case."""
    time = f"about {duration(seconds)} of computing"
    return f"{money(usd)}, {time}" if standing.snapshot.study.price_usd_per_gpu_hour > 0 else time


# Parts of sentences


def _declared_size(standing: Standing) -> str:
    study = standing.snapshot.study
    assert study.decision is not None
    declared = study.decision.min_effect
    return f"{declared} of its loss" if isinstance(declared, str) else f"{plain(declared)} nats/token"


def margin_text(standing: Standing) -> str:
    """The smallest effect worth having as it was declared, and in nats/token."""
    study = standing.snapshot.study
    assert study.decision is not None
    declared = study.decision.min_effect
    if not isinstance(declared, str):
        return f"{plain(declared)} nats/token"
    absolute = "" if standing.margin is None else f" ({plain(standing.margin)} nats/token)"
    return f"{declared} of {study.baseline}'s mean loss{absolute}"


def effect_text(comparison: ArmComparison) -> str:
    """The estimated effect with its interval; positive is better."""
    e = comparison.estimates
    if e.mean_diff is None:
        return f"no effect can be estimated: {e.undefined['mean_diff']}"
    size = f"effect {signed(e.mean_diff, half_width(e.ci95, e.mean_diff))} nats/token"
    return f"{size}, 95% interval {bracket(e.ci95)}" if e.ci95 else f"{size}, no interval: {e.undefined['ci95']}"


def worst_pair(comparison: ArmComparison) -> str:
    """The seed on which a challenger did worst against the baseline; it needs a pair."""
    worst = min(comparison.differences, key=lambda pair: pair.difference)
    diverged = ", where it diverged" if worst.seed in comparison.diverged else ""
    scale = half_width(comparison.estimates.ci95, worst.difference)
    return (
        f"its worst seed is {worst.seed}{diverged}: {signed(worst.difference, scale)} nats/token against the baseline, "
        f"of {count(len(comparison.differences), 'pair')}"
    )


def broken_guardrails(standing: Standing, comparison: ArmComparison) -> list[str]:
    """The guardrails that this arm broke, each with its limit."""
    e, declared = comparison.estimates, standing.snapshot.study.decision
    assert declared is not None
    baseline = standing.snapshot.study.baseline
    broken = []
    if e.challenger_diverged:
        broken.append(
            f"{e.challenger_diverged} of its {count(e.n, 'run')} diverged ({e.baseline_diverged} of {baseline}'s)"
        )
    limit = str(declared.max_early_regress)
    if e.early_regress is not None and 100 * e.early_regress > float(limit.rstrip("%")):
        broken.append(
            f"in the first 30% of the steps it was {100 * e.early_regress:.2f}% of {baseline}'s loss worse, "
            f"over the limit of {limit}"
        )
    return broken


def finding(standing: Standing, comparison: ArmComparison) -> Finding:
    """Which of the sentences a challenger's decision calls for."""
    decision, e = comparison.decision, comparison.estimates
    study = standing.snapshot.study
    assert decision is not None
    assert study.decision is not None
    match decision.verdict:
        case Verdict.INVALID:
            return "invalid"
        case Verdict.INCOMPLETE:
            return "incomplete"
        case Verdict.GO:
            return "go"
        case Verdict.EQUIVALENT:
            return "equivalent"
        case Verdict.INCONCLUSIVE:
            if study.provenance == "reported":
                return "reported"
            return "ended" if decision.next_pairs is None else "open"
    # A NO_GO has three reasons: the plan ended unstable; all but a guardrail was good; else B was established.
    plan = study.decision.plan
    last = study.decision.n_max if plan == "sequential" else plan.fixed
    if decision.n >= last and e.challenger_diverged > e.baseline_diverged:
        return "unstable"
    assert e.mean_diff is not None
    assert e.margin is not None
    return "guardrail" if e.mean_diff >= e.margin else "ruled_out"


def groups(standing: Standing) -> list[tuple[Finding, list[ArmComparison]]]:
    """The challengers by what was found, gravest first."""
    found = [(finding(standing, c), c) for c in standing.decided]
    return [(kind, same) for kind in ORDER if (same := [c for k, c in found if k == kind])]


def outcomes_text(standing: Standing) -> str:
    """How much of the declared grid has an outcome, and what became of the rest."""
    states = [cell.state for cell in standing.cells]
    done = states.count("completed") + states.count("diverged")
    rest = [f"{states.count(s)} {s}" for s in ("diverged", "failed", "abandoned", "missing") if s in states]
    return f"{done} of {len(states)} declared runs have an outcome" + (f" ({', '.join(rest)})" if rest else "")


# The verdict


def headline(standing: Standing) -> str:
    """The verdicts as a title."""
    baseline = standing.snapshot.study.baseline
    kinds = groups(standing)
    if (parent := standing.snapshot.study.twin_of) is not None:
        return f"Rehearsal of {parent}, no decision: {_rehearsed(standing)}."
    says: dict[Finding, str] = {
        "invalid": "INVALID: no verdict on {}",
        "incomplete": "INCOMPLETE: no verdict yet on {}",
        "go": f"Adopt {{}} in place of {baseline}",
        "ruled_out": "Archive {}",
        "guardrail": "Archive {}: a guardrail failed",
        "unstable": "Archive {} as unstable",
        "equivalent": f"Archive {{}} as equivalent to {baseline} within {_declared_size(standing)}",
        "open": "Undecided on {}",
        "ended": f"Undecided on {{}} when the plan ended: keep {baseline}",
        "reported": "Undecided on {}: reported by others, not run here",
    }
    title = ". ".join(says[kind].format(_titled(same)) for kind, same in kinds) + "."
    return f"{title} On {standing.snapshot.study.workload} alone." if _is_acted_on(kinds) else title


def _is_acted_on(kinds: Sequence[tuple[Finding, list[ArmComparison]]]) -> bool:
    """Whether something is to be adopted or archived: then a reader must know where that was shown."""
    return any(kind == "go" or kind in ARCHIVED for kind, _ in kinds)


def _titled(members: Sequence[ArmComparison]) -> str:
    """The names in a title; of many the first, since the sentence under it has them all."""
    names = [c.arm for c in members]
    return listed(names) if len(names) <= MOST_TITLED else f"{', '.join(names[:3])} and {len(names) - 3} more"


def decision_sentence(standing: Standing) -> str:
    """The one sentence to quote: the verdict on every challenger, with the numbers that carry it."""
    clauses: list[str] = []
    pivoted = False
    sized = False
    brief = len(standing.decided) > DETAILED_CLAUSES
    if standing.snapshot.study.twin_of is not None:
        return _rehearsal_sentence(standing, brief=brief)
    for kind, same in groups(standing):
        together = brief or kind in ("invalid", "incomplete")
        for members in [same] if together else [[c] for c in same]:
            pivot = ""
            if kind in ARCHIVED and not pivoted:
                pivot = _pivot(standing, members)
                pivoted = True
            size = "that size" if sized else margin_text(standing)
            sized = sized or kind in ("ruled_out", "equivalent", "open", "ended")
            clauses.append(_clause(standing, kind, members, pivot, size))
    sentence = "; ".join(clauses) + "."
    if _is_acted_on(groups(standing)):
        sentence += f" Shown on {standing.snapshot.study.workload} alone, which {_trains(standing)}."
    if not standing.complete:
        return f"Partial, {outcomes_text(standing)}: {sentence}"
    return sentence[0].upper() + sentence[1:]


def _rehearsed(standing: Standing) -> str:
    """The verdicts of a rehearsal, each with whom it is on, and nothing that follows from them."""
    by_verdict: dict[str, list[ArmComparison]] = {}
    for c in standing.decided:
        assert c.decision is not None
        by_verdict.setdefault(c.decision.verdict.value, []).append(c)
    return ", ".join(f"{verdict} on {_titled(members)}" for verdict, members in by_verdict.items())


def _rehearsal_sentence(standing: Standing, *, brief: bool) -> str:
    study = standing.snapshot.study
    clauses = [
        f"{c.decision.verdict.value} on {c.arm} {_after([c])} ({effect_text(c)})"
        for c in standing.decided
        if c.decision is not None
    ]
    partial = "" if standing.complete else f", partial ({outcomes_text(standing)})"
    return (
        f"A rehearsal on the workload {study.workload}{partial}, which decides nothing about {study.twin_of}: "
        f"{_rehearsed(standing) if brief else '; '.join(clauses)}."
    )


def rehearsal_notes(standing: Standing) -> list[str]:
    """What must be known of a rehearsal before its verdicts are read; nothing of any other study."""
    study = standing.snapshot.study
    if study.twin_of is None:
        return []
    return [
        f"This is a rehearsal of the study {study.twin_of}, on the workload {study.workload} and "
        f"{count(len(study.seeds), 'seed')}: it shows that the study runs from its plan to its report. It decides "
        f"nothing about {study.twin_of}, whatever a verdict below says."
    ]


def _pivot(standing: Standing, archived: Sequence[ArmComparison]) -> str:
    """What follows `archive X`: the declared next method, unless this study has something to say of it."""
    study = standing.snapshot.study
    and_ = " and" if len(archived) == 1 else ", and"
    kept = f"{and_} keep {study.baseline}"
    if any(kind == "go" for kind, _ in groups(standing)):
        return ""
    if study.on_archive is None or study.on_archive == study.baseline:
        return kept
    decided = {c.arm: finding(standing, c) for c in standing.decided}
    kind = decided.get(study.on_archive)
    if kind in ARCHIVED:
        # The method to pivot to is archived by this very study.
        return kept
    if kind is None:
        return f"{and_} pivot to {study.on_archive}"
    return f"{and_} pivot to {study.on_archive}, on which this study has no decision either"


def _clause(standing: Standing, kind: Finding, members: Sequence[ArmComparison], pivot: str, margin: str) -> str:
    """One part of the decision's sentence; `margin` names the smallest effect worth having."""
    study = standing.snapshot.study
    baseline = study.baseline
    names = listed(c.arm for c in members)
    one = members[0] if len(members) == 1 else None
    after = _after(members)
    evidence = f" ({effect_text(one)})" if one else " (the table holds each effect)"
    guard = ""
    if one and kind not in ("guardrail", "unstable") and (broken := broken_guardrails(standing, one)):
        guard = f", and a guardrail failed: {'; '.join(broken)}"
    match kind:
        case "invalid":
            return f"INVALID, no verdict on {names}: {_first_reason(members)}"
        case "incomplete":
            return f"INCOMPLETE, no verdict on {names}: {_why_incomplete(standing, members)}"
        case "go":
            return (
                f"adopt {names} in place of {baseline}: an improvement is established {after}{evidence}, and its "
                f"estimate reaches the smallest effect worth having, {margin_text(standing)}"
            )
        case "ruled_out":
            ruled = f"an improvement over {baseline} of {margin} is ruled out {after}"
            return f"archive {names}{pivot}: {ruled}{evidence}{guard}"
        case "guardrail":
            why = f": {'; '.join(broken_guardrails(standing, one))}" if one else ""
            return (
                f"archive {names}{pivot}: {after} its improvement over {baseline} would be enough{evidence}, but "
                f"a guardrail failed{why}"
            )
        case "unstable":
            why = f": {'; '.join(broken_guardrails(standing, one))}" if one else f" more often than {baseline}'s"
            return f"archive {names} as unstable{pivot}: runs diverged{why}, when the plan ended{evidence}"
        case "equivalent":
            return (
                f"archive {names} as equivalent to {baseline}{pivot}: {after} a difference of {margin} is ruled "
                f"out in both directions{evidence}{guard}"
            )
        case "open":
            next_ = f"; {_next_pairs(standing, one)}" if one else ""
            return (
                f"undecided on {names}: {after} an improvement over {baseline} of {margin} is neither ruled out "
                f"nor established enough to adopt{evidence}{guard}{next_}"
            )
        case "ended":
            return (
                f"undecided on {names}, keep {baseline}: {after} the plan has ended, and an improvement of "
                f"{margin} is neither ruled out nor established enough to adopt, which is not evidence of no "
                f"effect{evidence}{guard}"
            )
        case "reported":
            return (
                f"undecided on {names}: {after}, reported by others and not run here, so that no decision can "
                f"rest on them{evidence}{guard}"
            )


def _after(members: Sequence[ArmComparison]) -> str:
    numbers = sorted({c.estimates.n for c in members})
    if len(numbers) == 1:
        return f"after {count(numbers[0], 'pair')}"
    return f"after {numbers[0]} to {numbers[-1]} pairs"


def _first_reason(members: Sequence[ArmComparison]) -> str:
    """The first finding, and how many more there are; the report lists them all."""
    found = list(dict.fromkeys(reason for c in members if c.decision for reason in c.decision.reasons))
    more = f" (and {len(found) - 1} more below)" if len(found) > 1 else ""
    return one_line(found[0]).rstrip(".") + more


def _why_incomplete(standing: Standing, members: Sequence[ArmComparison]) -> str:
    arms = {standing.snapshot.study.baseline, *(c.arm for c in members)}
    cells = [cell for cell in standing.cells if cell.arm in arms]
    lacking = [c for c in cells if c.state not in ("completed", "diverged")]
    if not lacking:
        return _first_reason(members)
    if len(lacking) == len(cells) and all(c.state == "missing" for c in cells):
        return "none of its runs has been made"
    states = [c.state for c in lacking]
    parts = [f"{states.count(s)} {s}" for s in ("failed", "abandoned", "missing") if s in states]
    return f"of the {len(cells)} runs that it needs, {len(lacking)} have no outcome ({', '.join(parts)})"


def correction_text(standing: Standing) -> str:
    """How the error rate of the family is kept, and what that assumes."""
    decisions = [c.decision for c in standing.decided if c.decision is not None]
    size = max((d.family_size for d in decisions), default=len(standing.snapshot.study.challengers))
    declared = standing.snapshot.study.decision
    assert declared is not None
    if any(d.correction == "dunnett" for d in decisions):
        spreads = [c.estimates.sd_diff for c in standing.decided if c.estimates.sd_diff]
        seen = (
            f"; here the standard deviations of the differences are between {plain(min(spreads))} and "
            f"{plain(max(spreads))} nats/token"
            if len(spreads) > 1
            else ""
        )
        return (
            f"Correction: Dunnett's test of {count(size, 'challenger')} against one baseline, blocked by seed. It "
            f"assumes one variance of the noise in all arms, and errs where that is not so{seen}."
        )
    replaced = (
        " (Dunnett's test was declared; an amended plan does not use it)" if declared.correction != "holm" else ""
    )
    if size == 1:
        return f"Correction: none is needed for one challenger{replaced}."
    return (
        f"Correction: Holm over {size} challengers, each level at first alpha / {size}; it assumes nothing of the "
        f"variances of the arms{replaced}."
    )


def family_text(standing: Standing) -> str:
    """Which arms were run on the declared seeds beside this study, and whether they count in its family."""
    challengers = standing.snapshot.study.challengers
    others = [arm if n == 1 else f"{arm} ({n} variants)" for arm, n in standing.tried.items()]
    beside = sum(standing.tried.values())
    declares = f"this study declares {len(challengers)} as {'a challenger' if len(challengers) == 1 else 'challengers'}"
    if standing.undeclared:
        described = standing.undeclared - beside
        late = f", and {count(described, 'arm')} declared as control or reference after a result" if described else ""
        run = f" ({listed(others)}{late})" if others else f" ({late.removeprefix(', and ')})"
        size = len(challengers) + standing.undeclared
        return (
            f"{size} arms were run on these seeds, {declares}, and its challengers may have been picked by their "
            f"results: the family is taken as {size}{run}"
        )
    were = "arm was" if beside == 1 else "arms or variants were"
    return (
        f"{beside} other {were} run on these seeds beside this study ({listed(others)}), and {declares}, whose runs "
        f"were made after they were declared: the family stays {len(challengers)}, but the best of several studies on "
        "the same seeds still looks better than it is"
    )


APPROXIMATE = ("newton_schulz", "polar_express")
"""Orthogonalizers whose updates are not orthogonal to rounding: not a faster Muon, but another optimizer."""


def orthogonalizers(standing: Standing) -> list[str]:
    """How every arm that has an orthogonalizer makes its updates orthogonal; nothing where none has one."""
    methods = {
        arm: str(options["orthogonalizer"])
        for arm, spec in standing.snapshot.optimizers.items()
        if isinstance(options := spec.get("options"), dict) and options.get("orthogonalizer") is not None
    }
    if not methods:
        return []
    used = {
        arm: sorted({m for r in standing.snapshot.records if r.arm == arm for m in r.orthogonalizers.values()})
        for arm in methods
    }
    named = [
        f"{arm} {method}" + (f" (here {listed(used[arm])})" if method == "auto" and used[arm] else "")
        for arm, method in methods.items()
    ]
    text = f"Orthogonalizer: {', '.join(named)}."
    if len(set(methods.values())) > 1:
        text += " The arms do not share one, so that a part of a difference may be that of the orthogonalizers."
    if any(method in APPROXIMATE for method in methods.values()):
        text += f" {listed(sorted(set(APPROXIMATE) & set(methods.values())))}: approximate, hence another optimizer."
    return [text]


# What to do next


def _next_pairs(standing: Standing, comparison: ArmComparison) -> str:
    """The next pairs that an INCONCLUSIVE decision asks for, with price and predictive chance."""
    decision = comparison.decision
    assert decision is not None
    assert decision.next_pairs is not None
    assert decision.next_cost_usd is not None
    cost = price(standing, decision.next_cost_usd, decision.next_pairs * comparison.pair_seconds)
    pairs = f"the next {count(decision.next_pairs, 'pair')}" if decision.next_pairs > 1 else "the next pair"
    if decision.decision_chance is not None and decision.decision_chance < DECISION_CHANCE:
        pairs = f"even all that the plan has left, {pairs}"
    return f"{pairs} ({cost}){_chance(decision)}{_over_budget(standing, decision.next_cost_usd)}"


def _pairs_of_our_own(standing: Standing, comparison: ArmComparison) -> str:
    """What it takes to know what a reported pair cannot tell: new pairs, since it counts as none of them."""
    decision, declared = comparison.decision, standing.snapshot.study.decision
    assert decision is not None
    assert declared is not None
    text = (
        f"To decide on {comparison.arm}, declare a study and run its pairs here, since a reported pair counts as none"
    )
    if decision.earliest_go_n is not None:
        first, most = (
            price(standing, n * comparison.pair_cost_usd, n * comparison.pair_seconds)
            for n in (decision.earliest_go_n, declared.n_max)
        )
        text += (
            f". The earliest GO is at {count(decision.earliest_go_n, 'pair')} ({first}), the plan ends at "
            f"{declared.n_max} ({most})"
        )
    if comparison.estimates.n == 1:
        text += "; how many it takes cannot be said, since one pair shows no run-to-run spread"
    return text + "."


def _chance(decision: Decision) -> str:
    if decision.decision_chance is None:
        first = decision.earliest_go_n
        return " would make a first GO possible" if first == decision.n + (decision.next_pairs or 0) else ""
    decide = "decides" if decision.next_pairs == 1 else "decide"
    only = "only " if decision.decision_chance < DECISION_CHANCE else ""
    return f" {decide} with a predictive chance of {only}{decision.decision_chance:.0%}"


def _over_budget(standing: Standing, usd: float) -> str:
    study = standing.snapshot.study
    left = max(0.0, study.budget_usd - standing.total_cost_usd)
    if study.price_usd_per_gpu_hour == 0 or usd <= left:
        return ""
    return f", more than the {money(left)} left of the budget of {money(study.budget_usd)}"


def next_step(standing: Standing) -> str:
    """What to do now and what it costs."""
    study = standing.snapshot.study
    by_kind = dict(groups(standing))
    if study.twin_of is not None:  # nothing is adopted, archived or bought on a rehearsal
        by_kind = {kind: found for kind, found in by_kind.items() if kind in ("invalid", "incomplete")}
    steps: list[str] = []
    if "invalid" in by_kind:
        steps.append("Mend what contradicts itself (the reasons are below) before any further run is paid for.")
    lacking = [c for c in standing.cells if c.state not in ("completed", "diverged")]
    if lacking:
        seconds, usd = expected(standing, [cell.arm for cell in lacking])
        known = f" ({price(standing, usd, seconds)})" if seconds > 0 else ""
        what = (
            f"the {count(len(lacking), 'run')} without an outcome"
            if len(lacking) > 1
            else "the one run without an outcome"
        )
        steps.append(f"Make {what} with `muon study run {study.slug}`{known}.")
    if "go" in by_kind:
        names = listed(c.arm for c in by_kind["go"])
        choice = (
            " Picking the best of several on these seeds flatters the pick: confirm it on fresh seeds."
            if len(by_kind["go"]) > 1
            else ""
        )
        steps.append(f"Adopt {names} on this workload; this asks for no further pair and costs nothing more.{choice}")
    if any(kind in by_kind for kind in ARCHIVED):
        archived = [c for kind in ARCHIVED for c in by_kind.get(kind, [])]
        names = listed(c.arm for c in archived)
        steps.append(
            f"Archive {names}{_pivot(standing, archived)}; this asks for no further pair and costs nothing more."
            f"{_archive_commands(standing, archived)}"
        )
        if study.on_archive in [c.arm for c in archived]:
            steps.append(f"The declared next method, {study.on_archive}, is archived here as well.")
    if "incomplete" in by_kind and not lacking:
        steps.append(f"Mend first: {_first_reason(by_kind['incomplete'])}.")
    for comparison in by_kind.get("open", []):
        # Seeds that are declared and not yet run come first; there is none to add before.
        add = "" if lacking else " add seeds to the declaration:"
        steps.append(f"For {comparison.arm},{add} {_next_pairs(standing, comparison)}.")
    if "ended" in by_kind:
        names = listed(c.arm for c in by_kind["ended"])
        steps.append(f"Keep {study.baseline} over {names}: the plan has no pairs left, and this study buys no more.")
    if "reported" in by_kind:
        steps += [_pairs_of_our_own(standing, comparison) for comparison in by_kind["reported"]]
    if study.twin_of is not None:
        steps.append(f"Nothing follows from a rehearsal: `muon study plan {study.twin_of}` prices the study itself.")
    return " ".join(steps)


def _archive_commands(standing: Standing, archived: Sequence[ArmComparison]) -> str:
    """The commands that record it, which take a complete study."""
    if not standing.complete:
        return ""
    commands = listed(f"`muon archive {c.arm} --study {standing.snapshot.study.slug}`" for c in archived)
    records, their = ("records", "it") if len(archived) == 1 else ("record", "them")
    return (
        f" {commands} {records} that, whereupon every later study that uses {their}, of any workload, asks for "
        "`--override`."
    )


def expected(standing: Standing, arms: Sequence[str]) -> tuple[float, float]:
    """Seconds and dollars to expect for one run of each of these: the mean of the arm's finished ones, else of all."""

    def finished(arm: str | None) -> list[CellStanding]:
        done = ("completed", "diverged")
        return [c for c in standing.cells if c.state in done and arm in (None, c.arm)]

    seconds = usd = 0.0
    for name in arms:
        alike = finished(name) or finished(None)
        if alike:
            seconds += math.fsum(c.wall_seconds for c in alike) / len(alike)
            usd += math.fsum(c.cost_usd for c in alike) / len(alike)
    return seconds, usd


def status_line(standing: Standing) -> str:
    """What was declared and run, and what it cost so far."""
    snapshot = standing.snapshot
    registration = snapshot.registration
    if snapshot.study.provenance == "reported":
        declared = "Reported by others, the rule declared after the results"
    elif registration is None:
        declared = "The declaration was not registered"
    elif snapshot.amended:
        declared = f"Registered {moment(registration.registered_at)}, plan amended: only the E-value decides"
    else:
        declared = f"Registered {moment(registration.registered_at)}, not amended"
    spent = duration(standing.total_seconds)
    if snapshot.study.price_usd_per_gpu_hour > 0:
        spent = f"{money(standing.total_cost_usd)} and {spent}"
    return f"{declared}. {outcomes_text(standing).capitalize()}. Spent: {spent} of computing."


def same_seed(standing: Standing) -> str:
    """With which run of the baseline a run is compared."""
    reported = standing.snapshot.study.provenance == "reported"
    return "in its only run, of a seed that was not recorded" if reported else "on the same seed"


def _may_diverge(standing: Standing) -> str:
    """How often a challenger may diverge that was not seen to: the bound of Clopper and Pearson (1934)."""
    bounds = [c.estimates for c in standing.decided if c.estimates.challenger_diverged == 0 and c.estimates.n > 0]
    if not bounds:
        return ""
    n = min(e.n for e in bounds)
    bound = max(e.challenger_divergence_bound95 or 0.0 for e in bounds)
    return f", and {n} pairs without a divergence leave up to {bound:.0%} possible (95% bound)"


def _trains(standing: Standing) -> str:
    """What the workload does, and how large it is."""
    settings = standing.snapshot.settings
    if isinstance(settings, ReportedWorkload):
        return f"trains {settings.model} on {settings.data} ({settings.steps} steps)"
    tokens = settings.steps * settings.batch_size * settings.data.sequence_length
    model = (
        settings.model.pretrained
        if isinstance(settings.model, PretrainedSettings)
        else f"{count(len(settings.model.layers), 'layer')} of width {settings.model.hidden_size}"
    )
    return (
        f"trains {model} on {tokens:,} tokens ({settings.steps} steps of {settings.batch_size} x "
        f"{settings.data.sequence_length})"
    )


def limits(standing: Standing) -> list[str]:
    """What this study cannot tell, in plain words."""
    snapshot = standing.snapshot
    study = snapshot.study
    assert study.decision is not None
    pairs = sorted({c.estimates.n for c in standing.decided})
    found = []
    if pairs:
        few = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
        noun = "pair" if pairs == [1] else "pairs"
        sizes = {c.arm: c.estimates.mde_80 for c in standing.decided if c.estimates.mde_80 is not None}
        detectable = [f"{plain(size)} nats/token for {arm}" for arm, size in sizes.items()]
        if len(sizes) > DETAILED_CLAUSES:
            ends = (min(sizes.values()), max(sizes.values()))
            detectable = [f"{plain(ends[0])} to {plain(ends[1])} nats/token, by arm"]
        could = (
            f" At the spread seen here, one uncorrected t-test of as many pairs would find {listed(detectable)} with a "
            "chance of 80%; a GO takes more, since the rule allows for every look and wants the estimate to reach the "
            "smallest effect."
            if detectable
            else ""
        )
        found.append(f"Few seeds: the verdicts rest on {few} {noun} of runs.{could}")
    found.append(
        "Skewed noise: the error rates hold for normal and for symmetric heavy-tailed noise. Where rare seeds are "
        "much worse than the rest, no method protects the mean; only the divergence guardrail does"
        f"{_may_diverge(standing)}."
    )
    found.append(
        f"One workload: {study.workload} {_trains(standing)}. Whether a difference, or its absence, carries over to a "
        "larger model, a longer run or other data is not tested here."
    )
    digests = snapshot.digests
    if carried := {(c.arm, c.seed) for a in snapshot.acceptances for c in a.carried if c.digest in digests}:
        found.append(
            f"Other code: {count(len(carried), 'run')} here were made by other code and carried over by `muon accept`, "
            "which compares some steps of some runs; what is noted of the runs says which."
        )
    if study.tuning == "untuned":
        found.append("Untuned: the learning rates were not tuned, so that a difference may be one of tuning.")
    found += selection_notes(snapshot)
    found.append(correction_text(standing))
    if standing.false_go is not None:
        found.append(f"Error rate at hand: {standing.false_go.sentence}.")
    else:
        found.append(
            "Error rate at hand: not simulated. It takes two pairs of every challenger, none of them INVALID, and no "
            "Dunnett's test of several."
        )
    if standing.tried and not standing.undeclared:
        found.append(f"Other arms: {family_text(standing)}.")
    if len(study.challengers) > 1:
        found.append(
            f"Selection: the better of {len(study.challengers)} challengers on these seeds looks better than it is; "
            "a pick needs seeds that did not choose it."
        )
    if study.provenance == "reported":
        found.append("Reported by others: nothing here was run here, and the pairing of the runs could not be checked.")
    found += list(dict.fromkeys(note for c in standing.comparisons for note in c.estimates.notes))
    return found
