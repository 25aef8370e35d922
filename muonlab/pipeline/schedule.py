"""When the cells of a study would run on G GPUs, K a cell: list scheduling, as the driver of a cluster does it.

    slots     S = floor(G / K), as on nodes whose numbers of GPUs are multiples of K
    a cell    goes, in the order of the study, to the slot that is free first, and holds it for
              start_s (the first cell of a slot) or between_s (every later one) + its own seconds
    makespan  the end of the last cell
    idle      G * makespan - K * (sum of the cells' own seconds)          [GPU seconds]

The driver gives the next cell to whichever slot ends first, so that with true times this is its schedule. Order matters
little where cells are alike; the bound of Graham (1969, doi:10.1137/0117039) is makespan <= (2 - 1/S) * the best one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Times in seconds from the first start."""

    slots: int
    """Cells side by side; as many as there are cells at most."""
    ends: tuple[float, ...]
    """Of each cell, in the order of the study."""
    makespan_s: float
    busy_gpu_s: float
    idle_gpu_s: float
    """GPUs that nothing trains on until the last cell ends, those among them that no cell ever needs."""


def simulate(
    cell_seconds: Sequence[float], *, gpus: int, gpus_per_cell: int, start_s: float = 0.0, between_s: float = 0.0
) -> Schedule:
    """The schedule of cells that take so many seconds each. Raises ValueError where no cell fits."""
    if gpus < gpus_per_cell:
        raise ValueError(f"{gpus} GPUs do not hold a cell of {gpus_per_cell}")
    slots = min(gpus // gpus_per_cell, max(1, len(cell_seconds)))
    free = [(0.0, slot) for slot in range(slots)]
    fresh = set(range(slots))
    ends = []
    for seconds in cell_seconds:
        at, slot = heapq.heappop(free)
        end = at + (start_s if slot in fresh else between_s) + seconds
        fresh.discard(slot)
        ends.append(end)
        heapq.heappush(free, (end, slot))
    makespan = max(ends, default=0.0)
    busy = gpus_per_cell * math.fsum(cell_seconds)
    return Schedule(slots, tuple(ends), makespan, busy, gpus * makespan - busy)
