"""A study on a real Ray cluster on loopback, with pretended GPUs: the results of one machine, whatever is killed.

One head for the module, which holds no cells; nodes are started by the tests, each in a checkout, and ended by their
process numbers.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import STUDY, TOY_PARAMS, TOY_STUDY, Maker, Repository
from ray_nodes import START_S, Ray, wait_until

pytest.importorskip("ray", reason="the extra `cluster` is not installed")
pytestmark = pytest.mark.slow

GRID = f"experiments/{STUDY}/dvc.yaml"


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    folder = Path("/tmp") / f"mr{os.getpid()}"  # short: the name of a socket has 107 letters
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head(ray_folder: Path) -> Iterator[Ray]:
    (ray_folder / "a").mkdir()
    cluster = Ray(ray_folder / "a")
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(head: Ray) -> Iterator[Ray]:
    """The head; the nodes that a test adds end with it."""
    before = list(head.started)
    yield head
    head.end([process for process in head.started if process not in before])
    head.started = before


def declared(*, steps: int = 8, seeds: int = 2) -> dict[str, Any]:
    params, study = copy.deepcopy(TOY_PARAMS), copy.deepcopy(TOY_STUDY)
    params["workloads"]["toy"]["settings"]["steps"] = steps
    study |= {"seeds": list(range(seeds)), "price_usd_per_gpu_hour": 2.8, "budget_usd": 50}
    return {"params": params, "study": study}


def on_ray(cluster: Ray, *more: str) -> list[str]:
    return ["study", "run", STUDY, "--on", "ray", "--address", cluster.address, *more]


def clone(repository: Repository, target: Path) -> Repository:
    """Another checkout of the same commit; a toy repository has its data in git."""
    repository.run("git", "clone", "-q", str(repository.root), str(target))
    repository.run("cp", "-a", str(repository.root / ".dvc" / "cache"), str(target / ".dvc" / "cache"))
    other = replace(repository, root=target)
    other.git("config", "user.name", "n")
    other.git("config", "user.email", "n@example.org")
    return other


def with_other_data(repository: Repository, target: Path) -> Repository:
    """A checkout of the same commit whose data are not those that git holds, which git does not notice."""
    other = clone(repository, target)
    meta = other.root / "data" / "toy" / "meta.json"
    other.git("update-index", "--skip-worktree", str(meta))
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps(content | {"sha256": dict.fromkeys(content["sha256"], "0" * 64)}))
    return other


def results(repository: Repository) -> dict[str, tuple[Any, ...]]:
    """What must be the same wherever a cell is trained."""
    return {
        f"{row['arm']}-{row['seed']}": (
            row["status"], row["val_loss"], row["final_step"], row["hashes"]["weights"],
            [point["val_loss"] for point in row["curve"]],
        )
        for row in repository.ledger() if row["status"] in ("completed", "diverged")
    }  # fmt: skip


def verdict(repository: Repository) -> Any:
    return {
        arm: found["verdict"] for arm, found in repository.read(f"reports/{STUDY}/verdict.json")["verdicts"].items()
    }


def trainers(root: Path) -> list[psutil.Process]:
    """Processes that train in a checkout."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if "pipeline.worker" in line and process.info["cwd"] == str(root):
            found.append(process)
    return found


def running(repository: Repository, step: int = 1) -> dict[int, int]:
    """Process number -> step, of the attempts behind fences that came so far and still run."""
    found = {}
    for path in repository.root.glob("scratch/*/cluster/*/scratch/*/attempts/*/progress.json"):
        with contextlib.suppress(FileNotFoundError):  # promoted in this instant
            start, progress = json.loads(path.with_name("start.json").read_text()), json.loads(path.read_text())
            if progress["step"] >= step and psutil.pid_exists(start["pid"]):
                found[start["pid"]] = progress["step"]
    return found


def test_twelve_cells_on_two_checkouts_end_as_on_one_machine(make: Maker, cluster: Ray, tmp_path: Path) -> None:
    here = make(tmp_path / "here", **declared(steps=60, seeds=6))  # long enough to be seen at work on both
    alone, there = clone(here, tmp_path / "alone"), clone(here, tmp_path / "there")
    alone.muon("study", "run", STUDY)
    cluster.node(here)
    cluster.node(there)
    done = here.muon(*on_ray(cluster), **cluster.environment())
    assert results(here) == results(alone)
    assert len(results(here)) == 12
    assert verdict(here) == verdict(alone)
    # Both nodes had their part, the second through its own folder; each line says which node trains what.
    nodes = set(re.findall(r"-\d on (\S+)", done.stderr))
    assert len(nodes) == 2, done.stderr
    assert list((there.root / "scratch").glob("*/cluster"))
    assert not list((there.root / "scratch").glob("*/cluster/*"))
    assert "12 cells, 12 in place" in here.muon(*on_ray(cluster), **cluster.environment()).stderr
    assert f"Running stage '{GRID}:train" not in here.dvc("repro", GRID).stdout
    assert "(raylet)" not in done.stdout, "standard output is for the answer"
    assert len(here.attempts()) == 12
    _a_late_finisher_that_differs_is_found(here, cluster)


def _a_late_finisher_that_differs_is_found(here: Repository, cluster: Ray) -> None:
    """Behind the fence of an attempt that was taken for lost, another outcome than the first one's turns up."""
    path = next(path for path in here.root.glob("scratch/*/attempts/1/record.json"))
    digest, record = path.parents[2].name, json.loads(path.read_text())
    record |= {"attempt": 7, "attempt_id": "7" * 16, "val_loss": record["val_loss"] + 1e-9}
    attempt = path.parents[2] / "cluster" / "7" / "scratch" / digest / "attempts" / "7"
    attempt.mkdir(parents=True)
    (attempt / "record.json").write_text(json.dumps(record))
    (attempt / "start.json").write_text((path.parent / "start.json").read_text())
    found = here.muon(*on_ray(cluster), check=False, **cluster.environment())
    assert found.returncode == 5
    assert "two attempts at the same cell ended differently" in found.stdout + found.stderr


def test_a_killed_trainer_node_and_driver_change_nothing(make: Maker, cluster: Ray, tmp_path: Path) -> None:
    here = make(tmp_path / "here", **declared(steps=400))
    alone = clone(here, tmp_path / "alone")
    alone.muon("study", "run", STUDY, "-j", "1")
    nodes = [cluster.node(here), cluster.node(here)]

    said = tmp_path / "said.txt"

    def start() -> subprocess.Popen[bytes]:
        with said.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "muonlab.cli", *on_ray(cluster)], cwd=here.root, stdout=out, stderr=out,
                env=here.environment(**cluster.environment()),
            )  # fmt: skip

    driver = start()
    wait_until(lambda: running(here, step=20), START_S)
    shown = here.muon("status").stdout
    assert re.search(r"-\d on toy, on \S+: step \d+/400", shown), shown
    trainer = next(iter(running(here, step=20)))
    os.kill(trainer, signal.SIGKILL)
    wait_until(lambda: running(here, step=20).keys() - {trainer}, START_S)
    (another, *_) = running(here, step=20).keys() - {trainer}
    (doomed,) = (node for node in nodes if psutil.Process(node.pid) in psutil.Process(another).parents())
    late = cluster.node(with_other_data(here, tmp_path / "other"))
    wait_until(lambda: "the data of toy are others there" in said.read_text(), START_S)
    assert "It takes no part." in said.read_text()
    cluster.end([late])  # a run that begins with such a node is refused
    # Ray's processes of the node are killed; what trains there must not go on for long.
    cluster.kill(doomed)
    wait_until(lambda: not psutil.pid_exists(another), 60)
    # Ray takes a node for dead when it has not answered for a while; a driver that is killed before never hears of it.
    wait_until(lambda: "was lost (its node died)" in said.read_text(), START_S)
    wait_until(lambda: running(here, step=20), START_S)
    at_work = set(running(here))
    driver.kill()
    driver.wait()
    time.sleep(2)
    assert at_work <= {process.pid for process in trainers(here.root)}, "a cell does not need its driver"
    assert start().wait(START_S) == 0, said.read_text()
    told = said.read_text()
    assert "was lost (its process was killed)" in told
    assert "is being trained on" in told
    assert re.search(r"goes on from step [1-9]", told)
    assert results(here) == results(alone)
    assert verdict(here) == verdict(alone)
    statuses = [attempt["status"] for attempt in here.attempts()]
    assert statuses.count("completed") == 4, "nothing is trained twice"
    lost = [attempt for attempt in here.attempts() if attempt["status"] == "abandoned"]
    assert len(lost) == 2
    assert all(attempt["cost_usd"] > 0 for attempt in lost), "what was lost was paid for"
    assert len(here.ledger()) == 6


def test_ranks_die_with_their_node_and_the_cell_is_tried_again(make: Maker, cluster: Ray, tmp_path: Path) -> None:
    here = make(tmp_path / "here", **declared(steps=100, seeds=1))
    cluster.node(here, gpus=2)
    command = [sys.executable, "-m", "muonlab.cli", *on_ray(cluster, "--gpus-per-cell", "2", "--only", "muon-0")]
    driver = subprocess.Popen(
        command, cwd=here.root, text=True, env=here.environment(**cluster.environment()),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_until(lambda: running(here, step=4), START_S)
    ranks = [process for process in trainers(here.root) if "torch.distributed.run" not in process.cmdline()]
    agent = ranks[0].parent()
    assert agent is not None
    assert len(ranks) == 2
    slot = agent.parent()
    assert slot is not None
    slot.kill()
    wait_until(lambda: not any(rank.is_running() for rank in ranks), 60)
    told = driver.communicate(timeout=START_S)[0]
    assert driver.returncode == 3, told  # the other cells were left out
    lost, made = sorted(here.attempts(), key=lambda attempt: attempt["attempt"])
    assert (lost["status"], made["status"]) == ("abandoned", "completed")
    assert made["device_count"] == 2
    assert made["cost_usd"] == pytest.approx(2 * made["wall_seconds"] / 3600 * 2.8)


HOLDER = """
import ray
ray.init(address={address!r}, namespace="others", log_to_driver=False)
first = next(node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU"))
strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(first["NodeID"], soft=False)
@ray.remote(num_cpus=0, num_gpus=1, scheduling_strategy=strategy)
class Holder:
    def ready(self): return "held"
held = Holder.remote()
print(ray.get(held.ready.remote()), flush=True)
input()
"""
"""Another job of the cluster: it holds the GPU of the node that is asked first."""


def test_free_gpus_are_used_and_what_is_left_at_work_is_told_or_stopped(
    make: Maker, cluster: Ray, tmp_path: Path
) -> None:
    here = make(tmp_path / "here", **declared(steps=5000))
    for _ in range(2):
        cluster.node(here)
    environment = here.environment(**cluster.environment())
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(address=cluster.address)], cwd=here.root, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def start(cell: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "muonlab.cli", *on_ray(cluster, "--only", cell)]
        return subprocess.Popen(command, cwd=here.root, env=environment, stderr=subprocess.PIPE, text=True)

    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        driver = start("muon-0")
        wait_until(lambda: running(here), START_S)
        driver.kill()
        driver.communicate()
    finally:
        other.communicate("\n", timeout=60)
    second = start("nolah-0")
    wait_until(lambda: len(running(here)) == 2, START_S)
    second.send_signal(signal.SIGINT)
    assert "muon-0 is still at work on" in second.communicate(timeout=START_S)[1]
    assert len(trainers(here.root)) == 1
    limited = here.muon(
        *on_ray(cluster, "--only", "nolah-1", "--max-cost", "0.000001"), check=False, **cluster.environment()
    )
    assert limited.returncode == 4, limited.stderr
    assert "muon-0, left at work" in limited.stderr
    wait_until(lambda: not trainers(here.root), 60)
    stopped = next(attempt for attempt in here.attempts() if attempt["arm"] == "muon")
    assert stopped["status"] == "abandoned"
    assert stopped["cost_usd"] > 0


def test_what_cannot_work_is_refused_in_a_sentence(make: Maker, cluster: Ray, ray_folder: Path, tmp_path: Path) -> None:
    here = make(tmp_path / "here", **declared())
    node = cluster.node(here)

    def refusal(*options: str, **environment: str) -> str:
        asked = here.muon(*on_ray(cluster, *options), check=False, **{**cluster.environment(), **environment})
        assert asked.returncode == 2, asked.stdout + asked.stderr
        assert "Traceback" not in asked.stderr
        assert not (here.root / "experiments" / STUDY / "registration.json").exists(), "nothing is written"
        return asked.stderr.strip().splitlines()[-1]

    assert "no Ray cluster answers there" in refusal("--address", "127.0.0.1:9")
    assert "it should be HOST:PORT" in refusal("--address", "localhost")
    assert "no node of the cluster" in refusal("--gpus-per-cell", "5")
    assert "refuses this machine's token" in refusal(RAY_AUTH_TOKEN="another-token-0123456789")
    assert "there is none here" in refusal(RAY_AUTH_TOKEN="", HOME=str(tmp_path))
    for pretends, sentence in {
        "import platform; platform.python_version = lambda: '3.11.99'": "it runs Python 3.",
        "import ray; ray.__version__ = '2.59.0'": "the cluster runs other versions than this machine",
    }.items():
        (tmp_path / "sitecustomize.py").write_text(pretends)
        assert sentence in refusal(PYTHONPATH=f"{here.root}{os.pathsep}{tmp_path}")
    (here.root / "optim" / "muon.py").open("a").write("\nHASTE = 1\n")
    assert "optim/muon.py is not as committed" in refusal()
    here.git("checkout", "-q", "optim")
    other = clone(here, tmp_path / "other")
    (other.root / "optim" / "muon.py").open("a").write("\nHASTE = 1\n")
    other.commit("in haste")
    wrong = cluster.node(other)
    assert "its checkout is at commit" in refusal()
    wrong.terminate()
    wrong.wait()
    node.terminate()
    node.wait()
    (ray_folder / "open").mkdir()
    unguarded = Ray(ray_folder / "open", token=None)
    try:
        assert "asks for no token" in refusal("--address", unguarded.address)
    finally:
        unguarded.stop()
