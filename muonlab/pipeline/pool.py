"""Train cells side by side in worker processes, each of which trains one cell after another.

A worker (`python -m muonlab.pipeline.worker`) reads one job a line on its standard input and answers each with one
line; it dies with the driver. A worker that dies takes its cell down to `abandoned` and is replaced, and the cell
is tried again from its last checkpoint, a bounded number of times.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import IO

from muonlab.pipeline.attempts import AttemptProgress, CellScratch, Purpose, read_progress
from muonlab.pipeline.gpus import training_gpus
from muonlab.pipeline.layout import Layout
from muonlab.registry.cell import Cell
from muonlab.registry.errors import OverBudgetError

LARGEST_NUMBER_OF_TRIES = 3
"""Tries of a cell whose worker dies without a word; a failure that was recorded is not tried again."""


@dataclass(frozen=True)
class Job:
    """A cell to be trained, and for whom."""

    cell: Cell
    purpose: Purpose
    label: str = ""

    @property
    def name(self) -> str:
        """What a person is shown."""
        return self.label or self.cell.key


@dataclass
class PoolState:
    """What a watcher is shown: cells waiting, running (with where they stand), done and failed."""

    waiting: list[Job]
    running: dict[str, AttemptProgress | None] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    cost_usd: float = 0.0
    """Of the attempts that have ended."""
    running_cost_usd: float = 0.0


class TrainingStoppedError(OverBudgetError):
    """Training was stopped at its limit of cost; what was trained until then is kept."""

    def __init__(self, message: str, state: PoolState) -> None:
        super().__init__(message)
        self.state = state


def train_all(
    layout: Layout,
    jobs: Sequence[Job],
    *,
    workers: int,
    on_change: Callable[[PoolState], None],
    max_cost_usd: float | None = None,
) -> PoolState:
    """Train all jobs with `workers` processes; return how they ended.

    `on_change` is called about once a second and after each ending. Raises TrainingStoppedError, after stopping the
    workers, when the cost of these attempts reaches `max_cost_usd`; what was trained stays.
    """
    state = PoolState(waiting=list(jobs))
    tries: dict[str, int] = {}
    gpus: list[str | None] = [*training_gpus()] or [None]
    crew = [_Worker(layout, gpu) for gpu in islice(cycle(gpus), min(workers, len(jobs)))]
    try:
        while state.waiting or any(worker.job for worker in crew):
            for index, worker in enumerate(crew):
                if worker.job is None and state.waiting:
                    worker.give(state.waiting.pop(0))
                elif worker.job is not None and (ending := worker.poll()) is not None:
                    if ending.get("status") == "died":
                        job = worker.job
                        crew[index] = _Worker(layout, worker.gpu)
                        tries[job.cell.digest] = tries.get(job.cell.digest, 0) + 1
                        if tries[job.cell.digest] < LARGEST_NUMBER_OF_TRIES:
                            state.waiting.insert(0, job)
                        else:
                            state.failed[job.name] = f"its process died {LARGEST_NUMBER_OF_TRIES} times"
                    else:
                        _note_ending(state, worker, ending)
                        worker.job = None
            state.running = {w.job.name: w.progress() for w in crew if w.job}
            state.running_cost_usd = sum(
                w.job.purpose.cost_usd(p.seconds) for w in crew if w.job and (p := w.progress()) is not None
            )
            on_change(state)
            spent = state.cost_usd + state.running_cost_usd
            if max_cost_usd is not None and spent >= max_cost_usd:
                raise TrainingStoppedError(
                    f"the cost so far, ${spent:.2f}, has reached the limit of "
                    f"${max_cost_usd:.2f}; training was stopped with {len(state.waiting)} cells not begun, and what "
                    "was trained is kept. Raise budget_usd or --max-cost to go on.",
                    state,
                )
            _wait_for_news(crew)
    finally:
        for worker in crew:
            worker.stop()
    return state


def _note_ending(state: PoolState, worker: _Worker, ending: dict[str, object]) -> None:
    assert worker.job is not None
    key = worker.job.name
    if ending["status"] == "completed":
        state.done.append(key)
    elif ending["status"] == "diverged":
        state.diverged.append(key)
    else:
        state.failed[key] = str(ending.get("error", "no reason was given"))
    state.cost_usd += worker.job.purpose.cost_usd(float(str(ending.get("seconds", 0.0))))


def _wait_for_news(crew: list[_Worker], timeout_s: float = 1.0) -> None:
    with selectors.DefaultSelector() as selector:
        for worker in crew:
            if worker.job is not None:
                selector.register(worker.answers, selectors.EVENT_READ)
        if selector.get_map():
            selector.select(timeout_s)


class _Worker:
    """One worker process, with the GPU that it alone is to see (None: as it is), and the job it has."""

    def __init__(self, layout: Layout, gpu: str | None) -> None:
        self.layout = layout
        self.gpu = gpu
        alone = {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
        self.job: Job | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "muonlab.pipeline.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=layout.root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(layout.root), **alone},
        )
        assert self.process.stdout is not None
        self.answers: IO[str] = self.process.stdout

    def give(self, job: Job) -> None:
        assert self.process.stdin is not None
        self.job = job
        line = json.dumps({"cell": job.cell.model_dump(mode="json"), "purpose": vars(job.purpose)})
        with contextlib.suppress(BrokenPipeError):  # a worker that died is found by poll
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def poll(self) -> dict[str, object] | None:
        """The answer to the job, once there is one; a process that ended without one has `died`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            if not selector.select(0):
                return None
        line = self.answers.readline()
        if not line:
            self.process.wait()
            return {"status": "died"}
        answer: dict[str, object] = json.loads(line)
        return answer

    def progress(self) -> AttemptProgress | None:
        if self.job is None:
            return None
        folders = CellScratch(self.layout, self.job.cell.digest).attempt_folders()
        return read_progress(folders[-1]) if folders else None

    def stop(self) -> None:
        """End the process, in mid-step if need be: the next start goes on from the last checkpoint."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        deadline = time.monotonic() + 5
        if self.job is not None:
            self.process.terminate()
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.answers.close()
