"""What MLflow has and lacks, from the files alone; imports no mlflow.

    scratch/<digest>/attempts/<n>/mlflow.json   {uri, run_id, points, done}: the run of one attempt
    scratch/mlflow-reports/<study>.json         {uri, run_id, content}: the run of one study's report

A marker is a promise that the store at `uri` holds what it says; without one, nothing is known, and the store
is asked. A marker never holds credentials.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from muonlab.registry.files import write_atomically
from muonlab.registry.settings import Closed

SQLITE = "sqlite:///"
REPORT_FILES = ("report.md", "report.html", "verdict.json", "stats.json")
NOT_A_STUDY = "exp"
"""The folder of reports/ in which DVC's experiments report their one cell."""


class AttemptMarker(Closed):
    """What the run of an attempt holds."""

    uri: str
    run_id: str
    points: int = 0
    """Lines of curve.jsonl that are logged."""
    done: bool = False
    """The end of the attempt is logged too."""


class ReportMarker(Closed):
    """What the run of a study's report holds."""

    uri: str
    run_id: str
    content: str
    """Hash of the report's files as they were logged; empty before they were."""


Marker = TypeVar("Marker", AttemptMarker, ReportMarker)


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


def write_marker(path: Path, marker: AttemptMarker | ReportMarker) -> None:
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


def attempt_folders(main: Path) -> list[Path]:
    """Folders of all attempts that were made in the repository `main`."""
    return sorted(path.parent for path in main.glob("scratch/*/attempts/*/start.json"))


def curve_lines(folder: Path) -> list[str]:
    """Lines of the attempt's curve so far, but for one that is still being written or was cut short by a kill."""
    path = folder / "curve.jsonl"
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def unsynced_attempts(main: Path, uri: str, *, settled: Collection[Path] = ()) -> list[Path]:
    """Folders of the attempts of which the store at `uri` lacks something; those in `settled` are not looked at."""
    gone = store_is_gone(main, uri)
    own = without_credentials(uri)

    def lacks(folder: Path) -> bool:
        marker = read_marker(attempt_marker(folder), AttemptMarker)
        if gone or marker is None or marker.uri != own:
            return True
        if marker.done:
            return False
        return (folder / "record.json").exists() or len(curve_lines(folder)) > marker.points

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


def report_content(folder: Path) -> str:
    """Hash (SHA-256) over names and content of all files of a report."""
    digest = hashlib.sha256()
    for path in report_files(folder):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()


def report_files(folder: Path) -> list[Path]:
    """The files of a report that are there: page, data and figures."""
    named = [folder / name for name in REPORT_FILES]
    return [path for path in (*named, *sorted((folder / "figures").glob("*"))) if path.is_file()]
