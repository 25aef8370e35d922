"""A study on another machine: a real sshd on loopback with keys of its own, a real git push, a real dropped connection.

The machine is this one, in a folder of its own; its Python is the one that runs the tests (`--prepared`), so that no
environment is installed.
"""

from __future__ import annotations

import copy
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
    options: dict[str, str] = field(default_factory=dict)
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


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
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


def test_a_study_runs_there_and_is_whole_here(ours: Repository, pod: Pod) -> None:
    ours.muon(*pod.added(), "--host-key", pod.fingerprint)
    before = ours.git("rev-parse", "HEAD").strip()
    done = ours.muon("study", "run", "--on", "pod")
    print(done.stderr, done.stdout)
    assert len(pod.attempts()) == 4
    assert ours.attempts() == []
