"""What is declared and where it stands: the answers of `muon study list`, `show`, `status` and `run`.

`list` and `show` read files only. `status` looks at all the evidence again, which brings the ledger up to date.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from muonlab.pipeline.answer import Answer, Facts
from muonlab.pipeline.collect import collect
from muonlab.pipeline.conclude import index_entries, read_evaluations, verdict_sentence
from muonlab.pipeline.declare import current_registration, declared_params
from muonlab.pipeline.gates import Archived, Gate, gates_of, read_archive
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.price import declared_grid
from muonlab.pipeline.registered import read_registration
from muonlab.pipeline.resolve import check_study, grid_points, load_study, resolve_optimizer
from muonlab.pipeline.running import is_training
from muonlab.pipeline.study_run import RunOutcome
from muonlab.pipeline.tuning_checks import check_tuning, why_untuned
from muonlab.pipeline.tuning_results import arm_tunings
from muonlab.registry.errors import CellsFailedError, IntegrityError, MuonlabError, OverBudgetError
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import Params
from muonlab.registry.study import Decision, Study
from muonlab.reporting.criteria import Passed
from muonlab.reporting.index import IndexEntry, JudgedStudy
from muonlab.reporting.standing import Standing, exit_code, judge
from muonlab.reporting.tuning_report import read_tuned
from muonlab.reporting.tuning_standing import spell_options
from muonlab.reporting.tuning_wording import UNTUNED, tuning_sentences
from muonlab.reporting.wording import count, duration, family_text, listed, moment, money

TRAINING = "training"
Option = float | int | str | bool | None | list[float]


class StudyRow(Facts):
    """One study of the list."""

    slug: str
    kind: str | None
    """`comparison` or `tuning`; null where the declaration cannot be read."""
    provenance: str | None
    """`run`: made here; `reported`: by others."""
    workload: str | None
    arms: list[str]
    seeds: list[int]
    question: str | None
    decision: str | None
    """The sentence of its last report, of a tuning study what it chose; null before there is one."""
    verdicts: dict[str, str]
    """Challenger -> verdict, of the last report."""
    problem: str | None
    """Why the declaration or the last report cannot be read."""
    archived: list[str]
    """Its challengers that are archived on its verdict."""
    rehearsals: dict[str, dict[str, str]]
    """Twin, as `--workload` names it -> challenger -> verdict of its last report, which decides nothing; of a tuning
    study, arm -> what was chosen."""

    def lines(self) -> Iterator[str]:
        """Two lines: what it is, and what came out or is asked."""
        if self.kind is None:
            yield f"{self.slug}: cannot be read: {self.problem}"
            return
        reported = self.provenance == "reported"
        kind = "reported, not run here" if reported else self.kind
        seeds = count(len(self.seeds), "run" if reported else "seed")
        yield f"{self.slug}  {kind}, {len(self.arms)} arms x {seeds} on {self.workload}"
        yield f"    {self.decision or self.problem or self.question}"
        if self.archived:
            yield f"    archived: {listed(self.archived)}"
        for name, verdicts in self.rehearsals.items():
            came = ", ".join(f"{arm} {verdict}" for arm, verdict in verdicts.items())
            yield f"    rehearsal {name}: {came}; it decides nothing"


class StudyList(Answer):
    """The studies in experiments/, by name."""

    studies: list[StudyRow]

    def lines(self) -> Iterator[str]:
        """The list for a reader."""
        if not self.studies:
            yield "No study is declared in experiments/; `muon study new` declares one."
        for row in self.studies:
            yield from row.lines()


def list_studies(layout: Layout) -> StudyList:
    """Every study that is declared or was judged, and the outcome of its last report; a twin under its study."""
    entries = index_entries(layout)
    twins: dict[str, dict[str, dict[str, str]]] = {entry.slug: {} for entry in entries}
    alone = []
    for entry in entries:
        parent = entry.judged.summary.twin_of if entry.judged is not None else None
        if entry.tuned is not None:
            parent = entry.tuned.twin_of
        if entry.judged is not None and parent in twins:
            twins[parent][entry.slug.removeprefix(f"{parent}-")] = _verdicts_of(entry.judged)
        elif entry.tuned is not None and parent in twins:
            chosen = {arm: spell_options(options) for arm, options in entry.tuned.chosen.items()}
            twins[parent][entry.slug.removeprefix(f"{parent}-")] = chosen
        else:
            alone.append(entry)
    archive = read_archive(layout)
    return StudyList(studies=[_row(layout, entry, twins[entry.slug], archive) for entry in alone])


def _verdicts_of(judged: JudgedStudy) -> dict[str, str]:
    return {arm: its.verdict for arm, its in judged.summary.challengers.items()}


def _row(layout: Layout, entry: IndexEntry, rehearsals: dict[str, dict[str, str]], archive: list[Archived]) -> StudyRow:
    row: dict[str, Any] = {
        "slug": entry.slug, "kind": None, "provenance": None, "workload": None, "arms": [], "seeds": [],
        "question": None, "decision": None, "verdicts": {}, "problem": entry.reason or None, "rehearsals": rehearsals,
        "archived": [its.arm for its in archive if its.study == entry.slug],
    }  # fmt: skip
    if entry.tuned is not None:
        row["decision"] = entry.tuned.outcome
    if entry.judged is not None:
        row["decision"] = entry.judged.decision
        row["verdicts"] = _verdicts_of(entry.judged)
    try:
        study = load_study(layout, entry.slug)
    except MuonlabError as error:
        return StudyRow(**{**row, "problem": str(error)})
    named = ("kind", "provenance", "workload", "arms", "seeds", "question")
    return StudyRow(**{**row, **{name: getattr(study, name) for name in named}})


class DeclaredArm(Facts):
    """One arm, as the last commit's params.yaml configures it."""

    name: str
    role: str
    """`baseline`, `challenger` (decided on), `control` or `reference` (described only)."""
    kind: str | None
    """Its file in optim/; null where others ran it."""
    options: dict[str, Option]
    """As set in params.yaml, the tuned ones of the workload included; all others are the kind's defaults."""
    archived: str | None
    """On which verdict of which study it is archived; null where it is not."""


class StudyCard(Answer):
    """A study's declaration. Cost in USD."""

    slug: str
    question: str
    kind: str
    provenance: str
    twin_of: str | None
    """The study that this one rehearses; null for a study of its own."""
    twins: dict[str, str]
    """Its rehearsals: what `--workload` names -> the workload it stands for."""
    workload: str
    steps: int
    """Optimizer steps of a run."""
    arms: list[DeclaredArm]
    seeds: list[int]
    cells: int
    """Number of runs that are declared."""
    rule: dict[str, Option | dict[str, int]] | None
    """The decision rule as in study.yaml, defaults filled in; null for a tuning study."""
    grid: dict[str, list[Option]]
    """Of a tuning study: option -> values tried."""
    tuning: str
    """The tuning study that chose the learning rates, or `untuned`."""
    tuned: list[str]
    """How each arm was tuned by it, a sentence an arm; empty where no tuning study is named."""
    notes: list[str]
    """Why it cannot start yet."""
    price_usd_per_gpu_hour: float
    budget_usd: float
    on_archive: str | None
    """The next method, if this one is archived."""
    passes: list[str]
    """What must hold for the study as a whole to have passed; empty where it declares no criterion."""
    requires: list[str]
    """`<study>: <verdict>`, to be reached first."""
    gates: list[Gate]
    """How what is required stands now; and the arms that are archived, while the study is not registered."""
    declaration: str | None
    """SHA-256 of what is declared now; null where others ran it, which nothing registers."""
    registration: str | None
    """SHA-256 of what was registered; null before."""
    registered_at: str | None
    registered_commit: str | None

    def lines(self) -> Iterator[str]:
        """The declaration in words."""
        yield f"{self.slug}: {self.question}"
        made = ", reported by others and not run here" if self.provenance == "reported" else ""
        yield f"A {self.kind} on the workload {self.workload}, {self.steps} steps a run{made}."
        if self.twin_of is not None:
            yield f"A rehearsal of {self.twin_of}, about which it decides nothing."
        yield "Arms:"
        width = max(len(arm.name) for arm in self.arms)
        for arm in self.arms:
            options = ", ".join(f"{key} {value}" for key, value in arm.options.items())
            configured = "" if arm.kind is None else f"  {arm.kind}" + (f": {options}" if options else "")
            archived = f"  ({arm.archived})" if arm.archived else ""
            yield f"  {arm.name:<{width}}  {arm.role:<10}{configured}{archived}".rstrip()
        if self.grid:
            yield "Grid: " + "; ".join(f"{key} in {', '.join(map(str, found))}" for key, found in self.grid.items())
        yield f"Seeds: {', '.join(map(str, self.seeds))}; {count(self.cells, 'run')} in all."
        if self.rule is not None:
            yield from self._rule()
        if self.kind == "comparison":
            yield f"Tuning: {self.tuning if self.tuned else 'none; the learning rates were not tuned for this study.'}"
            yield from (f"  {sentence}" for sentence in self.tuned)
        yield from (f"It cannot start yet: {note}" for note in self.notes)
        if self.passes:
            yield f"Passes as a whole if all of this holds: {', '.join(self.passes)}."
        yield self._price()
        if self.on_archive:
            yield f"If a challenger is archived, the next method is {self.on_archive}."
        for gate in self.gates:
            yield from gate.lines()
        for name, workload in self.twins.items():
            yield f"Rehearsal: --workload {name}, on {workload}."
        yield self._registered()

    def _rule(self) -> Iterator[str]:
        rule = Decision.model_validate(self.rule)
        challengers = [arm.name for arm in self.arms if arm.role == "challenger"]
        yield f"Rule: {listed(challengers)} against {self._baseline()}, by {rule.metric}."
        yield f"  smallest improvement worth having: {_size(rule.min_effect)}"
        family = f", kept over {len(challengers)} challengers by {rule.correction.capitalize()}'s correction"
        yield f"  one-sided error rate: {rule.alpha:g}{family if len(challengers) > 1 else ''}"
        if rule.plan == "sequential":
            yield f"  looks: after every pair from {rule.n_min} to {rule.n_max}, by E-values (prior scale {rule.g:g})"
            yield f"  the look at {rule.n_max} also decides by a t-test that spends what is left of the error rate"
        else:
            yield f"  looks: one, after {len(self.seeds)} pairs"
        yield f"  guardrails: an early loss at most {rule.max_early_regress} above the baseline's, no diverged run"

    def _baseline(self) -> str:
        return next(arm.name for arm in self.arms if arm.role == "baseline")

    def _price(self) -> str:
        if self.price_usd_per_gpu_hour == 0:
            return "Price: none is declared; the report counts seconds."
        return f"Price: ${self.price_usd_per_gpu_hour:g} a GPU hour; budget: {money(self.budget_usd)}."

    def _registered(self) -> str:
        if self.declaration is None:
            return "Registered: never; what others report was not declared here before its results."
        if self.registration is None:
            return f"Registered: not yet; its first run does it, or `muon study register {self.slug}` now."
        when = f"{moment(self.registered_at or '')}, {self.registration[:12]}"
        if self.registration == self.declaration:
            return f"Registered: {when}; it reads the same now."
        return (
            f"Registered: {when}; it reads otherwise now ({self.declaration[:12]}), so that the plan counts as amended."
        )


def _size(declared: float | str) -> str:
    return f"{declared} of the baseline's mean" if isinstance(declared, str) else f"{declared:g} nats/token"


def show_study(layout: Layout, slug: str) -> StudyCard:
    """A study's declaration, as the last commit's params.yaml resolves it. Raises UsageError for a wrong one."""
    study = load_study(layout, slug)
    params = declared_params(layout)
    reported = study.provenance == "reported"
    if not reported:
        check_study(params, study)
        check_tuning(layout, study)
    held = read_registration(layout, slug)
    points = len(grid_points(study)) if study.kind == "tuning" else 1
    untuned = None if reported else why_untuned(layout, params, study)
    return StudyCard(
        slug=slug,
        question=study.question,
        kind=study.kind,
        provenance=study.provenance,
        twin_of=study.twin_of,
        twins={name: twin.workload for name, twin in study.twins.items()},
        workload=study.workload,
        steps=_steps(params, study),
        arms=[_arm(params, study, arm, read_archive(layout)) for arm in study.arms],
        seeds=list(study.seeds),
        cells=len(study.arms) * len(study.seeds) * points,
        rule=None if study.decision is None else study.decision.model_dump(mode="json"),
        grid=dict(study.grid),
        tuning=study.tuning,
        tuned=[] if reported else _tuned(layout, params, study),
        notes=[] if untuned is None else [untuned],
        price_usd_per_gpu_hour=study.price_usd_per_gpu_hour,
        budget_usd=study.budget_usd,
        on_archive=study.on_archive,
        passes=_passes(study),
        requires=[f"{required.study}: {required.verdict}" for required in study.requires],
        gates=gates_of(layout, study),
        declaration=None if reported else current_registration(params, study),
        registration=held.registration if held else None,
        registered_at=held.registered_at if held else None,
        registered_commit=held.commit if held else None,
    )


def _tuned(layout: Layout, params: Params, study: Study) -> list[str]:
    if study.tuning == UNTUNED:
        return []
    options = {arm: resolve_optimizer(params, study.workload, arm).options for arm in study.arms}
    return tuning_sentences(study.tuning, study.arms, arm_tunings(layout, params, study)[0], options)


def _passes(study: Study) -> list[str]:
    asked = {} if study.passes is None else study.passes.model_dump()
    return [name if value is True else f"{name} {value}" for name, value in asked.items() if value]


def _steps(params: Params, study: Study) -> int:
    if study.reported is not None:
        return study.reported.workloads[study.workload].steps
    return params.workloads[study.workload].settings.steps


def _arm(params: Params, study: Study, arm: str, archive: list[Archived]) -> DeclaredArm:
    archived = next((f"archived as {its.verdict} by {its.study}" for its in archive if its.arm == arm), None)
    if study.provenance == "reported":
        return DeclaredArm(name=arm, role=study.role(arm), kind=None, options={}, archived=archived)
    entry = params.optimizers[arm]
    # What a tuning study tries takes the place of what is tuned.
    tuned = params.workloads[study.workload].tuned.get(arm, {}) if study.kind == "comparison" else {}
    options = {key: value for key, value in {**entry, **tuned}.items() if key != "kind"}
    kind = str(entry.get("kind", arm))
    return DeclaredArm(name=arm, role=study.role(arm), kind=kind, options=options, archived=archived)


class CellStatus(Facts):
    """One declared cell as the evidence has it."""

    arm: str
    seed: int
    options: dict[str, Option] = {}
    """Of a tuning study: the point of its grid."""
    state: str
    """`completed`, `diverged`, `failed`, `abandoned` or `missing`; `training` while an attempt at a result runs."""
    val_loss: float | None
    """Final validation loss, nats/token."""
    attempts: int
    wall_seconds: float
    """Over all attempts."""
    cost_usd: float
    """Over all attempts."""
    digest: str

    def lines(self) -> Iterator[str]:
        """One line."""
        loss = "-" if self.val_loss is None else f"{self.val_loss:.4f}"
        spent = f"{self.wall_seconds:7.1f} s  ${self.cost_usd:.2f}" if self.attempts else ""
        more = f"  {self.attempts} attempts" if self.attempts > 1 else ""
        name = f"{self.arm}-{self.seed} {spell_options(self.options)}".rstrip()
        yield name.ljust(20) + f"{self.state:<10} {loss:>8} {spent}  {self.digest[:12]}{more}"


class ArmVerdict(Facts):
    """What is decided about a challenger."""

    verdict: str
    reasons: list[str]


class WholeStudy(Facts):
    """What came of the study's own pass criterion."""

    verdict: bool | None
    """True: passed; false: failed; null: open."""
    reasons: list[str]

    @classmethod
    def of(cls, standing: Standing | None) -> WholeStudy | None:
        """None where the study declares no criterion, or has no standing."""
        passed = standing.passed if standing else None
        return None if passed is None else cls(verdict=passed.verdict, reasons=passed.reasons)

    def lines(self) -> Iterator[str]:
        """The outcome with its reasons."""
        yield Passed(verdict=self.verdict, reasons=self.reasons).sentence


class StudyStatus(Answer):
    """Every cell of a study, and its verdicts."""

    study: str
    twin_of: str | None
    """The study that this one rehearses, about which its verdicts decide nothing; null for a study of its own."""
    cells: list[CellStatus]
    verdicts: dict[str, ArmVerdict]
    """Challenger -> verdict; empty for a tuning study."""
    passed: WholeStudy | None
    """Null where the study declares no pass criterion."""
    findings: list[str]
    """Evidence that contradicts itself; any of them makes the study INVALID."""
    notes: list[str]
    doubts: list[str]
    """What the verdicts must be read with: amendments, and arms that were run beside the study."""
    exit_code: int
    """0; 3 where the grid is incomplete; 5 where the evidence contradicts itself."""

    def lines(self) -> Iterator[str]:
        """The cells, then the verdicts."""
        for cell in self.cells:
            yield from cell.lines()
        if trained := sum(cell.state == TRAINING for cell in self.cells):
            yield f"{count(trained, 'cell')} in training now; `muon status` shows how far."
        for arm, its in self.verdicts.items():
            yield f"{arm}: {its.verdict}{', rehearsal' if self.twin_of else ''}: {its.reasons[0]}"
        if self.passed is not None:
            yield from self.passed.lines()

    def warnings(self) -> Iterator[str]:
        """What belongs on standard error."""
        for sentence in (*self.findings, *self.notes, *self.doubts):
            yield f"muon: {sentence}"


def status_of(layout: Layout, slug: str) -> StudyStatus:
    """Look at all the evidence of a study again: ledger, git history, scratch, outputs."""
    snapshot = collect(layout, slug, anew=False)
    cells = []
    tuning = snapshot.study.kind == "tuning"
    points = [point for _, _, point in declared_grid(snapshot.study)] if tuning else [{}] * len(snapshot.cells)
    for cell, options in zip(snapshot.cells, points, strict=True):
        attempts = snapshot.attempts_at(cell)
        outcome = next((r for r in attempts if r.is_result), attempts[-1] if attempts else None)
        cells.append(
            CellStatus(
                arm=cell.arm,
                seed=cell.seed,
                options=options,
                state=_state(outcome, trains=is_training(layout, cell.digest)),
                val_loss=outcome.val_loss if outcome else None,
                attempts=len(attempts),
                wall_seconds=sum(r.device_seconds for r in attempts),
                cost_usd=sum(r.cost_usd for r in attempts),
                digest=cell.digest,
            )
        )
    standing = judge(snapshot, read_evaluations(layout, slug)) if snapshot.study.kind == "comparison" else None
    if standing is not None:
        code = exit_code(standing)
    else:
        finished = all(cell.state in ("completed", "diverged") for cell in cells)
        code = 0 if finished else CellsFailedError.exit_code
        code = IntegrityError.exit_code if snapshot.findings else code
    return StudyStatus(
        study=slug,
        twin_of=snapshot.study.twin_of,
        cells=cells,
        verdicts=_verdicts(standing) if standing else {},
        passed=WholeStudy.of(standing),
        findings=list(snapshot.findings),
        notes=list(snapshot.notes),
        doubts=list(doubts(standing)) if standing else [],
        exit_code=code,
    )


def _state(outcome: RunRecord | None, *, trains: bool) -> str:
    if trains and (outcome is None or not outcome.is_result):
        return TRAINING
    return outcome.status if outcome else "missing"


def _verdicts(standing: Standing) -> dict[str, ArmVerdict]:
    return {
        c.arm: ArmVerdict(verdict=c.decision.verdict.value, reasons=list(c.decision.reasons))
        for c in standing.decided
        if c.decision is not None
    }


def doubts(standing: Standing) -> Iterator[str]:
    """What the verdicts must be read with, in sentences: the amendments, and arms that were run beside the study."""
    for reason in standing.snapshot.amendments:
        yield f"plan amended: {reason}."
    if standing.tried or standing.undeclared:
        yield f"{family_text(standing)}."


class StudyRun(Answer):
    """How a run of a study ended."""

    study: str
    twin_of: str | None
    """The study that this one rehearses, about which its verdicts decide nothing; null for a study of its own."""
    trained: int
    """Cells that this run trained."""
    in_place: int
    """Cells that were in place, restored from DVC's cache, or trained before and only taken over."""
    reported: int
    """Runs of others that were read; nothing of them is trained or recorded here."""
    failed: dict[str, str]
    """Cell -> why it has no outcome."""
    over_budget: str | None
    """Why training was stopped before its end, where the budget or --max-cost stopped it."""
    seconds: float
    """Wall time of this run."""
    cost_usd: float
    """Of all attempts at the study's cells so far."""
    verdicts: dict[str, ArmVerdict]
    passed: WholeStudy | None
    """Null where the study declares no pass criterion."""
    decision: str
    """The report's first sentence."""
    report: str
    """Path of report.md in the repository."""
    doubts: list[str]
    """What the verdicts must be read with: amendments, and arms that were run beside the study."""
    exit_code: int
    """As the command's: 0; 1 with --fail-on-no-go; 3; 4; 5."""

    def lines(self) -> Iterator[str]:
        """Verdicts, decision and the report's path."""
        for arm, its in self.verdicts.items():
            yield f"{arm}: {its.verdict}{', rehearsal' if self.twin_of else ''}"
        if self.passed is not None:
            yield from self.passed.lines()
        yield self.decision
        yield f"report: {self.report}"

    def warnings(self) -> Iterator[str]:
        """The work that was done, and what belongs beside the verdict, for standard error."""
        for key, reason in self.failed.items():
            yield f"failed: {key}: {reason}"
        if self.reported:
            done = f"{count(self.reported, 'reported run')} read, nothing trained or recorded here"
        elif self.trained == 0 and not self.failed and self.over_budget is None:
            done = f"nothing to train: all {self.in_place} cells are in place"
        else:
            done = f"trained {self.trained} cells, {self.in_place} in place or restored, {len(self.failed)} failed"
        spent = f", {money(self.cost_usd)} in all" if self.cost_usd else ""
        yield f"{self.study}: {done} ({duration(self.seconds)}{spent})."
        if self.over_budget is not None:
            yield f"muon: {self.over_budget}"
        for sentence in self.doubts:
            yield f"muon: {sentence}"


class TuningRun(Answer):
    """How a run of a tuning study ended."""

    study: str
    chosen: dict[str, dict[str, Option]]
    """Arm -> options, now in params.yaml; empty while runs are missing, without an arm whose best runs diverged."""
    outcome: str
    """What was chosen, in a sentence."""
    results: str
    """Path of the table of all runs in the repository, written when all have an outcome."""
    report: str
    """Path of report.md in the repository."""
    exit_code: int
    """0; 3 where cells failed; 5 where the evidence contradicts itself."""

    def lines(self) -> Iterator[str]:
        """The outcome, and where the results are; the doubts were said as they were found."""
        yield self.outcome
        yield f"results: {self.results}"
        yield f"report: {self.report}"


def tuning_answer(layout: Layout, slug: str, code: int) -> TuningRun:
    """The answer of `muon study run` on a tuning study that has ended with this exit code."""
    tuned = read_tuned(layout.reports(slug))
    assert tuned is not None  # the run has written it
    return TuningRun(
        study=slug,
        chosen=tuned.chosen if code == 0 else {},
        outcome=tuned.outcome,
        results=f"experiments/{slug}/results.csv",
        report=f"reports/{slug}/report.md",
        exit_code=code,
    )


def run_answer(layout: Layout, slug: str, outcome: RunOutcome, *, fail_on_no_go: bool) -> StudyRun:
    """The answer of `muon study run` on a comparison."""
    standing = outcome.standing
    verdicts = _verdicts(standing)
    code = exit_code(standing)
    if code == 0 and fail_on_no_go and any(its.verdict == "NO_GO" for its in verdicts.values()):
        code = 1
    if code != IntegrityError.exit_code and outcome.over_budget is not None:
        code = OverBudgetError.exit_code
    return StudyRun(
        study=slug,
        twin_of=standing.snapshot.study.twin_of,
        trained=outcome.trained,
        in_place=outcome.restored,
        reported=len(standing.cells) if standing.snapshot.study.provenance == "reported" else 0,
        failed=outcome.failed,
        over_budget=outcome.over_budget,
        seconds=outcome.seconds,
        cost_usd=standing.total_cost_usd,
        verdicts=verdicts,
        passed=WholeStudy.of(standing),
        decision=verdict_sentence(layout, slug) or "",
        report=f"reports/{slug}/report.md",
        doubts=list(doubts(standing)),
        exit_code=code,
    )
