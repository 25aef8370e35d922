"""One run on several processes: each takes its slice of every batch, and gradients are averaged.

    batch of step t:   blocks b_0 .. b_B-1 of `Order`, whatever the number of ranks
    rank r of R:       b_rB/R .. b_(r+1)B/R-1
    gradient:          (1/R) * sum over ranks of the mean over their slice = the mean over the batch

so that R ranks make the run that one process makes, to the rounding of that sum. Every rank holds the whole model and
optimizer state and takes the same step; only rank 0 writes. Started by torchrun, which sets RANK, WORLD_SIZE,
LOCAL_RANK and MASTER_ADDR. Gradients travel when all are there, not one by one behind the backward pass: simpler, and
for models of this size a small part of a step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from muonlab.registry.errors import UsageError

if TYPE_CHECKING:
    import torch

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others: longer than rank 0 takes for a checkpoint."""


class Ranks(NamedTuple):
    """This process among those of a run. With one rank every method leaves its argument alone."""

    rank: int
    size: int
    local_rank: int = 0

    @property
    def writes(self) -> bool:
        """Whether this process writes checkpoints and records."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """This rank's part of a batch. Raises UsageError where the ranks do not divide it."""
        if batch_size % self.size:
            raise UsageError(
                f"batch_size is {batch_size}, which {self.size} processes do not divide; start as many as do."
            )
        own = batch_size // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def micro_batch(self, batch_size: int, wanted: int | None) -> int:
        """Sequences that a rank takes at once of its part: `wanted`, or the whole part.

        Raises UsageError where that does not divide the part.
        """
        own = batch_size // self.size
        size = min(wanted or own, own)
        if own % size:
            raise UsageError(
                f"micro_batch_size is {size}, which does not divide the {own} sequences of each of {self.size} "
                "processes; choose one that does."
            )
        return size

    def average_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Replace every gradient by its mean over the ranks."""
        if self.size == 1:
            return
        import torch
        from torch import distributed as dist

        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for dtype in dict.fromkeys(grad.dtype for grad in grads):
            alike = [grad for grad in grads if grad.dtype == dtype]
            flat = torch.cat([grad.flatten() for grad in alike])
            dist.all_reduce(flat)
            flat /= self.size
            parts = torch.split(flat, [grad.numel() for grad in alike])
            for grad, mean in zip(alike, parts, strict=True):
                grad.copy_(mean.view_as(grad))

    def sums(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The sums of each value over the ranks: the same on all."""
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed as dist

        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Go on when every rank is here."""
        if self.size > 1:
            from torch import distributed as dist

            dist.barrier()


ALONE = Ranks(0, 1)


def started_ranks() -> Ranks:
    """What torchrun says of this process; one rank where it was started without. Imports no torch."""
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        return ALONE
    return Ranks(int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes of this run, for as long as the block lasts: over NCCL with CUDA, else gloo."""
    import torch
    from torch import distributed as dist

    ranks = started_ranks()
    if ranks.size == 1 or dist.is_initialized():
        yield ranks
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
