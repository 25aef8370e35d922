"""The polar factors of a step, split over the ranks of torch.distributed and gathered.

Replicas hold the same momenta, so each rank can orthogonalise a share of the matrices and take the others'
factors from their ranks. Who does what is a function of the shapes alone, and what travels are bits, so every
rank ends with the same update as one process would have computed (where batched equals looped bit for bit: on
the CPU). Nothing is sent for the noise, which is a function of seed, step and parameter.
Source: the distributed Muon of K. Jordan, https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from optim.core.orthogonalize import polar


class Work(NamedTuple):
    """A stack of matrices [b, m, n] to orthogonalise, and how."""

    stack: Tensor
    method: str
    options: Mapping[str, Any]


def ranks() -> int:
    """How many processes torch.distributed has joined; 1 where it is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank; the same answer on all of them."""
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def assign(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank of each piece of work: the costliest first, each to the rank with the least to do so far."""
    loads = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        owners[i] = rank
        heapq.heappush(loads, (load + costs[i], rank))
    return owners


def polar_factors(work: Sequence[Work], split: bool) -> Iterator[Tensor]:
    """polar of each stack, in order; with `split`, this rank computes its share of all of them at the outset."""
    if not split:
        for item in work:
            yield polar(item.stack, item.method, **item.options)
        return
    size, rank = ranks(), dist.get_rank()
    costs = [m * n * min(m, n) for b, m, n in (item.stack.shape for item in work) for _ in range(b)]
    owner = iter(assign(costs, size))
    owners = [[next(owner) for _ in item.stack] for item in work]
    computed = [_share(item, _of(rank, row)) for item, row in zip(work, owners, strict=True)]
    for own, row in zip(computed, owners, strict=True):
        yield _gathered(own, row, size)


def _of(rank: int, owners: list[int]) -> list[int]:
    return [i for i, owner in enumerate(owners) if owner == rank]


def _share(item: Work, mine: list[int]) -> Tensor:
    """The polar factors of some matrices of a stack, possibly none."""
    own = item.stack[mine]
    return polar(own, item.method, **item.options) if mine else own


def _gathered(own: Tensor, owners: list[int], size: int) -> Tensor:
    """The whole stack [b, m, n] from each rank's share of it."""
    most = max(owners.count(rank) for rank in range(size))
    sent = own.new_zeros((most, *own.shape[1:]))
    sent[: len(own)] = own
    parts = [torch.empty_like(sent) for _ in range(size)]
    # As bytes, for backends that do not know every dtype.
    dist.all_gather([part.view(torch.uint8) for part in parts], sent.view(torch.uint8))
    whole = own.new_empty((len(owners), *own.shape[1:]))
    for rank, part in enumerate(parts):
        mine = _of(rank, owners)
        whole[mine] = part[: len(mine)]
    return whole
