"""Where a study stands: every number of its report, computed from its snapshot and its evaluations alone.

`judge` turns records into paired samples (refusing pairs whose runs did not start alike), asks `muonlab.stats`
for estimates and verdicts, and adds cost, curves, failures and provenance. The report, verdict.json and the
command line show this object and compute nothing of their own.

Unless said otherwise: losses in nats/token, differences baseline - challenger (positive: challenger better),
cost in USD, time in seconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from muonlab.registry.errors import UsageError
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import Closed
from muonlab.registry.snapshot import DeclaredCell, Snapshot
from muonlab.registry.study import Decision as DeclaredRule
from muonlab.registry.study import Role
from muonlab.registry.verdict import Verdict
from muonlab.reporting.courses import (
    LARGEST_RESIDUAL,
    Curve,
    Diagnosis,
    PairedCurves,
    converged,
    course_fields,
    diagnose,
    guardrail_regress,
    pair_curves,
)
from muonlab.reporting.criteria import Passed, judge_passes
from muonlab.stats.cost import CostPerPoint, cost_per_point
from muonlab.stats.decision import FIRST_GO, Decision, decide_family
from muonlab.stats.effect import Estimates, describe, evidence_path
from muonlab.stats.guardrails import identical_curves
from muonlab.stats.instability import Instability
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample, Run
from muonlab.stats.simulate import NoiseRate, false_go_rate
from muonlab.stats.speed import Speed
from muonlab.stats.spending import CostDifference, cost_difference

CellState = Literal["completed", "diverged", "failed", "abandoned", "missing"]

SAME_START = ("data", "tokenizer", "init", "order")
"""What two runs must share to be a pair; code and environment are part of each cell's digest."""

EVALUATION_TOLERANCE = 1e-5
"""Relative. The evaluation repeats the training's own last one from the saved weights: bit for bit on one
machine, within float32 rounding on another."""

MOST_NAMES = 12
"""A sentence names at most as many cells."""


class Evaluation(Closed):
    """One line of evaluations.jsonl: what the saved weights of a cell score and write, and how its training went."""

    arm: str
    seed: int
    cell_digest: str
    weights_sha256: str | None
    val_loss: float | None
    perplexity: float | None
    prompt: str
    sample: str
    series: dict[str, list[tuple[int, float]]] = {}
    """Column of the cell's curve.csv -> (step, value) of the rows that have a finite value, but for the validation
    loss, tokens and seconds: train_loss, lr, grad_norm, update_rms, opt_*, hessian_*. Empty where none can be read."""

    def agrees_with(self, val_loss: float) -> bool:
        """Whether the weights score what the record of their training says."""
        return self.val_loss is not None and math.isclose(self.val_loss, val_loss, rel_tol=EVALUATION_TOLERANCE)


class CellStanding(Closed):
    """One declared cell: its outcome, and all attempts at it."""

    arm: str
    role: Role
    seed: int
    digest: str
    state: CellState
    val_loss: float | None
    perplexity: float | None
    steps: int
    attempts: int
    wall_seconds: float
    """Over all attempts, and over the devices of each."""
    cost_usd: float
    """Over all attempts."""
    error: str | None
    curve: list[tuple[int, float | None]]
    """(step, validation loss) of the run that counts."""


class PairDifference(Closed):
    """The two losses of one seed, and their difference; a diverged run counts with the diverged loss."""

    seed: int
    baseline: float
    challenger: float
    difference: float


class ArmComparison(Closed):
    """One arm against the baseline: described always, decided when it is a challenger."""

    arm: str
    role: Role
    estimates: Estimates
    decision: Decision | None
    differences: list[PairDifference]
    evidence: list[tuple[int, float]]
    """(number of pairs, E-value against `effect <= 0`) after each pair: for an improvement."""
    evidence_below: list[tuple[int, float]] = []
    """The same against `effect >= min_effect`: for there being none that is worth having."""
    seconds_per_point: CostPerPoint
    """Wall seconds of a pair per percentage point of improvement, for machines without a price."""
    pair_seconds: float
    pair_cost_usd: float
    seconds_difference: CostDifference | None = None
    """baseline - challenger, seconds of a run over all its attempts, over the pairs; positive: challenger cheaper."""
    usd_difference: CostDifference | None = None
    """The same in USD."""
    early: Instability | None = None
    """Regress by seed, spikes and roughness, over `curve_seeds`; a diverged run counts with the diverged loss."""
    speed: Speed | None = None
    """Steps of the baseline over the arm's for the same loss, over `curve_seeds` and nine levels of each pair."""
    first_level: Speed | None = None
    """The same to one loss, the baseline's mean at 40% of the run, with the bounds that the evaluation grid leaves."""
    curve_seeds: list[int] = []
    """The seeds that have a loss curve in both arms."""
    curve_steps: list[int] = []
    """The evaluations at which these curves are compared."""
    missing: list[int]
    """Declared seeds for which a run is missing in either arm."""
    diverged: list[int]
    failed: list[int]
    undefined: dict[str, str] = {}
    """Why a field above is None."""


class Standing(Closed):
    """All that is known of a study; every number of the report."""

    schema_version: Literal[1] = 1
    snapshot: Snapshot
    cells: list[CellStanding]
    comparisons: list[ArmComparison]
    baseline_mean: float | None
    baseline_sd: float | None
    """Run-to-run standard deviation of the baseline's final loss."""
    margin: float | None
    """The smallest effect worth having, in nats/token."""
    complete: bool
    """Every declared cell has an outcome."""
    integrity: list[str]
    """What makes the study INVALID."""
    notes: list[str]
    evaluations: list[Evaluation]
    diagnostics: list[Diagnosis] = []
    """Arm by arm as declared, what the training's own measurements came to; of arms that have them on their seeds."""
    tried: dict[str, int] = {}
    """Undeclared arm -> how many variants of it were run on the declared seeds, beside this study."""
    undeclared: int = 0
    """Arms beside the challengers that count in the family, because the challengers may have been picked among them."""
    passed: Passed | None = None
    """Whether the study has passed what it declares under `passes`; None where it declares nothing."""
    false_go: NoiseRate | None = None
    """How often the rule says GO wrongly in null studies with the noise of this one; the stats stage asks for it."""
    total_seconds: float
    total_cost_usd: float
    lost_seconds: float
    """Spent on attempts that did not become an outcome."""
    lost_cost_usd: float

    @property
    def decided(self) -> list[ArmComparison]:
        """The challengers' comparisons."""
        return [c for c in self.comparisons if c.decision is not None]


def judge(snapshot: Snapshot, evaluations: Sequence[Evaluation]) -> Standing:
    """Judge a comparison from its snapshot and the evaluations of its weights.

    Raises UsageError for a study that is not a comparison.
    """
    study = snapshot.study
    if study.decision is None:
        raise UsageError(f"experiments/{study.slug}: kind is {study.kind!r}; only a comparison has a verdict.")
    cells = [_cell(snapshot, cell) for cell in snapshot.cells]
    by_key = {(cell.arm, cell.seed): cell for cell in cells}
    outcomes = {
        (cell.arm, cell.seed): record for cell in snapshot.cells if (record := snapshot.outcome_of(cell)) is not None
    }
    by_digest = {d: r for c in snapshot.cells if (r := outcomes.get((c.arm, c.seed))) for d in c.digests}
    integrity = [*snapshot.findings, *_evaluation_findings(evaluations, by_digest)]
    unscored = _unscored(evaluations, snapshot)
    arms = [arm for arm in study.arms if arm != study.baseline]
    courses = {arm: _paired_curves(snapshot, arm, by_key) for arm in arms}
    samples = {
        arm: _sample(snapshot, arm, by_key, [*integrity, *_unlike(study.baseline, arm, outcomes)], courses[arm][1])
        for arm in arms
    }
    pair_seconds = {arm: _pair_mean(by_key, study.baseline, arm, "wall_seconds") for arm in arms}
    pair_costs = {arm: _pair_mean(by_key, study.baseline, arm, "cost_usd") for arm in arms}
    rule = _rule(snapshot, study.decision)
    tried = _tried(snapshot)
    undeclared = _undeclared(snapshot, tried)
    decided = decide_family([samples[a] for a in study.challengers], rule, undeclared=undeclared)
    if study.provenance == "reported":
        decided = tuple(_by_own_pairs(d, rule) for d in decided)
    decisions = {d.arm: _at_price(d, pair_costs[d.arm]) for d in decided}
    comparisons = []
    for arm in arms:
        own_rule = rule.model_copy(update={"price_per_pair_usd": pair_costs[arm]})
        estimates = describe(samples[arm], own_rule)
        comparisons.append(
            ArmComparison(
                arm=arm,
                role=study.role(arm),
                estimates=estimates,
                decision=decisions.get(arm),
                differences=_differences(samples[arm], estimates, rule),
                evidence=evidence_path(samples[arm], rule),
                evidence_below=evidence_path(samples[arm], rule, "below_margin"),
                seconds_per_point=cost_per_point(
                    estimates.rel_diff_pct, estimates.rel_ci95_pct, pair_seconds[arm], unit="s"
                ),
                pair_seconds=pair_seconds[arm],
                pair_cost_usd=pair_costs[arm],
                **_cost_and_course(snapshot, arm, by_key, estimates, courses[arm]),
                missing=_seeds_in(by_key, study.seeds, (study.baseline, arm), ("missing", "abandoned")),
                diverged=_seeds_in(by_key, study.seeds, (arm,), ("diverged",)),
                failed=_seeds_in(by_key, study.seeds, (arm,), ("failed",)),
            )
        )
    finals = [c.val_loss for c in cells if c.arm == study.baseline and c.val_loss is not None]
    counted = {record.attempt_id for record in outcomes.values()}
    lost = [r for r in snapshot.records if r.attempt_id not in counted]
    return Standing(
        snapshot=snapshot,
        cells=cells,
        comparisons=comparisons,
        baseline_mean=math.fsum(finals) / len(finals) if finals else None,
        baseline_sd=_sd(finals),
        margin=next((c.estimates.margin for c in comparisons if c.estimates.margin is not None), None),
        complete=all(cell.state in ("completed", "diverged") for cell in cells),
        integrity=integrity,
        notes=[*snapshot.notes, *_notes(snapshot), *unscored, *_series_notes(evaluations, by_digest)],
        evaluations=list(evaluations),
        diagnostics=_diagnostics(snapshot, evaluations),
        tried=tried,
        undeclared=undeclared,
        passed=judge_passes(study, rule, samples, decisions, cells),
        total_seconds=math.fsum(r.device_seconds for r in snapshot.records),
        total_cost_usd=math.fsum(r.cost_usd for r in snapshot.records),
        lost_seconds=math.fsum(r.device_seconds for r in lost),
        lost_cost_usd=math.fsum(r.cost_usd for r in lost),
    )


def verdict_json(standing: Standing, decision_sentence: str) -> dict[str, object]:
    """The content of verdict.json: one verdict a challenger, and the study's decision in one sentence."""
    snapshot = standing.snapshot
    return {
        "study": snapshot.study.slug,
        **({} if snapshot.study.twin_of is None else {"twin_of": snapshot.study.twin_of}),
        "registration": snapshot.registration.registration if snapshot.registration else None,
        "amended": snapshot.amended,
        "amendments": snapshot.amendments,
        "undeclared": standing.undeclared,
        "ledger_sha256": snapshot.ledger_sha256,
        "complete": standing.complete,
        "verdicts": {
            c.arm: {
                "verdict": c.decision.verdict.value,
                "reasons": list(c.decision.reasons),
                "next_pairs": c.decision.next_pairs,
                "next_cost_usd": c.decision.next_cost_usd,
                "p_adjusted": c.decision.p_adjusted,
                "correction": c.decision.correction,
                "family_size": c.decision.family_size,
            }
            for c in standing.comparisons
            if c.decision is not None
        },
        "passed": standing.passed.model_dump(mode="json") if standing.passed else None,
        "decision": decision_sentence,
        "generated_from": [cell.digest for cell in standing.cells if cell.state != "missing"],
    }


def exit_code(standing: Standing) -> int:
    """What `muon` returns for this standing: 5 for an INVALID study, 3 for an incomplete one, else 0."""
    verdicts = {c.decision.verdict for c in standing.comparisons if c.decision is not None}
    if Verdict.INVALID in verdicts:
        return 5
    return 3 if Verdict.INCOMPLETE in verdicts or not standing.complete else 0


def _cell(snapshot: Snapshot, cell: DeclaredCell) -> CellStanding:
    attempts = snapshot.attempts_at(cell)
    outcome = snapshot.outcome_of(cell)
    last = outcome or (attempts[-1] if attempts else None)
    return CellStanding(
        arm=cell.arm,
        role=snapshot.study.role(cell.arm),
        seed=cell.seed,
        digest=last.cell_digest if last else cell.digest,
        state=last.status if last else "missing",
        val_loss=outcome.val_loss if outcome else None,
        perplexity=outcome.perplexity if outcome else None,
        steps=last.final_step if last else 0,
        attempts=len(attempts),
        wall_seconds=math.fsum(r.device_seconds for r in attempts),
        cost_usd=math.fsum(r.cost_usd for r in attempts),
        error=last.error if last else None,
        curve=[(point.step, point.val_loss) for point in outcome.curve] if outcome else [],
    )


def _sample(
    snapshot: Snapshot,
    arm: str,
    cells: dict[tuple[str, int], CellStanding],
    integrity: list[str],
    curves: PairedCurves | None,
) -> PairedSample:
    study = snapshot.study
    # A seed that waits for a run is not yet a pair, and no sign of a selection: `missing` names it below.
    waiting = _seeds_in(cells, study.seeds, (study.baseline, arm), ("missing", "abandoned"))

    def runs(name: str) -> tuple[Run, ...]:
        found = []
        for seed in study.seeds:
            cell = cells[(name, seed)]
            if seed not in waiting and cell.state in ("completed", "diverged", "failed"):
                found.append(Run.model_validate({"seed": seed, "loss": cell.val_loss, "status": cell.state}))
        return tuple(found)

    started = [s for s in study.seeds if any(cells[(a, s)].state != "missing" for a in study.arms)]
    missing = tuple(
        f"cell {name}-{seed} is {cells[(name, seed)].state}; run it with `muon study run {study.slug}`"
        for seed in started
        for name in (study.baseline, arm)
        if cells[(name, seed)].state in ("missing", "abandoned")
    )
    missing += _left_out_pairs(snapshot, arm)
    return PairedSample(
        arm=arm,
        baseline=runs(study.baseline),
        challenger=runs(arm),
        provenance=study.provenance,
        early_regress=guardrail_regress(curves, **_scale(snapshot)) if curves else None,
        integrity_failures=tuple(dict.fromkeys(integrity)),
        missing_cells=missing,
    )


def _left_out_pairs(snapshot: Snapshot, arm: str) -> tuple[str, ...]:
    """One sentence a pair whose result is known and whose seed the declaration leaves out.

    Known is what was made in this study's name, or anything where the arm's declared runs are borrowed: its seeds may
    then have been picked. In a sequential plan only the next seeds in order are due; one beyond a gap waits.
    """
    study = snapshot.study
    assert study.decision is not None
    if study.twin_of is not None:
        return ()  # its seeds are its study's first ones, whatever other rehearsals have run
    borrowed = bool(snapshot.borrowed([arm]))
    theirs = {run.seed for run in snapshot.left_out if run.arm == arm and (borrowed or run.study == study.slug)}
    pairs = {run.seed for run in snapshot.left_out if run.arm == study.baseline} & theirs
    due = sorted(pairs)
    if study.decision.plan == "sequential":
        following = study.possible_seeds[len(study.seeds) :]
        due = list(itertools.takewhile(pairs.__contains__, following))
    return tuple(
        f"seed {seed}: {study.baseline}-{seed} and {arm}-{seed} have their results and the declaration leaves the seed "
        "out; put it into seeds, since leaving out a seed whose result is known would bias the test"
        for seed in due
    )


def _tried(snapshot: Snapshot) -> dict[str, int]:
    """Undeclared arm -> its variants: the most digests that it has on one seed."""
    by_arm: dict[str, dict[int, set[str]]] = {}
    for run in snapshot.outside:
        by_arm.setdefault(run.arm, {}).setdefault(run.seed, set()).add(run.digest)
    return {arm: max(map(len, seeds.values())) for arm, seeds in sorted(by_arm.items())}


def _undeclared(snapshot: Snapshot, tried: dict[str, int]) -> int:
    """How many arms beside the challengers the family has: 0 unless the challengers may have been picked by results.

    They may where their runs were there before the declaration, or were registered otherwise than they are now. Every
    arm that was run on these seeds is then a candidate, and so is a control or reference arm that was not registered as
    one before its result.
    """
    study, registration = snapshot.study, snapshot.registration
    if study.twin_of is not None:
        return 0  # a rehearsal, which picks nothing
    held = registration if registration is not None and registration.is_whole else None
    own = {r.registration for r in snapshot.records if r.study == study.slug and r.is_result}
    replaced = bool(own - {None, held.registration if held else snapshot.current_registration})
    before = held.challengers if held is not None and not replaced else study.challengers
    described = [*study.control, *study.reference]
    if replaced:
        # What was registered before is lost, and with it which arms were only to be described.
        late = {c.arm for c in snapshot.cells if c.arm in described and snapshot.outcome_of(c)}
    elif snapshot.borrowed(study.challengers) or set(before) != set(study.challengers):
        late = {cell.arm for cell in snapshot.borrowed(described)} | (set(described) & set(before))
    else:
        return 0
    return sum(tried.values()) + len(late)


def _paired_curves(
    snapshot: Snapshot, arm: str, cells: dict[tuple[str, int], CellStanding]
) -> tuple[list[int], PairedCurves | None]:
    """The seeds that have a curve in both arms, and their curves on one grid of steps."""
    study = snapshot.study
    held: dict[int, tuple[Curve, Curve]] = {}
    for seed in study.seeds:
        curves = (cells[(study.baseline, seed)].curve, cells[(arm, seed)].curve)
        if all(curves):
            held[seed] = curves
    base, ours = ([both[side] for both in held.values()] for side in (0, 1))
    return list(held), pair_curves(base, ours, shared=snapshot.settings.diverged_loss is None)


def _scale(snapshot: Snapshot) -> dict[str, Any]:
    """What curves are measured against: how long a run is, and what counts where a loss is not finite."""
    return {"total_steps": snapshot.settings.steps, "diverged_loss": snapshot.settings.diverged_loss}


def _diagnostics(snapshot: Snapshot, evaluations: Sequence[Evaluation]) -> list[Diagnosis]:
    """The diagnostics of every arm, from the evaluations of its declared cells that have series."""
    declared = snapshot.digests
    series: dict[str, dict[int, dict[str, list[tuple[int, float]]]]] = {}
    for line in evaluations:
        if line.series and line.cell_digest in declared:
            series.setdefault(line.arm, {})[line.seed] = line.series
    steps = snapshot.settings.steps
    return [found for arm in snapshot.study.arms for found in diagnose(arm, series.get(arm, {}), total_steps=steps)]


def _series_notes(evaluations: Sequence[Evaluation], by_digest: dict[str, RunRecord]) -> list[str]:
    """Which results were evaluated and left no series to read, and what of the series is too uncertain."""
    lines = [e for e in evaluations if e.cell_digest in by_digest]
    lacking = [f"{e.arm}-{e.seed}" for e in lines if not e.series]
    found = []
    if lacking:
        found.append(f"no series can be read from the curve.csv of {_some(lacking)}; the diagnostics are without them")
    measured = [e.series for e in lines if "hessian_top" in e.series]
    uncertain = sum(len(series["hessian_top"]) - len(converged(series)) for series in measured)
    if uncertain:
        found.append(
            f"eigenvalues of the Hessian left out of the diagnostics: {uncertain} of "
            f"{sum(len(series['hessian_top']) for series in measured)}, with a relative residual over "
            f"{LARGEST_RESIDUAL:g}"
        )
    return found


def _unlike(baseline: str, arm: str, outcomes: dict[tuple[str, int], RunRecord]) -> list[str]:
    """Why the runs of a seed are not a pair: they did not start alike, or are the same run."""
    found = []
    identical = []
    seeds = [seed for name, seed in outcomes if name == arm and (baseline, seed) in outcomes]
    for seed in seeds:
        ours, theirs = outcomes[(baseline, seed)], outcomes[(arm, seed)]
        unlike = [n for n in SAME_START if getattr(ours.hashes, n) != getattr(theirs.hashes, n)]
        if unlike:
            found.append(
                f"seed {seed}: {baseline} and {arm} do not share their {' and '.join(unlike)} (hashes differ), "
                "so they are not a pair"
            )
        curves = [[p.val_loss if p.val_loss is not None else math.nan for p in r.curve] for r in (ours, theirs)]
        if identical_curves(*curves):
            identical.append(seed)
    if identical and len(identical) == len(seeds):
        found.append(
            f"suspect: {arm} and {baseline} have identical loss curves on every seed; did the arm do anything?"
        )
    return found


def _evaluation_findings(evaluations: Sequence[Evaluation], by_digest: dict[str, RunRecord]) -> list[str]:
    """Where the saved weights do not score what the record of their training says."""
    found = []
    for line in evaluations:
        record = by_digest.get(line.cell_digest)
        if record is None or record.val_loss is None:
            continue
        if not line.agrees_with(record.val_loss):
            found.append(
                f"cell {record.arm}-{record.seed}: its weights score {line.val_loss} nats/token, its record says "
                f"{record.val_loss}; one of the two was edited"
            )
    return found


def _unscored(evaluations: Sequence[Evaluation], snapshot: Snapshot) -> list[str]:
    """Which completed cells have no evaluation of their weights beside the others'; none where nothing was scored."""
    scored = {line.cell_digest for line in evaluations}
    lacking = [
        f"{cell.arm}-{cell.seed}"
        for cell in snapshot.cells
        if (record := snapshot.outcome_of(cell)) and record.val_loss is not None and scored.isdisjoint(cell.digests)
    ]
    if not scored or not lacking:
        return []
    return [f"the weights of {_some(lacking)} were not scored again, so that nothing checks the recorded loss"]


def _some(names: Sequence[str]) -> str:
    """The names, of many the first and how many more there are."""
    shown = ", ".join(names[:MOST_NAMES])
    return f"{shown} and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else shown


def with_false_go(standing: Standing) -> Standing:
    """The standing with the rate at which its rule errs under its own noise: about a second of simulation.

    The challengers are resampled together, on the seeds that all of them have. None where fewer than two pairs are at
    hand, an arm is INVALID, or Dunnett's test decides between several arms, which is not simulated.
    """
    snapshot = standing.snapshot
    declared = snapshot.study.decision
    assert declared is not None
    by_seed = [{pair.seed: pair.difference for pair in c.differences} for c in standing.decided]
    seeds = [s for s in snapshot.study.seeds if all(s in held for held in by_seed)]
    judged = all(c.decision is not None and c.decision.verdict is not Verdict.INVALID for c in standing.decided)
    dunnett = any(c.decision is not None and c.decision.correction == "dunnett" for c in standing.decided)
    family_size = len(by_seed) + standing.undeclared
    if len(seeds) < 2 or not judged or (dunnett and family_size > 1):
        return standing
    residuals = np.array([[held[seed] for held in by_seed] for seed in seeds])
    if (residuals == residuals[:1]).all(axis=0).any():
        return standing
    rate = false_go_rate(residuals, _rule(snapshot, declared), family_size=family_size)
    return standing.model_copy(update={"false_go": rate})


def _rule(snapshot: Snapshot, declared: DeclaredRule) -> Rule:
    percent = isinstance(declared.min_effect, str)
    size = float(str(declared.min_effect).rstrip("%"))
    fixed_n: int | Literal["at_hand"] | None = None if declared.plan == "sequential" else declared.plan.fixed
    if fixed_n is not None and snapshot.study.twin_of is not None:
        fixed_n = "at_hand"  # a rehearsal has fewer seeds than its study's one look
    return Rule(
        min_effect=size,
        min_effect_unit="percent" if percent else "nats",
        alpha=declared.alpha,
        plan="sequential" if declared.plan == "sequential" else "fixed",
        fixed_n=fixed_n,
        n_min=declared.n_min,
        n_max=declared.n_max,
        first_seed=snapshot.study.first_seed,
        g=declared.g,
        correction=declared.correction,
        max_early_regress=float(str(declared.max_early_regress).rstrip("%")) / 100,
        diverged_loss=snapshot.settings.diverged_loss,
        amended=snapshot.amended,
    )


def _by_own_pairs(decision: Decision, rule: Rule) -> Decision:
    """The decision on reported runs, whose seeds nobody recorded: its next pairs are all that a GO takes, made here."""
    if decision.next_pairs is None:
        return decision
    own = decision.earliest_go_n or rule.n_max
    kept = [reason for reason in decision.reasons if not reason.startswith(FIRST_GO)]
    more = f"to decide takes at least {own} pairs that are run here; a reported pair counts as none of them"
    return decision.model_copy(update={"next_pairs": own, "reasons": (*kept, more)})


def _at_price(decision: Decision, usd: float) -> Decision:
    """The decision with the price of its next pairs, at what a pair of this arm costs: arms may differ in price."""
    if decision.next_pairs is None:
        return decision
    return decision.model_copy(update={"next_cost_usd": decision.next_pairs * usd})


def _differences(sample: PairedSample, estimates: Estimates, rule: Rule) -> list[PairDifference]:
    def counted(run: Run) -> float:
        loss = run.loss if run.status == "completed" else rule.diverged_loss
        assert loss is not None
        return loss

    base = {run.seed: run for run in sample.baseline}
    chal = {run.seed: run for run in sample.challenger}
    return [
        PairDifference(
            seed=seed,
            baseline=counted(base[seed]),
            challenger=counted(chal[seed]),
            difference=counted(base[seed]) - counted(chal[seed]),
        )
        for seed in estimates.seeds
    ]


def _pair_mean(
    cells: dict[tuple[str, int], CellStanding],
    baseline: str,
    arm: str,
    field: Literal["wall_seconds", "cost_usd"],
) -> float:
    """Mean over finished cells of the baseline plus that of the arm: what the next pair may be expected to take.

    A cell that has no outcome yet counts only while its arm has no other: a crash costs little and is no run.
    """
    total = 0.0
    for name in (baseline, arm):
        tried = [c for (a, _), c in cells.items() if a == name and c.state != "missing"]
        finished = [c for c in tried if c.state in ("completed", "diverged")]
        spent = [getattr(c, field) for c in finished or tried]
        total += math.fsum(spent) / len(spent) if spent else 0.0
    return total


def _cost_and_course(
    snapshot: Snapshot,
    arm: str,
    cells: dict[tuple[str, int], CellStanding],
    estimates: Estimates,
    curves: tuple[list[int], PairedCurves | None],
) -> dict[str, Any]:
    """The fields of an ArmComparison on what a run costs less than the baseline's, and on how it went."""
    study = snapshot.study
    course = course_fields(curves[1], **_scale(snapshot))
    costs: dict[str, Any] = {}
    undefined = course.pop("undefined")
    if not estimates.seeds:
        reason = estimates.undefined["mean_diff"]
        undefined |= dict.fromkeys(("seconds_difference", "usd_difference"), reason)
    else:
        base, ours = ([cells[(name, seed)] for seed in estimates.seeds] for name in (study.baseline, arm))
        costs["seconds_difference"] = cost_difference([c.wall_seconds for c in base], [c.wall_seconds for c in ours])
        if study.price_usd_per_gpu_hour > 0:
            costs["usd_difference"] = cost_difference([c.cost_usd for c in base], [c.cost_usd for c in ours])
        else:
            undefined["usd_difference"] = "the declared price is 0"
    return {**costs, **course, "curve_seeds": curves[0], "undefined": undefined}


def _seeds_in(
    cells: dict[tuple[str, int], CellStanding],
    seeds: list[int],
    arms: Sequence[str],
    states: Sequence[CellState],
) -> list[int]:
    return [s for s in seeds if any(cells[(arm, s)].state in states for arm in arms)]


def _notes(snapshot: Snapshot) -> list[str]:
    notes = []
    notes += [f"{reason}: plan amended, only the e-process decides" for reason in snapshot.amendments]
    study = snapshot.study
    if study.tuning == "untuned":
        notes.append("the arms' learning rates are untuned")
    digests = snapshot.digests
    extra = sorted({(r.arm, r.seed) for r in snapshot.records if r.cell_digest not in digests and r.is_result})
    if extra:
        listed = _some([f"{arm}-{seed}" for arm, seed in extra])
        notes.append(f"recorded in this study's name but outside its declared grid, and not counted: {listed}")
    for cell in snapshot.cells:
        failed = [r for r in snapshot.attempts_at(cell) if not r.is_result]
        if failed and snapshot.outcome_of(cell):
            reasons = "; ".join(f"attempt {r.attempt} {r.status}: {r.error}" for r in failed)
            lost = "a lost attempt" if len(failed) == 1 else f"{len(failed)} lost attempts"
            notes.append(f"cell {cell.arm}-{cell.seed} has an outcome after {lost} ({reasons})")
    return notes


def _sd(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
