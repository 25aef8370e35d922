"""`muon remote`: machines that are rented by the hour and reached over SSH, and `--on NAME`, a run there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from muonlab.cli.group import Group
from muonlab.cli.options import FiniteRange, json_option, say
from muonlab.cli.terminal import note

remote_option = click.option("--remote", "remote", metavar="NAME", help="On this machine instead (`muon remote list`).")


@click.group(cls=Group)
def remote() -> None:
    """Name, follow and stop rented machines that are reached over SSH (docs/remote.md)."""


@remote.command("add")
@click.argument("name")
@click.argument("address", metavar="USER@HOST")
@click.option("--port", type=click.IntRange(1, 65535), help="[default: 22]")
@click.option("--key-file", type=click.Path(), help="Private key to log in with.  [default: what ssh tries by itself]")
@click.option("--host-key", metavar="SHA256:...", help="The fingerprint that its provider shows; asked for without.")
@click.option("--price-per-hour", type=FiniteRange(0), help="Dollars, from the first set-up on, idle or not.")
@click.option("--folder", help="Where all lies there, from the user's home.  [default: muonlab-pod]")
@click.option("--python", help="Python 3.11 or newer there.  [default: python3]")
@click.option("--prepared/--not-prepared", default=None, help="That Python has all packages already: no .venv is made.")
def remote_add(
    name: str,
    address: str,
    port: int | None,
    key_file: str | None,
    host_key: str | None,
    price_per_hour: float | None,
    folder: str | None,
    python: str | None,
    prepared: bool | None,
) -> None:
    """Name a machine, and pin the host key by which it is known from then on.

    Its fingerprint is to be compared with what the provider shows, or with `ssh-keygen -lf
    /etc/ssh/ssh_host_ed25519_key.pub` in the provider's own console: a first answer proves nothing. Without a terminal
    to ask at, --host-key is needed. A name that there is already is pinned anew, and keeps
    every option that is not given. No password is ever asked for or kept.
    """
    from pathlib import Path

    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.remote.places import (
        Remote,
        add_remote,
        alias,
        check_name,
        fingerprint,
        hourly,
        offered_key,
        read_remotes,
        split_address,
    )
    from muonlab.registry.errors import UsageError

    layout = Layout.find()
    check_name(name)
    user, host = split_address(address)
    if key_file is not None and not Path(key_file).is_file():
        raise UsageError(f"--key-file: there is no file {key_file}.")
    held = read_remotes(layout).get(name)
    given = {
        "port": port,
        "key_file": None if key_file is None else str(Path(key_file).resolve()),
        "price_usd_per_hour": price_per_hour,
        "folder": folder,
        "python": python,
        "prepared": prepared,
    }
    options = {} if held is None else held.model_dump(include=set(given))
    options |= {option: value for option, value in given.items() if value is not None}
    port = options.get("port", Remote.model_fields["port"].default)
    key = offered_key(user, host, port)
    shown = fingerprint(key)
    if host_key is not None:
        if host_key != shown:
            raise UsageError(
                f"--host-key: {host} port {port} shows {shown} ({key.split()[0]}), not {host_key}; nothing was added."
            )
    elif held is None or held.host_key != key:
        if not sys.stdin.isatty():
            raise UsageError(
                f"{host} port {port} shows the host key {shown} ({key.split()[0]}), which nobody has compared; do so, "
                f"and give it as --host-key {shown}."
            )
        was = "" if held is None else f", where {fingerprint(held.host_key)} was pinned before"
        click.echo(f"{host} port {port} shows the host key {shown} ({key.split()[0]}){was}.", err=True)
        click.confirm("Is this what its provider shows?", abort=True, err=True)
    added = Remote(name=name, user=user, host=host, host_key=key, **options)
    add_remote(layout, added)
    price = hourly(added.price_usd_per_hour)
    click.echo(
        f"{name}: {added.address}, {price}, pinned to {shown} as {alias(name)}; "
        f"`muon doctor --remote {name}` looks at it."
    )


@remote.command("list")
@json_option
def remote_list(as_json: bool) -> None:
    """List the machines that are named here; connects to none."""
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.remote.places import list_remotes

    say(list_remotes(Layout.find()), as_json)


@remote.command("remove")
@click.argument("name")
def remote_remove(name: str) -> None:
    """Forget a machine and its key; nothing there is touched."""
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.remote.places import remove_remote

    remove_remote(Layout.find(), name)
    click.echo(f"{name}: forgotten; end the machine at its provider, if it still runs.")


@remote.command("follow")
@click.argument("name")
@click.option("--run", metavar="RUN", help="As `muon status --remote` names it.  [default: the last one]")
@json_option
def remote_follow(name: str, run: str | None, as_json: bool) -> None:
    """Follow a run there to its end, whoever started it, and bring home what it leaves.

    Ctrl-C and a lost connection leave it running. Exits with the code of `muon study run` there.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.remote.places import find_remote
    from muonlab.pipeline.remote.runs import follow_run

    layout = Layout.find()
    try:
        answer = follow_run(layout, find_remote(layout, name), run, say=note)
    except KeyboardInterrupt:
        _left_running(name)
    say(answer, as_json)
    sys.exit(answer.exit_code)


@remote.command("stop")
@click.argument("name")
def remote_stop(name: str) -> None:
    """End the run on a machine, and nothing but its processes; say what was spent.

    What it has trained is kept there, and its attempts are recorded. The machine itself stays rented.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.remote.places import find_remote
    from muonlab.pipeline.remote.runs import stop_run

    layout = Layout.find()
    click.echo(stop_run(layout, find_remote(layout, name)))


def run_on(
    name: str,
    slug: str | None,
    twin: str | None,
    *,
    jobs: int | None,
    max_cost: float | None,
    fail_on_no_go: bool,
    override: bool,
    only: Sequence[str],
    as_json: bool,
) -> NoReturn:
    """`muon study run --on NAME`: exits with the code of the same command there."""
    from muonlab.cli.options import slug_of
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.remote.places import find_remote
    from muonlab.pipeline.remote.runs import run_there

    layout = Layout.find()
    machine = find_remote(layout, name)
    arguments = [] if jobs is None else ["--jobs", str(jobs)]
    arguments += [] if max_cost is None else ["--max-cost", str(max_cost)]
    arguments += ["--fail-on-no-go"] if fail_on_no_go else []
    arguments += ["--override"] if override else []
    arguments += [word for pattern in only for word in ("--only", pattern)]
    try:
        answer = run_there(
            layout,
            machine,
            slug_of(layout, slug, twin),
            arguments,
            only=only,
            override=override,
            max_cost_usd=max_cost,
            say=note,
        )
    except KeyboardInterrupt:
        _left_running(name)
    say(answer, as_json)
    sys.exit(answer.exit_code)


def command_there(name: str, arguments: Sequence[str]) -> NoReturn:
    """Run a `muon` command in the tree on a machine, and exit with its code."""
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.remote.commands import muon_there
    from muonlab.pipeline.remote.places import find_remote

    layout = Layout.find()
    try:
        sys.exit(muon_there(layout, find_remote(layout, name), arguments, say=click.echo, warn=note))
    except KeyboardInterrupt:
        sys.exit(0)


def _left_running(name: str) -> NoReturn:
    note(f"muon: no longer followed; {name} goes on: `muon remote follow {name}`, `muon remote stop {name}`.")
    sys.exit(130)
