"""The verdict on one challenger, or on a family of them, from all current pairs; never latched.

    1. integrity failure -> INVALID; a gap or failed cell in the seeds so far -> INCOMPLETE
    2. a diverged challenger is never GO; more divergences than the baseline at the last look -> NO_GO
    3. GO: A, mean >= min_effect and not B, guardrails hold; GO but for a guardrail -> NO_GO
    4. EQUIVALENT: B and C        5. NO_GO: B and not C        6. else INCONCLUSIVE, with the next pairs;
    their price is a number of its own, and stands in no reason

A, B, C and Holm's correction are in `kernel.py`. Results reported by others are capped at INCONCLUSIVE.

Dunnett's correction, where a fixed plan declares it, replaces the paired t and Holm by one two-way layout of all arms:
A compares the losses as they are, B and C with the challenger's shifted by the margin; an arm is rejected where its
adjusted p is at most alpha. It needs every arm on the same seeds. An amended plan keeps the e-process, with Holm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from muonlab.registry.verdict import Verdict
from muonlab.stats.dunnett import blocked_dunnett
from muonlab.stats.effect import Estimates, estimate
from muonlab.stats.evidence import e_from_log, first_attainable_n
from muonlab.stats.kernel import Cache, Outcome, classify, decide_moments, decides_by_t, is_last_look
from muonlab.stats.predict import DECISION_CHANCE, decision_chances, next_pairs
from muonlab.stats.result import Result
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample, Pairs, pair

NOT_TESTED = "not tested: see the reasons"
NOT_NO_EFFECT = "keep the baseline; this is not evidence of no effect"


class Decision(Result):
    """The verdict on one challenger, the sentences that give its reasons, and what to do next."""

    arm: str
    n: int
    verdict: Verdict
    reasons: tuple[str, ...]
    next_pairs: int | None
    next_cost_usd: float | None
    decision_chance: float | None
    """Predictive chance that the next pairs decide."""
    e_improves: float | None
    """A: evidence against effect <= 0."""
    e_below_margin: float | None
    """B: evidence against effect >= min_effect."""
    e_above_minus_margin: float | None
    """C: evidence against effect <= -min_effect."""
    level_improves: float
    level_below_margin: float
    level_above_minus_margin: float
    family_size: int
    """Declared challengers, and the undeclared arms that count beside them."""
    correction: Literal["holm", "dunnett"]
    """Whose adjustment decided; Dunnett's only where it was declared and the plan was not amended."""
    p_adjusted: float | None
    """One-sided p of A, adjusted over the family: by Holm of the paired t, exact for one look at a fixed n only, or
    by Dunnett."""
    earliest_go_n: int | None


def decide(sample: PairedSample, rule: Rule, *, t_star_cache: Cache | None = None) -> Decision:
    """Decide one challenger that is its whole family."""
    return decide_family([sample], rule, t_star_cache=t_star_cache)[0]


def decide_family(
    samples: Sequence[PairedSample], rule: Rule, *, undeclared: int = 0, t_star_cache: Cache | None = None
) -> tuple[Decision, ...]:
    """Decide every challenger of a family, in the order given; control and reference arms don't belong in it.

    undeclared: arms outside `samples` that could have been picked in their place and count in the family, never
    rejected. t_star_cache: the caller's table of simulated t*, read and extended. Raises ValueError on an empty
    family, on arms of the same name, and where a run diverged without a diverged_loss in the rule.
    """
    names = [sample.arm for sample in samples]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"family: arms {names}; give at least one challenger, each once")
    arms = [_Arm.of(sample, rule) for sample in samples]
    by_dunnett = rule.correction == "dunnett" and decides_by_t(rule)
    if by_dunnett:
        arms = _in_complete_blocks(arms)
    family_size = len(arms) + undeclared
    n = np.array([arm.pairs.n for arm in arms])
    # An arm without a usable sample stays in the family, and can't be rejected.
    moments = np.array([arm.pairs.moments if arm.usable else (np.nan, np.nan) for arm in arms])
    margin = np.array([arm.pairs.margin for arm in arms])
    unstable = np.array([arm.more_divergences for arm in arms]) & is_last_look(n, rule)
    blocked = np.array([bool(arm.broken) for arm in arms])
    outcome = decide_moments(
        n,
        moments[:, 0],
        moments[:, 1],
        margin,
        rule,
        family_size=family_size,
        unstable=unstable,
        blocked=blocked,
        cache=t_star_cache,
    )
    tests = [_tests_of(outcome, i) for i in range(len(arms))]
    verdicts = outcome.verdict
    # Undeclared arms count in the family as ones that are never rejected.
    p = [arm.estimates.p_one_sided if arm.usable else None for arm in arms]
    adjusted = holm([*p, *[None] * undeclared])
    # Blocks are complete, so that one arm's pairs are every arm's.
    if by_dunnett and arms[0].usable and arms[0].pairs.n > 1:
        tests = _dunnett_tests(arms, tests, rule, family_size)
        adjusted = [arm_tests[0].p for arm_tests in tests]
        a, b, c = (np.array([arm_tests[i].rejected for arm_tests in tests]) for i in range(3))
        verdicts = classify((a, b, c), moments[:, 0], margin, unstable=unstable, blocked=blocked)
    return tuple(
        _conclude(
            arm,
            tests[i],
            Verdict(str(verdicts[i])),
            adjusted[i],
            family_size,
            undeclared,
            "dunnett" if by_dunnett else "holm",
            rule,
            t_star_cache,
        )
        for i, arm in enumerate(arms)
    )


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values, in order; an undefined one counts in the family and stays undefined."""
    order = sorted(range(len(p)), key=lambda i: 1.0 if (value := p[i]) is None else value)
    adjusted: list[float | None] = [None] * len(p)
    running = 0.0
    for rank, i in enumerate(order):
        value = p[i]
        if value is not None:
            running = max(running, min(1.0, (len(p) - rank) * value))
            adjusted[i] = running
    return adjusted


def earliest_go(rule: Rule, level: float) -> int | None:
    """The smallest number of pairs at which GO is possible at this one-sided level; None if the plan never
    gets there."""
    if rule.plan == "fixed":
        return rule.fixed_n if isinstance(rule.fixed_n, int) else rule.n_min
    n = max(rule.n_min, first_attainable_n(level, rule.g))
    if n <= rule.n_max:
        return n
    return None if rule.amended else rule.n_max


@dataclass(frozen=True)
class _Arm:
    """A challenger with everything its verdict is made of, before the tests."""

    sample: PairedSample
    pairs: Pairs
    estimates: Estimates
    broken: tuple[str, ...]

    @classmethod
    def of(cls, sample: PairedSample, rule: Rule) -> "_Arm":
        pairs = pair(sample, rule)
        e = estimate(pairs, sample, rule)
        return cls(sample, pairs, e, _broken_guardrails(e, rule))

    @property
    def usable(self) -> bool:
        return not (self.pairs.invalid or self.pairs.incomplete)

    def unusable(self, *, invalid: str | None = None, incomplete: str | None = None) -> "_Arm":
        """The same arm with one more reason against it, unless it has its own."""
        if not self.usable:
            return self
        added = {"invalid": (invalid,)} if invalid else {"incomplete": (incomplete,)}
        return replace(self, pairs=replace(self.pairs, **added))

    @property
    def more_divergences(self) -> bool:
        return self.estimates.challenger_diverged > self.estimates.baseline_diverged


@dataclass(frozen=True)
class _Test:
    """One of A, B, C for one arm."""

    claim: str
    e_value: float
    t: float
    rejected: bool
    level: float
    p: float | None = None
    """Dunnett's adjusted p, where it decides."""

    def sentence(self, rule: Rule) -> str:
        """What is established, or only that it is not."""
        verb = "established" if self.rejected else "not established"
        if self.p is not None:
            compared = "<=" if self.p <= self.level else ">"
            return f"{self.claim}: {verb} (t = {self.t:.3f}, Dunnett's p = {self.p:.4g} {compared} {self.level:.4g})"
        if decides_by_t(rule):
            return f"{self.claim}: {verb} (t = {self.t:.3f}, one-sided level {self.level:.4g})"
        limit = 1 / self.level
        comparison = ">=" if self.e_value >= limit else "<"
        by_t = (
            f", but t = {self.t:.3f} reaches t* at the last planned pair"
            if self.rejected and self.e_value < limit
            else ""
        )
        return f"{self.claim}: {verb} (E = {self.e_value:.4g} {comparison} {limit:.4g}{by_t})"


CLAIMS = (
    "an improvement above 0 (A)",
    "an improvement below min_effect (B)",
    "no harm beyond min_effect (C)",
)
Tests = tuple[_Test, _Test, _Test]


def _tests_of(outcome: Outcome, i: int) -> Tests:
    a, b, c = (
        _Test(claim, e_from_log(test.log_e[i]), float(test.t[i]), bool(rejected[i]), float(level[i]))
        for claim, test, rejected, level in zip(CLAIMS, outcome.tests, outcome.rejected, outcome.levels, strict=True)
    )
    return a, b, c


def _in_complete_blocks(arms: list[_Arm]) -> list[_Arm]:
    """The arms, none of them usable where Dunnett's two-way layout would have a hole."""
    needs = "Dunnett's test, declared here, pools the spread of all arms"
    invalid = [arm.sample.arm for arm in arms if arm.pairs.invalid]
    waiting = [arm.sample.arm for arm in arms if not arm.usable and not arm.pairs.invalid]
    seeds = {arm.pairs.seeds for arm in arms}
    baselines = {arm.pairs.baseline.tobytes() for arm in arms}
    if invalid:
        return [arm.unusable(invalid=f"{needs}, and {', '.join(invalid)} is INVALID") for arm in arms]
    if waiting:
        return [arm.unusable(incomplete=f"{needs}, and {', '.join(waiting)} is INCOMPLETE") for arm in arms]
    if len(seeds) > 1 or len(baselines) > 1:
        held = "; ".join(f"{arm.sample.arm}: {', '.join(map(str, arm.pairs.seeds))}" for arm in arms)
        return [arm.unusable(invalid=f"{needs} on the same seeds, and the arms' seeds differ ({held})") for arm in arms]
    return arms


def _dunnett_tests(arms: list[_Arm], tests: list[Tests], rule: Rule, family_size: int) -> list[Tests]:
    """A, B and C of every arm by Dunnett's adjusted p, at the family's own alpha; E stays as it is, for information."""
    baseline = arms[0].pairs.baseline
    losses = np.stack([arm.pairs.challenger for arm in arms])
    margin = np.array([[arm.pairs.margin] for arm in arms])
    compared = [
        blocked_dunnett(ours, theirs, family_size=family_size)
        for ours, theirs in ((baseline, losses), (-baseline, -losses - margin), (baseline, losses - margin))
    ]

    def adjusted(test: _Test, which: int, arm: int) -> _Test:
        p = compared[which].p_adjusted[arm]
        may = arms[arm].pairs.n >= rule.n_min
        return replace(test, t=compared[which].t[arm], p=p, level=rule.alpha, rejected=may and p <= rule.alpha)

    return [(adjusted(a, 0, i), adjusted(b, 1, i), adjusted(c, 2, i)) for i, (a, b, c) in enumerate(tests)]


def _broken_guardrails(e: Estimates, rule: Rule) -> tuple[str, ...]:
    broken = []
    if e.challenger_diverged:
        broken.append(f"{e.challenger_diverged} of {e.n} challenger runs diverged (baseline: {e.baseline_diverged})")
    if e.early_regress is not None and e.early_regress > rule.max_early_regress:
        broken.append(
            f"early regress of {e.early_regress:.2%} in the first 30% of the steps, over the limit of "
            f"{rule.max_early_regress:.2%}"
        )
    return tuple(broken)


def _conclude(
    arm: _Arm,
    tests: Tests,
    tested: Verdict,
    p_adjusted: float | None,
    family_size: int,
    undeclared: int,
    correction: Literal["holm", "dunnett"],
    rule: Rule,
    cache: Cache | None,
) -> Decision:
    """The frozen decision of one arm: integrity before the tested verdict, then the cap on reported
    results."""
    undefined: dict[str, str] = {}
    first_go = earliest_go(rule, tests[0].level)
    if first_go is None:
        undefined["earliest_go_n"] = f"E cannot reach {1 / tests[0].level:.4g} within {rule.n_max} pairs"
    if p_adjusted is None:
        undefined["p_adjusted"] = arm.estimates.undefined.get("p_one_sided", NOT_TESTED)

    e_values: tuple[float | None, ...] = tuple(test.e_value for test in tests)
    if not arm.usable:
        verdict = Verdict.INVALID if arm.pairs.invalid else Verdict.INCOMPLETE
        reasons = [*arm.pairs.invalid, *arm.pairs.incomplete]
        e_values = (None, None, None)
        undefined.update(dict.fromkeys(("e_improves", "e_below_margin", "e_above_minus_margin"), NOT_TESTED))
    else:
        verdict = tested
        reasons = [_effect_sentence(arm.estimates, rule), *_verdict_sentences(tested, tests, arm, rule)]
        if arm.sample.provenance == "reported":
            verdict = Verdict.INCONCLUSIVE
            reasons.append(
                "reported by others: the pairing check was skipped and the verdict is capped at "
                f"INCONCLUSIVE (uncapped: {tested})"
            )
        reasons += _family_sentences(family_size, undeclared, correction, rule)
    advice = _advise(arm, tested, tests, first_go, rule, cache) if verdict is Verdict.INCONCLUSIVE else _NO_ADVICE
    reasons += advice.sentences
    if arm.estimates.early_regress is None:
        reasons.append("early regress was not checked: " + arm.estimates.undefined["early_regress"])
    reasons += arm.estimates.notes
    if advice.pairs is None:
        undefined.update(dict.fromkeys(("next_pairs", "next_cost_usd"), advice.why_none))
    if advice.chance is None:
        undefined["decision_chance"] = advice.why_none
    return Decision(
        arm=arm.sample.arm,
        n=arm.pairs.n,
        verdict=verdict,
        reasons=tuple(reasons),
        next_pairs=advice.pairs,
        next_cost_usd=None if advice.pairs is None else advice.pairs * rule.price_per_pair_usd,
        decision_chance=advice.chance,
        e_improves=e_values[0],
        e_below_margin=e_values[1],
        e_above_minus_margin=e_values[2],
        level_improves=tests[0].level,
        level_below_margin=tests[1].level,
        level_above_minus_margin=tests[2].level,
        family_size=family_size,
        correction=correction,
        p_adjusted=p_adjusted,
        earliest_go_n=first_go,
        undefined=undefined,
    )


def _effect_sentence(e: Estimates, rule: Rule) -> str:
    # A usable sample has at least one pair.
    assert e.mean_diff is not None
    assert e.rel_diff_pct is not None
    assert e.margin is not None
    direction = "better" if e.mean_diff > 0 else "worse"
    size = f"{direction} by {abs(e.mean_diff):.4g} nats/token ({abs(e.rel_diff_pct):.4g}%)"
    if e.mean_diff == 0:
        size = "the same mean"
    interval = "no interval" if e.ci95 is None else f"95% interval [{e.ci95[0]:+.4g}, {e.ci95[1]:+.4g}]"
    unit = f" ({rule.min_effect:g}% of the baseline's mean)" if rule.min_effect_unit == "percent" else ""
    return f"{size}, {interval}, n = {e.n}, smallest effect worth having {e.margin:.4g}{unit}"


def _family_sentences(family_size: int, undeclared: int, correction: str, rule: Rule) -> list[str]:
    said = []
    if undeclared:
        more = (
            "1 arm that is not declared as a challenger"
            if undeclared == 1
            else f"{undeclared} arms that are not declared as challengers"
        )
        said.append(
            f"the family is taken as {family_size}: {more} could have been picked on these seeds, so that the level is "
            f"that of {family_size} challengers"
        )
    if correction == "dunnett":
        said.append("corrected by Dunnett's test, blocked by seed, which assumes that the noise of all arms is equal")
    elif rule.correction == "dunnett":
        said.append(
            "the plan was amended: Dunnett's test, declared for one look, is replaced by the e-process and Holm"
        )
    return said


def _verdict_sentences(verdict: Verdict, tests: Tests, arm: _Arm, rule: Rule) -> list[str]:
    a, b, c = (test.sentence(rule) for test in tests)
    e = arm.estimates
    assert e.mean_diff is not None
    if verdict is Verdict.NO_GO and arm.more_divergences and is_last_look(e.n, rule):
        return [f"instability: {arm.broken[0]}, more than the baseline's when the plan ended", a, b]
    if verdict is Verdict.NO_GO and not tests[1].rejected:
        return [f"would be GO but for a guardrail: {'; '.join(arm.broken)}", a]
    guardrails = [f"guardrail broken: {sentence}" for sentence in arm.broken]
    if verdict is Verdict.EQUIVALENT:
        kind = "better but trivial" if e.mean_diff > 0 else "worse but within the margin"
        return [kind, b, c, *guardrails]
    if verdict is Verdict.NO_GO:
        return [b, c, *guardrails]
    if verdict is Verdict.GO:
        return [a, "the mean improvement reaches min_effect"]
    return [a, b, *guardrails]


@dataclass(frozen=True)
class _Advice:
    """What an INCONCLUSIVE verdict asks for."""

    pairs: int | None
    chance: float | None
    why_none: str
    sentences: tuple[str, ...] = ()


FIRST_GO = ("the earliest GO is at", "no GO is possible within the plan")
"""How a reason begins that counts the pairs at hand towards the first GO."""

_NO_ADVICE = _Advice(None, None, "the verdict asks for no further pairs")


def _advise(arm: _Arm, tested: Verdict, tests: Tests, first_go: int | None, rule: Rule, cache: Cache | None) -> _Advice:
    """The next pairs of a sequential plan, or that the plan has ended."""
    n = arm.pairs.n
    if arm.sample.provenance == "reported" and tested is not Verdict.INCONCLUSIVE:
        own = first_go or rule.n_max
        confirm = f"to confirm it here takes at least {own} pairs of this project's own"
        return _Advice(own, None, "reported results predict nothing about runs made here", (confirm,))
    if is_last_look(n, rule):
        ended = f"all {n} planned pairs are in: {NOT_NO_EFFECT}"
        return _Advice(None, None, "the plan has no pairs left", (ended,))
    mean, ss = arm.pairs.moments
    if n == 1 or ss == 0:
        more = (first_go or rule.n_max) - n
        first = FIRST_GO[1] if first_go is None else f"{FIRST_GO[0]} {first_go} pairs"
        return _Advice(more, None, "one pair has no spread to predict from", (f"{first}: {_next(more)}",))
    chances = decision_chances(
        n,
        mean,
        ss,
        arm.pairs.margin,
        rule,
        (tests[0].level, tests[1].level, tests[2].level),
        more_divergences=arm.more_divergences,
        blocked=bool(arm.broken),
        cache=cache,
    )
    more = next_pairs(chances)
    chance = chances[more - 1]
    if chance >= DECISION_CHANCE:
        sentence = f"predictive chance of a decision within {_next(more)}: {chance:.0%}"
    else:
        sentence = (
            f"predictive chance of a decision within {_next(more)}, all that the plan has left: only {chance:.0%}"
        )
    return _Advice(more, chance, "", (sentence,))


def _next(more: int) -> str:
    return "the next pair" if more == 1 else f"the next {more} pairs"
