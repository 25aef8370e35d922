"""One cell on two processes, through the command that a person types; on the processor, where they meet over gloo."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@contextmanager
def training(repository: Repository) -> Iterator[subprocess.Popen[str]]:
    """The stage on two processes, once it has made a checkpoint that was not there before."""
    before = set(checkpoints(repository))
    with subprocess.Popen(
        [sys.executable, "-m", "stages.train", "toy", "muon", "0"], cwd=repository.root / "runs/exp/current",
        env=repository.environment(MUONLAB_RANKS="2", CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            wait_until(lambda: set(checkpoints(repository)) - before)
            yield process
        finally:
            process.kill()


def checkpoints(repository: Repository) -> list[Path]:
    return list(repository.root.glob("scratch/*/work/checkpoints/step-*"))


@pytest.mark.slow
def test_what_kills_a_rank_or_their_launcher_ends_all_and_the_next_start_makes_the_one_result(
    make: Maker, tmp_path: Path
) -> None:
    params, price = copy.deepcopy(TOY_PARAMS), 3.6
    params["workloads"]["toy"]["settings"] |= {"steps": 300, "eval_every": 100, "checkpoint_every": 10}
    study = {**TOY_STUDY, "price_usd_per_gpu_hour": price, "budget_usd": 5}
    repository = make(tmp_path / "repository", params=params, study=study)
    repository.run(sys.executable, "-m", "stages.fingerprint")
    with training(repository) as launcher:
        second = max(stages(repository, ranks=True), key=lambda rank: int(rank.environ()["RANK"]))
        second.send_signal(signal.SIGKILL)
        _, said = launcher.communicate(timeout=300)
        assert launcher.returncode == 3
        assert [line for line in said.splitlines() if line.startswith("muonlab: ")] == [
            "muonlab: process 1 of the 2 of this run was killed by SIGKILL, and the others were ended; start it again: "
            "the run goes on from its last checkpoint."
        ]
        assert not stages(repository, ranks=True)
    with training(repository) as launcher:
        ranks = stages(repository, ranks=True)
        assert len(ranks) == 2
        launcher.send_signal(signal.SIGKILL)
        wait_until(
            lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), seconds=90
        )
    done = repository.run(*COMMAND)
    assert done.stdout.startswith("MUONLAB_RANKS=2 CUDA_VISIBLE_DEVICES='' dvc exp run -S optimizer=muon -S seed=0")
    assert done.stdout.count("training cell") == 1
    two = json.loads((repository.root / "runs/exp/current/train.json").read_text())
    assert (two["status"], two["attempt"], two["device_count"]) == ("completed", 3, 2)
    assert two["resumed_from_step"] >= 10
    assert sum(two["computing"]["seconds_by_part"].values()) <= two["wall_seconds"] + 0.01
    # Whoever computed with it, an attempt has one record; and it is charged for both devices, a killed one too.
    attempts = repository.attempts()
    assert [attempt["status"] for attempt in attempts] == ["abandoned", "abandoned", "completed"]
    for attempt in attempts:
        assert attempt["device_count"] == 2
        assert attempt["wall_seconds"] > 0
        assert attempt["cost_usd"] == pytest.approx(attempt["wall_seconds"] / 3600 * 2 * price)
