"""One cell on two processes, through the command that a person types; on the processor, where they meet over gloo."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import TOY_PARAMS, TOY_STUDY, Maker, Repository

COMMAND = [sys.executable, "-m", "muonlab.cli", "pretrain", "--ngpus", "2", "--gloo"]


def stages(repository: Repository, *, ranks: bool) -> list[psutil.Process]:
    """The processes of the stage `train`: those that train, or the one that has started them."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line = process.info["cmdline"] or []
        if "stages.train" in line and str(process.info["cwd"]).startswith(str(repository.root)):
            parent = process.parent()
            started = parent is not None and "stages.train" in parent.cmdline()
            if started == ranks:
                found.append(process)
    return found


def wait_until(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_ranks_die_with_the_process_that_started_them_and_the_next_start_makes_their_one_record(
    make: Maker, tmp_path: Path
) -> None:
    params, price = copy.deepcopy(TOY_PARAMS), 3.6
    params["workloads"]["toy"]["settings"] |= {"steps": 400, "eval_every": 100, "checkpoint_every": 10}
    study = {**TOY_STUDY, "price_usd_per_gpu_hour": price, "budget_usd": 5}
    repository = make(tmp_path / "repository", params=params, study=study)
    with subprocess.Popen(
        COMMAND, cwd=repository.root, env=repository.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    ) as process:  # fmt: skip
        wait_until(lambda: list(repository.root.glob("scratch/*/work/checkpoints/step-*")))
        ranks = stages(repository, ranks=True)
        (agent,) = stages(repository, ranks=False)
        assert len(ranks) == 2
        agent.send_signal(signal.SIGKILL)
        wait_until(lambda: not any(rank.is_running() for rank in ranks), seconds=5)
        said, _ = process.communicate(timeout=120)
        assert process.returncode != 0
    assert "MUONLAB_RANKS=2 CUDA_VISIBLE_DEVICES='' dvc exp run -S optimizer=muon -S seed=0" in said
    done = repository.run(*COMMAND)
    two = json.loads((repository.root / "runs/exp/current/train.json").read_text())
    assert (two["status"], two["attempt"], two["device_count"]) == ("completed", 2, 2)
    assert two["resumed_from_step"] >= 10
    assert sum(two["computing"]["seconds_by_part"].values()) <= two["wall_seconds"] + 0.01
    # Each attempt is charged for both devices, the killed one too; and each has one record, whoever computed with it.
    lost, won = repository.attempts()
    assert [(lost["status"], won["status"]), lost["device_count"]] == [("abandoned", "completed"), 2]
    for attempt in (lost, won):
        assert attempt["wall_seconds"] > 0
        assert attempt["cost_usd"] == pytest.approx(attempt["wall_seconds"] / 3600 * 2 * price)
    assert done.stdout.count("training cell") == 1
    # The number of ranks is no part of what the cell is: asked for again on one process, nothing is trained.
    again = repository.muon("pretrain")
    assert "training cell" not in again.stdout + again.stderr
    assert len(repository.attempts()) == 2


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_in_a_sentence(make: Maker, tmp_path: Path) -> None:
    params = copy.deepcopy(TOY_PARAMS)
    params["workloads"]["toy"]["settings"] |= {"steps": 100_000, "eval_every": 50_000}
    repository = make(tmp_path / "repository", params=params)
    repository.run(sys.executable, "-m", "stages.fingerprint")
    with subprocess.Popen(
        [sys.executable, "-m", "stages.train", "toy", "muon", "0"], cwd=repository.root / "runs/exp/current",
        env=repository.environment(MUONLAB_RANKS="2", CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        wait_until(lambda: list(repository.root.glob("scratch/*/work/checkpoints/step-*")))
        second = max(stages(repository, ranks=True), key=lambda rank: int(rank.environ()["RANK"]))
        second.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "Traceback" not in said
    assert "process 1 of the 2 of this run was killed by SIGKILL" in said
    assert not stages(repository, ranks=True)
