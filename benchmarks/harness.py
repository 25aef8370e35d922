"""The ratio of a peer's time to ours, measured side by side in one process run.

    r_i   = seconds of the peer in round i / seconds of ours in round i        > 1: ours is faster
    ratio = median of r_1 .. r_rounds,   spread = [min r_i, max r_i]

Rounds alternate ours, peer, ours, peer, ..., so that a machine that slows down slows both. Each side is called
once before, untimed: imports, caches and allocators are warm. A side's time in a round is the mean over as many
calls as take `SHORTEST_S`; `setup` runs before every call and is not timed. The clock is the processor's
(all threads of this process), which other programs on the machine disturb least; a comparison with work in another
process brings a clock of its own.

Assumes that rounds are alike: no call may leave behind what makes the next one cheaper, or its `setup` undoes it.
A spread is a range and no interval of confidence; a row whose spread contains its goal is marked `~`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

SCHEMA = 1
SHORTEST_S = 0.05
MOST_CALLS = 2000
WIDTH = 100

Call = Callable[[], object]
Clock = Callable[[], float]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Comparison:
    """Two calls that do the same work. `goal` is the least ratio that is wanted; None for information only."""

    name: str
    ours: Call
    peer: Call
    peer_name: str
    goal: float | None = None
    rounds: int = 5
    setup: Call = _nothing
    """Called before every call of either side, untimed."""
    clock: Clock = time.process_time
    """In seconds; one that sees the other process where another process does the work."""
    peer_share: float = 1.0
    """The share of our work that the peer's call does; its seconds are divided by it."""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table: a ratio ("x"), or another measured value in its unit.

    `goal` is a lower bound where `at_least`, else an upper one; None for information. `value` is None where
    nothing was measured, and `note` then says why. `seconds` holds what a ratio was computed from, by round.
    """

    what: str
    peer: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = "x"
    goal: float | None = None
    at_least: bool = True
    note: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    suite: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or a value."""
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    @property
    def verdict(self) -> str:
        """yes, no or not measured; with a `~` where the spread contains the goal; - without a goal."""
        if self.goal is None:
            return "-" if self.value is not None else "not measured"
        if self.met is None:
            return "not measured"
        straddles = self.low is not None and self.high is not None and self.low < self.goal < self.high
        return ("yes" if self.met else "no") + (" ~" if straddles else "")


def run(comparison: Comparison) -> Row:
    """Measure one comparison. What its calls raise goes through: a benchmark that fails is a bug."""
    sides = {"ours": comparison.ours, "peer": comparison.peer}
    calls = {side: _calls_for(_warm_up(call, comparison.setup, comparison.clock)) for side, call in sides.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(comparison.rounds):
        for side, call in sides.items():
            seconds[side].append(_seconds(call, comparison.setup, comparison.clock, calls[side]))
    seconds["peer"] = [second / comparison.peer_share for second in seconds["peer"]]
    return ratio_row(
        comparison.name, comparison.peer_name, seconds["ours"], seconds["peer"], comparison.goal, comparison.note
    )


def ratio_row(
    what: str, peer: str, ours: Sequence[float], peers: Sequence[float], goal: float | None, note: str = ""
) -> Row:
    """The row of a ratio from both sides' seconds by round."""
    ratios = [theirs / mine for mine, theirs in zip(ours, peers, strict=True)]
    return Row(
        what,
        peer,
        value=median(ratios),
        low=min(ratios),
        high=max(ratios),
        goal=goal,
        note=note,
        seconds={"ours": list(ours), "peer": list(peers)},
    )


def weighted(what: str, parts: Sequence[tuple[float, Row]], goal: float | None, note: str = "") -> Row:
    """The ratio of the total times, each part's seconds times its count. Parts have one peer and as many rounds."""
    totals = {
        side: [
            math.fsum(second * count for second, (count, _) in zip(by_part, parts, strict=True))
            for by_part in zip(*(row.seconds[side] for _, row in parts), strict=True)
        ]
        for side in ("ours", "peer")
    }
    return ratio_row(what, parts[0][1].peer, totals["ours"], totals["peer"], goal, note)


def per_call(row: Row) -> str:
    """The median seconds of both sides, for a note."""
    return f"{seconds_text(median(row.seconds['ours']))} against {seconds_text(median(row.seconds['peer']))}"


def seconds_text(seconds: float) -> str:
    """Seconds to three digits in the unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _warm_up(call: Call, setup: Call, clock: Clock) -> float:
    """Seconds of a call that is warm, or of the first where that took so long that a second adds little."""
    first = _seconds(call, setup, clock, 1)
    return first if first > 20 * SHORTEST_S else _seconds(call, setup, clock, 1)


def _calls_for(seconds: float) -> int:
    return max(1, min(MOST_CALLS, math.ceil(SHORTEST_S / max(seconds, 1e-9))))


def _seconds(call: Call, setup: Call, clock: Clock, times: int) -> float:
    total = 0.0
    for _ in range(times):
        setup()
        began = clock()
        call()
        total += clock() - began
    return total / times


# ---------------------------------------------------------------------- what is printed and kept

COLUMNS = (("what", 32), ("peer", 19), ("ratio", 9), ("spread", 14), ("goal", 9))
"""Name and width of the columns; the last, `met`, gets what is left."""


def table(rows: Sequence[Row]) -> str:
    """The rows as text in `WIDTH` columns; notes stand under their row."""
    lines = [_line([name for name, _ in COLUMNS] + ["met"]), "-" * WIDTH]
    for row in rows:
        what = textwrap.wrap(row.what, COLUMNS[0][1]) or [""]
        peer = textwrap.wrap(row.peer, COLUMNS[1][1]) or [""]
        numbers = [_number(row.value, row.unit), _spread(row), _goal(row), row.verdict]
        for i in range(max(len(what), len(peer))):
            cells = [column[i] if i < len(column) else "" for column in (what, peer)]
            lines.append(_line(cells + (numbers if i == 0 else [""] * 4)))
        if row.note:
            lines += textwrap.wrap(row.note, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def unmet(rows: Sequence[Row]) -> list[Row]:
    """The rows whose goal is missed."""
    return [row for row in rows if row.met is False]


def summary(rows: Sequence[Row]) -> str:
    """How many goals there are, and which are missed or were not measured."""
    goals = [row for row in rows if row.goal is not None]
    missed, unknown = unmet(rows), [row for row in goals if row.met is None]
    lines = [
        f"{len(goals)} goals: {len(goals) - len(missed) - len(unknown)} met, {len(missed)} missed, "
        f"{len(unknown)} not measured."
    ]
    lines += [f"  missed: {row.what} (peer: {row.peer}): {_number(row.value, '')}, goal {_goal(row)}" for row in missed]
    lines += [f"  not measured: {row.what} (peer: {row.peer})" for row in unknown]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    widths = [width for _, width in COLUMNS]
    padded = [
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells[:-1], widths, strict=True))
    ]
    return " ".join([*padded, cells[-1]]).rstrip()


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def _spread(row: Row) -> str:
    return "" if row.low is None or row.high is None else f"{_number(row.low, '')}..{_number(row.high, '')}"


def _goal(row: Row) -> str:
    return "" if row.goal is None else f"{'>=' if row.at_least else '<='} {_number(row.goal, '')}"


def environment() -> dict[str, Any]:
    """What the numbers depend on: versions, processor, BLAS, threads, how busy the machine was, date."""
    import numpy as np
    import scipy
    import torch

    flags = cpu_field("flags").split()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "platform": platform.platform(),
        "cpu": cpu_field("model name") or platform.processor() or "unknown",
        "cpu_count": os.cpu_count(),
        "cpu_bf16_units": sorted(flag for flag in flags if flag.endswith("bf16")) if flags else None,
        "blas": {"torch": _torch_blas(), "numpy": _blas(np), "scipy": _blas(scipy)},
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def cpu_field(name: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _blas(library: Any) -> str:
    blas = library.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas['name']} {blas['version']}"


def _torch_blas() -> str:
    import torch

    settings = torch.__config__.show()
    return next((line.strip(" -") for line in settings.splitlines() if "Math Kernel Library" in line), "not MKL")


def record(rows: Sequence[Row], environment: dict[str, Any]) -> dict[str, Any]:
    """What is saved: every row with its seconds by round, and what is derived from them for a reader."""
    return {
        "schema": SCHEMA,
        "environment": environment,
        "rows": [{**asdict(row), "met": row.met, "verdict": row.verdict} for row in rows],
        "unmet": [row.what for row in unmet(rows)],
    }


def save(rows: Sequence[Row], environment: dict[str, Any], folder: Path) -> Path:
    """Write `record` as JSON into `folder`, named by date and suites."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = environment["date"].replace(":", "").replace("+0000", "Z")
    path = folder / f"{stamp}-{'-'.join(dict.fromkeys(row.suite for row in rows))}.json"
    path.write_text(json.dumps(record(rows, environment), indent=1, allow_nan=False) + "\n")
    return path
