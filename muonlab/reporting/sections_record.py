"""The report's sections on the record: samples, declaration, runs, provenance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from muonlab.registry.record import RunRecord
from muonlab.registry.study import LATER_KEYS, Study
from muonlab.reporting.blocks import (
    MOST_ROWS,
    Block,
    Bullets,
    Kind,
    Paragraph,
    Samples,
    Table,
    one_line,
    shortened,
    visible,
)
from muonlab.reporting.gate_wording import gate_sentences
from muonlab.reporting.sections_course import usd_of
from muonlab.reporting.selected import selection_notes
from muonlab.reporting.standing import Standing
from muonlab.reporting.tuning_wording import tuned_by
from muonlab.reporting.wording import (
    ABSENT,
    count,
    loss_digits,
    margin_text,
    moment,
    orthogonalizers,
    outcomes_text,
    plain,
)


def samples(standing: Standing) -> tuple[Block, ...]:
    """What the models write after one prompt, one seed of each arm side by side."""
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


def declared(standing: Standing) -> tuple[Block, ...]:
    """What was declared and when, and what its names resolved to."""
    snapshot = standing.snapshot
    study = snapshot.study
    assert study.decision is not None
    decision = study.decision.model_dump(mode="json")
    decision["min_effect"] = margin_text(standing)
    rows = [(f"decision.{key}", _plain_value(value)) for key, value in decision.items()]
    unsaid = {name for name in LATER_KEYS if getattr(study, name) == Study.model_fields[name].default}
    kept = study.model_dump(mode="json", exclude={"decision", "grid", "slug", "reported", "twins", *unsaid})
    rows = [*((key, _plain_value(value)) for key, value in kept.items()), *rows]
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
        (arm, _plain_value(spec.get("kind", arm)), _plain_value(spec.get("options", spec)), tuned_by(snapshot, arm))
        for arm, spec in snapshot.optimizers.items()
    ]
    said = [when, *selection_notes(snapshot), *orthogonalizers(standing)]
    tables: list[Block] = [*map(Paragraph, said)]
    if snapshot.gates:
        tables.append(Bullets(tuple(gate_sentences(standing)), "Gates"))
    tables.append(_pairs(rows, "key", "declared"))
    if options:
        columns: tuple[tuple[str, Kind], ...] = (
            ("arm", "arm"),
            ("kind", "code"),
            ("options, as resolved", "prose"),
            ("tuned by", "text"),
        )
        tables.append(Table(columns, tuple(options)))
    settings = snapshot.settings.model_dump(mode="json")
    tables.append(_pairs(((k, _plain_value(v)) for k, v in settings.items()), f"workload {study.workload}", "setting"))
    return tuple(tables)


def number_of(value: float | None, digits: int) -> str:
    """A number, or a dash for none."""
    return ABSENT if value is None else plain(value, digits)


def runs(standing: Standing) -> tuple[Block, ...]:
    """Every declared run, and what was noted of them."""
    return (Paragraph(outcomes_text(standing) + "."), _table_of_runs(standing), *_notes(standing))


def _table_of_runs(standing: Standing) -> Table:
    digits = loss_digits(standing, 6)
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
            str(c.seed) if standing.snapshot.study.provenance == "run" else "not recorded",
            c.state,
            number_of(c.val_loss, digits),
            number_of(c.perplexity, 4),
            str(c.steps),
            str(c.attempts),
            f"{c.wall_seconds:,.1f}",
            usd_of(standing, c.cost_usd),
            c.digest[:12],
            one_line(c.error) if c.error else "",
        )
        for c in standing.cells
    ]
    collapsed = len(rows) > MOST_ROWS
    if not any(row[-1] for row in rows):
        return Table(columns[:-1], tuple(row[:-1] for row in rows), collapsed=collapsed)
    return Table(columns, tuple(rows), collapsed=collapsed)


def _notes(standing: Standing) -> tuple[Block, ...]:
    names = standing.snapshot.study.arms
    return (Bullets(shortened(standing.notes, names), "Noted"),) if standing.notes else ()


def _dirty(records: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    """How many attempts were made from a tree that was not as committed, and by which differences."""
    dirty = [r for r in records if r.provenance.diff_sha256 is not None]
    if dirty:
        hashes = sorted({str(r.provenance.diff_sha256)[:12] for r in dirty})
        yield "made from a dirty tree", f"{count(len(dirty), 'attempt')}; hash of the git diff: {', '.join(hashes)}"


def provenance(standing: Standing) -> tuple[Block, ...]:
    """What the runs were made with."""
    snapshot = standing.snapshot
    digests = snapshot.digests
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
            *_dirty(records),
            *(
                (name, values(getattr(r.provenance, name) for r in records))
                for name in ("python", "torch", "transformers", "device", "host_os")
            ),
            *(
                (f"hash of {name}", values(getattr(r.hashes, name) for r in records))
                for name in ("data", "tokenizer", "code", "environment")
            ),
        ]
    rows.append(("hash of the ledger", snapshot.ledger_sha256 or "no ledger"))
    text = f"From {count(len(records), 'recorded attempt')} at the declared runs."
    return (Paragraph(text), _pairs(rows, "what", "value"))
