"""One run on several GPUs of this machine: torchrun's launcher, called by the stage that trains.

    muon pretrain --ngpus N  ->  MUONLAB_RANKS=N dvc exp run -S ...  ->  the stage `train`  ->  N times that same stage

The number travels in the environment, not in the stage's command line: that is part of the key of DVC's run cache, and
a cell is the same cell on any number of ranks (they agree to rounding, which its record says). The process that starts
the ranks trains nothing. They end with it, however it dies (`processes.die_with_ancestors`), and it with them: a rank
that fails ends the others. Several machines are torchrun's own business: it may start the stage as well.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping

from muonlab.pipeline.processes import PARENT
from muonlab.registry.errors import CellsFailedError, UsageError
from muonlab.registry.settings import WorkloadSettings
from muonlab.training.distributed import Ranks

RANKS = "MUONLAB_RANKS"
"""How many processes the stage `train` is to start for its run; unset, it trains by itself."""
ON_PROCESSOR = {"CUDA_VISIBLE_DEVICES": ""}
"""Hides the GPUs, so that ranks compute on the processor and meet over gloo."""


def wanted_ranks() -> int:
    """How many processes the environment asks for. Raises UsageError for what is no such number."""
    text = os.environ.get(RANKS, "1")
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UsageError(f"{RANKS}: found {text!r}; it is the number of processes of a run, 1 or more.")
    return int(text)


def check_ranks(ranks: int, settings: WorkloadSettings, environment: Mapping[str, str]) -> None:
    """Raise UsageError where the batch does not divide, or torch reaches too few GPUs that nobody has hidden."""
    Ranks(0, ranks).share(settings.batch_size)
    Ranks(0, ranks).micro_batch(settings.batch_size, settings.micro_batch_size)
    if ON_PROCESSOR.items() <= environment.items():
        return
    import torch

    if (found := torch.cuda.device_count()) < ranks:
        raise UsageError(
            f"--ngpus: found {ranks}, and torch reaches {found} GPU{'' if found == 1 else 's'} here; give no more than "
            "there are, or add --gloo, which tries the same on the processor."
        )


def train_on(ranks: int) -> None:
    """Run this process' own command line as so many ranks, and wait for them.

    Raises CellsFailedError for a rank that ended without a word, and SystemExit with the code of one that has said why.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its account of a rank that failed is a page; the rank has said it in a sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[PARENT] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode > 1:
            raise SystemExit(failure.exitcode) from None
        how = f"was killed by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else "failed"
        raise CellsFailedError(
            f"process {rank} of the {ranks} of this run {how}, and the others were ended; start it again: the run goes "
            "on from its last checkpoint."
        ) from None
