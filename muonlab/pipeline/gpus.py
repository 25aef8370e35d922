"""The NVIDIA GPUs of this machine, as its driver tells them: torch need not be imported to ask."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import shutil
import subprocess

JOBS_WITHOUT_GPU = 2


def accelerator() -> str:
    """Name of the first GPU, whether or not torch computes on it; `none` without one."""
    return next(iter(_names()), "none")


def training_accelerator() -> str:
    """Name of the GPU that torch computes on here, or `none`: also where torch has no CUDA, or is to see no GPU."""
    return "none" if _hidden() else accelerator()


def training_gpus() -> list[str]:
    """The GPUs that torch may compute on here, each as CUDA_VISIBLE_DEVICES would name it alone."""
    if _hidden():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(len(_names()))]
    return _before_the_first_missing(visible)


def default_jobs() -> int:
    """Cells to train side by side where nobody says: one on each GPU, for two on one share its speed and its price."""
    return len(training_gpus()) or JOBS_WITHOUT_GPU


def _hidden() -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and not _before_the_first_missing(visible)
    return hidden or importlib.metadata.version("torch").endswith("+cpu")


def _before_the_first_missing(visible: str) -> list[str]:
    # So CUDA reads the list: up to the first device that there is not.
    return list(itertools.takewhile(lambda device: device not in ("", "-1"), map(str.strip, visible.split(","))))


def _names() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = subprocess.run(
        [tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return [name.strip() for name in asked.stdout.strip().splitlines()] if asked.returncode == 0 else []
