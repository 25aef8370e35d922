"""Sentences on a terminal: broken between words at its width, further lines indented. Piped, a sentence is one line.

What stands between backquotes is kept on one line, so that a command can be copied.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import TextIO

import click

GLUE = "\N{NO-BREAK SPACE}"
HANGING = 2
"""Columns by which further lines of a sentence are indented."""


def tell(text: str) -> None:
    """Print lines on standard output."""
    click.echo(_fitted(text, sys.stdout))


def note(text: str) -> None:
    """Print lines on standard error."""
    click.echo(_fitted(text, sys.stderr), err=True)


def _fitted(text: str, stream: TextIO) -> str:
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size(os.get_terminal_size(stream.fileno())).columns
    return "\n".join(fit(line, width) for line in text.split("\n")) if width > 0 else text


def fit(line: str, width: int) -> str:
    """A line as several of at most `width` columns, but for a word or a command that is longer."""
    if len(line) <= width:
        return line
    # Every second part stands between backquotes.
    parts = line.split("`")
    parts[1::2] = [part.replace(" ", GLUE) for part in parts[1::2]]
    indent = " " * (len(line) - len(line.lstrip()) + HANGING)
    return textwrap.fill(
        "`".join(parts), width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ).replace(GLUE, " ")
