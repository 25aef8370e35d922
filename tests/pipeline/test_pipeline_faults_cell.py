"""One cell trained by its stage while something breaks: the disk, the memory, a checkpoint, the MLflow server.

Each fault is a real one: a full tmpfs, a limit of address space, an edited file, a server that is stopped or killed, an
exclusive lock of sqlite. Each costs a sentence and never the run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TOY_PARAMS, Maker, Repository

from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_params, resolve_cell
from muonlab.pipeline.running import ended_attempts, running

pytestmark = pytest.mark.slow

STEPS = 300
COMMAND = [sys.executable, "-m", "stages.train", "toy", "muon", "0"]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture(scope="module")
def ready(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository in which the stage `train` can be called."""
    params = copy.deepcopy(TOY_PARAMS)
    params["workloads"]["toy"]["settings"] |= {"steps": STEPS, "checkpoint_every": 10, "eval_every": 10}
    repository = make(tmp_path_factory.mktemp("cell") / "repository", params=params)
    repository.run("python", "-m", "stages.fingerprint")
    return repository


@pytest.fixture
def repository(ready: Repository, tmp_path: Path) -> Repository:
    return copied(ready, tmp_path / "repository")


def copied(repository: Repository, to: Path) -> Repository:
    subprocess.run(["cp", "-a", str(repository.root), str(to)], check=True)
    return replace(repository, root=to)


@pytest.fixture(scope="module")
def undisturbed(ready: Repository, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of the cell as it is trained when nothing happens."""
    repository = copied(ready, tmp_path_factory.mktemp("calm") / "repository")
    assert train(repository).returncode == 0
    return record(repository)


@pytest.fixture(scope="module")
def killed(ready: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The cell, killed when it had some checkpoints."""
    repository = copied(ready, tmp_path_factory.mktemp("killed") / "repository")
    with started(repository) as process:
        wait_until(lambda: len(checkpoints(repository)) == 2)
        process.kill()
    assert checkpoints(repository)
    return repository


@contextmanager
def started(repository: Repository, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The stage, running."""
    with subprocess.Popen(
        COMMAND, cwd=repository.root / "runs/exp/current", env=repository.environment(**environment),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def train(repository: Repository, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call the stage, behind the command `before`."""
    return subprocess.run(
        [*before, *COMMAND], cwd=repository.root / "runs/exp/current", env=repository.environment(**environment),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def record(repository: Repository) -> dict[str, Any]:
    found: dict[str, Any] = repository.read("runs/exp/current/train.json")
    return found


def outcome(found: dict[str, Any]) -> dict[str, Any]:
    """All of a record that a repetition must reproduce."""
    return {key: found[key] for key in ("status", "val_loss", "final_step", "tokens", "curve", "hashes")}


def checkpoints(repository: Repository) -> list[Path]:
    """Whole checkpoints of the one cell, oldest first."""
    return sorted(repository.root.glob("scratch/*/work/checkpoints/step-*"))


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def one_sentence(said: str) -> str:
    """The one line that was said by muonlab; there must be no traceback beside it."""
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("muonlab: ")]
    return line


# Checkpoints


def test_a_flipped_byte_is_told_and_the_run_ends_as_if_nothing_had_been(
    killed: Repository, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    repository = copied(killed, tmp_path / "repository")
    older, newest = checkpoints(repository)
    path = newest / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the numbers, where safetensors sees nothing
    path.write_bytes(content)
    done = train(repository)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {newest.name} is passed over: the SHA-256 of weights.safetensors" in done.stderr
    assert record(repository)["resumed_from_step"] == int(older.name.removeprefix("step-"))
    assert outcome(record(repository)) == outcome(undisturbed)


class Payload:
    """Unpickled without `weights_only`, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_code_is_refused_and_the_attempt_recorded(
    killed: Repository, tmp_path: Path
) -> None:
    import torch

    repository = copied(killed, tmp_path / "repository")
    newest = checkpoints(repository)[-1]
    torch.save({"state": Payload(tmp_path / "ran")}, newest / "optimizer.pt")
    hashes = json.loads((newest / "sha256.json").read_text())
    hashes["optimizer.pt"] = hashlib.sha256((newest / "optimizer.pt").read_bytes()).hexdigest()
    (newest / "sha256.json").write_text(json.dumps(hashes))
    done = train(repository)
    assert done.returncode == 3
    assert "its hashes hold, but it is not a checkpoint of this run" in one_sentence(done.stderr)
    assert not (tmp_path / "ran").exists()
    # The killed attempt too has its record by now.
    assert [found["status"] for found in repository.attempts()] == ["abandoned", "failed"]


def test_a_checkpoint_of_another_cell_is_refused_and_left_where_it_is(killed: Repository, tmp_path: Path) -> None:
    """As it comes to lie there by a copy between folders, of a cell that differs in its seed alone."""
    repository = copied(killed, tmp_path / "repository")
    layout = Layout.find(repository.root)
    other = resolve_cell(layout, load_params(layout.params), "toy", "muon", 1)
    (work,) = repository.root.glob("scratch/*/work")
    (layout.scratch / other.digest).mkdir()
    work.rename(layout.scratch / other.digest / "work")
    before = {path: path.read_bytes() for path in layout.scratch.glob("*/work/checkpoints/step-*/*")}
    done = subprocess.run(
        [*COMMAND[:-1], "1"], cwd=repository.root / "runs/exp/current", env=repository.environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "it belongs to the cell" in one_sentence(done.stderr)
    assert {path: path.read_bytes() for path in layout.scratch.glob("*/work/checkpoints/step-*/*")} == before
    assert len(before) == 8


# The machine


def may_mount() -> bool:
    tried = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


FULL_DISK = """
mount -t tmpfs -o size=20m tmpfs scratch
cp -a before/. scratch
cd runs/exp/current
dd if=/dev/zero of=../../../scratch/ballast bs=4k 2>/dev/null || true
code=0; "$@" 2>../../../full.err || code=$?; echo $code >../../../full.rc
rm ../../../scratch/ballast
code=0; "$@" 2>../../../free.err || code=$?; echo $code >../../../free.rc
cp -a ../../../scratch ../../../kept
"""


@pytest.mark.skipif(shutil.which("unshare") is None or not may_mount(), reason="no tmpfs may be mounted here")
def test_a_disk_without_a_free_byte_is_told_in_a_sentence_and_costs_no_result(
    killed: Repository, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """scratch/ is a tmpfs that is filled to its last page, as another process fills a disk; then it is freed."""
    repository = copied(killed, tmp_path / "repository")
    (repository.root / "scratch").rename(repository.root / "before")
    (repository.root / "scratch").mkdir()
    repository.run(*NAMESPACE, "sh", "-ec", FULL_DISK, "sh", *COMMAND)
    said = {name: (repository.root / name).read_text() for name in ("full.rc", "full.err", "free.rc", "free.err")}
    assert int(said["full.rc"]) != 0
    assert "No space left on device" in one_sentence(said["full.err"])
    assert (int(said["free.rc"]), "Traceback" in said["free.err"]) == (0, False), said
    assert outcome(record(repository)) == outcome(undisturbed)
    statuses = [
        json.loads(path.read_text())["status"] for path in repository.root.glob("kept/*/attempts/*/record.json")
    ]
    assert statuses.count("completed") == 1
    assert set(statuses) <= {"abandoned", "failed", "completed"}


def test_without_memory_the_attempt_fails_with_the_size_that_it_asked_for(repository: Repository) -> None:
    """A batch whose logits alone take 7.7 GB, in 4 GB of address space."""
    repository.edit_yaml("params.yaml", lambda p: p["workloads"]["toy"]["settings"].update(batch_size=200_000))
    done = train(repository, "prlimit", f"--as={4 << 30}")
    assert done.returncode == 3
    sentence = one_sentence(done.stderr)
    assert "out of memory" in sentence
    assert "a batch of 200000 x 32 tokens" in sentence
    (found,) = repository.attempts()
    assert (found["status"], found["val_loss"], found["hashes"]["weights"]) == ("failed", None, None)
    assert "allocate" in found["error"]
    assert found["wall_seconds"] > 0


def test_a_stage_whose_dvc_died_before_it_began_ends_at_once(repository: Repository) -> None:
    done = train(repository, DVC_ROOT=str(repository.root))
    assert done.returncode == -signal.SIGKILL
    assert not repository.attempts()


def test_a_rank_whose_launcher_died_before_it_began_ends_at_once(repository: Repository) -> None:
    done = train(repository, MUONLAB_PARENT="1")
    assert done.returncode == -signal.SIGKILL
    assert not repository.attempts()


@pytest.mark.parametrize("module", ["worker", "dvc_child"])
def test_what_a_driver_started_before_it_died_ends_at_once(repository: Repository, module: str) -> None:
    """Told of a parent that is not its own, as one is whose driver died while it loaded its libraries."""
    done = repository.run("python", "-m", f"muonlab.pipeline.{module}", "1", "version", check=False)
    assert done.returncode == -signal.SIGKILL


def test_an_attempt_that_is_killed_before_its_first_step_is_charged_until_then(repository: Repository) -> None:
    """A step of 40,000 sequences takes long enough to be killed in."""
    repository.edit_yaml("params.yaml", lambda p: p["workloads"]["toy"]["settings"].update(batch_size=40_000))
    layout = Layout.find(repository.root)
    with started(repository) as process:
        wait_until(lambda: running(layout, gpu=False).cells and running(layout, gpu=False).cells[0].seconds >= 1)
        process.kill()
        process.wait()
    assert not list(repository.root.glob("scratch/*/attempts/*/progress.json"))
    (found,) = ended_attempts(layout)
    assert (found.status, found.final_step) == ("abandoned", 0)
    assert found.wall_seconds >= 1


# MLflow


def shown(store: Path) -> dict[str, tuple[str, list[tuple[int, float]]]]:
    """Status and validation losses of every run of an attempt, by its id; duplicates are kept."""
    query = (
        "SELECT t.value, r.status, r.run_uuid FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
        "WHERE t.key = 'attempt_id'"
    )
    points = "SELECT step, value FROM metrics WHERE run_uuid = ? AND key = 'curve/val_loss' ORDER BY step"
    with closing(sqlite3.connect(store, timeout=30)) as opened:
        runs = opened.execute(query).fetchall()
        assert len({attempt for attempt, *_ in runs}) == len(runs), "an attempt has two runs"
        return {attempt: (status, opened.execute(points, (run,)).fetchall()) for attempt, status, run in runs}


def measured(repository: Repository) -> dict[str, tuple[str, list[tuple[int, float]]]]:
    """The same from the files of the attempts: each has the losses that it measured itself."""
    as_run = {"completed": "FINISHED", "abandoned": "KILLED"}
    found = {}
    for path in repository.root.glob("scratch/*/attempts/*/record.json"):
        ended = json.loads(path.read_text())
        rows = [json.loads(line) for line in path.with_name("curve.jsonl").read_text().splitlines()]
        points = [(row["step"], pytest.approx(row["val_loss"], rel=1e-12)) for row in rows if "val_loss" in row]
        found[ended["attempt_id"]] = (as_run[ended["status"]], points)
    return found


def pause_until_shown(repository: Repository, training: subprocess.Popen[str], store: Path) -> None:
    """Hold the training after some steps until MLflow shows its run with a loss, however slowly that goes."""
    wait_until(lambda: checkpoints(repository) and list(repository.root.glob("scratch/*/attempts/*/progress.json")))
    training.send_signal(signal.SIGSTOP)
    wait_until(lambda: any(status == "RUNNING" and points for status, points in shown(store).values()))


def follow_once(repository: Repository, **environment: str) -> subprocess.CompletedProcess[str]:
    """What every start does: copy what MLflow lacks."""
    return repository.run("python", "-m", "muonlab.tracking.follow", ".", "--once", check=False, **environment)


def test_a_killed_run_is_closed_and_a_locked_store_holds_nothing_up(
    repository: Repository, undisturbed: dict[str, Any]
) -> None:
    repository = replace(repository, tracking=True)
    store = repository.root / "mlflow.db"
    on = {"MUONLAB_TRACKING": "on"}
    with started(repository, **on) as process:
        pause_until_shown(repository, process, store)
        process.kill()
        process.wait()
    with closing(sqlite3.connect(store, timeout=60)) as held:
        held.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        done = train(repository, **on)
        took = time.monotonic() - began
        held.rollback()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert outcome(record(repository)) == outcome(undisturbed)
    # The follower is waited for 10 s at the end, whatever it waits for, and training not at all.
    assert took < record(repository)["wall_seconds"] + 60
    assert follow_once(repository).returncode == 0
    assert sorted(status for status, _ in shown(store).values()) == ["FINISHED", "KILLED"]
    assert shown(store) == measured(repository)
    abandoned = next(found for found in repository.attempts() if found["status"] == "abandoned")
    assert abandoned["wall_seconds"] > 0


@contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real MLflow server on 127.0.0.1, whose whole group of processes is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_until(lambda: answers(port))
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as said:
            return bool(said.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL], ids=["hanging", "dead"])
def test_a_server_that_stops_in_mid_run_costs_no_time_and_no_point(
    repository: Repository, undisturbed: dict[str, Any], tmp_path: Path, fault: signal.Signals
) -> None:
    shutil.copyfile(repository.root / "mlflow.db", tmp_path / "server.db")  # made, so that it need not be migrated
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    there = {"MUONLAB_TRACKING": "on", "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    store = tmp_path / "server.db"
    with server(tmp_path, port) as process:
        with started(repository, **there) as training:
            pause_until_shown(repository, training, store)
            os.killpg(process.pid, fault)
            training.send_signal(signal.SIGCONT)
            began = time.monotonic()
            _, said = training.communicate(timeout=300)
            waited = time.monotonic() - began
        assert training.returncode == 0, said
        assert "Traceback" not in said
        assert waited < record(repository)["wall_seconds"] + 60
        assert outcome(record(repository)) == outcome(undisturbed)
        ((_, points),) = shown(store).values()
        assert len(points) < len(undisturbed["curve"])
        if fault == signal.SIGSTOP:
            os.killpg(process.pid, signal.SIGCONT)
            assert follow_once(repository, **there).returncode == 0
    if fault == signal.SIGKILL:
        with server(tmp_path, port):
            assert follow_once(repository, **there).returncode == 0
    assert shown(store) == measured(repository)
