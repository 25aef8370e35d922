"""`muon ui`: MLflow on the studies."""

from __future__ import annotations

import sys

import click


@click.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
def ui(port: int) -> None:
    """Open MLflow's UI on the studies, at 127.0.0.1 only."""
    import os

    from muonlab.pipeline.layout import Layout
    from muonlab.tracking import sync_once, tracking_uri

    layout = Layout.find()
    if (silence := sync_once(layout.main, 60)) is not None:
        click.echo(f"muon: {silence}", err=True)
    click.echo(f"MLflow on http://127.0.0.1:{port} (Ctrl-C to end)", err=True)
    command = ["mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    # The address may hold a password: it goes by the environment, which `ps` shows to nobody else.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = tracking_uri(layout.main)
    os.execv(sys.executable, [sys.executable, "-m", *command])  # noqa: S606 - no shell is wanted
