"""One attempt at one cell: locked, recorded however it ends, and finished as a bundle that can be adopted.

    scratch/<digest>/lock                     held while an attempt runs; the system frees it when the holder dies
                     work/                    checkpoints, from which the next attempt goes on
                     attempts/<n>/start.json  who runs what, since when
                                  progress.json, curve.jsonl   rewritten / appended while it runs
                                  alive.json   its seconds so far, rewritten every second, whatever it is at
                                  record.json  how it ended: the ledger's row
                     bundle/                  train.json, curve.csv, model.safetensors, .done and manifest.json
                     cluster/<n>/             an attempt made on a cluster, until it is promoted (see `fences`)

An attempt without record.json whose lock is free was killed: the next start writes its record, `abandoned`.
Only a renamed, hashed bundle is ever read as a result. Adopting one imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from muonlab.pipeline.layout import Layout
from muonlab.pipeline.processes import provenance
from muonlab.registry.canonical import canonical_json
from muonlab.registry.cell import Cell
from muonlab.registry.errors import CellsFailedError, IntegrityError, MuonlabError, UsageError
from muonlab.registry.files import file_sha256, write_atomically
from muonlab.registry.record import CurvePoint, Hashes, RunRecord, Status

WEIGHTS = "model.safetensors"
BUNDLE_FILES = ("train.json", "curve.csv", WEIGHTS, ".done")
"""What a cell leaves: its record, its curve, its final weights, and a constant file that orders DVC's stages."""

ALIVE_EVERY_S = 1.0

SWEEP_S = 1.0
"""How long a trainer waits for a lock that is held: a sweep is over by then, another trainer is not."""

LAUNCHER_ENDS_RANKS_S = 30.0
"""How long a rank that fails waits to be ended by its launcher, which looks at its ranks every few seconds."""


@dataclass(frozen=True)
class Purpose:
    """On whose behalf an attempt runs: what its record says beside the result."""

    study: str | None
    registration: str | None
    price_usd_per_gpu_hour: float
    device_count: int = 1

    def cost_usd(self, wall_seconds: float) -> float:
        """Dollars for `wall_seconds` on the devices of one attempt."""
        return wall_seconds / 3600 * self.device_count * self.price_usd_per_gpu_hour


class CellHeldError(UsageError):
    """Another process trains the cell at the moment."""


class CellScratch:
    """The scratch folder of one cell."""

    def __init__(self, layout: Layout, digest: str) -> None:
        self.layout = layout
        self.digest = digest
        self.folder = layout.scratch / digest
        self.work = self.folder / "work"
        self.bundle = self.folder / "bundle"
        self.fences = self.folder / "cluster"

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the cell; raises CellHeldError when another process trains it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=SWEEP_S)
        except Timeout:
            raise CellHeldError(
                f"cell {name} ({self.digest[:12]}): another process is training it; wait for it, or stop that process."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def sweep_unless_held(self) -> None:
        """Write the record of every attempt that was killed, unless some process is training the cell right now."""
        if not (self.folder / "lock").exists():
            return
        # The lock is kept while sweeping: an attempt that began in between would be taken for a killed one.
        with contextlib.suppress(Timeout), FileLock(self.folder / "lock", timeout=0):
            self.sweep()

    def attempt_folders(self) -> list[Path]:
        """Folders of all attempts made on this machine, first to last."""
        return sorted((self.folder / "attempts").glob("*/"), key=lambda path: int(path.name))

    def next_number(self) -> int:
        """The number of the attempt that follows those made on this machine."""
        earlier = self.attempt_folders()
        return int(earlier[-1].name) + 1 if earlier else 1

    def records(self) -> list[RunRecord]:
        """Records of the attempts that have ended."""
        return [
            RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
            for folder in self.attempt_folders()
            if (path := folder / "record.json").exists()
        ]

    def sweep(self) -> None:
        """Write the record of every attempt that was killed; the caller holds the lock."""
        for folder, record in self._killed():
            _write_record(folder, record)

    def killed_unless_held(self) -> list[RunRecord]:
        """What `sweep_unless_held` would write, without writing it."""
        if (self.folder / "lock").exists():
            with contextlib.suppress(Timeout), FileLock(self.folder / "lock", timeout=0):
                return [record for _, record in self._killed()]
        return []

    def _killed(self) -> Iterator[tuple[Path, RunRecord]]:
        for folder in self.attempt_folders():
            if not (folder / "record.json").exists() and (folder / "start.json").exists():
                start = _read(folder / "start.json")
                yield (
                    folder,
                    lost_record(
                        folder,
                        start["record"],
                        Purpose(**start["purpose"]),
                        (read_progress(folder) or NOT_BEGUN)._replace(seconds=seconds_so_far(folder)),
                        status="abandoned",
                        error="the process ended without a word (killed, or the machine stopped)",
                    ),
                )

    def finished(self) -> RunRecord | None:
        """The record of a whole, verified bundle, or None where there is none.

        Raises IntegrityError when a bundle's files are not those that its attempt wrote.
        """
        if not (self.bundle / "manifest.json").exists():
            return None
        for name, stated in _read(self.bundle / "manifest.json").items():
            path = self.bundle / name
            if not path.exists() or file_sha256(path) != stated:
                raise IntegrityError(
                    f"scratch/{self.digest[:12]}/bundle: {name} is not the file that training wrote; "
                    "remove the folder `bundle` to train the cell again."
                )
        return RunRecord.model_validate_json((self.bundle / "train.json").read_text(encoding="utf-8"))

    def adopt(self, into: Path) -> None:
        """Copy the finished bundle's files into a cell's output folder."""
        into.mkdir(parents=True, exist_ok=True)
        for name in BUNDLE_FILES:
            # By another name until it is whole: `muon study status` may read the folder at any moment.
            part = into / f".{name}.part"
            shutil.copyfile(self.bundle / name, part)
            os.replace(part, into / name)

    def discard(self) -> None:
        """Remove bundle and checkpoints once the outputs are safe elsewhere; the attempts' records stay."""
        for folder in (self.bundle, self.work, self.fences):
            shutil.rmtree(folder, ignore_errors=True)


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """Step and validation loss of every evaluation that an attempt has logged so far."""
    path = folder / "curve.jsonl"
    if not path.exists():
        return []
    points = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that a kill cut short
        if "val_loss" in row:
            points.append({"step": row["step"], "val_loss": row["val_loss"]})
    return points


def train_cell(
    layout: Layout,
    cell: Cell,
    purpose: Purpose,
    *,
    data_dir: Path,
    number: int | None = None,
    on_progress: Callable[[Path], None] = lambda folder: None,
    warn: Callable[[str], None] = print,
) -> RunRecord:
    """Make one attempt at a cell, in this process, going on from its newest checkpoint; return its record.

    `number`: of the attempt, where others are made elsewhere; by default it follows those in this scratch folder.
    On success the cell's bundle is complete. `on_progress` is told the attempt's folder about once a second.
    A bundle that another process has completed in the meantime is taken instead. Raises CellsFailedError, after the
    record is written, when the attempt fails; a divergence is a result, not a failure. Raises CellHeldError when
    another process holds the cell.
    """
    from muonlab.training.loop import train, write_curve_csv

    scratch = CellScratch(layout, cell.digest)
    with scratch.locked(cell.key):
        scratch.sweep()
        if (finished := scratch.finished()) is not None:
            return finished
        if number is None:
            number = scratch.next_number()
        folder = scratch.folder / "attempts" / str(number)
        folder.mkdir(parents=True)
        base: dict[str, Any] = {
            "study": purpose.study,
            "workload": cell.workload,
            "arm": cell.arm,
            "seed": cell.seed,
            "cell_digest": cell.digest,
            "registration": purpose.registration,
            "attempt": number,
            "attempt_id": secrets.token_hex(8),
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "device_count": purpose.device_count,
            "hashes": Hashes(
                data=cell.inputs.data,
                tokenizer=cell.inputs.tokenizer,
                init=None,
                order=None,
                weights=None,
                code=cell.inputs.code,
                environment=cell.inputs.environment,
            ).model_dump(),
            "provenance": provenance(layout.root).model_dump(),
        }
        write_atomically(
            folder / "start.json",
            canonical_json(
                {
                    "record": base,
                    "purpose": vars(purpose),
                    "cell": cell.model_dump(mode="json"),
                    "pid": os.getpid(),
                }
            ),
        )
        clock = AttemptClock(folder, cell, on_progress, warn)
        try:
            with clock.alive():
                outcome = train(cell, data_dir, scratch.work, on_point=clock.point, on_progress=clock.progress)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            if not interrupted and purpose.device_count > 1:
                # Another rank may have died: then their launcher ends this one within seconds, and knows why.
                time.sleep(LAUNCHER_ENDS_RANKS_S)
            status: Status = "abandoned" if interrupted else "failed"
            name = type(error).__name__
            reason = f"interrupted ({name})" if interrupted else _reason(error, cell)
            lost = lost_record(folder, base, purpose, clock.state(), status=status, error=reason[:2000])
            try:
                _write_record(folder, lost)
            except OSError as unwritten:  # the disk is full: the next start finds the attempt, and records it
                raise MuonlabError(
                    f"cell {cell.key} ({cell.digest[:12]}): attempt {number} ended at step {clock.step} with {reason}, "
                    f"which cannot be recorded ({unwritten.strerror}); free space and start again: the next start "
                    "records the attempt as abandoned and goes on from the last checkpoint."
                ) from error
            if not interrupted:
                raise CellsFailedError(
                    f"cell {cell.key} ({cell.digest[:12]}): attempt {number} failed at step {clock.step} with "
                    f"{reason}; it is recorded and counted, mend the cause and run the cell again."
                ) from error
            raise
        record = RunRecord.model_validate(
            {
                **base,
                "status": outcome.status,
                "val_loss": outcome.val_loss,
                "perplexity": outcome.perplexity,
                "resumed_from_step": outcome.resumed_from_step,
                "final_step": outcome.final_step,
                "tokens": outcome.tokens,
                "wall_seconds": clock.seconds(),
                "cost_usd": purpose.cost_usd(clock.seconds()),
                "curve": [
                    CurvePoint(step=int(row["step"] or 0), val_loss=_finite(row["val_loss"]))
                    for row in outcome.curve
                    if "val_loss" in row
                ],
                # In the ledger's order, or the snapshot made from the ledger would read as another one.
                "orthogonalizers": dict(sorted(outcome.orthogonalizers.items())),
                "computing": {
                    "device": outcome.device,
                    "precision": outcome.precision,
                    "repeats": outcome.repeats,
                    "seconds_by_part": {part: round(s, 3) for part, s in sorted(outcome.seconds_by_part.items())},
                    "peak_memory_bytes": outcome.peak_memory_bytes,
                },
                "hashes": {
                    **base["hashes"],
                    "init": outcome.init_sha256,
                    "order": outcome.order_sha256,
                    "weights": outcome.weights_sha256,
                },
                "error": outcome.reason,
            }
        )
        making = scratch.folder / "bundle.part"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        (making / "train.json").write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        write_curve_csv(outcome.curve, making / "curve.csv")
        if outcome.weights is None:  # a diverged run has no weights worth keeping; DVC wants the file
            (making / WEIGHTS).touch()
        else:
            shutil.copyfile(outcome.weights, making / WEIGHTS)
        (making / ".done").write_text("done\n", encoding="utf-8")
        manifest = {name: file_sha256(making / name) for name in BUNDLE_FILES}
        (making / "manifest.json").write_text(canonical_json(manifest), encoding="utf-8")
        # The record first: killed between the two, the cell is trained again, to the same outcome. The other way
        # round, a finished attempt would be taken for an abandoned one.
        _write_record(folder, record)
        shutil.rmtree(scratch.bundle, ignore_errors=True)
        os.replace(making, scratch.bundle)
        shutil.rmtree(scratch.work, ignore_errors=True)
        return record


class AttemptClock:
    """Keeps an attempt's progress and curve on disk while it runs, for watchers and for the record of a killed one."""

    def __init__(
        self, folder: Path, cell: Cell, on_progress: Callable[[Path], None], warn: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self.on_progress, self.warn = on_progress, warn
        self.steps = cell.settings.steps
        self.tokens_a_step = cell.settings.batch_size * cell.settings.data.sequence_length
        self.started = time.monotonic()
        self.step = 0
        self.resumed_from_step = 0
        self.loss: float | None = None

    def seconds(self) -> float:
        return time.monotonic() - self.started

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Write every `ALIVE_EVERY_S` that the attempt lives: one that is killed is charged up to then.

        In a thread, since steps tell nothing of the minutes in which a model is loaded or a split evaluated.
        """
        ended = threading.Event()

        def beat() -> None:
            while True:
                with contextlib.suppress(OSError):  # a full disk is told of where it matters
                    text = json.dumps({"seconds": self.seconds()})
                    write_atomically(self.folder / "alive.json", text, durable=False)
                if ended.wait(ALIVE_EVERY_S):
                    return

        thread = threading.Thread(target=beat, daemon=True, name="alive")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def state(self) -> AttemptProgress:
        return AttemptProgress(
            step=self.step,
            steps=self.steps,
            loss=self.loss,
            seconds=self.seconds(),
            tokens=self.step * self.tokens_a_step,
            resumed_from_step=self.resumed_from_step,
        )

    def point(self, row: dict[str, Any]) -> None:
        clean = {key: _finite(value) if isinstance(value, float) else value for key, value in row.items()}
        with (self.folder / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def progress(self, state: Any) -> None:
        if state.warning is not None:
            self.warn(state.warning)
            return
        self.step, self.resumed_from_step = state.step, state.resumed_from_step
        self.loss = _finite(state.loss)
        write_atomically(self.folder / "progress.json", json.dumps(self.state()._asdict()), durable=False)
        self.on_progress(self.folder)


class AttemptProgress(NamedTuple):
    """Where a running attempt stands. Loss in nats/token; seconds of wall time since the attempt began."""

    step: int
    steps: int
    loss: float | None
    seconds: float
    tokens: int
    resumed_from_step: int


NOT_BEGUN = AttemptProgress(step=0, steps=0, loss=None, seconds=0.0, tokens=0, resumed_from_step=0)
"""Of an attempt that has not told of a step yet."""


def seconds_so_far(folder: Path) -> float:
    """Wall seconds of an attempt until the last sign of life in its folder."""
    path = folder / "alive.json"
    beat = float(_read(path)["seconds"]) if path.exists() else 0.0
    return max(beat, (read_progress(folder) or NOT_BEGUN).seconds)


def read_progress(folder: Path) -> AttemptProgress | None:
    """The progress that an attempt has last written, or None before its first."""
    path = folder / "progress.json"
    return AttemptProgress(**_read(path)) if path.exists() else None


def lost_record(
    folder: Path, base: dict[str, Any], purpose: Purpose, reached: AttemptProgress, *, status: Status, error: str
) -> RunRecord:
    """The record of an attempt that ended without a result: how far it came, and what it cost.

    `folder` holds its curve, `base` is what `start.json` says of the record.
    """
    return RunRecord.model_validate(
        {
            **base,
            "status": status,
            "val_loss": None,
            "perplexity": None,
            "resumed_from_step": reached.resumed_from_step,
            "final_step": reached.step,
            "tokens": reached.tokens,
            "wall_seconds": reached.seconds,
            "cost_usd": purpose.cost_usd(reached.seconds),
            "curve": read_curve(folder),
            "error": error,
        }
    )


def _reason(error: BaseException, cell: Cell) -> str:
    """Why an attempt failed; where memory did not suffice, with the sizes for which it did not."""
    told = f"{type(error).__name__}: {error}"
    # torch.OutOfMemoryError on a GPU; on the processor a RuntimeError in these words; numpy's own is a MemoryError.
    lacks_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if lacks_memory or "can't allocate memory" in told:
        settings = cell.settings
        return f"out of memory with a batch of {settings.batch_size} x {settings.data.sequence_length} tokens ({told})"
    return told


def _write_record(folder: Path, record: RunRecord) -> None:
    write_atomically(folder / "record.json", record.model_dump_json(indent=2))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
