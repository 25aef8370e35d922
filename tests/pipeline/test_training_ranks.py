"""A cell under torchrun: the stage that a study runs, on two processes, leaves what one leaves."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import Repository


@pytest.mark.slow
def test_the_stage_trains_on_two_processes_and_leaves_one_record(repository: Repository) -> None:
    repository.run(sys.executable, "-m", "stages.fingerprint")
    cell = repository.root / "runs" / "exp" / "current"
    cell.mkdir(parents=True, exist_ok=True)
    launcher = "python -m torch.distributed.run --standalone --nproc-per-node=2 -m stages.train"
    repository.run("bash", "-c", f"cd {cell} && {launcher} toy muon 0")
    two = json.loads((cell / "train.json").read_text())
    assert (two["status"], two["attempt"], two["device_count"]) == ("completed", 1, 2)
    assert {name.name for name in cell.iterdir()} >= {"train.json", "curve.csv", "model.safetensors", ".done"}
    assert two["computing"]["precision"] == "float32"
    assert sum(two["computing"]["seconds_by_part"].values()) <= two["wall_seconds"] + 0.01
    assert len(list((repository.root / "scratch").glob("*/attempts/*"))) == 1
    # Trained already, by whatever number of processes: the first alone takes it over.
    (cell / "train.json").unlink()
    again = repository.run("bash", "-c", f"cd {cell} && {launcher} toy muon 0")
    assert (again.stdout + again.stderr).count("already trained as cell") == 1
    assert json.loads((cell / "train.json").read_text()) == two
