"""On a terminal sentences break between words at its width and commands stay whole; piped, they stay one line."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from hypothesis import given
from hypothesis import strategies as st

from muonlab.cli import main
from muonlab.cli.terminal import fit
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import declared_slugs

PROJECT = Path(__file__).parents[2]
REFUSED = ["-m", "muonlab.cli", "study", "show", "001-nolah"]
WORDS = st.lists(st.text("abc-/.", min_size=1, max_size=12), min_size=1, max_size=30)


@given(words=WORDS, indent=st.integers(0, 6), width=st.integers(30, 100))
def test_lines_keep_within_the_width_and_hold_every_word(words: list[str], indent: int, width: int) -> None:
    line = " " * indent + " ".join(words)
    lines = fit(line, width).split("\n")
    assert all(len(one) <= width for one in lines)
    assert " ".join(lines).split() == words
    assert [len(one) - len(one.lstrip()) for one in lines] == [indent] + [indent + 2] * (len(lines) - 1)


def test_a_command_stays_on_one_line() -> None:
    command = "`muon study run 010-smoke-350m --workload tiny`"
    for width in range(20, 100):
        assert command in fit(f"nothing of it has been prepared or run here yet; {command} does both.", width)


def on_terminal(columns: int) -> list[str]:
    """What a refusal is printed as where standard error is a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with open(ours, "rb", buffering=0) as read, open(theirs, "wb", buffering=0) as write:
        done = subprocess.run(
            [sys.executable, *REFUSED],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=write,
            check=False,
        )
        assert done.returncode == 2
        return read.read(10_000).decode().splitlines()


def test_a_refusal_fits_the_terminal_and_is_one_line_in_a_pipe() -> None:
    lines = on_terminal(60)
    assert len(lines) > 1
    assert max(map(len, lines)) <= 60
    piped = subprocess.run([sys.executable, *REFUSED], cwd=PROJECT, capture_output=True, text=True, check=False).stderr
    assert piped.count("\n") == 1
    assert piped.split() == " ".join(lines).split()


COMPLETED = ["study show", "study run", "study select", "next", "report", "archive nolah --study"]


@pytest.mark.parametrize("command", COMPLETED)
def test_the_names_of_studies_complete(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    found = ShellComplete(main, {}, "muon", "_MUON_COMPLETE").get_completions(command.split(), "00")
    declared = [slug for slug in declared_slugs(Layout.find()) if slug.startswith("00")]
    assert [item.value for item in found] == declared
    assert len(declared) > 1


def test_no_study_completes_outside_of_a_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert ShellComplete(main, {}, "muon", "_MUON_COMPLETE").get_completions(["study", "show"], "") == []
