"""A worker trains a cell by the code that the cell's record will name, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tracking_attempts import cell as toy_cell

from muonlab.pipeline.attempts import CellScratch, Purpose
from muonlab.pipeline.fingerprint import code_fingerprint
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.pool import Job, line_of

PROJECT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_code_that_was_changed_after_the_cell_was_declared_is_refused(tmp_path: Path, rank: str) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(PROJECT / name, tmp_path / name)
    for name in ("optim", "muonlab"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    layout, cell = Layout(root=tmp_path, main=tmp_path), toy_cell()
    cell = cell.model_copy(
        update={"inputs": cell.inputs.model_copy(update={"code": code_fingerprint(tmp_path, cell.optimizer.kind)})}
    )
    (tmp_path / "optim" / f"{cell.optimizer.kind}.py").write_text("HASTE = 1\n")
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(line_of(Job(cell, Purpose(None, None, 0.0))) + "\n")
    as_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    told = subprocess.run(
        [sys.executable, "-m", "muonlab.pipeline.worker", str(os.getpid()), str(jobs)],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **as_rank},
    )  # fmt: skip
    if rank == "0":
        ending = json.loads(told.stdout)
        assert ending["status"] == "failed"
        assert "is no longer the one that the run began with" in ending["error"]
    else:
        assert not told.stdout, "the others wait for nobody"
    assert not CellScratch(layout, cell.digest).attempt_folders()
