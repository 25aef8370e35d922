"""`muon status`, `logs`, `commit` and `download`: the runs of this machine, and what others get of them."""

from __future__ import annotations

import contextlib
import sys
from typing import NoReturn

import click

from muonlab.cli.options import json_option, say
from muonlab.cli.remote import command_there, remote_option
from muonlab.cli.terminal import note, tell


@click.command()
@click.option("--gpu", is_flag=True, help="Also the load of the GPUs, by nvidia-smi.")
@remote_option
@json_option
def status(gpu: bool, remote: str | None, as_json: bool) -> None:
    """Show what trains on this machine now, or on the cluster it drives: study, cell, step, time left, cost so far.

    Where a study stands is `muon study status`. Writes nothing. With --remote, also what that machine has cost so far.
    """
    if remote is not None:
        _status_there(remote, gpu, as_json)
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.running import running

    say(running(Layout.find(), gpu=gpu), as_json)


def _status_there(name: str, gpu: bool, as_json: bool) -> NoReturn:
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.remote.commands import say_meter
    from muonlab.pipeline.remote.places import find_remote

    layout = Layout.find()
    if not say_meter(layout, find_remote(layout, name), say=note):
        sys.exit(0)
    command_there(name, ["status", *(["--gpu"] if gpu else []), *(["--json"] if as_json else [])])


@click.command()
@click.argument("cell", required=False)
@click.option("-n", "--tail", type=click.IntRange(0), help="Only the last rows of the curve.  [default: all]")
@click.option("-f", "--follow", is_flag=True, help="Go on with new rows until the run ends; Ctrl-C leaves it running.")
@remote_option
def logs(cell: str | None, tail: int | None, follow: bool, remote: str | None) -> None:
    """Print the curve of a run, finished or training, where its time went, and how it ended.

    CELL is `<arm>-<seed>` or `<study>/<arm>-<seed>` (an exploration's study is `exp`); by default, the newest run on
    this machine. Losses in nats/token.
    """
    if remote is not None:
        how = [*([] if tail is None else ["--tail", str(tail)]), *(["--follow"] if follow else [])]
        command_there(remote, ["logs", *how, *([] if cell is None else ["--", cell])])
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.running import find_log, tell_log

    log = find_log(Layout.find(), cell)
    with contextlib.suppress(KeyboardInterrupt):
        tell_log(log, tail=tail, follow=follow, say=tell)


@click.command()
@click.argument("message")
@click.option("--dry-run", is_flag=True, help="Only list what would be committed.")
@json_option
def commit(message: str, dry_run: bool, as_json: bool) -> None:
    """Commit the results to git: ledger, registrations, lock files, reports; list them.

    Weights, data and whatever else is staged or changed are left alone. Exits with 5, and commits nothing, when the
    ledger has lost lines.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.sharing import commit_results

    say(commit_results(Layout.find(), message, dry_run=dry_run), as_json)


@click.command()
@click.option("--run", "cell", required=True, metavar="CELL", help="<arm>-<seed>, or <study>/<arm>-<seed>.")
@click.option("--remote", "remote", metavar="NAME", help="From that machine (`muon remote list`).")
@click.option("--no-checkpoints", is_flag=True, help="With --remote: record and curve without the weights.")
def download(cell: str, remote: str | None, no_checkpoints: bool) -> None:
    """Bring a run's outputs (record, curve, weights) here from the DVC remote, else record and curve from MLflow.

    Without a study, the cell is one of the study that params.yaml names. A shell pattern (`'<study>/*'`) stands for all
    cells of the study that have been run. Whoever ran them has pushed (`dvc push`, while the study was open: after its
    run, before that of another) and committed its lock file (`muon commit`). What the remote lacks is looked for in
    MLflow and laid into downloads/<study>/<cell>; weights are in DVC only. How two clones share a study:
    docs/sharing.md.

    With --remote, what `muon study run --on` has left there comes straight over ssh: its commit is checked and merged,
    and every file is hashed as it arrives. --no-checkpoints lays record and curve into downloads/<study>/<cell>.
    """
    if remote is not None:
        _download_from(remote, cell, weights=not no_checkpoints)
        return
    if no_checkpoints:
        raise click.UsageError("--no-checkpoints goes with --remote: DVC's own remote is asked for whole cells.")
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.sharing import download as bring

    found = bring(Layout.find(), cell)
    for folder in (*found.folders, *found.without_weights):
        click.echo(folder)
    if found.without_weights:
        note("muon: record and curve are from MLflow; the weights are only in DVC.")


def _download_from(name: str, cell: str, *, weights: bool) -> None:
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.remote.link import Link
    from muonlab.pipeline.remote.places import find_remote
    from muonlab.pipeline.remote.results import bring
    from muonlab.pipeline.resolve import load_params

    layout = Layout.find()
    slug, _, pattern = cell.rpartition("/")
    link = Link(layout, find_remote(layout, name))
    for sentence in bring(link, slug or load_params(layout.params).study, cells=pattern, weights=weights):
        tell(sentence)
