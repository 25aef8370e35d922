"""`muon report`: the report of a study, of what there is now."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from muonlab.cli.options import slug_of, study_argument, workload_option
from muonlab.cli.terminal import note
from muonlab.registry.errors import UsageError

if TYPE_CHECKING:
    from muonlab.reporting.standing import Standing


@click.command()
@study_argument
@click.option("--open", "in_browser", is_flag=True, help="Open the report in the browser.")
@click.option("--json", "as_json", is_flag=True, help="Print verdicts and effects as one JSON object on stdout.")
@click.option("--watch", is_flag=True, help="Follow the study while it runs, with a partial report and no verdict.")
@workload_option
def report(slug: str | None, in_browser: bool, as_json: bool, watch: bool, twin: str | None) -> None:
    """Make the report of a study from the ledger and the runs there are, and print its path.

    STUDY is the study's folder under experiments/; by default, the one that params.yaml names. Looks at all the
    evidence again and trains nothing: of a study that is not finished the report says what is missing. Exits with 3
    when runs are missing or failed, 5 when the evidence contradicts itself.

    --json prints the content of verdict.json and, as `effects`, every arm's estimates against the baseline.

    Of a tuning study it reports losses by option and what was chosen, from results.csv where the ledger has none of its
    runs, and leaves params.yaml alone; --json prints tuning.json.

    --watch renders reports/STUDY/partial.html whenever a run of the study ended, and every ten seconds, until the
    study is concluded; start it beside `muon study run`, end it with Ctrl-C.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.resolve import load_study
    from muonlab.pipeline.tuning import report_tuning, tuning_exit_code
    from muonlab.pipeline.watch import report_now, watch_study
    from muonlab.reporting.standing import exit_code

    if watch and as_json:
        raise UsageError("--watch, --json: a partial report has no verdict to print; give one of the two.")
    layout = Layout.find()
    slug = slug_of(layout, slug, twin)
    page = layout.reports(slug) / "report.html"
    if not watch and load_study(layout, slug).kind == "tuning":
        tuned = report_tuning(layout, slug)
        content = (layout.reports(slug) / "tuning.json").read_text(encoding="utf-8")
        click.echo(content if as_json else _shown(page), nl=not as_json)
        if in_browser:
            _open(page)
        sys.exit(tuning_exit_code(tuned))
    if watch:
        try:
            standing = watch_study(layout, slug, say=_note, on_first=_open if in_browser else lambda path: None)
        except KeyboardInterrupt:
            _note(f"the watch is over, and what runs goes on; `muon report {slug}` reports what there is.")
            sys.exit(130)
    else:
        standing = report_now(layout, slug)
    if as_json:
        click.echo(_spell(layout.reports(slug), standing))
    else:
        click.echo(_shown(page))
    if in_browser:
        _open(page)
    sys.exit(exit_code(standing))


def _spell(folder: Path, standing: Standing) -> str:
    import json

    content = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    content["effects"] = {
        c.arm: {"role": c.role, **json.loads(c.estimates.model_dump_json())} for c in standing.comparisons
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _shown(path: Path) -> str:
    """The path from where the command was given, for a shell to go on with."""
    return os.path.relpath(path)


def _note(text: str) -> None:
    note(f"muon: {text}")


def _open(path: Path) -> None:
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        _note(f"no browser was found; open {_shown(path)} in one.")
