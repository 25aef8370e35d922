"""`muon doctor` and `muon setup`: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from muonlab.cli.options import json_option, say
from muonlab.cli.remote import remote_option
from muonlab.cli.terminal import note


@click.command()
@click.option("--fix", is_flag=True, help="Run the commands that need no decision of yours, and look again.")
@remote_option
@json_option
def doctor(fix: bool, remote: str | None, as_json: bool) -> None:
    """Look at this machine and this clone: can studies run here, how fast, and what is missing?

    Python, packages, torch build, GPU, disk, git, DVC and its remote, MLflow's store, data, and the time a step of
    the tiny model takes, measured. Exits with 0 when studies can run, else with 1.
    """
    if remote is not None:
        _examine_there(remote, fix, as_json)
    _examine(fix, as_json)


@click.command()
@json_option
def setup(as_json: bool) -> None:
    """Mend what is missing, and look again: the same as `muon doctor --fix`."""
    _examine(True, as_json)


def _examine(fix: bool, as_json: bool) -> None:
    from muonlab.pipeline.doctor import examine, mend
    from muonlab.pipeline.layout import Layout

    layout = Layout.find()
    found = examine(layout)
    if fix:
        found = mend(layout, found, note)
    say(found, as_json)
    sys.exit(found.exit_code)


def _examine_there(name: str, fix: bool, as_json: bool) -> NoReturn:
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.remote.commands import doctor_there
    from muonlab.pipeline.remote.places import find_remote
    from muonlab.registry.errors import UsageError

    if fix:
        raise UsageError("--fix mends this machine; leave it out with --remote, whose next run sets up what it lacks.")
    layout = Layout.find()
    found = doctor_there(layout, find_remote(layout, name))
    say(found, as_json)
    sys.exit(found.exit_code)
