"""Show a pool at work: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from muonlab.pipeline.pool import PoolState

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

PLAIN_EVERY_S = 10.0


class PoolWatcher:
    """Turns the states of a pool into what a person reads: cells done, running and left, ETA, cost so far.

    The estimate divides the steps that are left by the pace so far, over all workers.
    """

    def __init__(self, title: str, steps: int, cells: int, out: TextIO | None = None) -> None:
        self.title, self.steps, self.cells = title, steps, cells
        self.out = out or sys.stderr
        self.began = time.monotonic()
        self.spoken = 0.0
        self.told = 0
        self.steps_per_cell = steps / max(1, cells)
        self.live = _live() if self.out.isatty() else None

    def __call__(self, state: PoolState) -> None:
        """Show one state."""
        ended = len(state.done) + len(state.diverged) + len(state.failed)
        if self.live is not None:
            self.live.update(self._table(state), refresh=True)
            if ended == self.cells:
                self.live.stop()
            return
        now = time.monotonic()
        if now - self.spoken >= PLAIN_EVERY_S or ended > self.told:
            self.spoken, self.told = now, ended
            print(self.line(state), file=self.out, flush=True)

    def steps_done(self, state: PoolState) -> float:
        """Steps that this run of the pool has made."""
        ended = len(state.done) + len(state.diverged) + len(state.failed)
        return ended * self.steps_per_cell + sum(
            p.step - p.resumed_from_step for p in state.running.values() if p is not None
        )

    def eta_s(self, state: PoolState) -> float | None:
        """Seconds until the last cell, at the pace so far; None before there is a pace."""
        done = self.steps_done(state)
        if done <= 0:
            return None
        return max(0.0, self.steps - done) * (time.monotonic() - self.began) / done

    def line(self, state: PoolState) -> str:
        """The state in one plain line."""
        running = ", ".join(
            f"{name} {p.step}/{p.steps}" + ("" if p.loss is None else f" loss {p.loss:.3f}")
            if p
            else f"{name} starting"
            for name, p in ((_placed(key, state), p) for key, p in sorted(state.running.items()))
        )
        return f"{self._summary(state)}" + (f" | {running}" if running else "")

    def _summary(self, state: PoolState) -> str:
        eta = self.eta_s(state)
        troubled = "".join(
            f", {len(some)} {word}" for some, word in ((state.diverged, "diverged"), (state.failed, "failed")) if some
        )
        held = f" ({len(state.held)} trained by another process)" if state.held else ""
        return (
            f"{len(state.done)}/{self.cells} done{troubled}, {len(state.running)} running, {len(state.waiting)} left"
            f"{held} | ETA {duration(eta) if eta is not None else '-'} | ${state.cost_usd + state.running_cost_usd:.2f}"
        )

    def _table(self, state: PoolState) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for key, p in sorted(state.running.items()):
            key = _placed(key, state)
            if p is None:
                table.add_row(key, Text("starting", style="dim"), "", "")
            else:
                loss = "-" if p.loss is None else f"{p.loss:.4f}"
                table.add_row(key, ProgressBar(p.steps, p.step, width=20), f"{p.step}/{p.steps}", f"loss {loss}")
        return Group(Text(f"{self.title}: {self._summary(state)}"), table)


def _placed(key: str, state: PoolState) -> str:
    return f"{key} on {state.nodes[key]}" if key in state.nodes else key


def _live() -> Live:
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(stderr=True), auto_refresh=False, transient=False)
    live.start()
    return live


def duration(seconds: float) -> str:
    """Seconds as a person reads them: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
