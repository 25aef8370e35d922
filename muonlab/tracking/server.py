"""The shared tracking server: MLflow on a PostgreSQL of its own, both ended together.

    <folder>/artifacts        files of the runs, which the server takes and gives: clients need no shared disk
    <folder>/admin-password   of mode 600, with `basic_auth`, where MLFLOW_AUTH_ADMIN_PASSWORD names none
    <folder>/basic_auth.ini   what users may do, to be edited
    <folder>/mlflow.log       what MLflow says

Secrets go by the environment and by files of mode 600, never by a command line, which every user of a machine can read.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from muonlab.registry.errors import MuonlabError, UsageError
from muonlab.registry.parent import end_with_parent
from muonlab.tracking.postgres import Database, postgres, write_secret

START_S = 180.0
"""It takes some 10 s of processor time, much longer where others compute."""
STOP_S = 15.0
POLL_S = 0.5
ADMIN_PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"  # noqa: S105 - a variable's name
BASIC_AUTH = """[mlflow]
# What a user may do with what others made: EDIT, so that several people's runs of a study stand side by side.
default_permission = EDIT
database_uri = {database}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens, and who it answers."""

    host: str = "127.0.0.1"
    port: int = 5000
    names: tuple[str, ...] = ()
    """Other names than `host` in the addresses by which clients ask; requests by any other name are refused, so that
    no web page can ask through a browser of this network (DNS rebinding)."""
    basic_auth: bool = False

    @property
    def uri(self) -> str:
        """What a client on this machine calls it."""
        host = self._reached
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def allowed(self) -> str:
        """MLflow's --allowed-hosts."""
        named = dict.fromkeys([self._reached, "localhost", "127.0.0.1", *self.names])
        return ",".join(form for name in named for form in (name, f"{name}:{self.port}"))

    @property
    def is_local(self) -> bool:
        """Whether only processes of this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def _is_any(self) -> bool:
        return self.host in ("0.0.0.0", "::")  # noqa: S104 - only recognised

    @property
    def _reached(self) -> str:
        return "127.0.0.1" if self._is_any else self.host

    def check(self) -> None:
        """Raise UsageError for an address that would be open to others or cannot be had."""
        if not self.is_local and not self.basic_auth:
            raise UsageError(
                f"--host {self.host} lets other machines in, and without --basic-auth everybody there may read, change "
                "and delete all runs: add --basic-auth, or keep 127.0.0.1 and reach it by an SSH tunnel."
            )
        if any("*" in name for name in self.names):
            raise UsageError("--allowed-host: '*' would answer any name; give each by which clients call this server.")
        if self._is_any and not self.names:
            raise UsageError(
                f"--host {self.host} listens on every address; say by --allowed-host NAME how clients call this server."
            )
        if self.basic_auth and importlib.util.find_spec("flask_wtf") is None:
            raise UsageError("--basic-auth needs Flask-WTF, which is missing: pip install -e '.[tracking]'.")
        try:
            with socket.create_server(
                (self.host, self.port), family=socket.AF_INET6 if ":" in self.host else socket.AF_INET
            ):
                pass
        except OSError as error:
            reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else error.strerror
            raise UsageError(f"{self.host}, port {self.port}: {reason}; choose another by --port or --host.") from None


def serve(folder: Path, address: Address, workers: int, ready: Callable[[Database], None]) -> None:
    """Run PostgreSQL and MLflow until KeyboardInterrupt, and end both; `ready` is called once it answers.

    Raises UsageError for what prevents the start, MuonlabError where one of the two ends by itself.
    """
    address.check()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"{folder}: a tracking server is running on this folder already; end that one first."
        ) from None
    with lock, postgres(folder) as database, mlflow(folder, address, workers, database) as process:
        ready(database)
        while True:
            for name, its in (("PostgreSQL", database.process), ("MLflow", process)):
                if (code := its.poll()) is not None:
                    log = folder / f"{name.lower()}.log"
                    raise MuonlabError(f"{name} ended by itself (exit code {code}), so the other was ended: see {log}.")
            time.sleep(POLL_S)


@contextmanager
def mlflow(folder: Path, address: Address, workers: int, database: Database) -> Iterator[subprocess.Popen[bytes]]:
    """Run MLflow's server on that database until the block ends; it answers when the block begins."""
    command = ["--host", address.host, "--port", str(address.port), "--workers", str(workers)]
    command += ["--allowed-hosts", address.allowed, "--artifacts-destination", str(folder / "artifacts")]
    environment = {
        **os.environ,
        **database.environment,
        "MLFLOW_BACKEND_STORE_URI": database.uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # no process for jobs, which nobody sends
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)  # a client's, perhaps of this very server
    if address.basic_auth:
        command += ["--app-name", "basic-auth"]
        environment |= _basic_auth(folder, database)
    with (folder / "mlflow.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(signal.SIGTERM),
        )
    try:
        _wait(process, address, folder)
        yield process
    finally:
        _end(process)


def admin_password_file(folder: Path) -> Path | None:
    """Where the first user's password lies, None where the environment gave it."""
    path = folder / "admin-password"
    return path if path.exists() else None


def _basic_auth(folder: Path, database: Database) -> dict[str, str]:
    """What MLflow's basic-auth reads from its environment; the users are kept in the same database."""
    config = folder / "basic_auth.ini"
    if not config.exists():
        config.write_text(BASIC_AUTH.format(database=database.uri), encoding="utf-8")
    given = os.environ.get(ADMIN_PASSWORD)
    path = folder / "admin-password"
    if not given and not path.exists():
        write_secret(path, secrets.token_urlsafe(24))
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        ADMIN_PASSWORD: given or path.read_text(encoding="utf-8").strip(),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
    }


def _wait(process: subprocess.Popen[bytes], address: Address, folder: Path) -> None:
    until = time.monotonic() + START_S
    while not _answers(address):
        if process.poll() is not None or time.monotonic() > until:
            raise UsageError(f"MLflow's server did not start: {folder / 'mlflow.log'} says why.")
        time.sleep(0.2)


def _answers(address: Address) -> bool:
    try:
        with urllib.request.urlopen(f"{address.uri}/health", timeout=5) as said:  # noqa: S310 - http
            return bool(said.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End MLflow and its workers, which are the group of processes that it leads."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # workers that outlive the one that was to end them
    process.wait()
