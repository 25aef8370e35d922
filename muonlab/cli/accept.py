"""`muon accept`: carry recorded runs over to code that computes the same."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from muonlab.cli.options import json_option, say, slug_of, study_argument, workload_option
from muonlab.cli.terminal import note
from muonlab.registry.errors import UsageError

if TYPE_CHECKING:
    from muonlab.pipeline.accept import Steps


@click.command()
@study_argument
@click.option(
    "--steps",
    metavar="K|all",
    help="Compare the first K steps, or all, final weights included.  [default: past the warm-up, a tenth of a run]",
)
@click.option("--dry-run", is_flag=True, help="Say what would be trained again, for how much, and do nothing.")
@workload_option
@json_option
def accept(slug: str | None, steps: str | None, dry_run: bool, twin: str | None, as_json: bool) -> None:
    """Carry a study's runs over to changed code, if that computes the same bit for bit.

    For a refactoring: without it, other code makes other cells of all (a comment or a docstring does not). One recorded
    run of every arm is trained again by the code here, its first steps or all, and compared with its record: every
    number of the curve, the order of all batches, and what the recorded weights score. Where all of it is equal, the
    ledger says that the recorded runs count for the code here, on what evidence, and nothing else is trained again.
    At the first difference, however small, nothing is carried over, the ledger remembers it, and the exit code is 5.

    ONLY THE FIRST K STEPS OF ONE CELL AN ARM ARE COMPARED: a change that acts later, or in other cells, is not seen.
    The report says so. `--steps all` compares whole runs.

    Refused with 2: code that is not committed, another environment (libraries, kind of machine), other settings of an
    arm or of the workload, other data, runs by several processes, tuning studies.
    """
    from muonlab.pipeline.accept import accept as carry_over
    from muonlab.pipeline.layout import Layout

    layout = Layout.find()
    slug = slug_of(layout, slug, twin)
    asked = _steps(steps)
    command = f"muon accept {slug}" + (f" --steps {asked}" if asked is not None else "")
    found = carry_over(layout, slug, steps=asked, dry_run=dry_run, command=command, say=note)
    say(found, as_json)
    sys.exit(found.exit_code)


def _steps(text: str | None) -> Steps:
    if text is None or text == "all":
        return text  # type: ignore[return-value]
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UsageError(f"--steps: found {text!r}; it should be a number of steps from 1, or 'all'.")
    return int(text)
