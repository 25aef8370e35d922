"""Train a cell, or take over what was trained: the same code for `dvc exp run`, a study's grid and its workers."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from muonlab.pipeline.attempts import CellScratch, Purpose, read_progress, train_cell
from muonlab.pipeline.declare import purpose_of
from muonlab.pipeline.evaluations import evaluate_now
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.ranks import check_ranks, train_on, wanted_ranks
from muonlab.pipeline.resolve import load_params, resolve_cell
from muonlab.registry.cell import Cell
from muonlab.registry.record import RunRecord
from muonlab.tracking import start_follower
from muonlab.training.distributed import started_ranks

CURRENT = "exp"
"""The folder under runs/ and reports/ that belongs to the one cell of params.yaml, and to no study."""


def adopt_or_train(layout: Layout, workload: str, arm: str, seed: int, *, into: Path) -> RunRecord | None:
    """Put the results of a cell into the folder `into`: adopted when a verified bundle waits, else trained now.

    Under torchrun every process calls this; the first does it, and the others, which get None, compute with it where
    there is something to compute. Where the environment asks for ranks, they are started; who starts them gets None.
    Adopting imports no torch. Raises UsageError for a wrong cell, CellsFailedError when training fails.
    """
    params = load_params(layout.params)
    cell = resolve_cell(layout, params, workload, arm, seed)
    scratch = CellScratch(layout, cell.digest)
    ranks = started_ranks()
    record = scratch.finished()
    if record is not None:
        if not ranks.writes:
            return None
        print(f"{cell.key}: already trained as cell {cell.digest[:12]}; taking it over.")
    else:
        if ranks.size == 1 and (wanted := wanted_ranks()) > 1:
            check_ranks(wanted, cell.settings, os.environ)
            train_on(wanted)
            return None
        if not ranks.writes:
            follow(layout, cell)
            return None
        folder = into.parent.name
        purpose = purpose_of(layout, cell, params.study if folder == CURRENT else folder)
        purpose = replace(purpose, device_count=ranks.size)
        with start_follower(layout.main):
            record = train_in_sight(layout, cell, purpose)
        evaluate_now(layout, scratch.bundle, cell.settings, record, layout.data(workload))
    scratch.adopt(into)
    return record


def follow(layout: Layout, cell: Cell) -> None:
    """Train as one of torchrun's other processes: the first locks the cell, writes and reports for all."""
    from muonlab.training.loop import train

    data, work = layout.data(cell.workload), CellScratch(layout, cell.digest).work
    train(cell, data, work, on_point=lambda _: None, on_progress=lambda _: None)


def train_in_sight(layout: Layout, cell: Cell, purpose: Purpose) -> RunRecord:
    """Train in this process, printing a line of progress every few seconds."""
    print(f"{cell.key}: training cell {cell.digest[:12]}, {cell.settings.steps} steps.", flush=True)
    spoken = time.monotonic()

    def tell(folder: Path) -> None:
        nonlocal spoken
        if time.monotonic() - spoken < TELL_EVERY_S:
            return
        spoken = time.monotonic()
        state = read_progress(folder)
        if state is not None:
            left = (state.steps - state.step) * state.seconds / max(1, state.step - state.resumed_from_step)
            loss = "-" if state.loss is None else f"{state.loss:.4f}"
            print(
                f"{cell.key}: step {state.step}/{state.steps}, loss {loss}, {state.seconds:.0f} s, "
                f"about {left:.0f} s left, ${purpose.cost_usd(state.seconds):.2f} so far",
                flush=True,
            )

    record = train_cell(
        layout,
        cell,
        purpose,
        data_dir=layout.data(cell.workload),
        on_progress=tell,
        warn=lambda text: print(f"{cell.key}: {text}", file=sys.stderr, flush=True),
    )
    ending = f"val_loss {record.val_loss:.4f}" if record.val_loss is not None else f"diverged ({record.error})"
    print(f"{cell.key}: {ending} after {record.wall_seconds:.0f} s, ${record.cost_usd:.2f}", flush=True)
    return record


TELL_EVERY_S = 5.0
