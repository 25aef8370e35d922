"""`muon status`, `logs`, `commit` and `download`: the runs of this machine, and what others get of them."""

from __future__ import annotations

import contextlib

import click

from muonlab.cli.options import json_option, say


@click.command()
@click.option("--gpu", is_flag=True, help="Also the load of the GPUs, by nvidia-smi.")
@json_option
def status(gpu: bool, as_json: bool) -> None:
    """Show what trains on this machine now: study, cell, step, time left, cost so far.

    Where a study stands is `muon study status`. Writes nothing.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.running import running

    say(running(Layout.find(), gpu=gpu), as_json)


@click.command()
@click.argument("cell", required=False)
@click.option("-n", "--tail", type=click.IntRange(0), help="Only the last rows of the curve.  [default: all]")
@click.option("-f", "--follow", is_flag=True, help="Go on with new rows until the run ends; Ctrl-C leaves it running.")
def logs(cell: str | None, tail: int | None, follow: bool) -> None:
    """Print the curve of a run, finished or training, where its time went, and how it ended.

    CELL is `<arm>-<seed>` or `<study>/<arm>-<seed>` (an exploration's study is `exp`); by default, the newest run on
    this machine. Losses in nats/token.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.running import find_log, tell_log

    log = find_log(Layout.find(), cell)
    with contextlib.suppress(KeyboardInterrupt):
        tell_log(log, tail=tail, follow=follow, say=click.echo)


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
def download(cell: str) -> None:
    """Bring a run's outputs (record, curve, weights) here from the DVC remote, else record and curve from MLflow.

    Without a study, the cell is one of the study that params.yaml names. A shell pattern (`'<study>/*'`) stands for all
    cells of the study that have been run. Whoever ran them has pushed (`dvc push`, while the study was open: after its
    run, before that of another) and committed its lock file (`muon commit`). What the remote lacks is looked for in
    MLflow and laid into downloads/<study>/<cell>; weights are in DVC only. How two clones share a study:
    docs/sharing.md.
    """
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.sharing import download as bring

    found = bring(Layout.find(), cell)
    for folder in (*found.folders, *found.without_weights):
        click.echo(folder)
    if found.without_weights:
        click.echo("muon: record and curve are from MLflow; the weights are only in DVC.", err=True)
