"""`muon study`: list, check, register, run and create studies."""

from __future__ import annotations

import sys
from typing import Any

import click

from muonlab.cli.group import Group


@click.group(cls=Group)
def study() -> None:
    """List, check, register, run and create studies (experiments/<study>/study.yaml)."""


@study.command("list")
def study_list() -> None:
    """List the declared studies and where they stand."""
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.overview import study_rows

    for row in study_rows(Layout.find()):
        click.echo(row)


@study.command("run")
@click.argument("slug", required=False)
@click.option("-j", "--jobs", default=2, show_default=True, type=click.IntRange(1), help="Cells trained side by side.")
@click.option("--max-cost", type=click.FloatRange(0, min_open=True), help="Stop before these dollars are exceeded.")
@click.option("--fail-on-no-go", is_flag=True, help="Exit with 1 when a challenger is NO_GO.")
def study_run(slug: str | None, jobs: int, max_cost: float | None, fail_on_no_go: bool) -> None:
    """Run a study to its report, training only what is missing.

    SLUG is the study's folder under experiments/; by default, the one that params.yaml names. Interrupted, it goes
    on where it was; run again when all is done, it trains nothing and says so.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.overview import say_outcome
    from muonlab.pipeline.progress import PoolWatcher
    from muonlab.pipeline.resolve import load_params, load_study
    from muonlab.pipeline.study_run import run_study
    from muonlab.pipeline.tuning import run_tuning
    from muonlab.registry.verdict import Verdict
    from muonlab.reporting.standing import exit_code

    layout = Layout.find()
    slug = slug or load_params(layout.params).study
    declared = load_study(layout, slug)

    def watch(steps: int, cells: int) -> Any:
        return PoolWatcher(slug, steps, cells)

    def say(text: str) -> None:
        click.echo(text, err=True)

    try:
        if declared.kind == "tuning":
            sys.exit(run_tuning(layout, slug, workers=jobs, watch=watch, say=say, max_cost_usd=max_cost))
        outcome = run_study(layout, slug, workers=jobs, watch=watch, say=say, max_cost_usd=max_cost)
    except KeyboardInterrupt:
        click.echo(f"muon: interrupted; `muon study run {slug}` goes on from here.", err=True)
        sys.exit(130)
    say_outcome(layout, slug, outcome)
    code = exit_code(outcome.standing)
    verdicts = {c.decision.verdict for c in outcome.standing.comparisons if c.decision is not None}
    if code == 0 and fail_on_no_go and Verdict.NO_GO in verdicts:
        code = 1
    sys.exit(code)


@study.command("status")
@click.argument("slug", required=False)
def study_status(slug: str | None) -> None:
    """Show every cell of a study: its state, attempts, loss, seconds and dollars.

    Looks at all the evidence again (ledger, git history, scratch, outputs); exits with 3 when the grid is
    incomplete and with 5 when the evidence contradicts itself.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.overview import say_status
    from muonlab.pipeline.resolve import load_params

    layout = Layout.find()
    sys.exit(say_status(layout, slug or load_params(layout.params).study))


@study.command("register")
@click.argument("slug", required=False)
def study_register(slug: str | None) -> None:
    """Hash a study's declaration into its registration.json, before the first result.

    The first run does it too; do it earlier to commit what was declared. Refused once results exist under another
    declaration: the first one stays, and a changed plan counts as amended.
    """
    from muonlab.pipeline.declare import register_now
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.resolve import load_params
    from muonlab.pipeline.study_run import check

    layout = Layout.find()
    params, declared = check(layout, slug or load_params(layout.params).study)
    registration, new = register_now(layout, params, declared)
    click.echo(registration.registration)
    click.echo(f"experiments/{declared.slug}/registration.json")
    if new:
        click.echo("muon: registered; commit the file, so that its history is kept.", err=True)
    else:
        click.echo(f"muon: registered since {registration.registered_at}; nothing was changed.", err=True)


@study.command("new")
@click.argument("slug")
@click.option("--baseline", required=True, help="An optimizer of params.yaml.")
@click.option("--challenger", "challengers", multiple=True, required=True, help="One or more; may be given again.")
@click.option("--question", required=True, help="What the study is to answer, as a sentence.")
@click.option("--min-effect", required=True, help="Smallest improvement worth having: 0.5% or an absolute loss.")
@click.option("--workload", default="tiny", show_default=True)
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Number of seeds, from 0.")
@click.option("--price", default=0.0, show_default=True, help="Dollars a GPU hour.")
@click.option("--budget", default=0.0, show_default=True, help="Dollars.")
def study_new(slug: str, **declared: Any) -> None:
    """Declare a new study in experiments/SLUG: study.yaml, its grid and a README to fill in."""
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.new_study import new_study

    folder = new_study(Layout.find(), slug, **declared)
    click.echo(f"{folder}: edit study.yaml and README.md, commit them, then `muon study run {slug}`.")
