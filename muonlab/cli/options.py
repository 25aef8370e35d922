"""What several commands read from their options, each refusal naming its option."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from muonlab.registry.errors import UsageError

if TYPE_CHECKING:
    from muonlab.analysis.threshold_cache import ThresholdCache


def size(option: str, text: str) -> tuple[float, str]:
    """A positive size as (number, `percent` or `nats`), from `0.5%` or an absolute loss."""
    from muonlab.registry.study import percent_or_number

    try:
        number: object = float(text)
    except ValueError:
        number = text
    try:
        checked = percent_or_number(number)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
    if isinstance(checked, str):
        return float(checked.rstrip("%")), "percent"
    assert isinstance(checked, float)
    return checked, "nats"


def columns(pairs: tuple[str, ...]) -> dict[str, str]:
    """Our column -> the file's, from the values of --column."""
    found: dict[str, str] = {}
    for text in pairs:
        ours, separator, theirs = text.partition("=")
        if not (ours and separator and theirs):
            raise UsageError(f"--column: found {text!r}; it should be OURS=THEIRS, such as loss=val/loss.")
        if ours in found:
            raise UsageError(f"--column: {ours!r} is named twice, as {found[ours]!r} and as {theirs!r}; keep one.")
        found[ours] = theirs
    return found


def t_star_cache() -> ThresholdCache:
    """The user's t* from earlier commands. A study's own verdict never reads it: a file is easily edited."""
    from muonlab.analysis.threshold_cache import ThresholdCache

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return ThresholdCache(Path(home) / "muonlab" / "t_star.json")
