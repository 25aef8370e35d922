"""What the driver of a cluster spends on a cell, and whether the planned schedule is the real one.

    python -m benchmarks.cluster [--cells 2000] [--seconds 0.25] [--slots 8]

A real Ray cluster on loopback, the real driver with its fences, records and promotions, and pretended cells: their
slots sleep (between half and one and a half times `--seconds`) and leave a record with a bundle of a few bytes. Printed
are the driver's processor seconds a cell, and the makespan beside the one that `muonlab.pipeline.schedule` gives with
the start-up of a cell as a first run of a tenth of the cells measured it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
SAYS = "What the driver of a cluster spends on a cell, and whether the planned schedule is the real one."


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


def main() -> None:
    """Start the cluster, run twice, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=0.25, help="mean of a cell's")
    parser.add_argument("--slots", type=int, default=8)
    options = parser.parse_args()
    sys.path.insert(0, str(PROJECT / "tests" / "pipeline"))
    from conftest import STUDY, make_repository
    from ray_nodes import Ray

    folder = Path(tempfile.mkdtemp(prefix="mb", dir="/tmp"))
    repository = make_repository(folder / "repository")
    cluster = Ray(folder, code=PROJECT)
    rng = random.Random(0)  # noqa: S311 - lengths of pretended cells
    try:
        cluster.node(repository, gpus=options.slots)
        os.environ.update(cluster.environment())
        layout = Layout.find(repository.root)
        study = load_study(layout, STUDY)
        with contextlib.closing(PretendCluster(layout, study, ["muon"], cluster.address, 1, print)) as place:
            lengths = [options.seconds * rng.uniform(0.5, 1.5) for _ in range(options.cells)]
            few = lengths[: max(options.slots, options.cells // 10)]
            wall, _ = run(place, jobs(STUDY, few, first=0))
            start = (wall * options.slots - sum(few)) / len(few)
            wall, used = run(place, jobs(STUDY, lengths, first=len(few)))
            plan = simulate(lengths, gpus=options.slots, gpus_per_cell=1, start_s=start, between_s=start)
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{options.cells} cells of {options.seconds:g} s on {options.slots} slots; load {os.getloadavg()[0]:.1f}")
    print(f"driver: {1000 * used / options.cells:.1f} ms of processor time a cell (goal: under 20)")
    print(f"start-up of a cell, from a run of {len(few)}: {1000 * start:.0f} ms")
    print(f"makespan: {wall:.1f} s, planned {plan.makespan_s:.1f} s ({100 * (wall / plan.makespan_s - 1):+.1f}%)")


if __name__ == "__main__":
    main()
