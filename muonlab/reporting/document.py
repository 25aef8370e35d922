"""What a report says, in order, before it has a form: sections of paragraphs, tables, figures and samples.

Both renderings show this document, so that they cannot differ in what they say. All text is plain: a rendering
escapes it, and turns `...` into code. Numbers come from the Standing and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable

from muonlab.registry.record import RunRecord
from muonlab.reporting import sections_course, sections_record, sections_result
from muonlab.reporting.blocks import Bullets, Document, Kind, Section, Table, one_line, shortened, visible
from muonlab.reporting.computing import where_the_time_went
from muonlab.reporting.gate_wording import gate_warnings
from muonlab.reporting.selected import selection_doubts
from muonlab.reporting.standing import Standing
from muonlab.reporting.tuning_wording import tuning_limits, tuning_section
from muonlab.reporting.wording import (
    decision_sentence,
    family_text,
    headline,
    limits,
    next_step,
    outcomes_text,
    rehearsal_notes,
    status_line,
)

__all__ = ["Document", "Kind", "Table", "build", "one_line", "visible"]


def build(
    standing: Standing, *, pictures: Iterable[str], cell: RunRecord | None = None, partial: bool = False
) -> Document:
    """The document of a study; `pictures` are the names of the figures that could be drawn.

    A `partial` one is made while the study runs. It says so first, and has no verdict, no reasons for one, no advice.
    """
    drawn = tuple(pictures)
    study = standing.snapshot.study
    sections = [
        Section("Paired differences", sections_result.differences(standing, drawn)),
        Section("Comparisons", sections_result.comparisons(standing, partial=partial)),
        Section("Reasons", () if partial else sections_result.reasons(standing)),
        Section("What else was reported", sections_result.described(standing)),
        Section("Evidence as it grew", sections_result.evidence(standing, drawn)),
        Section("Loss curves", sections_result.curves(standing, drawn)),
        Section("Early stability", sections_course.early_stability(standing)),
        Section("Speed to target", sections_course.speed_to_target(standing)),
        Section("Cost", sections_course.cost(standing)),
        Section("Where the time went", where_the_time_went(standing)),
        Section("Tuning", tuning_section(standing.snapshot)),
        Section("Diagnostics", sections_course.diagnostics(standing, drawn)),
        Section("What the models write", sections_record.samples(standing)),
        Section("What was declared", sections_record.declared(standing)),
        Section("Every run", sections_record.runs(standing)),
        Section("Limits of this study", () if partial else (Bullets(shortened(_limits(standing), study.arms)),)),
        Section("Provenance", sections_record.provenance(standing)),
    ]
    return Document(
        slug=study.slug,
        question=one_line(study.question),
        headline=f"Partial: {outcomes_text(standing)}" if partial else headline(standing),
        lead=_partial_lead(standing) if partial else _lead(standing),
        warnings=shortened(_warnings(standing, partial=partial), study.arms),
        cell=_cell(standing, cell) if cell else None,
        sections=tuple(section for section in sections if section.blocks),
        partial=partial,
    )


def _limits(standing: Standing) -> list[str]:
    return [*limits(standing), *tuning_limits(standing.snapshot)]


def _lead(standing: Standing) -> tuple[str, ...]:
    return (decision_sentence(standing), *_as_a_whole(standing), f"Next: {next_step(standing)}", status_line(standing))


def _as_a_whole(standing: Standing) -> tuple[str, ...]:
    if standing.passed is None:
        return ()
    rehearsed = "In this rehearsal, which decides nothing: " if standing.snapshot.study.twin_of else ""
    return (f"{rehearsed}{standing.passed.sentence}",)


def _partial_lead(standing: Standing) -> tuple[str, ...]:
    return (
        f"This report is partial, made while the study runs: {outcomes_text(standing)}.",
        "It shows what there is so far, and gives no verdict; the study's own report does, when all declared runs have "
        "an outcome.",
        status_line(standing),
    )


def _warnings(standing: Standing, *, partial: bool) -> list[str]:
    word = "Contradiction" if partial else "INVALID"
    found = [*rehearsal_notes(standing), *(f"{word}: {reason}" for reason in standing.integrity)]
    if not standing.complete and not partial:
        found.append(
            "This report is partial: the declared grid is not finished, and what it says can change with every run."
        )
    found += gate_warnings(standing)
    found += [f"Plan amended: {reason}. Only the E-value decides." for reason in standing.snapshot.amendments]
    found += selection_doubts(standing.snapshot)
    if standing.undeclared:
        found.append(f"Family: {family_text(standing)}.")
    return found


def _cell(standing: Standing, record: RunRecord) -> Table:
    snapshot = standing.snapshot
    declared = next((c for c in snapshot.cells if record.cell_digest in c.digests), None)
    grid = f"declared as {declared.arm}-{declared.seed}" if declared else "outside the declared grid, not counted"
    columns: tuple[tuple[str, Kind], ...] = (
        ("this cell", "code"),
        ("status", "text"),
        ("loss [nats/token]", "number"),
        ("perplexity", "number"),
        ("seconds", "number"),
        ("cost", "number"),
        (snapshot.study.slug, "text"),
    )
    row = (
        f"{record.arm}, seed {record.seed}",
        record.status,
        sections_record.number_of(record.val_loss, 6),
        sections_record.number_of(record.perplexity, 4),
        f"{record.wall_seconds:,.1f}",
        sections_course.usd_of(standing, record.cost_usd),
        grid,
    )
    return Table(columns, (row,))
