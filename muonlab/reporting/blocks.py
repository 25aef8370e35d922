"""The blocks that a report is built of, and how foreign or plentiful text is made fit for them. All text is plain."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "prose", "number", "code", "arm"]


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences, under a name where it needs one."""

    sentences: tuple[str, ...]
    title: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of plain cells; an `arm` column shows the arm's colour where there is colour."""

    columns: tuple[tuple[str, Kind], ...]
    rows: tuple[tuple[str, ...], ...]
    collapsed: bool = False
    """Long, and read by few: it may be folded where there is something to fold it with."""
    strong: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the cells that stand out."""


@dataclass(frozen=True)
class Pictures:
    """Figures by name; two stand side by side where there is room."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Samples:
    """(who wrote it, text): line breaks kept, nothing in it active."""

    written: tuple[tuple[str, str], ...]


Block = Paragraph | Bullets | Table | Pictures | Samples


@dataclass(frozen=True)
class Section:
    """A titled part of the report."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """The whole report."""

    slug: str
    question: str
    headline: str
    lead: tuple[str, ...]
    """What to quote, what to do next, how things stand."""
    warnings: tuple[str, ...]
    """What must be known before the verdict is read."""
    cell: Table | None
    sections: tuple[Section, ...]
    partial: bool = False
    """Made while the study runs: no verdict, no decision, no advice."""


def visible(text: str) -> str:
    """Foreign text with what would act on a reader's screen spelled out: control and format characters.

    Line breaks stay, a tab becomes spaces; U+202E becomes `\\u202e`.
    """

    def shown(character: str) -> str:
        if character == "\n":
            return character
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
            code = ord(character)
            return f"\\u{code:04x}" if code > 0xFF else f"\\x{code:02x}"
        return character

    unified = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(map(shown, unified))


def one_line(text: str) -> str:
    """Foreign text as a single line."""
    return " ".join(visible(text).split())


MOST_ROWS = 40
"""A table of one row a run, or a quantity, is folded beyond."""

MOST_ALIKE = 6
SHOWN_ALIKE = 3


def shortened(sentences: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The sentences on one line each; of more than six alike but for numbers, hashes and these names, the first three.

    How many are left out is said in their place, so that hundreds of findings of one kind stay readable.
    """
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))

    def kind(sentence: str) -> str:
        return re.sub(rf"\b(?:{known})\b|[0-9a-f]{{12,}}|\d+", "#", sentence)

    kinds = [kind(sentence) for sentence in sentences]
    counts = {k: kinds.count(k) for k in kinds}
    seen: dict[str, int] = {}
    shown = []
    for sentence, of_kind in zip(sentences, kinds, strict=True):
        seen[of_kind] = number = seen.get(of_kind, 0) + 1
        if counts[of_kind] <= MOST_ALIKE or number <= SHOWN_ALIKE:
            shown.append(one_line(sentence))
        elif number == SHOWN_ALIKE + 1:
            shown.append(f"and {counts[of_kind] - SHOWN_ALIKE} more of this kind; `stats.json` holds them all")
    return tuple(shown)
