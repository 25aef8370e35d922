"""What MLflow has and lacks, from the files alone; imports no mlflow.

    scratch/<digest>/attempts/<n>/mlflow.json   {uri, run_id, form, points, ...}: the run of one attempt
    scratch/mlflow-reports/<study>.json         {uri, run_id, content}: the run of one study
    scratch/mlflow-ledger.json                  {uri, size, sha256}: the ledger's lines whose attempts have their run

A marker is a promise that the store at `uri` holds what it says; without one, nothing is known, and the store
is asked. A marker never holds credentials.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from muonlab.registry.files import write_atomically
from muonlab.registry.settings import Closed
from muonlab.tracking.process import lives

SQLITE = "sqlite:///"
REPORT_FILES = ("report.md", "report.html", "verdict.json", "stats.json")
FORM = 3
"""How runs are laid out: one of an earlier form is described anew. 2: under the study's run, in its arm's colour; 3:
with record and curve as files."""
NOT_A_STUDY = "exp"
"""The folder of reports/ in which DVC's experiments report their one cell."""


class AttemptMarker(Closed):
    """What the run of an attempt holds."""

    uri: str
    run_id: str
    form: int = 1
    """The `FORM` in which the run was described."""
    points: int = 0
    """Lines of curve.jsonl that are logged."""
    samples: int = 0
    """Lines of system.jsonl that are logged."""
    closed: bool = False
    """The run is shown as abandoned: its process is gone, and left no record so far."""
    done: bool = False
    """The end of the attempt is logged too."""


class ReportMarker(Closed):
    """What the run of a study's report holds."""

    uri: str
    run_id: str
    content: str
    """Hash of the report's files as they were logged; empty before they were."""


class LedgerMarker(Closed):
    """Up to where the ledger's attempts have their runs."""

    uri: str
    size: int
    """Bytes of the ledger."""
    sha256: str
    """Hash of these bytes: a ledger that was rewritten is looked through from its start."""


class LedgerPart(NamedTuple):
    """The ledger's lines that were not looked at, and the bytes up to them."""

    before: bytes
    lines: list[bytes]
    """Whole lines, each with its end."""


Marker = TypeVar("Marker", AttemptMarker, ReportMarker, LedgerMarker)


def tracking_uri(main: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else the sqlite file in the repository `main`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or default_uri(main)


def default_uri(main: Path) -> str:
    """The sqlite file in the repository `main`."""
    return f"{SQLITE}{main.resolve() / 'mlflow.db'}"


def without_credentials(uri: str) -> str:
    """The address without user, password and query, fit to be shown and kept."""
    address = uri.partition("?")[0]
    return address if address.startswith(SQLITE) else hide_userinfo(address)


def hide_userinfo(text: str) -> str:
    """The text without the `user:password@` of the addresses in it."""
    return re.sub(r"//[^/\s]*@", "//", text)


def sqlite_file(main: Path, uri: str) -> Path | None:
    """The file of an sqlite store, a relative one from the repository `main`; None for another kind of store."""
    return main / without_credentials(uri).removeprefix(SQLITE) if uri.startswith(SQLITE) else None


def store_is_gone(main: Path, uri: str) -> bool:
    """Whether the store is an sqlite file that does not exist, whatever the markers say."""
    file = sqlite_file(main, uri)
    return file is not None and not file.exists()


def read_marker(path: Path, kind: type[Marker]) -> Marker | None:
    """The marker in a file; None where there is none or it cannot be read: then the store is asked."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None


def write_marker(path: Path, marker: AttemptMarker | ReportMarker | LedgerMarker) -> None:
    """Write a marker; a reader sees the old or the new one.

    Not forced to the disk: one that a power cut takes back only makes the copying start over.
    """
    write_atomically(path, marker.model_dump_json(), durable=False)


def attempt_marker(folder: Path) -> Path:
    """Marker file of the attempt in `folder`."""
    return folder / "mlflow.json"


def report_marker(main: Path, study: str) -> Path:
    """Marker file of a study's report."""
    return main / "scratch" / "mlflow-reports" / f"{study}.json"


def ledger_marker(main: Path) -> Path:
    """Marker file of the ledger."""
    return main / "scratch" / "mlflow-ledger.json"


def forget(main: Path) -> None:
    """Remove all markers of the repository `main`, so that the store is asked about everything."""
    markers = [attempt_marker(folder) for folder in attempt_folders(main)]
    for path in (*markers, *main.glob("scratch/mlflow-reports/*.json"), ledger_marker(main)):
        path.unlink(missing_ok=True)


def attempt_folders(main: Path) -> list[Path]:
    """Folders of all attempts that were made in the repository `main`."""
    return sorted(path.parent for path in main.glob("scratch/*/attempts/*/start.json"))


def running_attempts(main: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and start of every attempt that has not ended and whose process lives."""
    for folder in attempt_folders(main):
        if not (folder / "record.json").exists() and (start := _start_of_living(folder)):
            yield folder, start


def _start_of_living(folder: Path) -> dict[str, Any] | None:
    """How an attempt began, or None where its process is gone or cannot be told: then it is looked at when copied."""
    try:
        start = read_json(folder / "start.json")
        return start if lives(start) else None
    except (ValueError, KeyError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError when it holds no JSON."""
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def whole_lines(path: Path) -> list[str]:
    """Lines of a file that grows, but for one that is still being written or was cut short by a kill."""
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def curve_lines(folder: Path) -> list[str]:
    """Lines of the attempt's curve so far."""
    return whole_lines(folder / "curve.jsonl")


def system_lines(folder: Path) -> list[str]:
    """Readings of the attempt's process so far."""
    return whole_lines(folder / "system.jsonl")


def unsynced_attempts(main: Path, uri: str, *, settled: Collection[Path] = ()) -> list[Path]:
    """Folders of the attempts of which the store at `uri` lacks something; those in `settled` are not looked at."""
    gone = store_is_gone(main, uri)
    own = without_credentials(uri)

    def lacks(folder: Path) -> bool:
        marker = read_marker(attempt_marker(folder), AttemptMarker)
        if gone or marker is None or marker.uri != own:
            return True
        if marker.form != FORM:
            return True
        if marker.done:
            return False
        return (
            (folder / "record.json").exists()
            or len(curve_lines(folder)) > marker.points
            or len(system_lines(folder)) > marker.samples
            or not (marker.closed or _start_of_living(folder))
        )

    return [folder for folder in attempt_folders(main) if folder not in settled and lacks(folder)]


def unsynced_reports(main: Path, uri: str) -> list[str]:
    """Studies whose report the store at `uri` lacks, or has in another version."""
    gone = store_is_gone(main, uri)
    own = without_credentials(uri)
    studies = []
    for verdict in sorted(main.glob("reports/*/verdict.json")):
        folder = verdict.parent
        if folder.name == NOT_A_STUDY or not (folder / "report.md").exists():
            continue
        marker = read_marker(report_marker(main, folder.name), ReportMarker)
        if gone or marker is None or marker.uri != own or marker.content != report_content(folder):
            studies.append(folder.name)
    return studies


def unsynced_ledger(main: Path, uri: str) -> LedgerPart:
    """The part of the ledger whose attempts the store at `uri` may lack."""
    path = main / "experiments" / "ledger.jsonl"
    content = path.read_bytes() if path.exists() else b""
    marker = read_marker(ledger_marker(main), LedgerMarker)
    size = 0
    if (
        marker is not None
        and marker.uri == without_credentials(uri)
        and not store_is_gone(main, uri)
        and hashlib.sha256(content[: marker.size]).hexdigest() == marker.sha256
    ):
        size = marker.size
    lines = [line for line in content[size:].splitlines(keepends=True) if line.endswith(b"\n")]
    return LedgerPart(content[:size], lines)


def report_content(folder: Path) -> str:
    """Hash (SHA-256) over names and content of all files of a report, and the form in which it is shown."""
    digest = hashlib.sha256(f"form {FORM}\n".encode())
    for path in report_files(folder):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()


def report_files(folder: Path) -> list[Path]:
    """The files of a report that are there: page, data and figures."""
    named = [folder / name for name in REPORT_FILES]
    return [path for path in (*named, *sorted((folder / "figures").glob("*"))) if path.is_file()]
