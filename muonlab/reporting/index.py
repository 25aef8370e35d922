"""The index of all studies, reports/README.md: verdict, effect, pairs, cost and date of each, and what was not run.

Made from the `summary` in each study's verdict.json, so that ten thousand recorded runs cost a few hundred small
files and neither the ledger nor a report is read. The same studies give the same bytes: no clock is asked.

Differences are baseline - challenger in % of the baseline's loss (positive: challenger better), cost in USD, time in
seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from muonlab.registry.errors import UsageError
from muonlab.registry.settings import Closed
from muonlab.reporting.blocks import Kind, Table, one_line
from muonlab.reporting.criteria import Passed
from muonlab.reporting.report import escape_inline, markdown_table
from muonlab.reporting.standing import ArmComparison, Standing
from muonlab.reporting.tuning_report import TunedStudy
from muonlab.reporting.wording import ABSENT, bracket, broken_guardrails, duration, half_width, money, signed

COLUMNS = (
    "Better by: the baseline's final validation loss minus the challenger's on the same seed (reported runs: of seeds "
    "that were not recorded), in % of the baseline's, averaged over the pairs; negative is worse. The interval is for "
    "one look at a number of pairs that no result chose. Cost: all attempts of all arms, failed ones too, in computing "
    "time where no price was declared."
)


class ArmSummary(Closed):
    """One challenger."""

    verdict: str
    guardrail_failed: bool
    n: int
    """Pairs."""
    rel_diff_pct: float | None
    rel_ci95_pct: tuple[float, float] | None
    undefined: str | None
    """Why the interval is None."""


class Summary(Closed):
    """What the index says of a study that was judged."""

    schema_version: Literal[1] = 1
    question: str
    provenance: Literal["run", "reported"]
    complete: bool
    challengers: dict[str, ArmSummary]
    seconds: float
    """Over all attempts, failed ones too."""
    cost_usd: float | None
    """The same in USD; None where the study has no price."""
    last_result: str | None
    """Day (UTC) on which the last run that counts ended; None before the first, and where it was not recorded."""
    twin_of: str | None = None
    """The study that this one rehearses, of which it decides nothing."""
    passed: Literal["passed", "failed", "open"] | None = None
    """By its pass criterion; None where it declares none."""


class JudgedStudy(BaseModel):
    """What is read of verdict.json; its other keys are for others."""

    model_config = ConfigDict(frozen=True)

    study: str
    decision: str
    summary: Summary
    passed: Passed | None = None
    amended: bool = False


class IndexEntry(NamedTuple):
    """A study, and where it stands."""

    slug: str
    question: str
    state: Literal["judged", "waiting", "tuning", "foreign"]
    judged: JudgedStudy | None = None
    """Of a judged study."""
    tuned: TunedStudy | None = None
    """Of a tuning study that has a report."""
    reason: str = ""
    """Of a foreign one: what is wrong with its files, and what to do."""


def summarize(standing: Standing) -> Summary:
    """The summary of a judged study, for its verdict.json."""
    study = standing.snapshot.study
    return Summary(
        question=study.question,
        provenance=study.provenance,
        complete=standing.complete,
        challengers={c.arm: _arm_summary(standing, c) for c in standing.decided},
        seconds=standing.total_seconds,
        cost_usd=standing.total_cost_usd if study.price_usd_per_gpu_hour > 0 else None,
        last_result=_last_result(standing),
        twin_of=study.twin_of,
        passed=standing.passed.word if standing.passed else None,
    )


def _arm_summary(standing: Standing, comparison: ArmComparison) -> ArmSummary:
    e, decision = comparison.estimates, comparison.decision
    assert decision is not None
    return ArmSummary(
        verdict=decision.verdict.value,
        guardrail_failed=bool(broken_guardrails(standing, comparison)),
        n=e.n,
        rel_diff_pct=e.rel_diff_pct,
        rel_ci95_pct=e.rel_ci95_pct,
        undefined=e.undefined.get("rel_ci95_pct"),
    )


def _last_result(standing: Standing) -> str | None:
    if standing.snapshot.study.provenance == "reported":
        return None
    declared = standing.snapshot.digests
    ends = [
        datetime.fromisoformat(r.started_at) + timedelta(seconds=r.wall_seconds)
        for r in standing.snapshot.records
        if r.is_result and r.cell_digest in declared
    ]
    return max(ends).astimezone(UTC).date().isoformat() if ends else None


def read_judged(folder: Path) -> JudgedStudy | None:
    """What reports/<study>/verdict.json says, None before there is one.

    Raises UsageError for a file that this version has not written for this study.
    """
    path = folder / "verdict.json"
    where = f"reports/{folder.name}/verdict.json"
    again = f"`muon study run {folder.name}` makes it anew"
    try:
        found = JudgedStudy.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError, OSError):
        raise UsageError(f"{where}: another version wrote it, or it was edited; {again}.") from None
    if found.study != folder.name:
        raise UsageError(f"{where}: it is the verdict of {found.study!r}, not of this study; {again}.")
    return found


def render_index(entries: Sequence[IndexEntry]) -> str:
    """The index as Markdown that reads well raw, too: the judged studies in a table, the others in lists."""
    with_verdict = [(entry.slug, entry.judged.summary) for entry in entries if entry.judged is not None]
    judged = [(slug, summary) for slug, summary in with_verdict if summary.twin_of is None]
    rehearsed = [(slug, summary) for slug, summary in with_verdict if summary.twin_of is not None]
    parts = [
        "# Studies",
        "Written by `muon` at the end of every report, from the verdict.json of each study; an edit here is lost.",
    ]
    if judged:
        parts += [
            markdown_table(_table(judged)),
            COLUMNS,
            "\n".join(f"- **{slug}** {escape_inline(one_line(summary.question))}" for slug, summary in judged),
        ]
    else:
        parts.append("No study has a verdict yet.")
    for title, state in (
        ("Declared, without a report", "waiting"),
        ("Cannot be read", "foreign"),
        ("Tuning: these choose learning rates and have no verdict", "tuning"),
    ):
        lines = [_line(entry) for entry in entries if entry.state == state]
        if lines:
            parts += [f"## {title}", "\n".join(lines)]
    if rehearsed:
        about = (
            "Each shows that its study runs, on a workload made small for that, and decides nothing about it. "
            "Rehearsals on one workload share the runs that they have in common, so that equal numbers are one result "
            "and not several. The runs of a report that came with the repository are not in it: `make rehearsals` "
            "makes them again."
        )
        parts += ["## Rehearsals", about, markdown_table(_table(rehearsed)), *(() if judged else (COLUMNS,))]
    if with_verdict:
        parts.append("\n".join(f"[{slug}]: {slug}/report.md" for slug, _ in with_verdict))
    return "\n\n".join(parts) + "\n"


def _line(entry: IndexEntry) -> str:
    if entry.state == "foreign":
        return f"- {entry.slug}: {escape_inline(one_line(entry.reason))}"
    question = escape_inline(one_line(entry.question))
    if entry.state == "tuning":
        if entry.tuned is None:
            return f"- [{entry.slug}](../experiments/{entry.slug}/study.yaml): {question} No report yet."
        rehearsal = f"A rehearsal of {entry.tuned.twin_of}. " if entry.tuned.twin_of else ""
        return f"- [{entry.slug}]({entry.slug}/report.md): {rehearsal}{escape_inline(one_line(entry.tuned.outcome))}"
    return f"- {entry.slug}: {question} (`muon study run {entry.slug}`)"


def _table(judged: Sequence[tuple[str, Summary]]) -> Table:
    """A row a challenger; what belongs to the whole study stands in its first row."""
    columns: tuple[tuple[str, Kind], ...] = (
        ("study", "text"),
        ("challenger", "text"),
        ("verdict", "text"),
        ("better by", "number"),
        ("95% interval", "number"),
        ("pairs", "number"),
        ("cost", "number"),
        ("last result", "text"),
    )
    rows = []
    for slug, summary in judged:
        # In Markdown a name in brackets is a link where its address is given, as it is below the table.
        study = (f"[{slug}]", *_spent(summary))
        for arm, its in summary.challengers.items():
            # The criterion is the study's: it stands in its first row, as the study's name does.
            passed = f" (criterion: {summary.passed})" if study[0] and summary.passed else ""
            rows.append((study[0], arm, _verdict(summary, its) + passed, *_effect(its), str(its.n), *study[1:]))
            study = ("", "", "")
    return Table(columns, tuple(rows))


def _verdict(summary: Summary, its: ArmSummary) -> str:
    judged = its.verdict not in ("INVALID", "INCOMPLETE")
    words = [
        its.verdict,
        *(["guardrail failed"] if its.guardrail_failed and judged else []),
        *(["reported, not run here"] if summary.provenance == "reported" else []),
        *(["partial"] if not summary.complete else []),
        *(["rehearsal"] if summary.twin_of is not None else []),
    ]
    return ", ".join(words)


def _effect(its: ArmSummary) -> tuple[str, str]:
    if its.rel_diff_pct is None:
        return (ABSENT, f"none: {its.undefined}")
    better = signed(its.rel_diff_pct, half_width(its.rel_ci95_pct, its.rel_diff_pct)) + "%"
    return (better, bracket(its.rel_ci95_pct, "%") if its.rel_ci95_pct else f"none: {its.undefined}")


def _spent(summary: Summary) -> tuple[str, str]:
    cost = duration(summary.seconds) if summary.cost_usd is None else money(summary.cost_usd)
    unknown = "not recorded" if summary.provenance == "reported" else ABSENT
    return (cost, summary.last_result or unknown)
