"""`muon ui`: MLflow on the studies."""

from __future__ import annotations

import sys

import click

from muonlab.cli.terminal import note

UP_TO_DATE_WITHIN_S = 60


@click.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--rebuild", is_flag=True, help="First copy all that ledger and reports hold again, however long it takes."
)
def ui(port: int, rebuild: bool) -> None:
    """Open MLflow's UI on the studies, at 127.0.0.1 only.

    Attempts of the ledger that MLflow lacks (a colleague's, those of a deleted mlflow.db) are copied first, for a
    minute at most; `--rebuild` looks at every one, whatever was copied before, and makes no run twice.
    """
    import os

    from muonlab import tracking
    from muonlab.pipeline.layout import Layout
    from muonlab.registry.errors import UsageError

    layout = Layout.find()
    if rebuild:
        if tracking.is_off():
            raise UsageError(
                f"{tracking.OFF} is 'off', so that nothing is copied to MLflow; unset it to use --rebuild."
            )
        if not tracking.rebuild(layout.main):
            note("muon: not everything could be copied to MLflow (see above); the rest is there.")
    elif (silence := tracking.sync_once(layout.main, UP_TO_DATE_WITHIN_S, everything=True)) is not None:
        note(f"muon: {silence}")
    note(f"MLflow on http://127.0.0.1:{port} (Ctrl-C to end); curves by arm: in a study, under Views")
    # One person looks: one worker, and no process for jobs, each of which takes some 0.2 GB.
    command = ["mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    # The address may hold a password: it goes by the environment, which `ps` shows to nobody else.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = tracking.tracking_uri(layout.main)
    os.execv(sys.executable, [sys.executable, "-m", *command])  # noqa: S606 - no shell is wanted
