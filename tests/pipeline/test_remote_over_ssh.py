"""A study on another machine: a real sshd on loopback with keys of its own, a real git push, a real dropped connection.

The machine is this one, in a folder of its own; its Python is the one that runs the tests (`--prepared`), so that no
environment is installed.
"""

from __future__ import annotations

import contextlib
import copy
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PROJECT, STUDY, TOY_PARAMS, Maker, Repository

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SSHD and shutil.which("ssh")), reason="needs sshd and ssh (Debian's openssh-server)"),
]


@dataclass
class Pod:
    """A machine that answers on loopback."""

    home: Path
    port: int
    server: subprocess.Popen[bytes] | None = None

    def make_keys(self) -> None:
        for name in ("host", "user"):
            make_key(self.home / name)
        shutil.copyfile(self.home / "user.pub", self.home / "authorized_keys")

    def start(self, **options: str) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks away what it trusts least
        settings = {
            "Port": str(self.port), "ListenAddress": "127.0.0.1", "HostKey": str(self.home / "host"),
            "AuthorizedKeysFile": str(self.home / "authorized_keys"), "UsePAM": "no", "StrictModes": "no",
            "PasswordAuthentication": "no", "KbdInteractiveAuthentication": "no", "PermitRootLogin": "yes",
            "PidFile": "none", "SetEnv": "MUONLAB_TRACKING=off OMP_NUM_THREADS=1", **options,
        }  # fmt: skip
        config = self.home / "sshd_config"
        config.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        with (self.home / "sshd.log").open("ab") as log:
            self.server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=log)
        wait_until(lambda: answers(self.port))

    def stop(self) -> None:
        if self.server is not None:
            self.drop()
            self.server.terminate()
            self.server.wait()
            self.server = None

    def drop(self) -> None:
        """Cut every connection there is, as a network does: the machine's end of it is gone."""
        assert self.server is not None
        for child in psutil.Process(self.server.pid).children(recursive=True):
            if child.name() == "sshd":
                child.kill()

    @property
    def fingerprint(self) -> str:
        told = subprocess.run(["ssh-keygen", "-lf", str(self.home / "host.pub")], capture_output=True, text=True)
        return told.stdout.split()[1]

    @property
    def checkout(self) -> Path:
        return self.home / "pod" / "checkout"

    def added(self) -> list[str]:
        """How `muon remote add` is called for it."""
        return [
            "remote", "add", "pod", f"{getpass.getuser()}@127.0.0.1", "--port", str(self.port), "--key-file",
            str(self.home / "user"), "--folder", str(self.home / "pod"), "--python", sys.executable, "--prepared",
            "--price-per-hour", "3.6",
        ]  # fmt: skip

    def attempts(self) -> list[Any]:
        return [json.loads(path.read_text()) for path in self.checkout.glob("scratch/*/attempts/*/record.json")]

    def runs(self) -> list[Path]:
        return sorted((self.home / "pod" / "runs").glob("*"))


def make_key(path: Path) -> None:
    for old in (path, path.with_suffix(".pub")):
        old.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def answers(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port: int = asked.getsockname()[1]
        return port


def wait_until(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    home = tmp_path / "machine"
    home.mkdir()
    made = Pod(home, free_port())
    made.make_keys()
    made.start()
    yield made
    made.stop()
    for run in made.runs():  # of a test that failed in the middle: what keeps a run ends all of it
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] and process.info["cmdline"][-2:] == ["keep", str(run)]:
                process.kill()


@pytest.fixture
def ours(make: Maker, tmp_path: Path) -> Repository:
    return shared(make(tmp_path / "ours"))


def shared(repository: Repository) -> Repository:
    """As a clone has it: merging told, data ignored by git and made anew wherever it runs."""
    shutil.copyfile(PROJECT / ".gitattributes", repository.root / ".gitattributes")
    (repository.root / "data" / ".gitignore").write_text("/toy\n/fingerprint\n")
    repository.git("rm", "-rq", "--cached", "data/toy")
    repository.commit("shared")
    repository.run(sys.executable, "-m", "muonlab.pipeline.merging")
    return repository


def refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    """One sentence, which has these words, and nothing of a traceback."""
    assert done.returncode == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("muon: "), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last, last


def started(ours: Repository, *options: str) -> subprocess.Popen[str]:
    """`muon study run --on pod`, under way."""
    return subprocess.Popen(
        [sys.executable, "-m", "muonlab.cli", "study", "run", "--on", "pod", *options],
        cwd=ours.root, env=ours.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def heard(client: subprocess.Popen[str], words: str) -> str:
    """What a command has said up to the first line with these words."""
    assert client.stdout is not None
    said = ""
    for line in client.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(f"{words!r} was never said:\n{said}")


def add(ours: Repository, pod: Pod, *options: str) -> None:
    ours.muon(*pod.added(), "--host-key", pod.fingerprint, *options)


def test_a_study_outlives_its_connection_and_is_whole_here(ours: Repository, pod: Pod) -> None:
    add(ours, pod)
    first = started(ours)
    heard(first, "4 to train")
    pod.drop()
    heard(first, "The run goes on there")
    heard(first, " running,")  # its log goes on, where it was
    first.kill()
    first.wait()

    sent = ours.git("rev-parse", "HEAD").strip()
    done = ours.muon("study", "run", "--on", "pod")
    assert "is this run already; it is followed, and no second one is started" in done.stderr
    assert "ended with 0 after" in done.stdout
    (run,) = pod.runs()
    assert [record["status"] for record in pod.attempts()] == ["completed"] * 4
    assert [record["provenance"]["commit"] for record in pod.attempts()] == [sent] * 4

    # Here nothing was trained, and nothing is: the rows, the outputs and the verdict came.
    verdict = ours.read(f"reports/{STUDY}/verdict.json")
    again = ours.muon("study", "run")
    assert "4 cells, 4 in place or restored from cache, 0 waiting to be taken over, 0 to train" in again.stderr
    assert ours.attempts() == []
    assert {row["attempt_id"] for row in ours.ledger()} == {record["attempt_id"] for record in pod.attempts()}
    assert ours.read(f"reports/{STUDY}/verdict.json") == verdict
    for row in ours.ledger():
        cell = f"{row['arm']}-{row['seed']}"
        for name in ("train.json", "curve.csv", "model.safetensors"):
            here, there = (root / "runs" / STUDY / cell / name for root in (ours.root, pod.checkout))
            assert here.read_bytes() == there.read_bytes()

    assert "val_loss" in ours.muon("logs", "muon-0", "--remote", "pod", "--follow").stdout
    found = json.loads(ours.muon("doctor", "--remote", "pod", "--json", check=False).stdout)
    assert {"ssh", "python there", "git there", "disk there", "dvc"} <= {check["name"] for check in found["checks"]}
    ours.muon("download", "--run", "muon-*", "--remote", "pod", "--no-checkpoints")
    laid = sorted(path.name for path in (ours.root / "downloads" / STUDY / "muon-1").iterdir())
    assert laid == [".done", "curve.csv", "train.json"]

    # What a run cannot have left is not believed: neither other code nor an edited row.
    for path, edit, words in (
        ("params.yaml", ("lr: 0.02", "lr: 0.03"), "changes params.yaml, which no run writes"),
        ("experiments/ledger.jsonl", ('"val_loss":5.', '"val_loss":4.'), "was edited after it was written"),
    ):
        text = (ours.root / path).read_text()
        assert edit[0] in text
        forge(pod, run.name, sent, path, text.replace(*edit))
        head = ours.git("rev-parse", "HEAD")
        refused(ours.muon("download", "--run", "*", "--remote", "pod", check=False), words, code=5)
        assert ours.git("rev-parse", "HEAD") == head


def forge(pod: Pod, run: str, sent: str, path: str, text: str) -> None:
    """Put another commit in the place of a run's results."""

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=pod.checkout, check=True, capture_output=True)

    git("checkout", "--quiet", "--force", "--detach", sent)
    (pod.checkout / path).write_text(text)
    git("add", "--force", path)
    git("commit", "--quiet", "--message", "forged")
    git("push", "--quiet", "--force", str(pod.home / "pod" / "repository.git"), f"HEAD:refs/muonlab/results/{run}")


def test_a_run_ends_at_the_price_of_the_machine_and_when_it_is_stopped(make: Maker, pod: Pod, tmp_path: Path) -> None:
    params = copy.deepcopy(TOY_PARAMS)
    params["workloads"]["toy"]["settings"]["steps"] = 5000
    ours = shared(make(tmp_path / "ours", params=params))
    add(ours, pod, "--price-per-hour", "3600")
    done = ours.muon("study", "run", "--on", "pod", "--max-cost", "2", check=False)
    assert done.returncode == 4
    assert "and --max-cost is $2.00" in done.stdout

    client = started(ours, "-j", "1")
    wait_until(lambda: any(step_made(path) for path in pod.checkout.glob("scratch/*/attempts/*/progress.json")))
    asked = ours.muon("status", "--gpu", "--remote", "pod")
    assert f"{STUDY}  muon-0 on toy: step" in asked.stdout
    assert "since its set-up began, $" in asked.stderr
    assert "idle hours too" in asked.stderr
    refused(ours.muon("study", "run", "--on", "pod", "-j", "2", check=False), "one run at a time", "remote stop pod")
    trainers = [p for p in psutil.process_iter(["cwd"]) if str(pod.checkout) in str(p.info["cwd"])]
    assert trainers
    stopped = ours.muon("remote", "stop", "pod").stdout
    assert "was stopped after" in stopped
    assert "at $3,600.00 an hour" in stopped
    wait_until(lambda: not any(process.is_running() for process in trainers))
    assert client.wait() == 130
    assert ours.ledger() == pod_ledger(pod)
    assert "abandoned" in {row["status"] for row in ours.ledger()}

    # The number of the process that is over was given to somebody else's.
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            record = pod.runs()[-1] / "process.json"
            record.write_text(json.dumps({**json.loads(record.read_text()), "pid": other.pid}))
            said = ours.muon("remote", "stop", "pod").stdout
            lives = other.poll() is None
        finally:
            other.kill()
    assert "nothing runs there" in said
    assert lives


def step_made(path: Path) -> bool:
    return bool(json.loads(path.read_text())["step"] > 0)


def pod_ledger(pod: Pod) -> list[Any]:
    return Repository(pod.checkout).ledger()


def test_a_disk_that_is_full_there_is_told_and_the_run_goes_on_once_there_is_space(
    ours: Repository, pod: Pod, tmp_path: Path
) -> None:
    disk = pod.home / "pod"
    disk.mkdir()
    with mounted(disk, "16m"):
        add(ours, pod)
        refused(ours.muon("study", "run", "--on", "pod", check=False), "1 GB are needed")
        assert "PROBLEM  disk there" in ours.muon("doctor", "--remote", "pod", check=False).stdout
    with mounted(disk, "1100m"):
        client = started(ours)
        heard(client, "its meter runs")
        filler = disk / "filler"
        fill(filler)
        assert client.stdout is not None
        said = client.stdout.read()
        assert client.wait() not in (0, 2)
        assert "No space left on device" in said.splitlines()[-2]
        filler.unlink()
        assert "ended with" in ours.muon("status", "--remote", "pod", check=False).stderr


def fill(path: Path) -> None:
    """Take all the space that there is, in ever smaller pieces."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A disk of that size, in memory."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to mount a small disk, as root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_machine_is_added_by_the_fingerprint_that_was_compared(ours: Repository, pod: Pod) -> None:
    file = ours.root / ".muonlab" / "remotes.yaml"
    other = "SHA256:" + "A" * 43
    refused(ours.muon(*pod.added(), check=False), f"--host-key {pod.fingerprint}")
    refused(ours.muon(*pod.added(), "--host-key", other, check=False), pod.fingerprint, other)
    refused(ours.muon("remote", "add", "ray", "a@b", check=False), "'ray' has a meaning of its own")
    refused(ours.muon("remote", "add", "--", "x", "-oProxyCommand=x@b", check=False), "it should be user@host")
    assert not file.exists()
    add(ours, pod)
    assert pod.fingerprint in ours.muon("remote", "list").stdout
    assert ours.git("status", "--porcelain") == ""  # a machine's address is nothing to commit
    assert "python there" in ours.muon("doctor", "--remote", "pod", check=False).stdout

    # Another machine answers at the address: nobody talks to it, whatever is asked.
    pinned = (ours.root / ".muonlab" / "known_hosts").read_text()
    pod.stop()
    make_key(pod.home / "host")
    pod.start()
    for command in (["doctor", "--remote", "pod"], ["study", "run", "--on", "pod"], ["remote", "stop", "pod"]):
        refused(ours.muon(*command, check=False), "another host key than before", pod.fingerprint)
    refused(ours.muon(*pod.added(), check=False), f"--host-key {pod.fingerprint}")
    assert (ours.root / ".muonlab" / "known_hosts").read_text() == pinned
    assert not (pod.home / "pod").exists()

    # Made anew, it keeps what is not told again: its price above all, without which no limit of cost holds.
    before = ours.read(".muonlab/remotes.yaml")["pod"]
    again = ours.muon(*pod.added()[:4], "--host-key", pod.fingerprint).stdout
    assert "$3.60 an hour" in again
    after = ours.read(".muonlab/remotes.yaml")["pod"]
    assert {key for key in before if before[key] != after[key]} == {"host_key"}
    ours.muon(*pod.added()[:4], "--price-per-hour", "0", "--not-prepared")
    assert ours.read(".muonlab/remotes.yaml")["pod"] == {**after, "price_usd_per_hour": 0.0, "prepared": False}
    refused(ours.muon("study", "run", "--on", "pod", "--max-cost", "2", check=False), "no price is known of pod")

    make_key(pod.home / "user")  # which the machine does not know
    add(ours, pod)
    refused(ours.muon("doctor", "--remote", "pod", check=False), "lets none of our keys in")
    ours.muon("remote", "remove", "pod")
    refused(ours.muon("doctor", "--remote", "pod", check=False), "muon remote add pod user@host")


def test_what_cannot_run_there_is_refused_in_a_sentence(ours: Repository, pod: Pod) -> None:
    add(ours, pod)
    refused(ours.muon("study", "run", "--on", "pot", check=False), "unknown remote 'pot'", "Did you mean 'pod'?")
    refused(ours.muon("logs", "--remote", "pod", check=False), "nothing is set up there yet")
    refused(ours.muon("remote", "follow", "pod", check=False), "no run was started there yet")

    def edit(text: str) -> None:
        with (ours.root / "optim" / "muon.py").open("a") as file:
            file.write(text)

    edit("# tried\n")
    refused(ours.muon("study", "run", "--on", "pod", check=False), "optim/muon.py is not as committed")
    ours.git("checkout", "--quiet", "optim")
    (ours.root / "experiments" / "ledger.jsonl").write_text("")
    refused(ours.muon("study", "run", "--on", "pod", check=False), "experiments/ledger.jsonl", "`muon commit")
    (ours.root / "experiments" / "ledger.jsonl").unlink()

    pod.stop()
    empty = pod.home / "empty"
    empty.mkdir()
    pod.start(SetEnv=f"PATH={empty}")
    refused(ours.muon("study", "run", "--on", "pod", check=False), "git is not installed there")
    add(ours, pod, "--python", "python3")
    refused(ours.muon("study", "run", "--on", "pod", check=False), "there is no python3 there", "--python PATH")
    pod.stop()
    refused(ours.muon("study", "run", "--on", "pod", check=False), "cannot be reached", "Connection refused")
    assert not (pod.home / "pod").exists()
