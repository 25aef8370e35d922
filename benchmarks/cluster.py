"""What the driver of a cluster spends on a cell, and whether the planned schedule is the real one.

    driver                 processor time of the driver a cell, and by how much the makespan of all cells differs from
                           the one that `muonlab.pipeline.schedule` plans with the start-up of a cell that a run of
                           a tenth of them has measured

A real Ray cluster on loopback, the real driver with its fences, records and promotions, and pretended cells: their
slots sleep, a second on average, and leave a record with a bundle of a few bytes. Takes six minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from muonlab.pipeline import cluster_node
from muonlab.pipeline.attempts import BUNDLE_FILES, AttemptProgress, Purpose
from muonlab.pipeline.cluster import Cluster
from muonlab.pipeline.fences import Fence, open_fence
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.pool import Job, train_all
from muonlab.pipeline.resolve import load_study
from muonlab.pipeline.schedule import simulate
from muonlab.registry.canonical import canonical_json
from muonlab.registry.cell import Cell, Inputs, OptimizerSpec
from muonlab.registry.files import file_sha256
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import WorkloadSettings

PROJECT = Path(__file__).parents[1]
LENGTH = "pretended_seconds"
CELLS, SECONDS, SLOTS = 2000, 1.0, 8
GOAL_MS = 20.0
GOAL_PERCENT = 10.0


class PretendSlot(cluster_node.Slot):
    """A slot that sleeps for as long as its cell's optimizer says."""

    def begin(self, digest: str, number: int, text: str) -> tuple[int, bool]:
        """Open the fence, as a slot that trains does."""
        self._heard = time.monotonic()
        content = json.loads(text)
        self._fence, shared = open_fence(self.layout, digest, number, text)
        self.text, self.ending = text, None
        self._cell, self._purpose = Cell.model_validate(content["cell"]), Purpose(**content["purpose"])
        self._until = self._heard + float(self._cell.optimizer.options[LENGTH])
        return 0, shared

    def look(self, seconds: float) -> dict[str, Any]:
        """Sleep, so long at most; leave a result at the end."""
        self._heard = time.monotonic()
        assert self._fence is not None
        time.sleep(max(0.0, min(seconds, self._until - self._heard)))
        if self.ending is None and time.monotonic() >= self._until:
            leave_result(self._fence, self._cell, self._purpose)
            self.ending = {"status": "completed"}
        return {"ending": self.ending, "seen": self._fence.seen()}


class PretendCluster(Cluster):
    """A cluster whose slots sleep."""

    slot_class = PretendSlot


def leave_result(fence: Fence, cell: Cell, purpose: Purpose) -> None:
    """What an attempt leaves that made one step."""
    seconds = float(cell.optimizer.options[LENGTH])
    hashes = {"init": None, "order": None, "weights": None, **cell.inputs.model_dump(exclude={"model"})}
    about = {"commit": None, "dirty": None, "python": "", "torch": "", "transformers": "", "device": "", "host_os": ""}
    base = {
        "study": purpose.study, "workload": cell.workload, "arm": cell.arm, "seed": cell.seed,
        "cell_digest": cell.digest, "registration": None, "attempt": fence.number,
        "attempt_id": f"{cell.seed:08d}{fence.number:08d}", "started_at": "2025-01-01T00:00:00+00:00",
        "device_count": 1, "hashes": hashes, "provenance": about,
    }  # fmt: skip
    record = RunRecord.model_validate(
        {**base, "status": "completed", "val_loss": 1.0, "perplexity": 2.7, "resumed_from_step": 0, "final_step": 1,
         "tokens": 1, "wall_seconds": seconds, "cost_usd": purpose.cost_usd(seconds), "curve": []}
    )  # fmt: skip
    fence.attempt.mkdir(parents=True)
    fence.scratch.bundle.mkdir(parents=True)
    progress = AttemptProgress(1, 1, 1.0, seconds, 1, 0)
    (fence.attempt / "progress.json").write_text(json.dumps(progress._asdict()))
    (fence.attempt / "start.json").write_text(canonical_json({"record": base, "purpose": vars(purpose), "pid": 0}))
    (fence.attempt / "record.json").write_text(record.model_dump_json())
    for name in BUNDLE_FILES:
        (fence.scratch.bundle / name).write_text(record.model_dump_json() if name == "train.json" else name)
    hashed = {name: file_sha256(fence.scratch.bundle / name) for name in BUNDLE_FILES}
    (fence.scratch.bundle / "manifest.json").write_text(canonical_json(hashed))


def jobs(slug: str, lengths: list[float], first: int) -> list[Job]:
    """A pretended cell for each of these times."""
    inputs = Inputs(data="d", tokenizer="t", code="c", environment="e")
    return [
        Job(
            Cell(workload="toy", arm="muon", seed=first + index, settings=WorkloadSettings(steps=30), inputs=inputs,
                 optimizer=OptimizerSpec(kind="muon", options={LENGTH: length})),
            Purpose(slug, None, 2.8),
        )
        for index, length in enumerate(lengths)
    ]  # fmt: skip


def run(place: Cluster, work: list[Job]) -> tuple[float, float]:
    """Train them; return the makespan and the driver's processor seconds, without what it takes to get the slots."""
    while len(place.recruit([], len(work))) < len(place.slots):
        place.wait([])
    began, used = time.monotonic(), time.process_time()
    state = train_all(work, place=place, on_change=lambda _: None)
    if len(state.done) != len(work):
        raise RuntimeError(f"{len(state.failed)} of {len(work)} cells failed: {list(state.failed.values())[:1]}")
    return time.monotonic() - began, time.process_time() - used


def driver() -> Iterator[Row]:
    """Start a cluster, train a tenth of the cells, and then all of them."""
    sys.path.insert(0, str(PROJECT / "tests" / "pipeline"))
    from conftest import STUDY, make_repository
    from ray_nodes import Ray

    folder = Path(tempfile.mkdtemp(prefix="mb", dir="/tmp"))  # short: the name of a socket has 107 letters
    repository = make_repository(folder / "repository")
    cluster = Ray(folder, code=PROJECT)
    rng = random.Random(0)  # noqa: S311 - lengths of pretended cells
    lengths = [SECONDS * rng.uniform(0.5, 1.5) for _ in range(CELLS)]
    few = lengths[: CELLS // 10]
    try:
        cluster.node(repository, gpus=SLOTS)
        os.environ.update(cluster.environment())
        layout = Layout.find(repository.root)
        study = load_study(layout, STUDY)
        with contextlib.closing(PretendCluster(layout, study, ["muon"], cluster.address, 1, print)) as place:
            run(place, jobs(STUDY, few[: 2 * SLOTS], first=0))  # the slots load their libraries
            wall, _ = run(place, jobs(STUDY, few, first=CELLS))
            start = (wall * SLOTS - sum(few)) / len(few)
            wall, used = run(place, jobs(STUDY, lengths, first=2 * CELLS))
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
    plan = simulate(lengths, gpus=SLOTS, gpus_per_cell=1, start_s=start, between_s=start)
    yield Row(
        f"driver of a cluster, a cell of {CELLS:,}", value=1000 * used / CELLS, unit="ms", goal=GOAL_MS, at_least=False
    )
    yield Row(
        f"makespan on {SLOTS} slots, off the planned", value=abs(100 * (wall / plan.makespan_s - 1)), unit="%",
        goal=GOAL_PERCENT, at_least=False,
        note=f"{wall:.1f} s on the clock, {plan.makespan_s:.1f} s planned with {1000 * start:.0f} ms to start a cell.",
    )  # fmt: skip


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {"driver": driver}
