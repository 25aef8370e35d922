"""What MLflow lacks is known from files alone, and addresses are shown without what is secret in them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from muonlab.tracking import pending, sync_once, tracking_uri
from muonlab.tracking.markers import (
    FORM,
    AttemptMarker,
    LedgerMarker,
    ReportMarker,
    attempt_marker,
    forget,
    ledger_marker,
    report_content,
    report_marker,
    running_attempts,
    unsynced_ledger,
    unsynced_reports,
    without_credentials,
    write_marker,
)


@pytest.fixture(autouse=True)
def _no_uri_of_a_person(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def synced_attempt(main: Path, points: int = 2) -> Path:
    folder = main / "scratch" / "d" / "attempts" / "1"
    folder.mkdir(parents=True)
    (main / "mlflow.db").touch()
    (folder / "start.json").write_text(
        json.dumps({"pid": os.getpid(), "record": {"started_at": "2100-01-01T00:00:00Z"}})
    )
    (folder / "curve.jsonl").write_text('{"step": 1}\n' * points)
    write_marker(attempt_marker(folder), AttemptMarker(uri=tracking_uri(main), run_id="r", form=FORM, points=points))
    return folder


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://eva:pass@host:5000/x", "https://host:5000/x"),
        ("https://eva:p@ss@host/x?password=q", "https://host/x"),
        ("https://token@host", "https://host"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("sqlite:///a@b.db", "sqlite:///a@b.db"),
    ],
)
def test_an_address_is_shown_without_credentials(uri, shown):
    assert without_credentials(uri) == shown


def test_the_address_is_the_repositorys_own_file_unless_one_is_set(tmp_path, monkeypatch):
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert tracking_uri(tmp_path) == "http://host"


def test_nothing_is_pending_when_the_markers_say_so(tmp_path):
    assert not pending(tmp_path)
    synced_attempt(tmp_path)
    assert not pending(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *("point", "record", "marker gone", "marker cut", "store gone", "other store", "reading", "earlier form"),
        *("dead", "unreadable start", "forgotten"),
    ],
)
def test_pending_after(tmp_path, monkeypatch, change):
    folder = synced_attempt(tmp_path)
    if change == "point":
        with (folder / "curve.jsonl").open("a") as file:
            file.write('{"step": 2}')
        assert not pending(tmp_path), "the line is not whole yet"
        with (folder / "curve.jsonl").open("a") as file:
            file.write("\n")
    elif change == "record":
        (folder / "record.json").write_text("{}")
    elif change == "marker gone":
        attempt_marker(folder).unlink()
    elif change == "marker cut":
        attempt_marker(folder).write_text('{"uri": "sql')
    elif change == "store gone":
        (tmp_path / "mlflow.db").unlink()
    elif change == "reading":
        (folder / "system.jsonl").write_text('{"seconds": 60}\n')
    elif change == "earlier form":
        write_marker(attempt_marker(folder), AttemptMarker(uri=tracking_uri(tmp_path), run_id="r", points=2, done=True))
    elif change == "dead":
        (folder / "start.json").write_text('{"pid": 1, "record": {"started_at": "1971-01-01T00:00:00Z"}}')
    elif change == "unreadable start":
        (folder / "start.json").write_text("{")
        assert list(running_attempts(tmp_path)) == []
    elif change == "forgotten":
        forget(tmp_path)
    elif change == "other store":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert pending(tmp_path)


def test_a_closed_attempt_is_not_pending_until_its_record_is_there(tmp_path):
    folder = synced_attempt(tmp_path)
    (folder / "start.json").write_text('{"pid": 1, "record": {"started_at": "1971-01-01T00:00:00Z"}}')
    marker = AttemptMarker(uri=tracking_uri(tmp_path), run_id="r", form=FORM, points=2, closed=True)
    write_marker(attempt_marker(folder), marker)
    assert not pending(tmp_path)
    (folder / "record.json").write_text("{}")
    assert pending(tmp_path)


def test_of_the_ledger_the_lines_after_the_marker_are_left_unless_it_was_rewritten(tmp_path):
    uri, path = tracking_uri(tmp_path), tmp_path / "experiments" / "ledger.jsonl"
    assert unsynced_ledger(tmp_path, uri).lines == []
    path.parent.mkdir()
    path.write_bytes(b"one\ntwo\nthr")
    (tmp_path / "mlflow.db").touch()
    assert unsynced_ledger(tmp_path, uri) == (b"", [b"one\n", b"two\n"]), "the last line is not whole"
    ledger_marker(tmp_path).parent.mkdir()
    write_marker(ledger_marker(tmp_path), LedgerMarker(uri=uri, size=4, sha256=hashlib.sha256(b"one\n").hexdigest()))
    assert unsynced_ledger(tmp_path, uri) == (b"one\n", [b"two\n"])
    assert unsynced_ledger(tmp_path, "http://host").before == b""
    path.write_bytes(b"ONE\ntwo\n")
    assert unsynced_ledger(tmp_path, uri) == (b"", [b"ONE\n", b"two\n"])
    path.write_bytes(b"one\ntwo\n")
    (tmp_path / "mlflow.db").unlink()
    assert unsynced_ledger(tmp_path, uri).before == b""


def test_a_report_is_pending_until_this_version_of_it_is_logged(tmp_path):
    folder = tmp_path / "reports" / "001-a"
    (folder / "figures").mkdir(parents=True)
    (tmp_path / "mlflow.db").touch()
    (folder / "verdict.json").write_text(json.dumps({}))
    uri = tracking_uri(tmp_path)
    assert unsynced_reports(tmp_path, uri) == [], "without report.md it is not written yet"
    (folder / "report.md").write_text("# A")
    assert unsynced_reports(tmp_path, uri) == ["001-a"]
    marker = report_marker(tmp_path, "001-a")
    marker.parent.mkdir(parents=True)
    write_marker(marker, ReportMarker(uri=uri, run_id="r", content=report_content(folder)))
    assert not pending(tmp_path)
    (folder / "figures" / "a.svg").write_text("<svg/>")
    assert unsynced_reports(tmp_path, uri) == ["001-a"]


def test_the_report_of_a_single_experiment_is_no_study(tmp_path):
    folder = tmp_path / "reports" / "exp"
    folder.mkdir(parents=True)
    (folder / "verdict.json").write_text("{}")
    (folder / "report.md").write_text("")
    assert not pending(tmp_path)


def test_where_nothing_is_pending_no_process_is_started(tmp_path):
    synced_attempt(tmp_path)
    assert sync_once(tmp_path, timeout_s=0.001) is None


def test_importing_the_package_and_looking_imports_no_mlflow():
    code = (
        "import sys; from pathlib import Path; import muonlab.tracking.follow as f; "
        "f.pending(Path('/nowhere')); print('mlflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
