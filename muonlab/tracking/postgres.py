"""A PostgreSQL of one folder, for the tracking server: made, started and ended here, by nobody else's service.

    <folder>/postgres       the cluster, made by initdb aside and then renamed
    <folder>/password       its password, of mode 600, where `PASSWORD` names none
    <folder>/postgres.log   what it says

It listens on a Unix socket in a private temporary folder (the path of a socket takes 107 bytes at most, which a
project's folder may exceed) and on no network. PostgreSQL refuses to run as root: then it runs as `ACCOUNT`, which
Debian's package creates.

Source: PostgreSQL 15's manual, 19.3 (starting), 19.5 (SIGINT is the fast shutdown), 34.15 (PGPASSWORD).
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from muonlab.registry.errors import UsageError
from muonlab.registry.parent import end_with_parent

PASSWORD = "MUONLAB_POSTGRES_PASSWORD"  # noqa: S105 - a variable's name
ACCOUNT = "postgres"
USER = "mlflow"
PROGRAMS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin")
"""Where Debian, Red Hat and Homebrew keep one folder a version, off the PATH."""
START_S = 60.0
STOP_S = 30.0


class Database(NamedTuple):
    """A PostgreSQL that runs."""

    process: subprocess.Popen[bytes]
    uri: str
    """SQLAlchemy's address of it, the same at every start."""
    environment: dict[str, str]
    """What a client needs besides: where the socket is, and the password."""
    version: str


@contextmanager
def postgres(folder: Path) -> Iterator[Database]:
    """Run the PostgreSQL of `folder`, made where there is none, until the block ends.

    Raises UsageError where it cannot: no PostgreSQL, one of another version than the data's, no account to run it as,
    a folder that account cannot reach, a wrong password.
    """
    psycopg2 = _client()
    data, account = folder / "postgres", _account()
    folder.mkdir(parents=True, exist_ok=True)
    _reachable(folder, account)
    programs = _programs((data / "PG_VERSION").read_text().strip() if data.exists() else None)
    password = _password(folder, new=not data.exists())
    if not data.exists():
        _make(data, programs, password, account)
    with _private_folder(account) as sockets, (folder / "postgres.log").open("ab") as log:
        began = log.tell()
        options = ["-D", str(data), "-k", str(sockets), "-c", "listen_addresses=", "-c", "unix_socket_permissions=0700"]
        process = subprocess.Popen(
            [programs / "postgres", *options],
            cwd=data,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the server, which ends MLflow first
            preexec_fn=lambda: end_with_parent(signal.SIGINT),
            **_as(account),
        )
        try:
            _wait(psycopg2, process, sockets, password, folder, began)
            yield Database(
                process,
                # SQLAlchemy 2.1 takes psycopg 3 unless told; MLflow's own requirement is psycopg2.
                f"postgresql+psycopg2://{USER}@/postgres",
                {"PGHOST": str(sockets), "PGPASSWORD": password},
                (data / "PG_VERSION").read_text().strip(),
            )
        finally:
            _end(process)


def _client() -> Any:
    try:
        import psycopg2
    except ImportError:
        raise UsageError(
            "psycopg2, by which MLflow speaks to PostgreSQL, is missing: pip install -e '.[tracking]'."
        ) from None
    return psycopg2


def _account() -> pwd.struct_passwd | None:
    """Whom PostgreSQL runs as: None for this user, another account for root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(ACCOUNT)
    except KeyError:
        raise UsageError(
            f"PostgreSQL refuses to run as root and there is no account {ACCOUNT!r} to run it as; "
            "start this as another user."
        ) from None


def _as(account: pwd.struct_passwd | None) -> dict[str, Any]:
    """How subprocess starts a program as that account."""
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _reachable(folder: Path, account: pwd.struct_passwd | None) -> None:
    if account is not None and subprocess.run(["test", "-x", folder], **_as(account)).returncode != 0:
        raise UsageError(
            f"{folder}: PostgreSQL, which does not run as root, runs as {account.pw_name}, who may not enter this "
            "folder; name another by --folder, or start this as another user."
        )


def _programs(version: str | None) -> Path:
    """Folder of the programs of that version of PostgreSQL, of the newest where it does not matter."""
    on_path = shutil.which("postgres")
    listed = [Path(on_path).resolve().parent] if on_path else []
    listed += [path for pattern in PROGRAMS for path in Path("/").glob(pattern.removeprefix("/"))]
    found = {_version(folder): folder for folder in listed if (folder / "initdb").exists()}
    if not found:
        raise UsageError("No PostgreSQL is found on the PATH or where Debian keeps it: apt install postgresql.")
    if version is None:
        return found[max(found, key=int)]
    if version not in found:
        raise UsageError(
            f"The tracking server's data are of PostgreSQL {version}, and installed is {', '.join(sorted(found))}: "
            f"install {version}, or bring the data over by pg_upgrade."
        )
    return found[version]


def _version(programs: Path) -> str:
    """The major version, which is the one that data are bound to."""
    said = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"\d+", said)
    assert match is not None, said
    return match.group()


def _password(folder: Path, *, new: bool) -> str:
    """The password of the environment, else that of the file; for new data one is made up."""
    if given := os.environ.get(PASSWORD):
        return given
    path = folder / "password"
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    if not new:
        raise UsageError(f"{path} is missing, and {PASSWORD} is not set: one of them has to give the password.")
    password = secrets.token_urlsafe(24)
    write_secret(path, password)
    return password


def write_secret(path: Path, text: str, account: pwd.struct_passwd | None = None) -> None:
    """Write a new file that only its owner can read: this user, or that account."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text + "\n")
        if account is not None:
            os.fchown(file.fileno(), account.pw_uid, account.pw_gid)


def _make(data: Path, programs: Path, password: str, account: pwd.struct_passwd | None) -> None:
    """Make the cluster, elsewhere and then renamed: a kill in between leaves none that looks whole."""
    part = data.with_name("postgres-part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700)
    if account is not None:
        os.chown(part, account.pw_uid, account.pw_gid)
    with _private_folder(account) as private:
        write_secret(private / "password", password, account)
        done = subprocess.run(
            [programs / "initdb", "-D", part, "-U", USER, f"--pwfile={private / 'password'}", "--auth=scram-sha-256",
             "--encoding=UTF8", "--locale=C"],
            cwd=part, stdin=subprocess.DEVNULL, capture_output=True, text=True, **_as(account),
        )  # fmt: skip
    if done.returncode != 0:
        raise UsageError(f"{data}: PostgreSQL's initdb failed: {_last(done.stderr)}.")
    os.replace(part, data)


@contextmanager
def _private_folder(account: pwd.struct_passwd | None) -> Iterator[Path]:
    """A temporary folder that only PostgreSQL's account (and root) can enter."""
    with tempfile.TemporaryDirectory(prefix="muonlab-postgres-") as name:
        if account is not None:
            os.chown(name, account.pw_uid, account.pw_gid)
        yield Path(name)


def _wait(
    psycopg2: Any, process: subprocess.Popen[bytes], sockets: Path, password: str, folder: Path, began: int
) -> None:
    """Wait until it lets us in."""
    until = time.monotonic() + START_S
    while True:
        try:
            psycopg2.connect(host=str(sockets), user=USER, password=password, dbname="postgres").close()
            return
        except psycopg2.OperationalError as error:
            if "password authentication failed" in str(error):
                raise UsageError(
                    f"{folder}: its PostgreSQL refuses the password; {PASSWORD}, or the file `password` there, must "
                    "give the one with which it was made."
                ) from None
            if process.poll() is not None or time.monotonic() > until:
                raise UsageError(f"{folder}: PostgreSQL did not start: {_last(_since(folder, began))}.") from None
        time.sleep(0.1)


def _since(folder: Path, began: int) -> str:
    return (folder / "postgres.log").read_bytes()[began:].decode(errors="replace")


def _last(said: str) -> str:
    """The line that says why: the last one of an error, else the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    return ([line for line in lines if re.search("FATAL|error", line)] or lines)[-1].rstrip(".")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it orderly, within a bound."""
    for how in (signal.SIGINT, signal.SIGQUIT):  # with what it has written; at once, to be recovered at the next start
        if process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                continue
