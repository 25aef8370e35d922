"""The short form of `make chaos`: three kills of a study of two arms and two seeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_three_kills_change_no_verdict_no_weight_and_no_result() -> None:
    program = [sys.executable, str(Path(__file__).with_name("chaos.py"))]
    done = subprocess.run(
        [*program, "--kills", "3", "--seed", "1", "--arms", "2", "--seeds", "2", "--steps", "150", "--wait", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same verdicts, weights and results as undisturbed" in done.stdout
