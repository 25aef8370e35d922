"""`muon study`: list, show, plan, register, run and create studies."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

from muonlab.cli.group import Group
from muonlab.cli.options import (
    FiniteRange,
    json_option,
    say,
    slug_of,
    studies,
    study_argument,
    workload_option,
)
from muonlab.cli.remote import run_on
from muonlab.cli.terminal import note, tell
from muonlab.cli.where import (
    RAY,
    address_option,
    check_place,
    gpus_per_cell_option,
    on_option,
    place_of,
    schedule_options,
    scheduler,
)
from muonlab.pipeline.gpus import default_jobs

override_option = click.option(
    "--override", is_flag=True, help="Start against a closed gate; the registration and the report say so."
)
jobs_option = click.option(
    "-j",
    "--jobs",
    show_default="one a GPU; 2 without a GPU",
    type=click.IntRange(1),
    help="Cells trained side by side; several on one GPU share its speed, and each is charged as if alone.",
)
max_cost_option = click.option(
    "--max-cost", type=FiniteRange(0, min_open=True), help="Stop before these dollars are exceeded."
)


@click.group(cls=Group)
def study() -> None:
    """List, show, plan, register, run, select and create studies (experiments/<study>/study.yaml)."""


@study.command("list")
@json_option
def study_list(as_json: bool) -> None:
    """List the declared studies and the outcome of each one's last report."""
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.studies import list_studies

    say(list_studies(Layout.find()), as_json)


@study.command("show")
@study_argument
@workload_option
@json_option
def study_show(slug: str | None, twin: str | None, as_json: bool) -> None:
    """Show what a study declares, in words: question, arms, seeds, rule, price, registration.

    STUDY is the study's folder under experiments/; by default, the one that params.yaml names. The arms are shown as
    the last commit's params.yaml configures them, as a registration holds them. Reads files only.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.studies import show_study

    layout = Layout.find()
    say(show_study(layout, slug_of(layout, slug, twin)), as_json)


@study.command("plan")
@study_argument
@jobs_option
@max_cost_option
@schedule_options
@workload_option
@json_option
def study_plan(
    slug: str | None, jobs: int | None, max_cost: float | None, twin: str | None, as_json: bool, **of_ray: Any
) -> None:
    """Say what a run of the study would train and restore, how long and for how much, and do nothing.

    The same as `muon study run --dry-run`: cells by their state, seconds, GPU hours and dollars to expect from finished
    cells of the same workload, against the budget and --max-cost. Exits with 4 where these do not suffice.

    --on ray --gpus G adds the schedule on a cluster: when the last cell ends, what stands idle until then, and the rent
    of all G GPUs. Connects to nothing.
    """
    _plan(slug, twin, jobs, max_cost, as_json, of_ray=of_ray)


def _plan(
    slug: str | None,
    twin: str | None,
    jobs: int | None,
    max_cost: float | None,
    as_json: bool,
    only: tuple[str, ...] = (),
    of_ray: dict[str, Any] | None = None,
) -> NoReturn:
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.plan import make_plan

    layout = Layout.find()
    schedule = scheduler(**of_ray or {})
    made = make_plan(layout, slug_of(layout, slug, twin), jobs=jobs or default_jobs(), max_cost_usd=max_cost, only=only)
    plan = schedule(made)
    say(plan, as_json)
    sys.exit(plan.exit_code)


@study.command("run")
@study_argument
@jobs_option
@max_cost_option
@click.option("--dry-run", is_flag=True, help="Say what would be done, as `muon study plan` does, and do nothing.")
@click.option("--fail-on-no-go", is_flag=True, help="Exit with 1 when a challenger is NO_GO.")
@click.option(
    "--until-decided", is_flag=True, help="Add the next seeds that are worth their price, and run until a verdict."
)
@override_option
@click.option(
    "--only", multiple=True, metavar="PATTERN", help="Train only these cells, as in 'muon-*'; may be given again."
)
@on_option
@address_option
@gpus_per_cell_option
@workload_option
@json_option
def study_run(
    slug: str | None,
    jobs: int | None,
    max_cost: float | None,
    dry_run: bool,
    fail_on_no_go: bool,
    until_decided: bool,
    override: bool,
    only: tuple[str, ...],
    on: str | None,
    address: str | None,
    gpus_per_cell: int | None,
    twin: str | None,
    as_json: bool,
) -> None:
    """Run a study to its report, training only what is missing.

    STUDY is the study's folder under experiments/; by default, the one that params.yaml names. Interrupted, it goes
    on where it was; run again when all is done, it trains nothing and says so. A study whose gate is closed (what it
    requires of other studies, and that none of its arms is archived) is refused before its first run (--override).

    --until-decided goes on where a sequential plan is INCONCLUSIVE: it adds to study.yaml the seeds that `muon next`
    asks for, runs them and looks again, until every challenger has a verdict, the plan has all its pairs, or the budget
    or --max-cost (of all looks together) does not pay for the next pairs. The rule may be looked at after every pair,
    and adding seeds is part of the plan, so that the registration stays.

    --only trains the cells of these names (`<arm>-<seed>`, shell patterns) and leaves the others to be trained
    elsewhere: it exits with 3 and names what is missing, until all are in place or in DVC's run cache.

    --on NAME sends the last commit to a machine of `muon remote`, sets it up, runs the study there in a process that
    outlives the connection, follows it, and brings home ledger, reports and outputs. Given again, it follows the same
    run. --max-cost then counts the machine's own price, too, from the start of its set-up.

    --on ray trains on every node of a Ray cluster that has the GPUs for a cell (--gpus-per-cell; -j does not count
    there), from the commit that is checked out, and takes the results over here. A cell whose worker or node dies is
    tried again; killed, this command finds what still runs when it is started again. See docs/cluster.md.
    """
    from contextlib import ExitStack, closing

    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.parts import chosen_cells
    from muonlab.pipeline.progress import PoolWatcher
    from muonlab.pipeline.resolve import load_study
    from muonlab.pipeline.studies import StudyRun, run_answer, tuning_answer
    from muonlab.pipeline.study_run import RunOutcome, begin, only_driver, run_study
    from muonlab.pipeline.tuning import run_tuning
    from muonlab.pipeline.until_decided import decided_answer, once, refuse_undecidable, run_until_decided

    if dry_run:
        _plan(slug, twin, jobs, max_cost, as_json, only)
    if on is not None and on != RAY:
        check_place(None, address=address, gpus_per_cell=gpus_per_cell)
        if until_decided:
            raise click.UsageError("--until-decided edits study.yaml as it goes on; it does not go with --on.")
        run_on(
            on, slug, twin, jobs=jobs, max_cost=max_cost, fail_on_no_go=fail_on_no_go, override=override, only=only,
            as_json=as_json,
        )  # fmt: skip
    jobs = jobs or default_jobs()
    layout = Layout.find()
    slug = slug_of(layout, slug, twin)
    declared = load_study(layout, slug)
    chosen_cells(declared, only)  # a wrong pattern is refused before anything is prepared
    if until_decided:
        refuse_undecidable(declared)

    def watch(steps: int, cells: int) -> Any:
        return PoolWatcher(slug, steps, cells)

    try:
        with ExitStack() as held:
            place = held.enter_context(
                closing(
                    place_of(layout, declared, on=on, jobs=jobs, address=address, gpus_per_cell=gpus_per_cell, say=note)
                )
            )
            if declared.provenance == "run":
                begin(layout, slug, override=override)
                held.enter_context(only_driver(layout, slug))
            if declared.kind == "tuning":
                code = run_tuning(layout, slug, place=place, watch=watch, say=note, max_cost_usd=max_cost)
            elif until_decided:
                note_once = once(note)

                def run(limit: float | None) -> RunOutcome:
                    return run_study(
                        layout, slug, place=place, watch=watch, say=note_once, max_cost_usd=limit, only=only
                    )

                looked = run_until_decided(layout, slug, run, say=note, max_cost_usd=max_cost)
                answer: StudyRun = decided_answer(layout, slug, looked, fail_on_no_go=fail_on_no_go)
            else:
                outcome = run_study(layout, slug, place=place, watch=watch, say=note, max_cost_usd=max_cost, only=only)
                answer = run_answer(layout, slug, outcome, fail_on_no_go=fail_on_no_go)
    except KeyboardInterrupt:
        again = f"muon study run {slug}{' --until-decided' if until_decided else ''}"
        note(f"muon: interrupted; `{again}` goes on from here.")
        sys.exit(130)
    if declared.kind == "tuning":
        say(tuning_answer(layout, slug, code), as_json)
        sys.exit(code)
    for sentence in answer.warnings():
        note(sentence)
    say(answer, as_json)
    sys.exit(answer.exit_code)


@study.command("status")
@study_argument
@workload_option
@json_option
def study_status(slug: str | None, twin: str | None, as_json: bool) -> None:
    """Show every cell of a study: its state, loss, seconds and dollars.

    Looks at all the evidence again (ledger, git history, scratch, outputs); exits with 3 when the grid is
    incomplete and with 5 when the evidence contradicts itself.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.studies import status_of

    layout = Layout.find()
    status = status_of(layout, slug_of(layout, slug, twin))
    for sentence in status.warnings():
        note(sentence)
    say(status, as_json)
    sys.exit(status.exit_code)


@study.command("register")
@study_argument
@override_option
@workload_option
def study_register(slug: str | None, override: bool, twin: str | None) -> None:
    """Hash a study's declaration into its registration.json, before the first result.

    The first run does it too; do it earlier to commit what was declared. Refused once results exist under another
    declaration: the first one stays, and a changed plan counts as amended. Refused, too, while another study that this
    one requires has not come to what is asked (--override).
    """
    from muonlab.pipeline.declare import register_now
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.study_run import check

    layout = Layout.find()
    params, declared = check(layout, slug_of(layout, slug, twin))
    registration, new = register_now(layout, params, declared, override=override)
    click.echo(registration.registration)
    click.echo(f"experiments/{declared.slug}/registration.json")
    if new:
        note("muon: registered; commit the file, so that its history is kept.")
    else:
        note(f"muon: registered since {registration.registered_at}; nothing was changed.")


@study.command("select")
@click.argument("slug", shell_complete=studies)
@json_option
def study_select(slug: str, as_json: bool) -> None:
    """Write the challenger that another study's results pick into the study that confirms it on new seeds.

    SLUG declares that study as `selected_from`. Its challenger with the lowest mean final loss goes into `challengers`
    of SLUG's study.yaml. Refused while a declared run of it has no outcome, and once SLUG has results.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.selecting import select_challenger

    say(select_challenger(Layout.find(), slug), as_json)


@study.command("new")
@click.argument("slug")
@click.option("--kind", type=click.Choice(["comparison", "tuning"]), default="comparison", show_default=True)
@click.option("--baseline", required=True, help="An optimizer of params.yaml.")
@click.option("--challenger", "challengers", multiple=True, help="Another; may be given again.")
@click.option("--question", required=True, help="What the study is to answer, as a sentence.")
@click.option("--min-effect", help="Of a comparison: smallest improvement worth having, 0.5% or an absolute loss.")
@click.option("--tuning", default="untuned", show_default=True, help="Of a comparison: the study that tuned its arms.")
@click.option("--grid", multiple=True, metavar="OPTION=VALUE,...", help="Of a tuning: values to try; again for others.")
@click.option("--workload", default="tiny", show_default=True)
@click.option(
    "--seeds", type=click.IntRange(1), help="Number of seeds; 5 from 0 by default, of a tuning study 2 from 1000."
)
@click.option("--price", default=0.0, type=FiniteRange(0), show_default=True, help="Dollars a GPU hour.")
@click.option("--budget", default=0.0, type=FiniteRange(0), show_default=True, help="Dollars.")
def study_new(slug: str, **declared: Any) -> None:
    """Declare a new study in experiments/SLUG: study.yaml, its grid and a README to fill in.

    A comparison decides whether its challengers beat its baseline. A tuning study (--kind tuning) gives every one of
    these arms the same grid of options and the same seeds, and writes what was best for each into params.yaml:

    muon study new 902-tune --kind tuning --baseline muon --challenger mine --grid lr=0.005,0.01,0.02 --question "..."
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.new_study import new_study

    folder = new_study(Layout.find(), slug, **declared)
    tell(f"{folder}: edit study.yaml and README.md, commit them, then `muon study run {slug}`.")
