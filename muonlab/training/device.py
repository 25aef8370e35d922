"""Where a run computes, in what precision, and how repeatable that makes it.

    CPU     float32 (or the dtype of the weights), one thread: bit-identical on one kind of machine
    CUDA    float32 weights and optimizer state; products of matrices in bfloat16 under autocast

bfloat16 on a processor without units for it is some 80 times slower than float32, hence float32 there. On CUDA torch is
told to take deterministic algorithms where it has them, and to warn where it has none (such as a cumulative sum): two
runs there agree to rounding, and mostly to the bit, which `Placement.repeats` says.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from typing import NamedTuple

import torch

from muonlab.registry.settings import WorkloadSettings


class Placement(NamedTuple):
    """Where and in what precision a model computes."""

    device: torch.device
    autocast: bool
    """Products of matrices in bfloat16, of float32 weights."""
    repeats: str
    """How far a repetition on the same kind of machine agrees, and what was set for that; in words."""

    @property
    def name(self) -> str:
        """The device, as the record names it."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def computing(self) -> contextlib.AbstractContextManager[object]:
        """The context of every forward pass, of training and evaluation alike."""
        if not self.autocast:
            return contextlib.nullcontext()
        # The cache holds casts of the weights across passes; a step changes the weights in between.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def synchronize(self) -> None:
        """Wait until the device has done what it was told; CUDA computes behind the program's back."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int:
        """The most memory that was in use at once: of the device by this run, or of this process since it began."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def place(settings: WorkloadSettings, *, local_rank: int = 0) -> Placement:
    """The placement of a workload's runs on this machine: the first CUDA device, or that of the rank, else the CPU.

    Sets torch to one thread: the summation order, hence the result, depends on their number.
    """
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        return Placement(
            torch.device("cpu"), settings.precision == "bfloat16-autocast", "bit for bit: one thread of the processor"
        )
    # Read when the first matrix product is made; without it cuBLAS may sum in another order every time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.cuda.reset_peak_memory_stats(device)  # of this run, not of one that the process has made before
    autocast = settings.precision != "float32" and settings.weights == "float32"
    return Placement(
        device,
        autocast,
        "to rounding: deterministic algorithms where torch has them (warn_only), cuDNN's search off, "
        f"CUBLAS_WORKSPACE_CONFIG={os.environ['CUBLAS_WORKSPACE_CONFIG']}",
    )
