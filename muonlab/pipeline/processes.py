"""Training processes that never outlive who started them, and the facts about this process that a record keeps."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from muonlab.registry.record import Provenance

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent() -> None:
    """Arrange that this process ends when its parent dies, even by SIGKILL (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_ancestors(poll_s: float = 0.5) -> None:
    """End this process when its parent or the dvc process above it dies.

    DVC starts a stage through a shell: when dvc is killed the shell lives on, so the parent's death alone does
    not tell. A thread watches the whole line of ancestors up to dvc; polling costs microseconds.
    """
    die_with_parent()
    watched: list[psutil.Process] = []
    try:
        for ancestor in psutil.Process().parents():
            watched.append(ancestor)
            if "dvc" in " ".join(ancestor.cmdline()[:3]):
                break
        else:
            watched = watched[:1]  # not under dvc: the shell above is a person's
    except psutil.Error:
        return

    def watch() -> None:
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in watched):
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGKILL)

    def guarded() -> None:
        try:
            watch()
        except psutil.Error:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=guarded, daemon=True, name="watch-ancestors").start()


CODE_PATHS = ("optim", "muonlab", "stages", "pyproject.toml", "constraints.txt")


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit that is checked out, and whether tracked code differs from it; nulls outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", *CODE_PATHS))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def provenance(root: Path) -> Provenance:
    """Commit, versions and machine of this process; imports nothing heavy."""
    import importlib.metadata

    commit, dirty = git_state(root)
    return Provenance(
        commit=commit,
        dirty=dirty,
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        transformers=importlib.metadata.version("transformers"),
        device=device_name(),
        host_os=f"{platform.system()} {platform.release()}",
    )


def device_name() -> str:
    """The device that a training here runs on, as its record names it: the GPU, or the processor."""
    from muonlab.pipeline.fingerprint import accelerator

    gpu = accelerator()
    return gpu if gpu != "none" else processor()


def processor() -> str:
    """Model name of the processor, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
