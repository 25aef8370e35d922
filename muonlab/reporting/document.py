"""What a report says, in order, before it has a form: sections of paragraphs, tables, figures and samples.

Both renderings show this document, so that they cannot differ in what they say. All text is plain: a rendering
escapes it, and turns `...` into code. Numbers come from the Standing and nowhere else.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from muonlab.registry.record import RunRecord
from muonlab.registry.verdict import Verdict
from muonlab.reporting.standing import ArmComparison, Standing
from muonlab.reporting.wording import (
    ABSENT,
    bracket,
    broken_guardrails,
    count,
    decision_sentence,
    duration,
    family_text,
    half_width,
    headline,
    limits,
    listed,
    margin_text,
    moment,
    money,
    next_step,
    orthogonalizers,
    percent_of,
    plain,
    signed,
    status_line,
    worst_pair,
)
from muonlab.stats.spending import CostDifference

Kind = Literal["text", "prose", "number", "code", "arm"]


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences, under a name where it needs one."""

    sentences: tuple[str, ...]
    title: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of plain cells; an `arm` column shows the arm's colour where there is colour."""

    columns: tuple[tuple[str, Kind], ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Pictures:
    """Figures by name; two stand side by side where there is room."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Samples:
    """(who wrote it, text): line breaks kept, nothing in it active."""

    written: tuple[tuple[str, str], ...]


Block = Paragraph | Bullets | Table | Pictures | Samples


@dataclass(frozen=True)
class Section:
    """A titled part of the report."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """The whole report."""

    slug: str
    question: str
    headline: str
    lead: tuple[str, ...]
    """What to quote, what to do next, how things stand."""
    warnings: tuple[str, ...]
    """What must be known before the verdict is read."""
    cell: Table | None
    sections: tuple[Section, ...]


def visible(text: str) -> str:
    """Foreign text with what would act on a reader's screen spelled out: control and format characters.

    Line breaks stay, a tab becomes spaces; U+202E becomes `\\u202e`.
    """

    def shown(character: str) -> str:
        if character == "\n":
            return character
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
            code = ord(character)
            return f"\\u{code:04x}" if code > 0xFF else f"\\x{code:02x}"
        return character

    unified = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(map(shown, unified))


def one_line(text: str) -> str:
    """Foreign text as a single line."""
    return " ".join(visible(text).split())


def build(standing: Standing, *, pictures: Iterable[str], cell: RunRecord | None = None) -> Document:
    """The document of a study; `pictures` are the names of the figures that could be drawn."""
    drawn = tuple(pictures)
    sections = [
        Section("Paired differences", _differences(standing, drawn)),
        Section("Comparisons", _comparisons(standing)),
        Section("Reasons", _reasons(standing)),
        Section("Evidence and curves", _evidence(standing, drawn)),
        Section("Cost", _cost(standing)),
        Section("What the models write", _samples(standing)),
        Section("What was declared", _declared(standing)),
        Section("Every run", (_runs(standing), *_notes(standing))),
        Section("Limits of this study", (Bullets(tuple(limits(standing))),)),
        Section("Provenance", _provenance(standing)),
    ]
    study = standing.snapshot.study
    return Document(
        slug=study.slug,
        question=one_line(study.question),
        headline=headline(standing),
        lead=(decision_sentence(standing), f"Next: {next_step(standing)}", status_line(standing)),
        warnings=tuple(one_line(text) for text in _warnings(standing)),
        cell=_cell(standing, cell) if cell else None,
        sections=tuple(section for section in sections if section.blocks),
    )


def _warnings(standing: Standing) -> list[str]:
    found = [f"INVALID: {reason}" for reason in standing.integrity]
    if not standing.complete:
        found.append(
            "This report is partial: the declared grid is not finished, and what it says can change with every run."
        )
    found += [f"Plan amended: {reason}. Only the E-value decides." for reason in standing.snapshot.amendments]
    if standing.undeclared:
        found.append(f"Family: {family_text(standing)}.")
    return found


def _cell(standing: Standing, record: RunRecord) -> Table:
    snapshot = standing.snapshot
    declared = next((c for c in snapshot.cells if c.digest == record.cell_digest), None)
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
        _number(record.val_loss, 6),
        _number(record.perplexity, 4),
        f"{record.wall_seconds:,.1f}",
        _usd(standing, record.cost_usd),
        grid,
    )
    return Table(columns, (row,))


def _pictures(drawn: Sequence[str], *names: str) -> tuple[Block, ...]:
    found = tuple(name for name in names if name in drawn)
    return (Pictures(found),) if found else ()


def _differences(standing: Standing, drawn: Sequence[str]) -> tuple[Block, ...]:
    pictures = _pictures(drawn, "forest")
    if not pictures:
        baseline = standing.snapshot.study.baseline
        return (Paragraph(f"No seed is finished in both {baseline} and another arm: there is no pair to show."),)
    text = (
        "Small marks: one seed each (a cross: one of its two runs diverged). Diamond and bar: their mean and its 95% "
        "interval. Shaded: smaller than the smallest effect worth having. An arrow: beyond the scale."
    )
    return (*pictures, Paragraph(text))


# Comparisons


def _comparisons(standing: Standing) -> tuple[Block, ...]:
    baseline = standing.snapshot.study.baseline
    effects: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"),
        ("verdict", "text"),
        ("better by [nats/token]", "number"),
        ("95% interval", "number"),
        ("[% of the baseline's loss]", "number"),
        ("95% interval", "number"),
        ("pairs", "number"),
        ("E", "number"),
    )
    stability: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"),
        ("cost per percentage point of improvement", "prose"),
        ("early regress", "number"),
        ("diverged", "text"),
        ("failed", "text"),
        ("missing", "text"),
    )
    first = [_effect_row(standing, c) for c in standing.comparisons]
    second = [_stability_row(standing, c) for c in standing.comparisons]
    spread = ""
    if standing.baseline_mean is not None:
        spread = f"{baseline} ends at {plain(standing.baseline_mean, 5)} nats/token on average"
        if standing.baseline_sd is not None:
            spread += f", with a run-to-run standard deviation of {plain(standing.baseline_sd)}"
        in_sd = next((c.estimates.margin_in_run_sd for c in standing.comparisons if c.estimates.margin_in_run_sd), None)
        if in_sd is not None:
            spread += f"; the smallest effect worth having is {plain(in_sd)} of these standard deviations"
        spread += ". "
    note = (
        f"{spread}Better by: {baseline}'s final validation loss minus the arm's on the same seed, averaged over the "
        "pairs; negative is worse. E is the evidence against no improvement: 1 says nothing, and chance alone "
        "reaches 1/level in at most that level of all studies, however often one looks. Early regress: the largest "
        f"mean lag behind {baseline} in the first 30% of the steps, in percent of its loss; negative is ahead. "
        "The arms that are control or reference are described, not decided."
    )
    return (Table(effects, tuple(first)), Table(stability, tuple(second)), Paragraph(note))


def _effect_row(standing: Standing, c: ArmComparison) -> tuple[str, ...]:
    e = c.estimates
    verdict = _verdict(standing, c) if c.decision else c.role
    if e.mean_diff is None or e.rel_diff_pct is None or e.e_value is None:
        return (c.arm, verdict, ABSENT, e.undefined["mean_diff"], ABSENT, ABSENT, str(e.n), ABSENT)
    return (
        c.arm,
        verdict,
        signed(e.mean_diff, half_width(e.ci95, e.mean_diff)),
        bracket(e.ci95) if e.ci95 else f"none: {e.undefined['ci95']}",
        signed(e.rel_diff_pct, half_width(e.rel_ci95_pct, e.rel_diff_pct)) + "%",
        bracket(e.rel_ci95_pct, "%") if e.rel_ci95_pct else ABSENT,
        str(e.n),
        plain(e.e_value),
    )


def _verdict(standing: Standing, c: ArmComparison) -> str:
    """The verdict, and beside it that a guardrail failed."""
    assert c.decision is not None
    verdict = c.decision.verdict
    judged = verdict not in (Verdict.INVALID, Verdict.INCOMPLETE)
    return f"{verdict.value}, guardrail failed" if judged and broken_guardrails(standing, c) else verdict.value


def _stability_row(standing: Standing, c: ArmComparison) -> tuple[str, ...]:
    e = c.estimates
    return (
        c.arm,
        _per_point(standing, c),
        ABSENT if e.early_regress is None else percent_of(e.early_regress),
        _of_seeds(c.diverged),
        _of_seeds(c.failed),
        _of_seeds(c.missing),
    )


def _per_point(standing: Standing, c: ArmComparison) -> str:
    if standing.snapshot.study.price_usd_per_gpu_hour > 0:
        return c.estimates.usd_per_pp.sentence
    return c.seconds_per_point.sentence


def _of_seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)}: {'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)}" if seeds else "0"


def _reasons(standing: Standing) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for c in standing.decided:
        assert c.decision is not None
        d = c.decision
        reasons = list(d.reasons)
        if d.p_adjusted is not None and d.correction == "dunnett":
            reasons.append(f"Dunnett's test over {count(d.family_size, 'challenger')}: p = {d.p_adjusted:.3g}")
        elif d.p_adjusted is not None:
            family = f", Holm over {d.family_size} challengers" if d.family_size > 1 else ""
            reasons.append(f"one-sided paired t: p = {d.p_adjusted:.3g}{family}; exact only for one look at a fixed n")
        if c.differences:
            reasons.append(worst_pair(c))
        blocks.append(Bullets(tuple(map(one_line, reasons)), f"{c.arm}: {_verdict(standing, c)}"))
    return tuple(blocks)


def _evidence(standing: Standing, drawn: Sequence[str]) -> tuple[Block, ...]:
    pictures = _pictures(drawn, "evidence", "differences", "losses", "finish")
    if not pictures:
        return ()
    study = standing.snapshot.study
    assert study.decision is not None
    baseline = study.baseline
    text = (
        "A faint line is one run (or one seed's pair), a thick line the mean of an arm, drawn as far as all its runs "
        f"go on (a cross: one of them diverged there). Up is better than {baseline} in the differences; the shaded "
        "zone is where the early guardrail looks."
    )
    if study.decision.plan != "sequential":
        text += (
            f" The plan looks once, at {study.decision.plan.fixed} pairs, and decides by t: E is shown for information."
        )
    return (*pictures, Paragraph(text))


# Cost


def _usd(standing: Standing, usd: float) -> str:
    return money(usd) if standing.snapshot.study.price_usd_per_gpu_hour > 0 or usd > 0 else ABSENT


def _cost(standing: Standing) -> tuple[Block, ...]:
    study = standing.snapshot.study
    total, lost = duration(standing.total_seconds), duration(standing.lost_seconds)
    priced = study.price_usd_per_gpu_hour > 0
    if priced:
        left = study.budget_usd - standing.total_cost_usd
        text = (
            f"All attempts took {total} of computing and {money(standing.total_cost_usd)} at "
            f"{money(study.price_usd_per_gpu_hour)} a GPU hour; of this, {lost} and {money(standing.lost_cost_usd)} "
            "went into attempts that did not become an outcome. "
        ) + (
            f"Of the budget of {money(study.budget_usd)}, {money(left)} is left."
            if left >= 0
            else f"This is {money(-left)} over the budget of {money(study.budget_usd)}."
        )
    else:
        text = (
            f"All attempts took {total} of computing; of this, {lost} went into attempts that did not become an "
            "outcome. The declared price is 0, so that an improvement is priced in seconds."
        )
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"),
        ("seconds a pair", "number"),
        *((("cost a pair", "number"),) if priced else ()),
        ("a run is cheaper by [s]", "number"),
        ("95% interval", "number"),
        *((("a run is cheaper by [$]", "number"), ("95% interval", "number")) if priced else ()),
    )
    rows = [
        (
            c.arm,
            f"{c.pair_seconds:,.1f}" if c.pair_seconds else ABSENT,
            *((money(c.pair_cost_usd),) if priced else ()),
            *_cheaper(c.seconds_difference),
            *(_cheaper(c.usd_difference) if priced else ()),
        )
        for c in standing.comparisons
    ]
    note = (
        f"Cheaper by: what a run of {study.baseline} took minus what the arm's took on the same seed, averaged over "
        "the pairs; negative is dearer. All attempts at a run count, and a run that diverged early is a cheap one."
    )
    return (Paragraph(text), Table(columns, tuple(rows)), Paragraph(note))


def _cheaper(cost: CostDifference | None) -> tuple[str, str]:
    """A difference of costs and its interval; stats.json says why one is absent."""
    if cost is None:
        return (ABSENT, ABSENT)
    mean = signed(cost.mean_diff, half_width(cost.ci95, cost.mean_diff))
    return (mean, bracket(cost.ci95) if cost.ci95 else ABSENT)


# Samples


def _samples(standing: Standing) -> tuple[Block, ...]:
    written = [e for e in standing.evaluations if e.sample.strip()]
    if not written:
        return ()
    seeds = [e.seed for e in written]
    # The seed that most arms have, the lowest of those.
    seed = min(set(seeds), key=lambda s: (-seeds.count(s), s))
    order = standing.snapshot.study.arms
    same = sorted((e for e in written if e.seed == seed and e.arm in order), key=lambda e: order.index(e.arm))
    prompts = list(dict.fromkeys(e.prompt for e in same))
    intro = f"Seed {seed}, one continuation an arm, drawn alike; a sample is an impression, not evidence."
    blocks: list[Block] = [Paragraph(intro)]
    for prompt in prompts:
        asked = [("the prompt", visible(prompt))] if prompt.strip() else []
        answers = [(e.arm, visible(e.sample)) for e in same if e.prompt == prompt]
        blocks.append(Samples((*asked, *answers)))
    return tuple(blocks)


# Declaration


def _plain_value(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain_value, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_plain_value(v)}" for k, v in value.items()) or "none"
    return one_line(str(value))


def _pairs(rows: Iterable[tuple[str, str]], first: str, second: str) -> Table:
    return Table(((first, "code"), (second, "prose")), tuple(rows))


def _declared(standing: Standing) -> tuple[Block, ...]:
    snapshot = standing.snapshot
    study = snapshot.study
    assert study.decision is not None
    decision = study.decision.model_dump(mode="json")
    decision["min_effect"] = margin_text(standing)
    rows = [(f"decision.{key}", _plain_value(value)) for key, value in decision.items()]
    declared = study.model_dump(mode="json", exclude={"decision", "grid", "slug"})
    rows = [*((key, _plain_value(value)) for key, value in declared.items()), *rows]
    registration = snapshot.registration
    if registration is None:
        when = "The declaration was not registered before the runs."
    else:
        commit = f" at commit `{registration.commit}`" if registration.commit else ""
        when = f"Registered {moment(registration.registered_at)}{commit}, hash `{registration.registration}`"
        when += (
            f"; plan amended, so that only the E-value decides: {'; '.join(snapshot.amendments)}. The hash of the "
            f"declaration is now `{snapshot.current_registration}`."
            if snapshot.amended
            else ", not amended since."
        )
        starts = [r.started_at for r in snapshot.records]
        if starts:
            when += f" The first run that counts or was tried here started {moment(min(starts))}."
    options = [
        (arm, _plain_value(spec.get("kind", arm)), _plain_value(spec.get("options", spec)))
        for arm, spec in snapshot.optimizers.items()
    ]
    tables: list[Block] = [Paragraph(when), *map(Paragraph, orthogonalizers(standing)), _pairs(rows, "key", "declared")]
    if options:
        tables.append(Table((("arm", "arm"), ("kind", "code"), ("options, as resolved", "prose")), tuple(options)))
    settings = snapshot.settings.model_dump(mode="json")
    tables.append(_pairs(((k, _plain_value(v)) for k, v in settings.items()), f"workload {study.workload}", "setting"))
    return tuple(tables)


# Runs


def _number(value: float | None, digits: int) -> str:
    return ABSENT if value is None else plain(value, digits)


def _runs(standing: Standing) -> Table:
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"),
        ("seed", "number"),
        ("status", "text"),
        ("loss [nats/token]", "number"),
        ("perplexity", "number"),
        ("steps", "number"),
        ("attempts", "number"),
        ("seconds", "number"),
        ("cost", "number"),
        ("digest", "code"),
        ("error", "prose"),
    )
    rows = [
        (
            c.arm,
            str(c.seed),
            c.state,
            _number(c.val_loss, 6),
            _number(c.perplexity, 4),
            str(c.steps),
            str(c.attempts),
            f"{c.wall_seconds:,.1f}",
            _usd(standing, c.cost_usd),
            c.digest[:12],
            one_line(c.error) if c.error else "",
        )
        for c in standing.cells
    ]
    if not any(row[-1] for row in rows):
        return Table(columns[:-1], tuple(row[:-1] for row in rows))
    return Table(columns, tuple(rows))


def _notes(standing: Standing) -> tuple[Block, ...]:
    return (Bullets(tuple(map(one_line, standing.notes)), "Noted"),) if standing.notes else ()


def _provenance(standing: Standing) -> tuple[Block, ...]:
    snapshot = standing.snapshot
    digests = {c.digest for c in snapshot.cells}
    records = [r for r in snapshot.records if r.cell_digest in digests]

    def values(found: Iterable[object]) -> str:
        kept = sorted({ABSENT if v is None else one_line(str(v)) for v in found})
        return ", ".join(kept)

    rows: list[tuple[str, str]] = []
    if records:
        rows = [
            ("commit", values(r.provenance.commit for r in records)),
            (
                "tracked code as committed",
                values({True: "no", False: "yes", None: "not known"}[r.provenance.dirty] for r in records),
            ),
            *(
                (name, values(getattr(r.provenance, name) for r in records))
                for name in ("python", "torch", "transformers", "device", "host_os")
            ),
            *(
                (f"hash of {name}", values(getattr(r.hashes, name) for r in records))
                for name in ("data", "tokenizer", "code", "environment")
            ),
        ]
    rows.append(("hash of the ledger", snapshot.ledger_sha256))
    text = f"From {count(len(records), 'recorded attempt')} at the declared runs."
    return (Paragraph(text), _pairs(rows, "what", "value"))
