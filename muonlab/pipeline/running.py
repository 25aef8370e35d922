"""What trains on this machine at the moment, and the curves of attempts, from the files alone.

An attempt runs while the lock of its cell is held; the system frees it when the holder dies, however it dies. Its
progress is the file that the trainer writes about once a second (see `muonlab.pipeline.attempts`), or what the driver
of a cluster was last told (`muonlab.pipeline.fences`).
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from pydantic import ValidationError

from muonlab.pipeline.answer import Answer, Facts
from muonlab.pipeline.attempts import AttemptProgress, CellScratch, Purpose, read_progress, seconds_so_far
from muonlab.pipeline.cells import CURRENT
from muonlab.pipeline.evaluations import read_record
from muonlab.pipeline.fences import fences_of
from muonlab.pipeline.layout import Layout
from muonlab.registry import ledger
from muonlab.registry.errors import UsageError, nearest
from muonlab.registry.ledger import Ledger
from muonlab.registry.record import RunRecord
from muonlab.reporting.computing import computing_line
from muonlab.reporting.wording import count, duration, money

POLL_S = 0.5
SHOWN = ("seconds", "train_loss", "val_loss", "lr", "grad_norm")
"""Columns of a curve that a log shows; the diagnostics are for MLflow and the report."""


class RunningCell(Facts):
    """An attempt that is being made. Seconds of wall time, cost in USD, losses in nats/token."""

    study: str | None
    """Null for an exploration with `dvc exp run`."""
    workload: str
    arm: str
    seed: int
    digest: str
    attempt: int
    node: str | None
    """Of a cluster, that trains it; null for this machine."""
    pid: int
    """Of its process there."""
    started_at: str
    """UTC, ISO 8601."""
    step: int
    steps: int
    train_loss: float | None
    seconds: float
    """Since the attempt began."""
    eta_seconds: float | None
    """Until its last step, at the pace so far; null before there is one."""
    cost_usd: float
    """Of this attempt so far."""

    def line(self) -> str:
        """One line for a reader."""
        loss = "" if self.train_loss is None else f", loss {self.train_loss:.4f}"
        left = "no pace yet" if self.eta_seconds is None else f"about {duration(self.eta_seconds)} left"
        where = self.study or "exploration"
        node = "" if self.node is None else f", on {self.node}"
        return (
            f"{where}  {self.arm}-{self.seed} on {self.workload}{node}: step {self.step}/{self.steps}{loss}, "
            f"{duration(self.seconds)} so far, {left}, {money(self.cost_usd)}"
        )


class StudySpending(Facts):
    """A study of which a cell is running."""

    study: str
    attempts: int
    """That have ended, failed ones included."""
    cost_usd: float
    """Of the ended and the running ones."""


class Gpu(Facts):
    """One GPU, as nvidia-smi tells it."""

    name: str
    utilization_pct: float | None
    memory_used_mib: float | None
    memory_total_mib: float | None
    temperature_c: float | None
    power_w: float | None

    def line(self) -> str:
        """One line for a reader."""
        memory = f"{_plain(self.memory_used_mib)} of {_plain(self.memory_total_mib)} MiB"
        return (
            f"gpu  {self.name}: {_plain(self.utilization_pct)} % busy, {memory}, {_plain(self.temperature_c)} C, "
            f"{_plain(self.power_w)} W"
        )


class Running(Answer):
    """What runs on this machine now, and on the cluster that it drives."""

    cells: list[RunningCell]
    studies: list[StudySpending]
    gpus: list[Gpu] | None
    """With --gpu; else null."""
    gpu_note: str | None
    """Why --gpu has nothing to show."""

    def lines(self) -> Iterator[str]:
        """What runs, for a reader."""
        for cell in self.cells:
            yield cell.line()
        if not self.cells:
            yield "Nothing is training on this machine."
        for study in self.studies:
            yield f"{study.study}: {money(study.cost_usd)} so far, {count(study.attempts, 'attempt')} ended"
        for gpu in self.gpus or []:
            yield gpu.line()
        if self.gpu_note is not None:
            yield self.gpu_note


def running(layout: Layout, *, gpu: bool) -> Running:
    """Look at scratch/ (and, with `gpu`, ask nvidia-smi); writes nothing."""
    made = (_being_made(scratch) for scratch in _scratches(layout))
    cells = sorted(
        (_running_cell(attempt) for attempt in made if attempt is not None),
        key=lambda cell: (cell.study or "", cell.seed, cell.arm),
    )
    gpus, note = gpu_state() if gpu else (None, None)
    return Running(cells=cells, studies=_spending(layout, cells), gpus=gpus, gpu_note=note)


def is_training(layout: Layout, digest: str) -> bool:
    """Whether an attempt at this cell is being made now, here or on a cluster, for whichever study."""
    return _being_made(CellScratch(layout, digest)) is not None


def _scratches(layout: Layout) -> list[CellScratch]:
    digests = {path.parent.name for kind in ("attempts", "cluster") for path in layout.scratch.glob(f"*/{kind}")}
    return [CellScratch(layout, digest) for digest in sorted(digests)]


class _Made(NamedTuple):
    """An attempt that is being made: its start.json, and how far it has come."""

    start: dict[str, Any]
    progress: AttemptProgress | None
    seconds: float
    node: str | None


def _being_made(scratch: CellScratch) -> _Made | None:
    if not _is_held(scratch):
        return None
    folder = _last_attempt(scratch)
    if folder is not None and not (folder / "record.json").exists():
        return _Made(_json(folder / "start.json"), read_progress(folder), seconds_so_far(folder), None)
    for fence in reversed(fences_of(scratch.layout, scratch.digest)):
        taken = (scratch.folder / "attempts" / str(fence.number)).exists()  # as lost
        if not taken and (seen := fence.seen()) is not None:
            return _Made(seen.start, seen.progress, seen.seconds, fence.node() or "the cluster")
    return None


def _last_attempt(scratch: CellScratch) -> Path | None:
    folders = [folder for folder in scratch.attempt_folders() if (folder / "start.json").exists()]
    return folders[-1] if folders else None


def _is_held(scratch: CellScratch) -> bool:
    path = scratch.folder / "lock"
    if not path.exists():
        return False
    # Taken for an instant, which a trainer that starts just then waits for.
    with contextlib.suppress(Timeout), FileLock(path, timeout=0):
        return False
    return True


def _running_cell(attempt: _Made) -> RunningCell:
    start, progress, seconds, node = attempt
    record, purpose = start["record"], Purpose(**start["purpose"])
    steps = int(start["cell"]["settings"]["steps"])
    step = progress.step if progress else 0
    made = step - progress.resumed_from_step if progress else 0
    return RunningCell(
        study=record["study"],
        workload=record["workload"],
        arm=record["arm"],
        seed=record["seed"],
        digest=record["cell_digest"],
        attempt=record["attempt"],
        node=node,
        pid=start["pid"],
        started_at=record["started_at"],
        step=step,
        steps=steps,
        train_loss=progress.loss if progress else None,
        seconds=seconds,
        eta_seconds=(steps - step) * seconds / made if made > 0 else None,
        cost_usd=purpose.cost_usd(seconds),
    )


def _spending(layout: Layout, cells: list[RunningCell]) -> list[StudySpending]:
    named = {cell.study for cell in cells if cell.study is not None}
    records = ended_attempts(layout) if named else []
    spending = []
    for study in sorted(named):
        ended = [r.cost_usd for r in records if r.study == study]
        now = [cell.cost_usd for cell in cells if cell.study == study]
        spending.append(StudySpending(study=study, attempts=len(ended), cost_usd=math.fsum([*ended, *now])))
    return spending


def ended_attempts(layout: Layout, held: Ledger | None = None) -> list[RunRecord]:
    """Every attempt that has ended: the ledger's, and those of this machine that are not in it yet. Writes nothing.

    Those that were killed are among them, whether or not their record was written since. `held`: the ledger, where it
    was read already.
    """
    recorded = (held or ledger.read(layout.ledger)).records
    known = {record.attempt_id for record in recorded}
    new = (r for scratch in _scratches(layout) for r in (*scratch.records(), *scratch.killed_unless_held()))
    return [*recorded, *(record for record in new if record.attempt_id not in known)]


GPU_FIELDS = ("name", "utilization.gpu", "memory.used", "memory.total", "temperature.gpu", "power.draw")


def gpu_state() -> tuple[list[Gpu], str | None]:
    """The GPUs of this machine, or none and one sentence that says why."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], "No NVIDIA GPU: nvidia-smi is not on this machine."
    asked = subprocess.run(
        [tool, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if asked.returncode != 0:
        said = (asked.stderr or asked.stdout).strip().splitlines()
        return [], f"nvidia-smi found no GPU ({said[-1] if said else f'exit {asked.returncode}'})."
    return [_gpu(row) for row in csv.reader(asked.stdout.splitlines(), skipinitialspace=True) if row], None


def _gpu(row: list[str]) -> Gpu:
    numbers = [_number(text) for text in row[1:]]
    return Gpu(
        name=row[0].strip(),
        utilization_pct=numbers[0],
        memory_used_mib=numbers[1],
        memory_total_mib=numbers[2],
        temperature_c=numbers[3],
        power_w=numbers[4],
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # `[N/A]`
        return None


def _plain(value: float | None) -> str:
    return "?" if value is None else f"{value:g}"


# Logs


class Log(NamedTuple):
    """The curve of one run: where it is read from, and what it is of."""

    title: str
    path: Path
    """curve.jsonl of an attempt, or curve.csv of a cell's outputs."""
    scratch: CellScratch | None
    """Of an attempt."""


def find_log(layout: Layout, cell: str | None) -> Log:
    """The newest run of a cell, `<arm>-<seed>` or `<study>/<arm>-<seed>`; by default the newest of all.

    An exploration's study is `exp`. Raises UsageError where there is no such run in scratch/ or runs/.
    """
    known: dict[str, Log] = {}
    newest: dict[str, float] = {}
    for names, log in _logs(layout):
        written = log.path.stat().st_mtime
        for name in (*names, ""):
            if written >= newest.get(name, 0.0):
                known[name], newest[name] = log, written
    wanted = cell or ""
    if wanted in known:
        return known[wanted]
    if cell is None:
        raise UsageError("scratch/ and runs/ hold no run; `muon study run` or `dvc exp run` makes one.")
    names = sorted(name for name in known if "-" in name and "/" not in name)
    raise UsageError(
        f"{cell!r}: no run of such a cell is on this machine; a cell is `<arm>-<seed>` or `<study>/<arm>-<seed>`, and "
        f"there are {', '.join(names[:8]) or 'none'}{', ...' if len(names) > 8 else ''}.{nearest(cell, names)}"
    )


def _logs(layout: Layout) -> Iterator[tuple[list[str], Log]]:
    """Every run on this machine under the names that it is called by."""
    for path in sorted((layout.root / "runs").glob("*/*/curve.csv")):
        try:
            record = read_record(path.parent)
        except ValidationError:
            record = None  # a damaged record costs its run nothing but the name in it
        place, key = path.parent.parent.name, path.parent.name
        if record is not None:
            key = f"{record.arm}-{record.seed}"
            yield [key, f"{place}/{key}", path.parent.name], Log(f"{place}/{key}", path, None)
    for scratch in _scratches(layout):
        # Of a node that shares this folder; another one sends its curve when the attempt has ended.
        fenced = [fence.attempt for fence in fences_of(layout, scratch.digest)]
        for folder in (*scratch.attempt_folders(), *fenced):
            if (folder / "start.json").exists() and (folder / "curve.jsonl").exists():
                try:
                    start = _json(folder / "start.json")["record"]
                except json.JSONDecodeError:
                    continue  # cut short by a power cut: nothing says whose attempt it was
                key, place = f"{start['arm']}-{start['seed']}", start["study"] or CURRENT
                title = f"{place}/{key}, attempt {start['attempt']}"
                yield [key, f"{place}/{key}"], Log(title, folder / "curve.jsonl", scratch)


def tell_log(log: Log, *, tail: int | None, follow: bool, say: Callable[[str], None]) -> None:
    """Say the curve's last `tail` rows (all by default) and how the run ended; with `follow`, go on until it ends."""
    say(log.title)
    told: int | None = None
    while True:
        # Asked before the rows are read: whatever an ended attempt has written is among them then.
        alive = log.scratch is not None and _is_held(log.scratch)
        rows = _rows(log.path)
        first = told if told is not None else 0 if tail is None else max(0, len(rows) - tail)
        for row in rows[first:]:
            say(_spell(row))
        told = len(rows)
        if not (alive and follow):
            for line in _ending(log.path.parent, alive=alive):
                say(line)
            return
        time.sleep(POLL_S)


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    # A last line without its end is still being written, or was cut short by a kill.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _spell(row: dict[str, Any]) -> str:
    shown = [f"{name} {_short(row[name])}" for name in SHOWN if row.get(name) not in (None, "")]
    return "  ".join([f"step {row.get('step', '?'):>6}", *shown])


def _short(value: object) -> str:
    number = _number(str(value))
    return str(value) if number is None else f"{number:.5g}"


def _ending(folder: Path, *, alive: bool) -> Iterator[str]:
    """Where its time went, if it has measured that, and how the run ended or where it is."""
    record = read_record(folder)
    path = folder / "record.json"
    if record is None and path.exists():
        record = RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    if record is not None:
        loss = "" if record.val_loss is None else f" with val_loss {record.val_loss:.4f}"
        why = "" if record.error is None else f" ({record.error})"
        if (split := computing_line(record)) is not None:
            yield split
        yield f"{record.status}{loss} after {duration(record.wall_seconds)}, {money(record.cost_usd)}{why}"
        return
    progress = read_progress(folder)
    at = "before its first step" if progress is None else f"at step {progress.step} of {progress.steps}"
    yield f"training, {at}" if alive else f"ended without a word {at}; the next run of the cell goes on from there"


def _json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
