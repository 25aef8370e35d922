"""Simulated t* in a JSON file, so that the next process need not simulate them again.

A mapping for the `cache` of `stats.threshold.t_star`, which checks each value that it takes from it against the bounds
that any t* obeys. The file is no evidence: it may be deleted at any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

from muonlab.registry.files import write_atomically


class ThresholdCache(MutableMapping[str, float]):
    """A dict of numbers in a JSON file, read once, written at each change; an unreadable one counts as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = _read(path)

    def __getitem__(self, key: str) -> float:
        return self._values[key]

    def __setitem__(self, key: str, value: float) -> None:
        # Another process may have added its own meanwhile.
        self._values = {**_read(self._path), **self._values, key: value}
        self._write()

    def __delitem__(self, key: str) -> None:
        del self._values[key]
        self._write()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _write(self) -> None:
        text = json.dumps(self._values, indent=1, sort_keys=True) + "\n"
        # Where nothing can be written, the next process simulates again.
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, text, durable=False)


def _read(path: Path) -> dict[str, float]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        {key: float(value) for key, value in held.items() if isinstance(value, int | float)}
        if isinstance(held, dict)
        else {}
    )
