"""`muon doctor` says what is missing and which command mends it; `--fix` runs that command and nothing else."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from muonlab.pipeline import doctor
from muonlab.pipeline.doctor import Check, Doctor, examine, mend
from muonlab.pipeline.layout import Layout

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A clone in which git knows nobody."""
    for key in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(key, "/dev/null")
    for key in ("MLFLOW_TRACKING_URI", "GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "EMAIL"):
        monkeypatch.delenv(key, raising=False)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(PROJECT / name, tmp_path / name)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    (tmp_path / "data" / "tiny" / "meta.json").write_text("{}")
    for command in (
        ["init", "-q"],
        ["-c", "user.name=n", "-c", "user.email=n@e", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return Layout(root=tmp_path, main=tmp_path)


def check(found: Doctor, name: str) -> Check:
    return next(c for c in found.checks if c.name == name)


def test_it_names_the_command_and_fix_runs_it(layout: Layout) -> None:
    found = examine(layout)
    assert (found.usable, found.exit_code) == (False, 1)
    broken = [c for c in found.checks if c.state == "problem"]
    assert [c.name for c in broken] == ["git user.name", "git user.email"]
    assert "Not usable yet; `muon doctor --fix` runs the commands it can." in list(found.lines())
    said: list[str] = []
    mended = mend(layout, found, said.append)
    assert said == [f"$ {c.fix}" for c in broken]
    assert (mended.usable, mended.exit_code) == (True, 0)
    assert list(mended.lines())[-1] == "Usable."
    # A remote is the user's to choose: named, and not made.
    remote = check(mended, "dvc remote")
    assert (remote.state, remote.automatic) == ("note", False)
    said.clear()
    assert mend(layout, mended, said.append) == mended
    assert said == []
    # Steps were really made.
    assert mended.seconds_per_step is not None
    assert 0.001 < mended.seconds_per_step < 60
    assert f"{1000 * mended.seconds_per_step:.0f} ms a step with muon" in check(mended, "speed of tiny").found


def test_packages_are_held_against_pyproject(layout: Layout) -> None:
    project = '[project]\nname = "x"\ndependencies = ["numpy>=2", "numpy<2", "no-such-package-here>=1"]\n'
    (layout.root / "pyproject.toml").write_text(project)
    (layout.root / "constraints.txt").touch()
    found = doctor._packages(layout)
    assert found.state == "problem"
    assert "<2 is needed" in found.found
    assert "no-such-package-here is missing" in found.found
    assert found.fix is not None
    assert found.fix.startswith(f"{sys.executable} -m pip install -c constraints.txt")


def test_the_tracking_store_is_asked_and_its_password_is_not_told(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "to be made by the first run" in doctor._mlflow(layout).found
    file = layout.main / "mlflow.db"
    file.write_text("not a database, but long enough to be read as one" * 20)
    assert (doctor._mlflow(layout).state, "cannot be read" in doctor._mlflow(layout).found) == ("note", True)
    file.unlink()
    with closing(sqlite3.connect(file)) as store:
        store.execute("create table runs (id)")
        store.execute("insert into runs values (1)")
        store.commit()
    assert doctor._mlflow(layout).found.endswith("mlflow.db, 1 runs")

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answering)
    address = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@{address}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    answered = doctor._mlflow(layout)
    server.shutdown()
    server.server_close()
    gone = doctor._mlflow(layout)
    assert (answered.state, answered.found) == ("ok", f"http://{address} answers")
    assert (gone.state, gone.fix) == ("note", "unset MLFLOW_TRACKING_URI")
    assert "secret" not in answered.found + gone.found


def test_a_declaration_that_cannot_be_read_is_a_problem_in_its_own_words(layout: Layout) -> None:
    layout.params.write_text(layout.params.read_text().replace("optimizer: muon", "optimizer: moun", 1))
    found = examine(layout)
    assert "'moun'" in check(found, "params.yaml").found
    assert (found.exit_code, found.seconds_per_step) == (1, None)
