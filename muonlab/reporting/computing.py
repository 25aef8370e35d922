"""Where the wall time of runs went, and the memory that they took: from what their records say of their computing.

    share of a part = sum of its seconds / sum of the attempts' wall seconds, over runs that became results
    other           = what is left: building or loading the model, and what is between the parts

A run that was resumed counts with its last attempt, which alone has measured itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from muonlab.registry.record import RunRecord
from muonlab.reporting.blocks import Block, Kind, Paragraph, Table
from muonlab.reporting.standing import Standing

OTHER = "other"


def measured(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Those that say how they were computed."""
    return [record for record in records if record.computing is not None and record.wall_seconds > 0]


def shares(records: Sequence[RunRecord]) -> dict[str, float]:
    """Part -> its share of the records' wall time, the largest first, `other` last; empty without a measured record."""
    seconds: dict[str, float] = {}
    for record in (found := measured(records)):
        assert record.computing is not None
        for part, spent in record.computing.seconds_by_part.items():
            seconds[part] = seconds.get(part, 0.0) + spent
    if not found:
        return {}
    wall = math.fsum(record.wall_seconds for record in found)
    parts = {part: spent / wall for part, spent in sorted(seconds.items(), key=lambda item: -item[1])}
    return {**parts, OTHER: max(0.0, 1 - math.fsum(parts.values()))}


def peak_memory_gb(records: Sequence[RunRecord]) -> float:
    """The most memory that any of the measured records took, in 10^9 bytes."""
    return max(r.computing.peak_memory_bytes for r in measured(records) if r.computing is not None) / 1e9


def percent(share: float) -> str:
    """`41%`, `0.3%`."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def computing_line(record: RunRecord) -> str | None:
    """One record's split and memory in a line; None where it has not measured itself."""
    if not (parts := shares([record])) or record.computing is None:
        return None
    split = ", ".join(f"{part} {percent(share)}" for part, share in parts.items())
    devices = f"{record.device_count} x " if record.device_count > 1 else ""
    return (
        f"time: {split}; peak memory {peak_memory_gb([record]):.2f} GB; {record.computing.precision} on "
        f"{devices}{record.computing.device}"
    )


def where_the_time_went(standing: Standing) -> tuple[Block, ...]:
    """A row an arm: the shares of its runs' time, and their peak memory."""
    digests = standing.snapshot.digests
    results = [r for r in standing.snapshot.records if r.is_result and r.cell_digest in digests]
    overall = shares(results)
    if not overall:
        return ()
    by_arm = {arm: [r for r in results if r.arm == arm] for arm in standing.snapshot.study.arms}
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"),
        *((part, "number") for part in overall),
        ("peak memory [GB]", "number"),
    )
    rows = []
    for arm, records in by_arm.items():
        if own := shares(records):
            parts = (percent(own.get(part, 0.0)) for part in overall)
            rows.append((arm, *parts, f"{peak_memory_gb(records):.2f}"))
    text = (
        "Shares of the wall time of the runs that became results; `optimizer` includes schedule and clipping, "
        "`measures` is what the curve says beside losses, `other` is building or loading the model."
    )
    return (Paragraph(text), Table(columns, tuple(rows)))
