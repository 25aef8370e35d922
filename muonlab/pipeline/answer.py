"""What a command answers: one frozen object, printed as sentences for people or as one JSON object for programs.

The docstrings of the fields are the documentation of the JSON keys: docs/cli.md is made from them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from pydantic import ConfigDict

from muonlab.registry.settings import Closed


class Facts(Closed):
    """A part of an answer. Keys may be added in later versions; none is renamed or removed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Answer(Facts):
    """All that a command answers."""

    @abstractmethod
    def lines(self) -> Iterator[str]:
        """The answer for a reader, line by line."""
