"""Nodes of a Ray cluster on loopback, with pretended GPUs: processes of `ray start --block`, ended by their numbers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from conftest import Repository

TOKEN = "a-token-of-the-tests-0123456789"
START_S = 600.0
STARTS = 4


class Ray:
    """A cluster of `ray start --block` processes."""

    def __init__(self, folder: Path, token: str | None = TOKEN, code: Path | None = None) -> None:
        """`code`: a folder that nodes import from behind their checkout."""
        self.folder, self.token, self.code = folder, token, code
        self.started: list[subprocess.Popen[bytes]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.start(folder, "--head", f"--port={self.address.partition(':')[2]}", "--num-gpus=0",
                   "--include-dashboard=false")  # fmt: skip

    def environment(self) -> dict[str, str]:
        of_ray = {"RAY_AUTH_MODE": "disabled"} if self.token is None else {"RAY_AUTH_TOKEN": self.token}
        patient = {"RAY_raylet_start_wait_time_s": "150"}  # on a busy machine 30 s do not suffice
        return {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", **patient, **of_ray}

    def node(self, checkout: Repository, gpus: int = 1) -> subprocess.Popen[bytes]:
        """A node whose checkout this is."""
        around = checkout.environment()
        if self.code is not None:
            around["PYTHONPATH"] += f"{os.pathsep}{self.code}"
        return self.start(checkout.root, f"--address={self.address}", f"--num-gpus={gpus}", **around)

    def start(self, where: Path, *options: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a node; again where Ray's own patience of 15 s was too short for a busy machine."""
        for _ in range(STARTS):
            process, log = self._start_once(where, *options, **environment)
            if process.poll() is None:
                return process
        raise AssertionError(log.read_text())

    def _start_once(self, where: Path, *options: str, **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
        number = len(self.started)
        log = self.folder / f"{number}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1",
                 "--object-store-memory=100000000", f"--temp-dir={self.folder / str(number)}",
                 "--disable-usage-stats", *options],
                cwd=where, env={**os.environ, **environment, **self.environment()}, stdout=out, stderr=out,
            )  # fmt: skip
        self.started.append(process)
        wait_until(lambda: b"Ray runtime started" in log.read_bytes() or process.poll() is not None, START_S)
        return process, log

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL to Ray's own processes of a node; what they had started is not touched."""
        for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def stop(self) -> None:
        self.end(self.started)

    def end(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """End them, the last first."""
        for process in reversed(processes):
            process.terminate()  # nothing, to one that has ended
        for process in reversed(processes):
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill(process)


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
