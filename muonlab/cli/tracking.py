"""`muon tracking`: the MLflow server that several machines share."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; beyond this machine with --basic-auth."
)
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--allowed-host", "names", multiple=True, metavar="NAME", help="A name by which clients call it (repeatable)."
)
@click.option("--basic-auth", is_flag=True, help="Ask every client for user and password.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 64), help="Processes that answer.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where it keeps everything; mlflow-server/ in the project.",
)
def tracking(host: str, port: int, names: tuple[str, ...], basic_auth: bool, workers: int, folder: Path | None) -> None:
    """Run MLflow on PostgreSQL, for studies on several machines, until Ctrl-C.

    Needs Debian's package postgresql (no service of it: the database is made in mlflow-server/, and listens on no
    network) and pip install -e '.[tracking]'. Studies show their runs there once MLFLOW_TRACKING_URI names it; while it
    is down they train on, and what it missed is copied at their next start. Passwords are made up and kept in files of
    mode 600, or taken from MUONLAB_POSTGRES_PASSWORD and MLFLOW_AUTH_ADMIN_PASSWORD. See docs/tracking.md.
    """
    import signal

    from muonlab.pipeline.layout import Layout
    from muonlab.tracking.postgres import Database
    from muonlab.tracking.server import Address, admin_password_file, serve

    folder = (folder or Layout.find().main / "mlflow-server").resolve()
    address = Address(host=host, port=port, names=names, basic_auth=basic_auth)

    def ready(database: Database) -> None:
        click.echo(f"MLflow on {address.uri}, on PostgreSQL {database.version} in {folder} (Ctrl-C ends both)")
        click.echo(f"  export MLFLOW_TRACKING_URI={address.uri}")
        if basic_auth:
            path = admin_password_file(folder)
            password = f'"$(cat {path})"' if path else '"$MLFLOW_AUTH_ADMIN_PASSWORD"'
            click.echo(f"  export MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD={password}")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        serve(folder, address, workers, ready)
    except KeyboardInterrupt:
        click.echo("muon: MLflow and PostgreSQL have ended; the runs are kept.", err=True)
