"""What runs on the nodes of a cluster, in Ray's worker processes: a look at the node, and slots that train.

Ray starts these in the folder in which `ray start` was called: the node's own checkout. Training itself runs in a child
process with that checkout's code, which dies with the slot (PR_SET_PDEATHSIG), as torchrun and its ranks do.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import threading
import time
from typing import Any

from muonlab.pipeline.attempts import Purpose
from muonlab.pipeline.fences import Fence, fences_of, files_of, inherit, open_fence
from muonlab.pipeline.fingerprint import code_fingerprint, environment
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.pool import Job, LocalWorker, line_of, wait_for_news
from muonlab.pipeline.processes import difference, dirty_text, git_state
from muonlab.registry.cell import Cell
from muonlab.registry.errors import MuonlabError

ORPHANED_AFTER_S = 600.0
"""A slot that nobody has asked for so long, and that trains nothing, gives its GPUs back."""


def survey(kinds: list[str], workloads: list[str], digests: list[str]) -> dict[str, Any]:
    """What must be the same on every node (see `facts_of` and `data_of`), and which attempts at these cells ended here.

    Of a folder that is no checkout, `error`, a sentence, instead.
    """
    # Ray hides the GPUs from a task that asks for none; the node has them all the same.
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        layout = Layout.find()
    except MuonlabError as error:
        return {"error": f"Ray was not started in a checkout of this project: {error}"}
    ended = {
        digest: [(fence.number, fence.job(), fence.record() is not None) for fence in fences_of(layout, digest)]
        for digest in digests
    }
    return {
        **facts_of(layout, kinds),
        "data": data_of(layout, workloads),
        "fences": {digest: found for digest, found in ended.items() if found},
    }


def facts_of(layout: Layout, kinds: list[str]) -> dict[str, Any]:
    """What a checkout would train with: commit, what differs from it, interpreter, libraries and code."""
    commit, _ = git_state(layout.root)
    return {
        "host": socket.gethostname(),
        "commit": commit,
        "dirty": dirty_text(difference(layout.root)),
        "python": platform.python_version(),
        "environment": environment(),
        "code": {kind: code_fingerprint(layout.root, kind) for kind in kinds},
    }


def data_of(layout: Layout, workloads: list[str]) -> dict[str, dict[str, str] | None]:
    """Workload -> file -> SHA-256 of its prepared data; None where they are not prepared."""
    return {workload: _data(layout, workload) for workload in workloads}


def _data(layout: Layout, workload: str) -> dict[str, str] | None:
    path = layout.data(workload) / "meta.json"
    if not path.exists():
        return None
    hashes: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["sha256"]
    return hashes


def list_files(digest: str, number: int) -> list[tuple[str, int]]:
    """`files_of` the fence on this node."""
    return list(files_of(Fence(Layout.find(), digest, number)))


def read_file(digest: str, number: int, name: str, offset: int, size: int) -> bytes:
    """At most `size` bytes of a file behind a fence on this node."""
    with (Fence(Layout.find(), digest, number).folder / name).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def drop(digest: str, number: int) -> None:
    """Remove a fence on this node whose result lies elsewhere now."""
    shutil.rmtree(Fence(Layout.find(), digest, number).folder, ignore_errors=True)


class Slot:
    """An actor that holds the GPUs of one cell at a time and trains in a child process.

    It outlives its driver, so that a driver which is started again finds it at work.
    """

    def __init__(self, gpus_per_cell: int) -> None:
        self.layout = Layout.find()
        self.ranks = gpus_per_cell
        self.text: str | None = None
        self.ending: dict[str, Any] | None = None
        self._worker: LocalWorker | None = None
        self._fence: Fence | None = None
        self._heard = time.monotonic()
        threading.Thread(target=self._end_when_orphaned, daemon=True).start()

    def ready(self) -> int:
        """The number of this process, once it has its GPUs."""
        return os.getpid()

    def begin(self, digest: str, number: int, text: str) -> tuple[int, bool]:
        """Begin the attempt `text` describes; return the step it goes on from, and whether its folder is shared."""
        self._heard = time.monotonic()
        content = json.loads(text)
        self._fence, shared = open_fence(self.layout, digest, number, text)
        step = inherit(self.layout, self._fence)
        job = Job(Cell.model_validate(content["cell"]), Purpose(**content["purpose"]))
        self.text, self.ending = text, None
        if self.ranks > 1:
            jobs = self._fence.folder / "jobs.jsonl"
            jobs.write_text(line_of(job, self._fence) + "\n", encoding="utf-8")
            module = ("muonlab.pipeline.torchrun", str(self.ranks), "muonlab.pipeline.worker", str(jobs))
            self._worker = LocalWorker(self.layout, module)
        elif self._worker is None:
            self._worker = LocalWorker(self.layout)
        self._worker.give(job, self._fence)
        return step, shared

    def look(self, seconds: float) -> dict[str, Any]:
        """Wait so long for the end of the attempt, and say how it stands: `start`, `progress`, and its `ending`."""
        self._heard = time.monotonic()
        if self._worker is None or self._fence is None:
            return {"ending": {"status": "died"}, "seen": None}
        if self.ending is None:
            wait_for_news([self._worker], seconds)
            self.ending = self._worker.poll()
            if self.ending is not None:
                self._worker.job = None
                if self.ranks > 1 or self.ending["status"] == "died":
                    self._worker.stop()
                    self._worker = None
        return {"ending": self.ending, "seen": self._fence.seen()}

    def at_work(self) -> tuple[str, int] | None:
        """The job and the number of its attempt, for a driver that was started again; None where there is none."""
        self._heard = time.monotonic()
        return None if self.text is None or self._fence is None else (self.text, self._fence.number)

    def stop(self) -> None:
        """End the attempt; `look` then says how far it came."""
        if self._worker is not None and self.ending is None:
            self._worker.stop()
            self.ending, self._worker = {"status": "stopped"}, None

    def _end_when_orphaned(self) -> None:
        while True:
            time.sleep(5)
            busy = self.text is not None and self.ending is None and self._trains()
            if not busy and time.monotonic() - self._heard > ORPHANED_AFTER_S:
                os._exit(0)

    def _trains(self) -> bool:
        """Whether the attempt has not answered yet; nobody has looked."""
        return self._worker is not None and self._worker.process.poll() is None and not _answered(self._worker)


def _answered(worker: LocalWorker) -> bool:
    import select

    return bool(select.select([worker.answers], [], [], 0)[0])
