"""Challengers against a baseline on results that are already there: what `muon compare` prints.

    on the final loss   paired by seed: `stats.decision`       without pairs: `stats.unpaired` on the losses
    on steps to a loss  paired by seed: `stats.decision` on log steps to the target, and where a run never arrives the
                        sign test at one look               without pairs: `stats.unpaired` on the steps

The family is every challenger that is asked about, printed or not. A diverged run counts with the diverged loss, and
never arrives at a target. Differences are baseline - challenger: positive is better; on steps they are log ratios.
Assumes of paired results that one seed gave both arms the same initial weights and data order; a file cannot show it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from muonlab.analysis.table import Entry, Results, up_to_the_shortest
from muonlab.registry.errors import UsageError, unknown_name
from muonlab.registry.verdict import Verdict
from muonlab.stats.cost import CostPerPoint, cost_per_point
from muonlab.stats.decision import CLAIMS, NOT_NO_EFFECT, NOT_TESTED, Decision, decide_family
from muonlab.stats.dunnett import blocked_dunnett
from muonlab.stats.effect import Estimates, Interval, describe, t_interval
from muonlab.stats.guardrails import early_regress
from muonlab.stats.kernel import Cache, classify, is_last_look
from muonlab.stats.result import Result
from muonlab.stats.rule import Rule
from muonlab.stats.sample import Floats, PairedSample, Pairs, pair
from muonlab.stats.speed import Speed, grid_bracket, log_ratios, sign_test_p, speed_of_arrivals, steps_to_target
from muonlab.stats.spending import CostDifference, CostToTarget, cost_difference, cost_to_target
from muonlab.stats.threshold import TooFewPathsError
from muonlab.stats.unpaired import Median, Unpaired, UnpairedSample, decide_unpaired, median_of_steps

Provenance = Literal["run", "reported"]

NO_PRICE = "no cost is known: give --cost-per-pair, or a column cost_usd"
UNPAIRED = "unpaired: it is defined for pairs only"
CENSORED = "a run never arrives at the target: see speed"
NO_COMMON_START = "no evaluations in the first 30% of the steps are common to the runs"
UNCHECKED = "early regress was not checked: "
NO_COSTS = "a run of the pairs has no cost above 0: give a column cost_usd, or seconds"
ESTIMATED = (
    "mean_diff",
    "rel_diff_pct",
    "ci95",
    "rel_ci95_pct",
    "t",
    "p_one_sided",
    "p_two_sided",
    "p_adjusted",
    "d_z",
    "g_z",
    "wilcoxon_p_one_sided",
    "wilcoxon_p_two_sided",
    "signflip_p_one_sided",
    "signflip_p_two_sided",
    "tost_p",
    "e_value",
    "confidence_sequence",
    "required_n_80",
    "margin",
)


class Question(BaseModel):
    """What is compared, with the rule that decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    baseline: str
    rule: Rule
    family: tuple[str, ...] = ()
    """Challengers that the correction counts; empty: every arm of the file but the baseline."""
    printed: tuple[str, ...] = ()
    """Challengers that are asked for; empty: the whole family."""
    target: float | None = None
    unpaired: bool = False
    provenance: Provenance = "run"
    cost_per_pair_usd: float | None = None


class Comparison(Result):
    """One challenger against the baseline. Effects are in `unit`; what does not exist is None, with its reason."""

    arm: str
    n: int | None
    """Pairs."""
    n_baseline: int
    n_challenger: int
    unit: Literal["nats/token", "log steps"]
    mean_diff: float | None
    rel_diff_pct: float | None
    """Percent of the baseline's loss; under a target, percent of its steps that are saved."""
    ci95: Interval | None
    rel_ci95_pct: Interval | None
    t: float | None
    p_one_sided: float | None
    p_two_sided: float | None
    p_adjusted: float | None
    dunnett_p: float | None
    """Blocked by seed, for information: the verdict is corrected by Holm."""
    d_z: float | None
    g_z: float | None
    wilcoxon_p_one_sided: float | None
    wilcoxon_p_two_sided: float | None
    signflip_p_one_sided: float | None
    signflip_p_two_sided: float | None
    tost_p: float | None
    e_value: float | None
    confidence_sequence: Interval | None
    required_n_80: int | None
    """Pairs, or without pairs runs per arm, for 80 % power at the effect as estimated."""
    margin: float | None
    """min_effect in `unit`."""
    early_regress: float | None
    usd_per_pp: CostPerPoint
    seconds_per_pp: CostPerPoint
    cost_unit: Literal["usd", "s"] | None
    """Of the two that follow: dollars where the file tells them of every run of the pairs, else seconds."""
    cost_difference: CostDifference | None
    """Of whole runs, on the final loss."""
    cost_to_target: CostToTarget | None
    speed: Speed | None
    unpaired: Unpaired | None
    family_size: int
    verdict: Verdict
    next_pairs: int | None
    next_cost_usd: float | None
    reasons: tuple[str, ...]


class ArmSteps(Result):
    """Steps of one arm's runs to the target."""

    arm: str
    n: int
    never: int
    never_seeds: tuple[int, ...]
    median: Median
    geometric_mean: float | None
    geometric_mean_ci95: Interval | None
    widest_bracket: float | None
    """Steps between the two evaluations that the arrival was interpolated from, the widest of the arm."""
    last_step: float
    """Of the arm's longest run."""


class Report(BaseModel):
    """All that `muon compare` knows, in the order in which it is printed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    baseline: str
    provenance: Provenance
    plan: Literal["sequential", "fixed"]
    pairing: Literal["paired", "unpaired"]
    metric: str
    target: float | None
    min_effect: str
    alpha: float
    n_min: int
    n_max: int | None
    """None under a fixed plan, which takes the pairs at hand."""
    family: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    steps_to_target: tuple[ArmSteps, ...]
    notes: tuple[str, ...]


def compare(results: Results, question: Question, *, t_star_cache: Cache | None = None) -> Report:
    """Decide the family of a file's challengers, and report those that are asked for.

    Raises UsageError where the file does not hold what the question needs.
    """
    family, printed = _arms(results, question)
    _check_margin(results, question)
    prices = {arm: _pair_mean(results, question, arm, "cost_usd") for arm in family}
    rule = question.rule
    if question.target is not None:
        _check_curves(results, question.baseline, *family)
    found = (
        _without_pairs(results, question, family)
        if question.unpaired
        else _by_pairs(results, question, family, printed, t_star_cache)
    )
    comparisons = tuple(
        Comparison(**_priced(values, prices[values["arm"]], _pair_mean(results, question, values["arm"], "seconds")))
        for values in found
        if values["arm"] in printed
    )
    unit = "% of the steps" if question.target is not None else "% of the baseline's mean loss"
    if rule.min_effect_unit == "nats":
        unit = " nats/token"
    return Report(
        baseline=question.baseline,
        provenance=question.provenance,
        plan=rule.plan,
        pairing="unpaired" if question.unpaired else "paired",
        metric="loss of the last step" if question.target is None else f"steps to a loss of {question.target:g}",
        target=question.target,
        min_effect=f"{rule.min_effect:g}{unit}",
        alpha=rule.alpha,
        n_min=rule.n_min,
        n_max=rule.n_max if rule.plan == "sequential" else None,
        family=tuple(family),
        comparisons=comparisons,
        steps_to_target=()
        if question.target is None
        else tuple(_arm_steps(results, arm, question.target) for arm in (question.baseline, *printed)),
        notes=tuple(_notes(results, question, printed)),
    )


def exit_code(report: Report, *, fail_on_no_go: bool = False) -> int:
    """5 where a printed comparison is INVALID, 3 where one is INCOMPLETE, 1 for a NO_GO if asked, else 0."""
    verdicts = {comparison.verdict for comparison in report.comparisons}
    if Verdict.INVALID in verdicts:
        return 5
    if Verdict.INCOMPLETE in verdicts:
        return 3
    return 1 if fail_on_no_go and Verdict.NO_GO in verdicts else 0


# What is asked


def _arms(results: Results, question: Question) -> tuple[list[str], list[str]]:
    """The family, in the file's order, and what is printed of it."""
    where = str(results.path)
    results.of(question.baseline)
    others = [arm for arm in results.arms if arm != question.baseline]
    if not others:
        raise UsageError(f"{where}: {question.baseline!r} is the only arm; a comparison needs a challenger as well.")
    for name in (*question.family, *question.printed):
        if name == question.baseline:
            raise UsageError(f"{where}: {name!r} is the baseline; a challenger is another arm: {', '.join(others)}.")
        if name not in others:
            raise unknown_name(where, "challenger", name, others)
    family = [arm for arm in others if not question.family or arm in question.family]
    for name in question.printed:
        if name not in family:
            raise UsageError(
                f"{where}: --challenger {name} is not in --family {','.join(question.family)}; the correction must "
                "count it: add it to the family."
            )
    return family, [arm for arm in family if not question.printed or arm in question.printed]


def _check_margin(results: Results, question: Question) -> None:
    """Refuse a smallest effect of all of the loss, or of all of the steps."""
    rule = question.rule
    if question.target is not None:
        if rule.min_effect >= 100:
            raise UsageError(f"--min-effect: {rule.min_effect:g}% of the steps; it should be under 100%.")
        return
    losses = [e.run.loss for e in results.of(question.baseline).values() if e.run.loss is not None]
    if rule.min_effect_unit == "nats" and losses and rule.min_effect >= math.fsum(losses) / len(losses):
        raise UsageError(
            f"--min-effect: {rule.min_effect:g} nats/token is over 100% of {question.baseline}'s mean loss "
            f"({math.fsum(losses) / len(losses):.4g}); for a percentage write {rule.min_effect:g}%."
        )


def _check_curves(results: Results, *arms: str) -> None:
    for arm in arms:
        for seed, entry in results.of(arm).items():
            if entry.curve is None and entry.run.status != "failed":
                raise UsageError(
                    f"{results.path}: arm {arm!r}, seed {seed} has no curve; --target needs the losses of several "
                    "steps: name the column with --column step=NAME."
                )


def _check_seeds(results: Results, question: Question, printed: Sequence[str]) -> None:
    """Refuse what cannot be paired at all."""
    for arm in printed:
        common = results.common_seeds(question.baseline, arm)
        if not common:
            finished = all(
                any(e.run.status != "failed" for e in results.of(name).values()) for name in (question.baseline, arm)
            )
            if not finished:
                continue
            raise UsageError(
                f"{results.path}: {question.baseline} and {arm} share no seed, so that nothing can be paired; run both "
                "on the same seeds, or compare without pairs, at the price of more runs, with --unpaired."
            )
        if question.rule.plan == "sequential" and common[0] >= question.rule.n_max:
            raise UsageError(
                f"{results.path}: {question.baseline} and {arm} share the seeds {', '.join(map(str, common))}, and a "
                f"sequential plan takes 0 to {question.rule.n_max - 1} in order; if the number of pairs was set before "
                "the first result, use --plan fixed."
            )


# By pairs


def _by_pairs(
    results: Results, question: Question, family: Sequence[str], printed: Sequence[str], cache: Cache | None
) -> list[dict[str, Any]]:
    _check_seeds(results, question, printed)
    samples = [results.paired(question.baseline, arm, provenance=question.provenance) for arm in family]
    if question.target is not None:
        return _speed_by_pairs(results, question, samples, printed, cache)
    rule = question.rule
    decisions = _decide(samples, rule, cache)
    dunnett = _dunnett(samples, rule)
    found = []
    for sample, decision in zip(samples, decisions, strict=True):
        if sample.arm in printed:
            values = _of_pairs(results, question, describe(sample, rule), decision)
            values["dunnett_p"] = dunnett.get(sample.arm)
            if values["dunnett_p"] is None:
                values["undefined"]["dunnett_p"] = "it needs the whole family on the same two seeds or more"
            values["undefined"] |= dict.fromkeys(("speed", "cost_to_target"), "no --target")
            values |= {"speed": None, "cost_to_target": None}
            _set_cost(values, "cost_difference", _cost_difference(results, question.baseline, pair(sample, rule)))
            found.append(values)
    return found


def _decide(samples: Sequence[PairedSample], rule: Rule, cache: Cache | None) -> tuple[Decision, ...]:
    try:
        return decide_family(samples, rule, t_star_cache=cache)
    except TooFewPathsError as error:
        raise UsageError(
            f"--alpha {rule.alpha:g} with --n-max {rule.n_max} and {len(samples)} in the family: {error}."
        ) from None


def _of_pairs(results: Results, question: Question, e: Estimates, decision: Decision) -> dict[str, Any]:
    """The values that estimates and decision hold under the same names, and the reasons of those they do not have."""
    names = set(Comparison.model_fields)
    values: dict[str, Any] = {name: getattr(e, name) for name in Estimates.model_fields if name in names}
    values |= {name: getattr(decision, name) for name in Decision.model_fields if name in names}
    undefined = {name: why for name, why in (e.undefined | decision.undefined).items() if name in names}
    reasons = decision.reasons
    if e.early_regress is None and any(results.curves(arm) for arm in (question.baseline, e.arm)):
        said, undefined["early_regress"] = undefined["early_regress"], NO_COMMON_START
        reasons = tuple(
            reason.replace(said, NO_COMMON_START) if reason.startswith(UNCHECKED) else reason for reason in reasons
        )
    hint: tuple[str, ...] = ()
    if decision.verdict is Verdict.INCOMPLETE and question.rule.plan == "sequential":
        hint = ("if the number of pairs was set before the first result, --plan fixed takes the seeds at hand",)
    return values | {
        "n_baseline": len(results.of(question.baseline)),
        "n_challenger": len(results.of(e.arm)),
        "unit": "nats/token",
        "unpaired": None,
        "reasons": (*reasons, *hint),
        "undefined": undefined | {"unpaired": "the runs are paired"},
    }


def _dunnett(samples: Sequence[PairedSample], rule: Rule) -> dict[str, float]:
    """Dunnett's one-sided p of each arm; empty unless all the family's arms have the same pairs, and two of them."""
    pairs = [pair(sample, rule) for sample in samples]
    if len({p.seeds for p in pairs}) > 1 or pairs[0].n < 2 or any(p.invalid or p.incomplete for p in pairs):
        return {}
    p = blocked_dunnett(pairs[0].baseline, [p.challenger for p in pairs]).p_adjusted
    return dict(zip((sample.arm for sample in samples), p, strict=True))


def _speed_by_pairs(
    results: Results, question: Question, samples: Sequence[PairedSample], printed: Sequence[str], cache: Cache | None
) -> list[dict[str, Any]]:
    """Decide on log steps to the target; an arm with a run that never arrives stays in the family, untested there."""
    rule = question.rule.model_copy(update={"min_effect": _log_margin(question.rule), "min_effect_unit": "nats"})
    # Schedules of different length are what a race to a target may compare.
    samples = [sample.model_copy(update={"integrity_failures": ()}) for sample in samples]
    races = [_race(results, question, pair(sample, question.rule)) for sample in samples]
    in_steps = [_in_log_steps(sample, race) for sample, race in zip(samples, races, strict=True)]
    decisions = _decide(in_steps, rule, cache)
    found = []
    for sample, race, decision in zip(in_steps, races, decisions, strict=True):
        if sample.arm not in printed:
            continue
        e = describe(sample, rule)
        values = _of_pairs(results, question, e, decision)
        values |= {"unit": "log steps", "dunnett_p": None, "speed": race and race.speed, "cost_difference": None}
        values["undefined"] |= {"dunnett_p": "it is given for losses", "cost_difference": "see cost_to_target"}
        _set_cost(values, "cost_to_target", _cost_of_race(results, question, sample.arm, race))
        if race is None:
            _forget(values, NOT_TESTED)
            values["undefined"]["speed"] = NOT_TESTED
        elif race.censored:
            _forget(values, CENSORED)
            _decide_by_signs(values, race, e, len(samples), question)
        else:
            ends = None if e.ci95 is None else (_saved_pct(e.ci95[0]), _saved_pct(e.ci95[1]))
            values |= {"rel_diff_pct": race.speed.steps_saved_pct, "rel_ci95_pct": ends}
            if decision.verdict is not Verdict.INVALID:
                values["reasons"] = (_steps_sentence(question, race, ends), *values["reasons"][1:])
        found.append(values)
    return found


@dataclass(frozen=True)
class _Race:
    """Steps to the target of n pairs, in seed order; infinity for a run that never arrives."""

    seeds: tuple[int, ...]
    baseline: Floats
    challenger: Floats
    baseline_ends: Floats
    """Last step of the baseline's runs; infinity for one that diverged."""
    cut_short: int
    """Pairs of which one run arrived after the other had ended without arriving: undecided, so that neither counts."""
    speed: Speed

    @property
    def censored(self) -> bool:
        return self.speed.baseline_never + self.speed.challenger_never > 0


def _race(results: Results, question: Question, pairs: Pairs) -> _Race | None:
    """The race of the pairs that the plan uses; None where they are INVALID or INCOMPLETE, whatever they ran."""
    if pairs.invalid or pairs.incomplete:
        return None
    target = question.target
    assert target is not None
    arms = (question.baseline, pairs.arm)
    runs = [[results.of(arm)[seed] for seed in pairs.seeds] for arm in arms]
    ends = np.array([[_last_step(entry) for entry in side] for side in runs])
    by_seed = [_steps_needed(results, arm, target) for arm in arms]
    # A diverged run may have no curve at all.
    arrived = np.array([[needed.get(seed, math.inf) for seed in pairs.seeds] for needed in by_seed])
    brackets = np.array([[_bracket(entry, target) for entry in side] for side in runs])
    firsts = np.array([[0.0 if e.curve is None else e.curve.steps[0] for e in side] for side in runs])
    if (arrived == firsts).all():
        raise UsageError(
            f"{results.path}: every run of {arms[0]} and {arms[1]} is at {target:g} or below by its first evaluation, "
            "so that the steps to it are not known; choose a lower --target."
        )
    # What the longer run of a pair did after the other had ended without arriving says nothing about which is faster.
    cut = np.where(np.isinf(arrived), ends, np.inf).min(axis=0)
    needed = np.where(arrived > cut, np.inf, arrived)
    speed = speed_of_arrivals(*needed, *brackets, target=target)
    return _Race(
        seeds=pairs.seeds,
        baseline=needed[0],
        challenger=needed[1],
        baseline_ends=ends[0],
        cut_short=int((arrived != needed).any(axis=0).sum()),
        speed=speed,
    )


def _bracket(entry: Entry, target: float) -> tuple[float, float]:
    if entry.curve is None:
        return 0.0, math.inf
    return grid_bracket(entry.curve.steps, entry.curve.losses, target)


def _check_start(results: Results, arm: str, needed: Mapping[int, float], target: float) -> None:
    for seed, steps in needed.items():
        if steps <= 0:
            raise UsageError(
                f"{results.path}: arm {arm!r}, seed {seed} is at {target:g} before its first step; choose a lower "
                "--target."
            )


def _in_log_steps(sample: PairedSample, race: _Race | None) -> PairedSample:
    """The sample with log steps in place of the losses of its pairs; untestable where a run never arrives."""
    if race is None:
        return sample
    if race.censored:
        return sample.model_copy(update={"integrity_failures": (CENSORED,)})
    # Only differences count; the shift keeps every value positive, as the losses are that the sample is made for.
    least = min(race.baseline.min(), race.challenger.min())
    sides = {}
    for side, steps in (("baseline", race.baseline), ("challenger", race.challenger)):
        logs = dict(zip(race.seeds, 1 + np.log(steps / least), strict=True))
        sides[side] = tuple(
            run.model_copy(update={"loss": float(logs[run.seed])}) if run.seed in logs else run
            for run in getattr(sample, side)
        )
    return sample.model_copy(update=sides)


def _decide_by_signs(values: dict[str, Any], race: _Race, e: Estimates, family_size: int, question: Question) -> None:
    """Sign tests of A, B and C at one look; where neither run of a pair arrives, the pair counts against every claim.

    Bonferroni over the family, which never rejects what Holm would not.
    """
    rule, margin = question.rule, _log_margin(question.rule)
    n = len(race.seeds)
    both = np.isinf(race.baseline) & np.isinf(race.challenger)
    r = log_ratios(race.baseline, race.challenger)
    with np.errstate(invalid="ignore"):
        # A GO counts on the least that a baseline run which ended without arriving allows.
        at_least = np.log(np.where(np.isinf(race.baseline), race.baseline_ends, race.baseline)) - np.log(
            race.challenger
        )
        middle = np.median(np.where(both, -np.inf, at_least))
    ratios = [np.where(both, -np.inf, shifted) for shifted in (r, margin - r, r + margin)]
    one_look = rule.plan == "fixed" and n >= rule.n_min
    p = [sign_test_p(shifted, {})[0] if one_look else None for shifted in ratios]
    # Twice the smaller one-sided p; a pair in which neither arrives counts against either direction.
    worse = sign_test_p(np.where(both, -np.inf, -r), {})[0] if one_look else None
    p_two_sided = None if p[0] is None or worse is None else min(1.0, 2 * min(p[0], worse))
    adjusted = [None if x is None else min(1.0, family_size * x) for x in p]
    a, b, c = (np.array(x is not None and x <= rule.alpha) for x in adjusted)
    broken = _broken_guardrails(race, e, rule)
    unstable = e.challenger_diverged > e.baseline_diverged and bool(is_last_look(n, rule))
    tested = Verdict(str(classify((a, b, c), middle, margin, unstable=unstable, blocked=bool(broken))))
    never = " and ".join(
        f"{int(np.isinf(steps).sum())} runs of {name}"
        for name, steps in ((question.baseline, race.baseline), (values["arm"], race.challenger))
    )
    reasons = [f"of {n} pairs, {never} never arrive, which leaves signs and medians: {_median_sentence(race.speed)}"]
    if race.cut_short:
        reasons.append(
            f"in {race.cut_short} of {n} pairs one run arrived only after the other had ended: undecided, so that they "
            "count for no claim"
        )
    if one_look:
        over = f", times {family_size} for the family" if family_size > 1 else ""
        reasons += [
            f"{claim}: {'established' if rejected else 'not established'} (sign test, p = {x:.3g}{over})"
            for claim, rejected, x in zip(CLAIMS, (a, b, c), adjusted, strict=True)
            if x is not None
        ]
    elif rule.plan == "sequential":
        reasons.append(
            "not tested: a sign test may look once, so that runs which never arrive need --plan fixed, with a number "
            "of pairs that was set before the first result"
        )
    else:
        reasons.append(f"{n} pairs: no verdict is given below {rule.n_min} pairs, GO is blocked")
    reasons += [f"guardrail broken: {sentence}" for sentence in broken]
    verdict = tested
    if question.provenance == "reported":
        verdict = Verdict.INCONCLUSIVE
        reasons.append(f"reported by others: the verdict is capped at INCONCLUSIVE (uncapped: {tested})")
    if tested is Verdict.INCONCLUSIVE:
        reasons.append(NOT_NO_EFFECT)
    values["undefined"] |= dict.fromkeys(
        ("next_pairs", "next_cost_usd"), "signs do not tell how many pairs would decide"
    )
    if e.early_regress is None:
        reasons.append(UNCHECKED + NO_COMMON_START)
    values |= {"next_pairs": None, "next_cost_usd": None, "verdict": verdict, "reasons": (*reasons, *e.notes)}
    for name, value in (("p_one_sided", p[0]), ("p_two_sided", p_two_sided), ("p_adjusted", adjusted[0])):
        values[name] = value
        if value is not None:
            values["undefined"].pop(name)
        else:
            values["undefined"][name] = NOT_TESTED


def _broken_guardrails(race: _Race, e: Estimates, rule: Rule) -> list[str]:
    broken = []
    if e.challenger_diverged:
        broken.append(f"{e.challenger_diverged} of {e.n} challenger runs diverged (baseline: {e.baseline_diverged})")
    if e.early_regress is not None and e.early_regress > rule.max_early_regress:
        broken.append(f"early regress of {e.early_regress:.2%}, over the limit of {rule.max_early_regress:.2%}")
    return broken


def _median_sentence(speed: Speed) -> str:
    if speed.median_ratio is None or 2 * min(speed.baseline_never, speed.challenger_never) >= speed.n:
        return "the median pair has no ratio"
    saved = 100 * (1 - 1 / speed.median_ratio)
    return f"the median pair takes {abs(saved):.4g}% {'fewer' if saved >= 0 else 'more'} steps"


def _steps_sentence(question: Question, race: _Race, ends: Interval | None) -> str:
    saved = race.speed.steps_saved_pct
    assert saved is not None
    interval = "no interval" if ends is None else f"95% interval of the steps saved [{ends[0]:+.4g}%, {ends[1]:+.4g}%]"
    return (
        f"{abs(saved):.4g}% {'fewer' if saved >= 0 else 'more'} steps to {question.target:g}, {interval}, "
        f"n = {len(race.seeds)}, smallest effect worth having {question.rule.min_effect:g}% fewer"
    )


def _saved_pct(log_ratio: float) -> float:
    return -100 * math.expm1(-log_ratio)


def _log_margin(rule: Rule) -> float:
    """min_effect, in % of the steps, as a log ratio of steps."""
    return -math.log1p(-rule.min_effect / 100)


def _forget(values: dict[str, Any], why: str) -> None:
    """Take back estimates that were made of values which are not what is compared."""
    for name in ESTIMATED:
        values[name] = None
        values["undefined"][name] = why


# Without pairs


def _without_pairs(results: Results, question: Question, family: Sequence[str]) -> list[dict[str, Any]]:
    samples = [_unpaired_sample(results, question, arm) for arm in family]
    return [
        _of_unpaired(results, question, sample, decided)
        for sample, decided in zip(samples, decide_unpaired(samples, question.rule), strict=True)
    ]


def _unpaired_sample(results: Results, question: Question, arm: str) -> UnpairedSample:
    rule, target, arms = question.rule, question.target, (question.baseline, arm)
    ends: list[tuple[float, ...]] = [(), ()]
    finished = [{s: e for s, e in results.of(name).items() if e.run.status != "failed"} for name in arms]
    diverged = [sum(e.run.status == "diverged" for e in entries.values()) for entries in finished]
    if target is None:
        outcomes = [
            tuple(rule.diverged_loss if e.run.loss is None else e.run.loss for e in entries.values())
            for entries in finished
        ]
        converged = [e.run.loss for e in finished[0].values() if e.run.loss is not None]
        percent_of = math.fsum(converged) / len(converged) if converged else rule.diverged_loss
        margin = rule.min_effect
        if rule.min_effect_unit == "percent" and percent_of is not None:
            margin *= percent_of / 100
    else:
        outcomes = [tuple(_steps_needed(results, name, target).values()) for name in arms]
        ends = [tuple(_last_step(e) for e in entries.values()) for entries in finished]
        margin = rule.min_effect / 100
    return UnpairedSample(
        arm=arm,
        baseline=outcomes[0],
        challenger=outcomes[1],
        outcome="loss" if target is None else "steps",
        margin=margin,
        baseline_ends=ends[0],
        challenger_ends=ends[1],
        baseline_diverged=diverged[0],
        challenger_diverged=diverged[1],
        early_regress=_unpaired_early_regress(results, *arms),
        provenance=question.provenance,
        integrity_failures=tuple(_unlike_arms(results, question, arm)),
    )


def _steps_needed(results: Results, arm: str, target: float) -> dict[int, float]:
    """Steps to the target of every finished run of an arm by seed; infinity for never, and for a run that diverged."""
    needed = {}
    for seed, curve in results.curves(arm).items():
        status = results.of(arm)[seed].run.status
        if status != "failed":
            needed[seed] = math.inf if status == "diverged" else steps_to_target(curve.steps, curve.losses, target)
    _check_start(results, arm, needed, target)
    return needed


def _last_step(entry: Entry) -> float:
    """Where a run's curve ends; infinity for one that diverged, which no longer run would have saved."""
    return math.inf if entry.run.status == "diverged" or entry.curve is None else float(entry.curve.steps[-1])


def _unpaired_early_regress(results: Results, baseline: str, arm: str) -> float | None:
    """Of the arms' mean curves, on the steps that all runs have, over 30 % of the shortest run that completed."""
    sides = [[e for e in results.of(name).values() if e.run.status != "failed"] for name in (baseline, arm)]
    grid = up_to_the_shortest(*sides)
    if grid is None:
        return None
    steps, base, chal = grid.curves
    if results.diverged_loss is not None:
        base, chal = (np.where(np.isfinite(losses), losses, results.diverged_loss) for losses in (base, chal))
    return early_regress(steps, base.mean(axis=0), chal.mean(axis=0), total_steps=grid.total_steps)


def _unlike_arms(results: Results, question: Question, arm: str) -> list[str]:
    """What forbids to compare two arms as they are: unequal failures, and last losses after different lengths."""
    found = []
    sides = [results.of(name) for name in (question.baseline, arm)]
    failed = [sum(e.run.status == "failed" for e in side.values()) for side in sides]
    if failed[0] * len(sides[1]) != failed[1] * len(sides[0]):
        found.append(
            f"unequal failures between the arms ({failed[0]} of {len(sides[0])} baseline and {failed[1]} of "
            f"{len(sides[1])} challenger runs): what is left is a selection"
        )
    ends = {
        float(e.curve.steps[-1])
        for side in sides
        for e in side.values()
        if e.curve is not None and e.run.status == "completed"
    }
    if question.target is None and len(ends) > 1:
        found.append(
            f"the runs end at different steps ({min(ends):g} to {max(ends):g}), so that their last losses are not of "
            "the same training; compare the steps to a loss with --target, or cut all runs to the same step"
        )
    return found


def _of_unpaired(results: Results, question: Question, sample: UnpairedSample, u: Unpaired) -> dict[str, Any]:
    reasons = [*u.reasons, *_horizon_sentences(results, question, u.arm)]
    if sample.early_regress is None:
        reasons.append(UNCHECKED + NO_COMMON_START)
    values: dict[str, Any] = dict.fromkeys(Comparison.model_fields, None) | {
        "arm": u.arm,
        "n_baseline": len(results.of(question.baseline)),
        "n_challenger": len(results.of(u.arm)),
        "unit": "nats/token" if sample.outcome == "loss" else "log steps",
        "mean_diff": u.effect,
        "rel_diff_pct": u.effect_pct,
        "ci95": u.ci95,
        "rel_ci95_pct": u.ci95_pct,
        "t": u.t,
        "p_one_sided": u.p_improves,
        "p_two_sided": u.p_two_sided,
        "p_adjusted": u.p_adjusted,
        "tost_p": None
        if u.p_below_margin is None or u.p_above_minus_margin is None
        else max(u.p_below_margin, u.p_above_minus_margin),
        "required_n_80": u.required_runs_80,
        "margin": u.effect_margin,
        "early_regress": sample.early_regress,
        "unpaired": u,
        "family_size": len(question.family) or len(results.arms) - 1,
        "verdict": u.verdict,
        "reasons": tuple(reasons),
    }
    theirs = {
        "mean_diff": "effect",
        "rel_diff_pct": "effect_pct",
        "ci95": "ci95",
        "rel_ci95_pct": "ci95_pct",
        "t": "t",
        "p_one_sided": "p_improves",
        "p_two_sided": "p_two_sided",
        "p_adjusted": "p_adjusted",
        "tost_p": "p_below_margin",
        "required_n_80": "required_runs_80",
    }
    why = {name: u.undefined[theirs[name]] for name in theirs if values[name] is None}
    why |= {
        "early_regress": NO_COMMON_START,
        "speed": "see unpaired and steps_to_target" if question.target is not None else "no --target",
        "next_pairs": "the plan looked once",
        "next_cost_usd": "the plan looked once",
    }
    priced_later = ("undefined", "usd_per_pp", "seconds_per_pp")
    values["undefined"] = {
        name: why.get(name, UNPAIRED) for name, value in values.items() if value is None and name not in priced_later
    }
    return values


def _horizon_sentences(results: Results, question: Question, arm: str) -> list[str]:
    """How often the ranking puts a run behind one that arrived only after the other had ended."""
    if question.target is None:
        return []
    names = (question.baseline, arm)
    needed = [_steps_needed(results, name, question.target) for name in names]
    found = []
    for ours, theirs in ((0, 1), (1, 0)):
        ends = [_last_step(results.of(names[ours])[seed]) for seed, steps in needed[ours].items() if math.isinf(steps)]
        late = sum(end < steps < math.inf for end in ends for steps in needed[theirs].values())
        if late:
            found.append(
                f"in {late} of {len(needed[0]) * len(needed[1])} comparisons of two runs, one of {names[ours]} that "
                f"never arrived counts as slower than one of {names[theirs]} that arrived after the other had ended; "
                "each p is the larger of two, with and without what came after the shortest run that never arrived"
            )
    return found


# What both have


def _pair_mean(results: Results, question: Question, arm: str, column: Literal["cost_usd", "seconds"]) -> float | None:
    """Mean of a baseline run plus mean of a challenger run; None where a run of either arm lacks the value."""
    if column == "cost_usd" and question.cost_per_pair_usd is not None:
        return question.cost_per_pair_usd
    total = 0.0
    for name in (question.baseline, arm):
        known = [getattr(entry, column) for entry in results.of(name).values()]
        if not known or None in known:
            return None
        total += math.fsum(known) / len(known)
    return total


def _run_costs(results: Results, arms: Sequence[str], seeds: Sequence[int]) -> tuple[str, list[Floats]] | None:
    """Unit, and the costs [S] of the runs of two arms; None where no column tells them all, above 0."""
    for unit, column in (("usd", "cost_usd"), ("s", "seconds")):
        costs = [[getattr(results.of(arm)[seed], column) for seed in seeds] for arm in arms]
        if all(cost for side in costs for cost in side):
            return unit, [np.array(side, dtype=np.float64) for side in costs]
    return None


def _cost_difference(results: Results, baseline: str, pairs: Pairs) -> tuple[str, CostDifference] | str:
    """Unit and difference of the costs of whole runs, or why there is none."""
    if pairs.invalid or pairs.incomplete:
        return NOT_TESTED
    if pairs.baseline_diverged.any() or pairs.challenger_diverged.any():
        return "a run diverged: its cost is not that of a whole run"
    found = _run_costs(results, (baseline, pairs.arm), pairs.seeds)
    return NO_COSTS if found is None else (found[0], cost_difference(*found[1]))


def _cost_of_race(results: Results, question: Question, arm: str, race: _Race | None) -> tuple[str, CostToTarget] | str:
    """Unit and cost to the target, at each run's own price of a step, or why there is none."""
    if race is None:
        return NOT_TESTED
    assert question.target is not None
    arms = (question.baseline, arm)
    found = _run_costs(results, arms, race.seeds)
    curves = [[results.of(name)[seed].curve for seed in race.seeds] for name in arms]
    if found is None:
        return NO_COSTS
    lengths = [[0.0 if curve is None else curve.steps[-1] for curve in side] for side in curves]
    if not np.all(lengths):
        return "a run has no step after 0 to price"
    per_step = [costs / length for costs, length in zip(found[1], lengths, strict=True)]
    return found[0], cost_to_target(
        race.baseline,
        race.challenger,
        target=question.target,
        baseline_per_step=per_step[0],
        challenger_per_step=per_step[1],
    )


def _set_cost(values: dict[str, Any], name: str, found: tuple[str, CostDifference | CostToTarget] | str) -> None:
    if isinstance(found, str):
        values |= {"cost_unit": None, name: None}
        values["undefined"] |= dict.fromkeys(("cost_unit", name), found)
    else:
        values["cost_unit"], values[name] = found


def _priced(values: dict[str, Any], usd: float | None, seconds: float | None) -> dict[str, Any]:
    """The values with what a percentage point costs; without a price, what the next pairs cost is unknown too."""
    percent, interval = values["rel_diff_pct"], values["rel_ci95_pct"]

    def per_point(cost: float | None, unknown: str, unit: Literal["usd", "s"]) -> CostPerPoint:
        if cost and percent is not None and (interval is not None or values["n"] == 1):
            return cost_per_point(percent, interval, cost, unit=unit)
        why = unknown if not cost else values["undefined"].get("rel_ci95_pct", values["undefined"].get("rel_diff_pct"))
        undefined = dict.fromkeys(("point", "low", "high"), why)
        return CostPerPoint(point=None, low=None, high=None, sentence=why, undefined=undefined)

    values["usd_per_pp"] = per_point(usd, NO_PRICE, "usd")
    values["seconds_per_pp"] = per_point(seconds, "no column seconds, or a run without it", "s")
    if usd is None:
        values["next_cost_usd"] = None
        values["undefined"].setdefault("next_cost_usd", NO_PRICE)
    elif values["next_pairs"] is not None:
        values["next_cost_usd"] = values["next_pairs"] * usd
    return values


def _arm_steps(results: Results, arm: str, target: float) -> ArmSteps:
    needed = _steps_needed(results, arm, target)
    steps = np.array(list(needed.values()))
    never = tuple(sorted(seed for seed, value in needed.items() if math.isinf(value)))
    curves = results.curves(arm)
    undefined: dict[str, str] = {}
    mean = interval = widest = None
    if never or not steps.size:
        reason = f"{len(never)} of {steps.size} runs never arrive: see the median" if never else "no finished run"
        undefined.update(dict.fromkeys(("geometric_mean", "geometric_mean_ci95"), reason))
    else:
        logs = np.log(steps)
        mean = float(np.exp(logs.mean()))
        if steps.size >= 2:
            low, high = t_interval(logs)
            interval = (math.exp(low), math.exp(high))
        else:
            undefined["geometric_mean_ci95"] = "a single run has no spread"
    brackets = [grid_bracket(curves[s].steps, curves[s].losses, target) for s in needed if s not in never]
    if brackets:
        widest = max(high - low for low, high in brackets)
    else:
        undefined["widest_bracket"] = "no run arrives"
    return ArmSteps(
        arm=arm,
        n=steps.size,
        never=len(never),
        never_seeds=never,
        median=median_of_steps(steps),
        geometric_mean=mean,
        geometric_mean_ci95=interval,
        widest_bracket=widest,
        last_step=max((float(curve.steps[-1]) for curve in curves.values()), default=0.0),
        undefined=undefined,
    )


def _notes(results: Results, question: Question, printed: Sequence[str]) -> list[str]:
    """What the reader of any of the comparisons must know."""
    notes = []
    if question.unpaired:
        notes.append(
            "Unpaired: differences between seeds stay in the noise, the runs are looked at once, and nothing shows "
            "that the arms saw the same data."
        )
        shared = [arm for arm in printed if results.common_seeds(question.baseline, arm)]
        if shared:
            them = "the other arms" if len(shared) > 1 and len(shared) == len(printed) else ", ".join(shared)
            notes.append(
                f"{question.baseline} shares seed numbers with {them}: if they stand for the same initial weights and "
                "data order, leave --unpaired out, since pairs need fewer runs."
            )
    if question.target is not None:
        arms = (question.baseline, *printed)
        ends = {max(c.steps[-1] for c in curves.values()) for arm in arms if (curves := results.curves(arm))}
        if len(ends) > 1:
            notes.append(
                f"The arms' longest runs end at different steps ({min(ends):g} to {max(ends):g}): where the schedule "
                "of the learning rate was made for its length, the steps to a target depend on that length."
            )
    return notes
