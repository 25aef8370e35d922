"""Attempts that are made elsewhere, each behind a fence: a folder under its number, which the driver alone promotes.

    scratch/<digest>/cluster/<n>/job.json   what was given to whom; the same text on the node, with a token
                                 seen.json  the last that the driver has heard of the attempt
                                 scratch/   the attempt's own scratch folder (`muonlab.pipeline.attempts`)

A node that a broken network has cut off goes on, finishes perhaps, and disturbs nobody: it writes behind its fence, and
nothing there is a result before the driver has checked its hashes and moved it to the cell's own attempts and bundle.
What comes second is kept as a record beside the first, so that the ledger compares the two.

Where nodes and driver share the folder, an attempt begins at the newest checkpoint behind any other fence of its cell.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from muonlab.pipeline.attempts import (
    NOT_BEGUN,
    AttemptProgress,
    CellScratch,
    Purpose,
    lost_record,
    read_progress,
    seconds_so_far,
)
from muonlab.pipeline.layout import Layout
from muonlab.registry.canonical import canonical_json
from muonlab.registry.errors import IntegrityError, UsageError
from muonlab.registry.files import write_atomically
from muonlab.registry.record import RunRecord, Status

CHECKPOINTS = "checkpoints"
"""The folder in which `muonlab.training.loop` keeps them; its module would load torch."""


class Seen(NamedTuple):
    """What is known of a running attempt: its `start.json`, where it stands, and how long it has lived."""

    start: dict[str, Any]
    progress: AttemptProgress | None
    seconds: float
    """Of wall time, until its last sign of life: there may be one long before the first step."""


class Fence:
    """The folder of one attempt at one cell, in the checkout `layout`."""

    def __init__(self, layout: Layout, digest: str, number: int) -> None:
        self.digest, self.number = digest, number
        self.folder = CellScratch(layout, digest).fences / str(number)
        self.layout = Layout(root=layout.root, main=self.folder)
        self.scratch = CellScratch(self.layout, digest)
        self.attempt = self.scratch.folder / "attempts" / str(number)

    def job(self) -> str | None:
        """The text that it was reserved with."""
        path = self.folder / "job.json"
        return path.read_text(encoding="utf-8") if path.exists() else None

    def record(self) -> RunRecord | None:
        """How the attempt ended, where it says so."""
        path = self.attempt / "record.json"
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None

    def seen(self) -> Seen | None:
        """What the attempt's own files say, or else what was noted of it."""
        if (self.attempt / "start.json").exists():
            start = json.loads((self.attempt / "start.json").read_text(encoding="utf-8"))
            return Seen(start, read_progress(self.attempt), seconds_so_far(self.attempt))
        noted = self._noted()
        if noted is None:
            return None
        reached = None if noted["progress"] is None else AttemptProgress(*noted["progress"])
        return Seen(noted["start"], reached, noted["seconds"])

    def note(self, seen: Seen, node: str) -> None:
        """Keep what was heard, and from where, for the record of an attempt that is lost with its node."""
        text = json.dumps({**seen._asdict(), "node": node})
        write_atomically(self.folder / "seen.json", text, durable=False)

    def node(self) -> str | None:
        """From where it was last heard of."""
        noted = self._noted()
        return None if noted is None else str(noted["node"])

    def _noted(self) -> dict[str, Any] | None:
        path = self.folder / "seen.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def fences_of(layout: Layout, digest: str) -> list[Fence]:
    """Of one cell, by their numbers."""
    folders = CellScratch(layout, digest).fences.glob("*/")
    return [Fence(layout, digest, number) for number in sorted(int(folder.name) for folder in folders)]


def reserve(layout: Layout, digest: str, job: dict[str, Any], *, above: int = 0) -> Fence:
    """A new fence with the number that follows all attempts at the cell that are known here, and `above`."""
    fence = Fence(layout, digest, max(_free_number(layout, digest), above + 1))
    fence.folder.mkdir(parents=True)
    write_atomically(fence.folder / "job.json", canonical_json({**job, "token": secrets.token_hex(16)}))
    return fence


def _free_number(layout: Layout, digest: str) -> int:
    """Above every attempt at the cell that is known here, whether it has ended or is made behind a fence."""
    behind = [fence.number + 1 for fence in fences_of(layout, digest)]
    return max([CellScratch(layout, digest).next_number(), *behind])


def open_fence(layout: Layout, digest: str, number: int, job: str) -> tuple[Fence, bool]:
    """The fence at the node that was given this job, and whether it is the driver's own folder, shared with this node.

    Raises UsageError where another job's attempt has this number here.
    """
    fence = Fence(layout, digest, number)
    there = fence.job()
    if there is None:
        fence.folder.mkdir(parents=True)
        write_atomically(fence.folder / "job.json", job)
    elif there != job:
        raise UsageError(f"{fence.folder}: another driver's attempt has this number; remove the folder, and run again.")
    return fence, there is not None


def inherit(layout: Layout, fence: Fence) -> int:
    """Give the attempt the checkpoints of the one that came furthest; return its step, 0 where there is none.

    By hard links: who wrote them may still live, and drops its own names for them when it likes.
    """
    works = [CellScratch(layout, fence.digest).work, *(other.scratch.work for other in fences_of(layout, fence.digest))]
    for work in sorted(works, key=_reached, reverse=True):
        for checkpoint in _checkpoints(work):
            part = fence.folder / "inherited"
            shutil.rmtree(part, ignore_errors=True)
            with contextlib.suppress(OSError):  # dropped in this instant by its owner
                shutil.copytree(checkpoint, part, copy_function=os.link)
                target = fence.scratch.work / CHECKPOINTS / checkpoint.name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, target)
        if reached := _reached(fence.scratch.work):
            return reached
    return 0


def _checkpoints(work: Path) -> list[Path]:
    return [path for path in (work / CHECKPOINTS).glob("step-*") if path.name.removeprefix("step-").isdigit()]


def _reached(work: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in _checkpoints(work)), default=0)


def files_of(fence: Fence) -> Iterator[tuple[str, int]]:
    """Name (below the fence) and size in bytes of every file that makes the attempt's result; no checkpoints."""
    for folder in (fence.attempt, fence.scratch.bundle, fence.layout.scratch / "evaluations"):
        for path in sorted(folder.glob("*")):
            if path.is_file():
                yield str(path.relative_to(fence.folder)), path.stat().st_size


def promote(layout: Layout, fence: Fence) -> RunRecord | None:
    """Make an ended attempt one of the cell's, and its bundle the cell's where there is none; return its record.

    None where it has left no record. The caller holds the cell's lock. Each step can be cut off and done again. Raises
    IntegrityError for files that are not those that training wrote; then nothing is moved.
    """
    own = CellScratch(layout, fence.digest)
    record = fence.record()
    if record is None:
        return None
    whole = fence.scratch.finished()
    if record.cell_digest != fence.digest or whole not in (None, record):
        raise IntegrityError(
            f"scratch/{fence.digest[:12]}/cluster/{fence.number}: its record is not that of the attempt which was to "
            "be made there; remove the folder to train the cell again."
        )
    for path in (fence.layout.scratch / "evaluations").glob("*.json"):
        target = layout.scratch / "evaluations" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    if whole is not None and own.finished() is None:
        shutil.rmtree(own.bundle, ignore_errors=True)
        os.replace(fence.scratch.bundle, own.bundle)
    elif not record.is_result and not own.work.exists() and fence.scratch.work.exists():
        os.replace(fence.scratch.work, own.work)
    _keep(own, fence, fence.attempt)
    shutil.rmtree(fence.folder)
    return record


def record_lost(layout: Layout, fence: Fence, error: str, status: Status = "abandoned") -> RunRecord | None:
    """Write the record of an attempt whose node or process is gone, from what is known of it, and return it.

    None where it never began, or has its record already. The caller holds the cell's lock. The fence stays, for its
    checkpoints, and for an attempt that lives on where nobody hears it: what that finishes is another record, so that
    this one has an identity of its own.
    """
    own = CellScratch(layout, fence.digest)
    seen = fence.seen()
    if seen is None or (own.folder / "attempts" / str(fence.number)).exists():
        return None
    start = {**seen.start, "record": {**seen.start["record"], "attempt_id": secrets.token_hex(8)}}
    folder = own.folder / "recording"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_atomically(folder / "start.json", canonical_json(start))
    if (fence.attempt / "curve.jsonl").exists():
        shutil.copyfile(fence.attempt / "curve.jsonl", folder / "curve.jsonl")
    reached = (seen.progress or NOT_BEGUN)._replace(seconds=seen.seconds)
    write_atomically(folder / "progress.json", json.dumps(reached._asdict()), durable=False)
    record = lost_record(
        folder, start["record"], Purpose(**start["purpose"]), reached, status=status, error=error[:2000]
    )
    write_atomically(folder / "record.json", record.model_dump_json(indent=2))
    _keep(own, fence, folder)
    return record


def _keep(own: CellScratch, fence: Fence, attempt: Path) -> None:
    target = own.folder / "attempts" / str(fence.number)
    if target.exists():  # it was taken for lost
        target = target.with_name(str(_free_number(own.layout, own.digest)))
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(attempt, target)
