"""`muon archive`: archive an arm on the verdict of a study."""

from __future__ import annotations

import click

from muonlab.cli.options import json_option, say, studies


@click.command()
@click.argument("arm")
@click.option(
    "--study",
    "slug",
    required=True,
    shell_complete=studies,
    help="The study whose verdict it is, a folder under experiments/.",
)
@json_option
def archive(arm: str, slug: str, as_json: bool) -> None:
    """Archive an optimizer on a study's NO_GO or EQUIVALENT, and say what that unlocks.

    ARM is a challenger of the study. Its verdict is made anew from all the evidence and must be that of the last
    report; any other is refused with 2. The entry goes to experiments/archived.json (`muon commit` takes it): studies
    that use the arm ask for --override from then on, and those that require the archiving may start. `git revert` of
    the commit takes it back.
    """
    from muonlab.pipeline.archive import archive_arm
    from muonlab.pipeline.layout import Layout

    say(archive_arm(Layout.find(), arm, slug), as_json)
