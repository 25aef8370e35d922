"""What is killed goes on; what is edited is found; what fails is counted. Real processes, real signals."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import STUDY, TOY_PARAMS, TOY_STUDY, Maker, Repository

pytestmark = pytest.mark.slow

GRID = f"experiments/{STUDY}/dvc.yaml"


def longer(steps: int) -> dict[str, object]:
    params = copy.deepcopy(TOY_PARAMS)
    params["workloads"]["toy"]["settings"]["steps"] = steps
    return params


def training_processes(repository: Repository) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line = " ".join(process.info["cmdline"] or [])
        if ("stages.train" in line or "pipeline.worker" in line) and str(repository.root) in str(process.info["cwd"]):
            found.append(process)
    return found


def wait_until(condition: object, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")


def some_step_done(repository: Repository) -> bool:
    for path in repository.root.glob("scratch/*/attempts/*/progress.json"):
        if json.loads(path.read_text())["step"] >= 4:
            return True
    return False


def weights(repository: Repository) -> dict[str, str]:
    return {
        f"{row['arm']}-{row['seed']}": row["hashes"]["weights"]
        for row in repository.ledger()
        if row["status"] == "completed"
    }


@pytest.fixture(scope="module")
def undisturbed(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A study run by DVC alone, cell after cell, by nobody disturbed."""
    repository = make(tmp_path_factory.mktemp("calm") / "repository", params=longer(150))
    repository.dvc("repro", GRID)
    return repository


def test_a_study_by_dvc_alone(undisturbed: Repository) -> None:
    assert len(undisturbed.attempts()) == 4
    assert undisturbed.read(f"reports/{STUDY}/verdict.json")["complete"] is True
    assert (undisturbed.root / f"reports/{STUDY}/report.md").exists()


@pytest.mark.parametrize("door", ["muon", "dvc"])
def test_a_killed_driver_leaves_no_training_behind_and_the_next_start_ends_the_same(
    make: Maker, tmp_path: Path, undisturbed: Repository, door: str
) -> None:
    repository = make(tmp_path / "repository", params=longer(150))
    commands = {
        "muon": [sys.executable, "-m", "muonlab.cli", "study", "run"],
        "dvc": [sys.executable, "-m", "dvc", "repro", GRID],
    }
    if door == "dvc":
        repository.run("mkdir", "-p", *(f"runs/{STUDY}/{arm}-{seed}" for arm in ("muon", "nolah") for seed in (0, 1)))
    with subprocess.Popen(
        commands[door],
        cwd=repository.root,
        env=repository.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as driver:
        wait_until(lambda: some_step_done(repository))
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    wait_until(lambda: not training_processes(repository), seconds=10)
    repository.muon("study", "run", check=False)
    assert weights(repository) == weights(undisturbed)
    abandoned = [row for row in repository.ledger() if row["status"] == "abandoned"]
    assert abandoned
    # One that died before its first word has nothing to show; the one that was seen running has.
    assert any(row["wall_seconds"] > 0 for row in abandoned)
    report = (repository.root / f"reports/{STUDY}/report.md").read_text()
    assert "abandoned" in report


def test_a_cell_trained_after_others_in_a_worker_equals_one_trained_alone(
    make: Maker, tmp_path: Path, undisturbed: Repository
) -> None:
    """A worker trains several cells in one process; none may leave a trace in the next."""
    repository = make(tmp_path / "repository", params=longer(150))
    repository.muon("study", "run", "-j", "1", check=False)
    assert weights(repository) == weights(undisturbed)
    ours, theirs = ({r["cell_digest"]: r["val_loss"] for r in some.ledger()} for some in (repository, undisturbed))
    assert ours == theirs


def test_two_processes_on_one_cell(make: Maker, tmp_path: Path) -> None:
    # So long that the first is still training however slowly the second starts; it is killed, not waited for.
    repository = make(tmp_path / "repository", params=longer(100_000))
    repository.dvc("repro", "fingerprint", "data/dvc.yaml:prepare_data@toy")
    command = [sys.executable, "-m", "stages.train", "toy", "muon", "0"]
    folder = repository.root / "runs/exp/current"
    environment = repository.environment()
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as first:
        wait_until(lambda: some_step_done(repository))
        second = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        first.kill()
    assert second.returncode == 2
    assert "another process is training it" in second.stderr


@pytest.fixture
def held(make: Maker, tmp_path: Path) -> Iterator[tuple[Repository, subprocess.Popen[bytes]]]:
    """A repository in which another process, stopped after some steps, holds the cell muon-0 of the study."""
    repository = make(tmp_path / "repository", params=longer(400))
    repository.dvc("repro", "fingerprint", "data/dvc.yaml:prepare_data@toy")
    command = [sys.executable, "-m", "stages.train", "toy", "muon", "0"]
    folder = repository.root / "runs/exp/current"
    with subprocess.Popen(command, cwd=folder, env=repository.environment(), stdout=subprocess.DEVNULL) as other:
        try:
            wait_until(lambda: some_step_done(repository))
            other.send_signal(signal.SIGSTOP)
            assert other.poll() is None
            yield repository, other
        finally:
            other.kill()


def test_a_study_waits_for_a_cell_that_another_process_trains_and_takes_it_over(
    held: tuple[Repository, subprocess.Popen[bytes]],
) -> None:
    repository, other = held
    with subprocess.Popen(
        [sys.executable, "-m", "muonlab.cli", "study", "run"],
        cwd=repository.root, env=repository.environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    ) as driver:  # fmt: skip
        assert driver.stderr is not None
        said = []
        for line in driver.stderr:
            said.append(line)
            if "1 left (1 trained by another process)" in line:
                other.send_signal(signal.SIGCONT)
                break
        said += driver.stderr.readlines()
        driver.wait()
    assert other.wait() == 0
    assert driver.returncode == 0, said
    assert {row["status"] for row in repository.ledger()} == {"completed"}
    assert len(weights(repository)) == len(repository.attempts()) == 4


def test_a_second_driver_of_a_study_is_refused(held: tuple[Repository, subprocess.Popen[bytes]]) -> None:
    repository, _ = held
    command = [sys.executable, "-m", "muonlab.cli", "study", "run"]
    with subprocess.Popen(
        command, cwd=repository.root, env=repository.environment(), stderr=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stderr is not None
        driver.stderr.readline()  # it is at work
        second = repository.muon("study", "run", check=False)
        driver.kill()
    assert second.returncode == 2
    assert f"experiments/{STUDY}: another `muon study run` of it is at work in this checkout" in second.stderr


def test_a_diverged_run_is_a_result_and_is_counted(make: Maker, tmp_path: Path) -> None:
    params = copy.deepcopy(TOY_PARAMS)
    params["workloads"]["toy"]["tuned"]["nolah"]["lr"] = 1e4
    params["workloads"]["toy"]["settings"]["steps"] = 40
    repository = make(tmp_path / "repository", params=params)
    done = repository.muon("study", "run", check=False)
    assert {r["status"] for r in repository.ledger() if r["arm"] == "nolah"} == {"diverged"}
    verdict = repository.read(f"reports/{STUDY}/verdict.json")["verdicts"]["nolah"]
    assert verdict["verdict"] != "GO"
    assert done.returncode in (0, 5)
    assert "diverged" in (repository.root / f"reports/{STUDY}/report.md").read_text()


def test_a_failed_cell_is_named_and_the_study_is_incomplete(make: Maker, tmp_path: Path) -> None:
    repository = make(tmp_path / "repository")
    path = repository.root / "optim/nolah.py"
    path.write_text(
        path.read_text().replace('register("nolah", NolahOptions)', "")
        + "\ndef _broken(model, options, seed):\n    raise RuntimeError('out of luck')\n\n\n"
        + 'register("nolah", NolahOptions, _broken)\n'
    )
    repository.commit("a broken optimizer")
    done = repository.muon("study", "run", check=False)
    assert done.returncode == 3
    assert "out of luck" in done.stderr
    rows = [r for r in repository.ledger() if r["arm"] == "nolah"]
    assert {r["status"] for r in rows} == {"failed"}
    verdict = repository.read(f"reports/{STUDY}/verdict.json")
    assert verdict["complete"] is False
    assert verdict["verdicts"]["nolah"]["verdict"] == "INCOMPLETE"
    assert "out of luck" in (repository.root / f"reports/{STUDY}/report.md").read_text()


def test_over_budget_stops_with_its_exit_code(make: Maker, tmp_path: Path) -> None:
    study = {**TOY_STUDY, "price_usd_per_gpu_hour": 1000, "budget_usd": 0.01}
    repository = make(tmp_path / "repository", params=longer(400), study=study)
    done = repository.muon("study", "run", check=False)
    assert done.returncode == 4
    assert "budget" in done.stderr
    assert not training_processes(repository)
