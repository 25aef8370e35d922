"""Made-up attempts on disk, as training leaves them, for the tests of what is copied to MLflow."""

import json
import math
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from muonlab.pipeline.attempts import CellScratch, write_atomically
from muonlab.pipeline.layout import Layout
from muonlab.registry.canonical import canonical_json
from muonlab.registry.cell import Cell, Inputs, OptimizerSpec
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import DataSettings, WorkloadSettings
from muonlab.training.loop import write_curve_csv

STUDY = "001-a-study"
STARTED = "2030-01-02T03:04:05+00:00"
STARTED_MS = 1893553445000
COMMIT = "c" * 40


def cell(arm="muon", seed=0) -> Cell:
    return Cell(
        workload="toy",
        arm=arm,
        seed=seed,
        settings=WorkloadSettings(steps=300, data=DataSettings(vocab_size=300)),
        optimizer=OptimizerSpec(kind="muon", options={"lr": 0.01, "nesterov": True, "gate": arm}),
        inputs=Inputs(data="d" * 64, tokenizer="t" * 64, code="c" * 64, environment="e" * 64),
    )


class Attempt:
    """An attempt on disk, as training leaves it."""

    def __init__(self, main: Path, arm="muon", seed=0, number=1, study: str | None = STUDY):
        self.main = main
        self.cell = cell(arm, seed)
        self.scratch = CellScratch(Layout(root=main, main=main), self.cell.digest)
        self.folder = self.scratch.folder / "attempts" / str(number)
        self.folder.mkdir(parents=True)
        self.id = f"{arm}-{seed}-{number}-{study}"
        self.base = {
            "study": study,
            "workload": "toy",
            "arm": arm,
            "seed": seed,
            "cell_digest": self.cell.digest,
            "registration": None,
            "attempt": number,
            "attempt_id": self.id,
            "started_at": STARTED,
            "device_count": 1,
            "hashes": {"data": "d" * 64, "tokenizer": "t" * 64, "init": None, "order": None, "weights": None}
            | {"code": "c" * 64, "environment": "e" * 64},
            "provenance": {"commit": COMMIT, "dirty": False, "python": "3", "torch": "2", "transformers": "5"}
            | {"device": "a processor", "host_os": "an os"},
        }
        purpose = {"study": study, "registration": None, "price_usd_per_gpu_hour": 3.6, "device_count": 1}
        start = {"record": self.base, "purpose": purpose, "cell": self.cell.model_dump(mode="json"), "pid": 1}
        write_atomically(self.folder / "start.json", canonical_json(start))
        self.points = 0
        self.losses = []

    def begin(self, pid: int, started_at: str):
        """State which process makes the attempt, and since when."""
        self.base["started_at"] = started_at
        start = json.loads((self.folder / "start.json").read_text())
        write_atomically(self.folder / "start.json", canonical_json(start | {"record": self.base, "pid": pid}))
        return self

    def record(self) -> RunRecord:
        return RunRecord.model_validate_json((self.folder / "record.json").read_text())

    def adopt(self):
        """Put record and curve into runs/, as a study does with a cell's bundle."""
        into = Layout(root=self.main, main=self.main).runs(STUDY) / f"{self.cell.arm}-{self.cell.seed}"
        into.mkdir(parents=True)
        shutil.copyfile(self.folder / "record.json", into / "train.json")
        points = [json.loads(line) for line in (self.folder / "curve.jsonl").read_text().splitlines()]
        # In memory, and so in the file, a loss that is not finite stands as what it is.
        not_finite = [{"val_loss": math.nan} if point["val_loss"] is None else {} for point in points]
        write_curve_csv([a | b for a, b in zip(points, not_finite, strict=True)], into / "curve.csv")
        return self

    def train(self, points: int, val_loss=lambda step: 5 - step / 1000):
        """Log so many more points."""
        lines = []
        for step in range(self.points, self.points + points):
            row = {"step": step, "tokens": 512 * step, "seconds": step / 8, "train_loss": None if step == 0 else 4.0}
            loss = val_loss(step)
            row |= {"val_loss": loss if math.isfinite(loss) else None, "lr": 0.01, "opt_rank": 7.5}
            self.losses.append({"step": step, "val_loss": row["val_loss"]})
            lines.append(json.dumps(row) + "\n")
        with (self.folder / "curve.jsonl").open("a") as file:
            file.writelines(lines)
        self.points += points
        return self

    def end(self, status="completed", error=None):
        """Write the record of an attempt that ended by itself."""
        record = RunRecord.model_validate(
            self.base
            | {"status": status, "resumed_from_step": 0, "final_step": self.points, "tokens": 512 * self.points}
            | {"val_loss": 4.5 if status == "completed" else None, "wall_seconds": 10.0, "cost_usd": 0.01}
            | {"perplexity": 90.0 if status == "completed" else None, "curve": self.losses, "error": error}
        )
        write_atomically(self.folder / "record.json", record.model_dump_json(indent=2))
        return self


def whole_curve(points: int) -> list[tuple]:
    return [(step, STARTED_MS + 125 * step, 5 - step / 1000) for step in range(points)]


@contextmanager
def environment(**variables: str):
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def wait_for(condition, seconds=180.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)
    return found
