"""The process that makes an attempt, seen from outside: whether it lives, and what it uses.

    cpu     = (user + system seconds since the last reading) / (seconds since then), in % of one core
    memory  = resident set, in 10^6 bytes

Training knows nothing of this: the reading costs it nothing and may fail without harm. Source: psutil, from /proc.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil

CLOCK_S = 60.0
"""The clock may have been set by so much since the machine started; a process number comes back much later."""
FROM_S = 60.0
"""Shorter attempts have no readings: a handful of points says nothing."""
EVERY_S = 15.0


def lives(start: dict[str, Any]) -> bool:
    """Whether the process of an attempt that began so (`start.json`) still runs on this machine."""
    return _process(start) is not None


def _process(start: dict[str, Any]) -> psutil.Process | None:
    try:
        process = psutil.Process(start["pid"])
        # A number is given again: a process that began later than the attempt is another one.
        same = process.create_time() <= _began(start) + CLOCK_S
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _began(start: dict[str, Any]) -> float:
    return datetime.fromisoformat(start["record"]["started_at"]).timestamp()


class _Reading(NamedTuple):
    at: float
    cpu_seconds: float


class Sampler:
    """Reads the processes of running attempts into `system.jsonl` beside their curves, every `every_s` seconds."""

    def __init__(self, from_s: float = FROM_S, every_s: float = EVERY_S) -> None:
        self.from_s, self.every_s = from_s, every_s
        self._last: dict[Path, _Reading] = {}

    def sample(self, attempts: Iterable[tuple[Path, dict[str, Any]]]) -> None:
        """Read the process of every attempt whose reading is due; `attempts` are folders and their `start.json`."""
        for folder, start in attempts:
            process = _process(start)
            before, now = self._last.get(folder), time.time()
            seconds = now - _began(start)
            # One reading interval before the first point begins the first interval.
            if process is None or seconds < self.from_s - self.every_s or (before and now - before.at < self.every_s):
                continue
            try:
                times, memory = process.cpu_times(), process.memory_info().rss
            except psutil.Error:
                continue  # it has just ended, or is another person's
            self._last[folder] = reading = _Reading(now, times.user + times.system)
            if before and seconds >= self.from_s and not self._another_samples(folder / "system.jsonl", now):
                share = (reading.cpu_seconds - before.cpu_seconds) / (reading.at - before.at)
                row = {
                    "seconds": round(seconds, 3),
                    "process_cpu_percent": round(100 * share, 1),
                    "process_memory_megabytes": round(memory / 1e6, 1),
                }
                with (folder / "system.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")

    def _another_samples(self, path: Path, now: float) -> bool:
        """Whether the last line is fresher than one of this process could be: two studies have a follower each."""
        return path.exists() and now - path.stat().st_mtime < 0.9 * self.every_s
