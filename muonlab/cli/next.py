"""`muon next`: the next pairs that are worth running, and their price."""

from __future__ import annotations

import sys

import click

from muonlab.cli.options import json_option, say, slug_of, study_argument, workload_option


@click.command("next")
@study_argument
@workload_option
@json_option
def next_(slug: str | None, twin: str | None, as_json: bool) -> None:
    """Say which pairs are worth running next, why, at what price, and with what chance of a decision.

    STUDY is the study's folder under experiments/; by default, the one that params.yaml names. Looks at all the
    evidence again. Exits with 3 when runs are missing, 4 when the pairs are over the budget, 5 when the evidence
    contradicts itself, and says what to mend.
    """
    from muonlab.pipeline.advice import advise
    from muonlab.pipeline.layout import Layout

    layout = Layout.find()
    advice = advise(layout, slug_of(layout, slug, twin))
    say(advice, as_json)
    sys.exit(advice.exit_code)
