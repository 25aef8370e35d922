"""Train cells side by side at workers, each of which trains one cell after another.

Where the workers are is a parameter, a `Place`: this machine, or a cluster (`muonlab.pipeline.cluster`). Here a worker
is a process (`python -m muonlab.pipeline.worker`) that reads one job a line on its standard input and answers each with
one line; it dies with the driver. A worker that dies takes its cell down to `abandoned` and is replaced, and the cell
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from muonlab.pipeline.attempts import AttemptProgress, CellScratch, Purpose, read_progress, seconds_so_far
from muonlab.pipeline.fences import Fence
from muonlab.pipeline.gpus import training_gpus
from muonlab.pipeline.layout import Layout
from muonlab.registry.cell import Cell
from muonlab.registry.errors import OverBudgetError

LARGEST_NUMBER_OF_TRIES = 3
"""Tries of a cell whose worker dies without a word; a failure that was recorded is not tried again."""

HELD_S = 2.0
"""Until a cell that another process trains is asked for again; what that one has made by then is taken over."""


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


def line_of(job: Job, fence: Fence | None = None) -> str:
    """The job as a worker reads it."""
    behind = None if fence is None else {"main": str(fence.folder), "number": fence.number}
    return json.dumps({"cell": job.cell.model_dump(mode="json"), "purpose": vars(job.purpose), "fence": behind})


@dataclass
class PoolState:
    """What a watcher is shown: cells waiting, running (with where they stand), done and failed."""

    waiting: list[Job]
    running: dict[str, AttemptProgress | None] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)
    """Waiting cell that another process trains -> when it is asked for again, by the monotonic clock."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Running cell -> the node that trains it; none on this machine."""
    cost_usd: float = 0.0
    """Of the attempts that have ended."""
    running_cost_usd: float = 0.0


class TrainingStoppedError(OverBudgetError):
    """Training was stopped at its limit of cost; what was trained until then is kept."""

    def __init__(self, message: str, state: PoolState) -> None:
        super().__init__(message)
        self.state = state


class Worker(Protocol):
    """Trains one cell at a time."""

    job: Job | None
    node: str
    """Where it is; empty on this machine."""

    def give(self, job: Job) -> None:
        """Begin to train."""

    def poll(self) -> dict[str, Any] | None:
        """How the job ended, once it has: `status` (`completed`, `diverged`, `failed` with its `error`, `held` by
        another process, or `died`) and `seconds`. One that died is of no further use; its job may be given to another.
        """

    def progress(self) -> AttemptProgress | None:
        """Where the job stands."""

    def unrecorded_seconds(self) -> float:
        """Wall seconds of the attempt that is being made, or that was left without a record."""

    def ask_to_stop(self) -> None:
        """Begin to end, in mid-step if need be: the next start goes on from the last checkpoint."""

    def stop(self) -> None:
        """End, and keep what the attempt says of it."""


class Place(Protocol):
    """Where cells are trained."""

    devices: int
    """GPUs of a cell."""

    def gather(self, cells: Iterable[Cell]) -> None:
        """Take over what attempts at these cells have left there that no driver saw end."""

    def found(self, jobs: Sequence[Job]) -> Sequence[Worker]:
        """Workers that an earlier driver has left behind at one of these jobs."""

    def recruit(self, crew: Sequence[Worker], jobs: int) -> Sequence[Worker]:
        """Workers to be added to the crew now, for so many jobs that wait or run. Raises CellsFailedError where there
        is nobody left to wait for."""

    def wait(self, crew: Sequence[Worker]) -> None:
        """Until there is news of a worker, a second at most."""

    def stop_left(self) -> None:
        """End what an earlier driver has left at work and nobody has taken up: a limit of cost is reached."""

    def close(self) -> None:
        """Let go of the place."""


def train_all(
    jobs: Sequence[Job],
    *,
    place: Place,
    on_change: Callable[[PoolState], None],
    max_cost_usd: float | None = None,
) -> PoolState:
    """Train all jobs with the workers of `place`; return how they ended.

    `on_change` is called about once a second and after each ending. Raises TrainingStoppedError, after stopping the
    workers, when the cost of these attempts reaches `max_cost_usd`; what was trained stays.
    """
    state = PoolState(waiting=list(jobs))
    tries: dict[str, int] = {}
    crew: list[Worker] = []
    try:
        crew += place.found(jobs)
        at_work = {worker.job.cell.digest for worker in crew if worker.job}
        state.waiting = [job for job in jobs if job.cell.digest not in at_work]
        while state.waiting or any(worker.job for worker in crew):
            crew += place.recruit(crew, len(state.waiting) + sum(worker.job is not None for worker in crew))
            for worker in list(crew):
                if worker.job is not None and (ending := worker.poll()) is not None:
                    job = worker.job
                    state.cost_usd += job.purpose.cost_usd(float(ending.get("seconds", 0.0)))
                    if ending["status"] == "died":
                        crew.remove(worker)
                        worker.stop()
                        tries[job.cell.digest] = tries.get(job.cell.digest, 0) + 1
                        if tries[job.cell.digest] < LARGEST_NUMBER_OF_TRIES:
                            state.waiting.insert(0, job)
                        else:
                            state.failed[job.name] = f"its process died {LARGEST_NUMBER_OF_TRIES} times"
                    else:
                        _note_ending(state, job, ending)
                        worker.job = None
                if worker.job is None and (ready := _ready(state)) is not None:
                    worker.give(ready)
            state.running = {w.job.name: w.progress() for w in crew if w.job}
            state.nodes = {w.job.name: w.node for w in crew if w.job and w.node}
            state.running_cost_usd = sum(w.job.purpose.cost_usd(w.unrecorded_seconds()) for w in crew if w.job)
            on_change(state)
            spent = state.cost_usd + state.running_cost_usd
            if max_cost_usd is not None and spent >= max_cost_usd:
                raise TrainingStoppedError(
                    f"the cost so far, ${spent:.2f}, has reached the limit of "
                    f"${max_cost_usd:.2f}; training was stopped with {len(state.waiting)} cells not begun, and what "
                    "was trained is kept. Raise budget_usd or --max-cost to go on.",
                    state,
                )
            place.wait(crew)
            if state.held and not any(worker.job for worker in crew):
                time.sleep(HELD_S / 4)  # nobody here has news
    finally:
        for worker in crew:
            worker.ask_to_stop()
        for worker in crew:
            worker.stop()
    return state


def _note_ending(state: PoolState, job: Job, ending: dict[str, Any]) -> None:
    if ending["status"] == "completed":
        state.done.append(job.name)
    elif ending["status"] == "diverged":
        state.diverged.append(job.name)
    elif ending["status"] == "held":
        state.waiting.append(job)
        state.held[job.name] = time.monotonic() + HELD_S
    else:
        state.failed[job.name] = str(ending.get("error", "no reason was given"))


def _ready(state: PoolState) -> Job | None:
    """Take the first waiting job that no other process was just seen to hold."""
    now = time.monotonic()
    for place, job in enumerate(state.waiting):
        if state.held.get(job.name, now) <= now:
            state.held.pop(job.name, None)
            return state.waiting.pop(place)
    return None


class ThisMachine:
    """A place: so many worker processes here."""

    devices = 1

    def __init__(self, layout: Layout, workers: int) -> None:
        self.layout, self.workers = layout, workers

    def gather(self, cells: Iterable[Cell]) -> None:
        """Nothing: whatever ends here lies here."""

    def found(self, jobs: Sequence[Job]) -> Sequence[Worker]:
        """None: they die with their driver."""
        return []

    def recruit(self, crew: Sequence[Worker], jobs: int) -> Sequence[Worker]:
        """As many as there are jobs for, up to the number of this place; each on the GPU that has the fewest."""
        gpus: list[str | None] = [*training_gpus()] or [None]
        taken = [worker.gpu for worker in crew if isinstance(worker, LocalWorker)]
        added = []
        for _ in range(min(self.workers, jobs) - len(crew)):
            gpu = min(gpus, key=taken.count)
            taken.append(gpu)
            added.append(LocalWorker(self.layout, gpu=gpu))
        return added

    def wait(self, crew: Sequence[Worker]) -> None:
        """Until one answers."""
        wait_for_news([worker for worker in crew if isinstance(worker, LocalWorker)])

    def stop_left(self) -> None:
        """Nothing: workers die with their driver."""

    def close(self) -> None:
        """Nothing is held."""


def wait_for_news(crew: Sequence[LocalWorker], timeout_s: float = 1.0) -> None:
    """Return when a worker that has a job answers, or after so many seconds."""
    with selectors.DefaultSelector() as selector:
        for worker in crew:
            if worker.job is not None:
                selector.register(worker.answers, selectors.EVENT_READ)
        if selector.get_map():
            selector.select(timeout_s)


class LocalWorker:
    """One worker process and the job it has: `python -m MODULE PID ARGUMENTS`, with this process' number.

    gpu: the one that it alone is to see, as CUDA_VISIBLE_DEVICES names it; None leaves that as it is.
    """

    node = ""

    def __init__(
        self, layout: Layout, module: Sequence[str] = ("muonlab.pipeline.worker",), *, gpu: str | None = None
    ) -> None:
        self.layout = layout
        self.gpu = gpu
        alone = {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
        self.job: Job | None = None
        self._attempt_in = layout
        self._asked_to_stop = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", module[0], str(os.getpid()), *module[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=layout.root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(layout.root), **alone},
        )
        assert self.process.stdout is not None
        self.answers: IO[str] = self.process.stdout

    def give(self, job: Job, fence: Fence | None = None) -> None:
        """Begin to train; with a fence, behind it."""
        assert self.process.stdin is not None
        self.job = job
        self._attempt_in = self.layout if fence is None else fence.layout
        with contextlib.suppress(BrokenPipeError):  # a worker that died is found by poll
            self.process.stdin.write(line_of(job, fence) + "\n")
            self.process.stdin.flush()

    def poll(self) -> dict[str, Any] | None:
        """The answer to the job, once there is one; a process that ended without one has `died`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            if not selector.select(0):
                return None
        line = self.answers.readline()
        if not line:
            self.process.wait()
            died = {"status": "died", "seconds": self.unrecorded_seconds()}
            if self.job is not None and self._attempt_in is self.layout:
                CellScratch(self.layout, self.job.cell.digest).sweep_unless_held()
            return died
        answer: dict[str, Any] = json.loads(line)
        return answer

    def progress(self) -> AttemptProgress | None:
        """What the attempt has last written."""
        folder = self._attempt()
        return None if folder is None else read_progress(folder)

    def unrecorded_seconds(self) -> float:
        """Until the last sign of life; 0 once the attempt's record has them."""
        folder = self._attempt()
        return 0.0 if folder is None or (folder / "record.json").exists() else seconds_so_far(folder)

    def _attempt(self) -> Path | None:
        """The folder of the newest attempt at the job's cell."""
        if self.job is None:
            return None
        folders = CellScratch(self._attempt_in, self.job.cell.digest).attempt_folders()
        return folders[-1] if folders else None

    def ask_to_stop(self) -> None:
        """Send SIGTERM to a process that trains."""
        if self.job is not None and not self._asked_to_stop:
            self._asked_to_stop = True
            self.process.terminate()

    def stop(self) -> None:
        """End the process, in mid-step if need be: the next start goes on from the last checkpoint."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        deadline = time.monotonic() + 5
        self.ask_to_stop()
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.answers.close()
