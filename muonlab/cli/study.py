"""`muon study`: list, show, plan, register, run and create studies."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

from muonlab.cli.group import Group
from muonlab.cli.options import json_option, say

jobs_option = click.option(
    "-j", "--jobs", default=2, show_default=True, type=click.IntRange(1), help="Cells trained side by side."
)
max_cost_option = click.option(
    "--max-cost", type=click.FloatRange(0, min_open=True), help="Stop before these dollars are exceeded."
)


@click.group(cls=Group)
def study() -> None:
    """List, show, plan, register, run and create studies (experiments/<study>/study.yaml)."""


@study.command("list")
@json_option
def study_list(as_json: bool) -> None:
    """List the declared studies and the outcome of each one's last report."""
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.studies import list_studies

    say(list_studies(Layout.find()), as_json)


@study.command("show")
@click.argument("slug", required=False)
@json_option
def study_show(slug: str | None, as_json: bool) -> None:
    """Show what a study declares, in words: question, arms, seeds, rule, price, registration.

    SLUG is the study's folder under experiments/; by default, the one that params.yaml names. The arms are shown as
    the last commit's params.yaml configures them, as a registration holds them. Reads files only.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.resolve import load_params
    from muonlab.pipeline.studies import show_study

    layout = Layout.find()
    say(show_study(layout, slug or load_params(layout.params).study), as_json)


@study.command("plan")
@click.argument("slug", required=False)
@jobs_option
@max_cost_option
@json_option
def study_plan(slug: str | None, jobs: int, max_cost: float | None, as_json: bool) -> None:
    """Say what a run of the study would train and restore, how long and for how much, and do nothing.

    The same as `muon study run --dry-run`: cells by their state, seconds, GPU hours and dollars to expect from finished
    cells of the same workload, against the budget and --max-cost. Exits with 4 where these do not suffice.
    """
    _plan(slug, jobs, max_cost, as_json)


def _plan(slug: str | None, jobs: int, max_cost: float | None, as_json: bool) -> NoReturn:
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.plan import make_plan
    from muonlab.pipeline.resolve import load_params

    layout = Layout.find()
    plan = make_plan(layout, slug or load_params(layout.params).study, jobs=jobs, max_cost_usd=max_cost)
    say(plan, as_json)
    sys.exit(plan.exit_code)


@study.command("run")
@click.argument("slug", required=False)
@jobs_option
@max_cost_option
@click.option("--dry-run", is_flag=True, help="Say what would be done, as `muon study plan` does, and do nothing.")
@click.option("--fail-on-no-go", is_flag=True, help="Exit with 1 when a challenger is NO_GO.")
@json_option
def study_run(
    slug: str | None, jobs: int, max_cost: float | None, dry_run: bool, fail_on_no_go: bool, as_json: bool
) -> None:
    """Run a study to its report, training only what is missing.

    SLUG is the study's folder under experiments/; by default, the one that params.yaml names. Interrupted, it goes
    on where it was; run again when all is done, it trains nothing and says so.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.progress import PoolWatcher
    from muonlab.pipeline.resolve import load_params, load_study
    from muonlab.pipeline.studies import run_answer, tuning_answer
    from muonlab.pipeline.study_run import run_study
    from muonlab.pipeline.tuning import run_tuning

    if dry_run:
        _plan(slug, jobs, max_cost, as_json)
    layout = Layout.find()
    slug = slug or load_params(layout.params).study
    declared = load_study(layout, slug)

    def watch(steps: int, cells: int) -> Any:
        return PoolWatcher(slug, steps, cells)

    def note(text: str) -> None:
        click.echo(text, err=True)

    try:
        if declared.kind == "tuning":
            code = run_tuning(layout, slug, workers=jobs, watch=watch, say=note, max_cost_usd=max_cost)
            say(tuning_answer(layout, slug, code), as_json)
            sys.exit(code)
        outcome = run_study(layout, slug, workers=jobs, watch=watch, say=note, max_cost_usd=max_cost)
    except KeyboardInterrupt:
        click.echo(f"muon: interrupted; `muon study run {slug}` goes on from here.", err=True)
        sys.exit(130)
    answer = run_answer(layout, slug, outcome, fail_on_no_go=fail_on_no_go)
    for sentence in answer.warnings():
        note(sentence)
    say(answer, as_json)
    sys.exit(answer.exit_code)


@study.command("status")
@click.argument("slug", required=False)
@json_option
def study_status(slug: str | None, as_json: bool) -> None:
    """Show every cell of a study: its state, loss, seconds and dollars.

    Looks at all the evidence again (ledger, git history, scratch, outputs); exits with 3 when the grid is
    incomplete and with 5 when the evidence contradicts itself.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.resolve import load_params
    from muonlab.pipeline.studies import status_of

    layout = Layout.find()
    status = status_of(layout, slug or load_params(layout.params).study)
    for sentence in status.warnings():
        click.echo(sentence, err=True)
    say(status, as_json)
    sys.exit(status.exit_code)


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
