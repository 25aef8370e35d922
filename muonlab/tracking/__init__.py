"""MLflow as a view of the attempts on disk: live while a cell trains, complete afterwards, never waited for.

Training writes only to `scratch/`. A separate process, the follower, copies from there what MLflow lacks; what
it could not copy (a server that is down, a kill) the next one does. The state is in marker files, and every
write is one that may be repeated, so a copy that was interrupted anywhere ends without gaps or duplicates.

    markers.py   what MLflow lacks, from the files alone
    process.py   whether an attempt's process lives, and what it uses
    store.py     the store: opened, asked, written to
    content.py   what is shown: names, tags, metrics, the view by arm
    sync.py      what is copied when, from scratch, ledger and reports
    follow.py    the process: `python -m muonlab.tracking.follow <repository> [--once [--all | --rebuild]]`
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import IO

from muonlab.tracking.markers import (
    tracking_uri,
    unsynced_attempts,
    unsynced_reports,
    whole_lines,
    without_credentials,
)

__all__ = ["Follower", "is_off", "pending", "rebuild", "start_follower", "sync_once", "tracking_uri"]

OFF = "MUONLAB_TRACKING"
"""Set to `off`, this variable keeps everything from MLflow; once it is unset, the next start copies what it missed."""
TOLD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
"""How a line of a copying process begins; others are of libraries."""
TOLD_LENGTH = 200
EXIT_WAIT_S = 10.0
"""The longest that leaving a follower takes; its last pass is done in one or two seconds when the store answers."""


def is_off() -> bool:
    """Whether the user has switched MLflow off."""
    return os.environ.get(OFF, "").lower() == "off"


def pending(main: Path) -> bool:
    """Whether MLflow lacks anything of the repository `main`, as far as the marker files tell; imports no mlflow."""
    if is_off():
        return False
    uri = tracking_uri(main)
    return bool(unsynced_attempts(main, uri) or unsynced_reports(main, uri))


class Follower:
    """The running process that copies attempts to MLflow; ends with the `with` block that holds it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ask for a last pass and wait for it, at most `EXIT_WAIT_S`; what is left over the next start copies."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_follower(main: Path) -> AbstractContextManager[object]:
    """Start following the attempts of the repository `main`; use the result in a `with` statement.

    The follower ends, after a last pass, when its standard input closes or the thread that called this dies.
    """
    if is_off():
        return nullcontext()
    with _log(main) as log:
        process = subprocess.Popen(
            _command(main), cwd=main, env=_environment(), stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    return Follower(process)


def sync_once(main: Path, timeout_s: float, *, everything: bool = False) -> str | None:
    """Copy to MLflow what it lacks, in a process that is killed after `timeout_s`.

    With `everything` the ledger's attempts too, and runs that their process left RUNNING are looked for in the store
    itself; it costs the import of mlflow (seconds) also where nothing is missing. Returns None when MLflow has
    everything, else one sentence that says what happened. Nothing is lost then.
    """
    if is_off() or not (everything or pending(main)):
        return None
    where = f"MLflow at {without_credentials(tracking_uri(main))}"
    kept = "the curves are kept in scratch/ and replayed at the next start."
    try:
        with _log(main) as log:
            done = subprocess.run(
                [*_command(main), "--once", *(["--all"] if everything else [])],
                cwd=main,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=timeout_s,
            )
    except subprocess.TimeoutExpired:
        return f"{where} was not up to date within {timeout_s:g} s; {kept}"
    if done.returncode != 0:
        why = _last_told(main).removeprefix(f"{where}: ")
        return f"{where} could not be brought up to date ({why}; see scratch/mlflow.log); {kept}"
    return None


def rebuild(main: Path) -> bool:
    """Copy everything that ledger, `scratch/` and `reports/` hold to MLflow, however long it takes; no run twice.

    Problems are told on standard error as they come; returns whether there was none.
    """
    command = [*_command(main), "--once", "--rebuild"]
    return subprocess.run(command, cwd=main, env=_environment(), stdin=subprocess.DEVNULL, stdout=2).returncode == 0


def _command(main: Path) -> list[str]:
    # -P: else the folder it runs in would lead sys.path, and a copy of the code there would be run.
    return [sys.executable, "-P", "-m", "muonlab.tracking.follow", str(main)]


def _environment() -> dict[str, str]:
    """The environment of the child, which imports the same code as this process, wherever it runs."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _last_told(main: Path) -> str:
    """The problem that a copying process told last, shortened."""
    told = [line[len("2030-01-02 03:04:05 ") :] for line in whole_lines(_log_file(main)) if TOLD.match(line)]
    return textwrap.shorten(told[-1], TOLD_LENGTH, placeholder=" ...").rstrip(".") if told else "no reason was told"


def _log_file(main: Path) -> Path:
    return main / "scratch" / "mlflow.log"


def _log(main: Path) -> IO[bytes]:
    path = _log_file(main)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")
