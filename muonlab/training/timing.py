"""Where a run's wall seconds go, by part."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

PARTS = ("data", "forward", "backward", "optimizer", "measures", "evaluation", "logging", "checkpoint")
"""`optimizer`: schedule, clipping, the exchange between ranks and the step; `measures`: what a row of the curve says of
its step beside its loss, and the Hessian; `logging`: what callers do with points and progress."""


class Stopwatch:
    """Adds up seconds by part. `wait` is called at each end of a part: a device may still be at work."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._wait = wait

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's seconds as part `name`; blocks must not nest, or seconds would count twice."""
        self._wait()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[name] += time.perf_counter() - began
