"""`muon verify`: train a recorded run again and compare."""

from __future__ import annotations

import sys

import click

from muonlab.cli.options import json_option, say


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--steps", type=click.IntRange(1), help="Only the first steps, up to the last measured one of these.")
@json_option
def verify(run: str, steps: int | None, as_json: bool) -> None:
    """Train a recorded run again, in a temporary folder, and compare it with its record.

    RUN is `<arm>-<seed>` of the study that params.yaml names, or `<study>/<arm>-<seed>`. In the environment of the
    record (libraries, kind of machine) curve, loss and weights must be the same bit for bit, where the record says of
    itself that it repeats so; elsewhere, and for runs on CUDA or by several processes, the losses must agree within 1%.
    Exits with 5 where they do not. It is no attempt: nothing is recorded.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.verify import verify as retrain

    found = retrain(Layout.find(), run, steps=steps)
    say(found, as_json)
    sys.exit(found.exit_code)
