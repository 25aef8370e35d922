"""A whole study under attack: secrets around it, markup in its texts, other data, a driver killed beside its dvc."""

from __future__ import annotations

import bz2
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import filelock
import psutil
import pytest
from conftest import STUDY, TOY_STUDY, Maker, Repository, make_repository

from muonlab.pipeline.doors import mend_rwlock
from muonlab.pipeline.layout import Layout

pytestmark = pytest.mark.slow

CANARY = "canary-91c7e0d4"
SECRETS = {
    name: f"{CANARY}-{name}"
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY", "MUONLAB_SECRET")
}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> [click](javascript:alert(3))"


@pytest.fixture(scope="module")
def finished(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, str]:
    """A finished study with a hostile question, shown to MLflow, with secrets around it; and all that was said."""
    study = {**TOY_STUDY, "question": HOSTILE}
    repository = make(tmp_path_factory.mktemp("attacked") / "repository", tracking=True, study=study)
    said = [repository.muon(*line, **SECRETS) for line in (("study", "run"), ("study", "status"))]
    said.append(repository.muon("commit", "results", **SECRETS))
    return repository, "".join(done.stdout + done.stderr for done in said)


@pytest.fixture
def repository(finished: tuple[Repository, str], tmp_path: Path) -> Repository:
    subprocess.run(["cp", "-a", str(finished[0].root), str(tmp_path / "repository")], check=True)
    return replace(finished[0], root=tmp_path / "repository", tracking=False)


def test_no_secret_of_the_environment_is_written_anywhere(finished: tuple[Repository, str]) -> None:
    """Ledger, records, logs, reports, MLflow's store, DVC's cache and git's history are searched byte for byte."""
    repository, said = finished
    assert CANARY not in said
    assert CANARY not in repository.git("log", "--all", "-p")
    files = [path for path in repository.root.rglob("*") if path.is_file()]
    assert {"ledger.jsonl", "mlflow.db", "mlflow.log", "report.html", "record.json"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


class Tags(HTMLParser):
    """Which elements a page has, and which of their attributes would run code."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.active: list[str] = []
        self.policy = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if (named.get("http-equiv") or "").lower() == "content-security-policy":
            self.policy = named["content"] or ""
        if tag in ("script", "iframe", "object", "embed"):
            self.active.append(tag)
        self.active += [f"{tag} {key}" for key, value in attrs
                        if key.startswith("on") or (value or "").strip().lower().startswith("javascript:")]  # fmt: skip


def outside_fences(markdown: str) -> str:
    """The lines of a page that no code fence encloses."""
    lines, fence = [], ""
    for line in markdown.splitlines():
        mark = line[: len(line) - len(line.lstrip("`"))]
        if not fence and len(mark) >= 3:
            fence = mark
        elif fence and line.strip() == fence:
            fence = ""
        elif not fence:
            lines.append(line)
    return "\n".join(lines)


def test_markup_in_a_question_and_in_a_sampled_text_stays_text(repository: Repository) -> None:
    path = repository.root / f"reports/{STUDY}/evaluations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "prompt": HOSTILE, "sample": f"```\n{HOSTILE}"}) + "\n" for row in rows))
    repository.run("python", "-m", "stages.stats", STUDY)
    repository.run("python", "-m", "stages.report", STUDY)
    folder = repository.root / f"reports/{STUDY}"
    page = Tags((folder / "report.html").read_text())
    assert page.active == []
    assert "default-src 'none'" in page.policy
    assert "script-src" not in page.policy.replace("script-src 'none'", "")
    for name in ("report.md", "../README.md"):
        text = outside_fences((folder / name).read_text())
        assert "alert(1)" in text, name  # it is shown
        # A backslash before it makes a bracket a letter.
        assert re.search(r"(?<!\\)(<script|<img|\]\(javascript:)", text) is None, name


def test_a_document_that_changed_makes_the_study_invalid(repository: Repository, tmp_path: Path) -> None:
    """A word of the corpus reads otherwise; the data are prepared again, and the study is looked at."""
    package = importlib.util.find_spec("gensim")
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "test/test_data"
    (dump,) = folder.glob("enwiki-latest-pages-articles1.xml-*-shortened.bz2")
    other = tmp_path / "site" / "gensim" / "test" / "test_data" / dump.name
    other.parent.mkdir(parents=True)
    (tmp_path / "site" / "gensim" / "__init__.py").touch()
    changed = bz2.decompress(dump.read_bytes()).replace(b" political ", b" poetical ")
    other.write_bytes(bz2.compress(changed, 1))
    paths = {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{repository.root}"}
    before = repository.read("data/toy/meta.json")["sha256"]
    repository.run("python", "-m", "stages.prepare_data", "toy", **paths)
    assert repository.read("data/toy/meta.json")["sha256"]["tokens"] != before["tokens"]
    said = repository.muon("study", "status", check=False)
    assert said.returncode == 5
    assert "recorded in this study under other inputs" in said.stderr
    assert "nolah: INVALID" in said.stdout


def in_repository(root: Path) -> list[psutil.Process]:
    """Living processes that work in the repository."""
    return [
        process
        for process in psutil.process_iter(["cwd", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(process.info["cwd"]).startswith(str(root))
    ]


def wait_for(condition: object, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False


def test_with_its_driver_dvc_and_its_stage_die_too(tmp_path: Path) -> None:
    """Nothing is prepared, so that the driver first calls dvc; it is killed while dvc's stage runs."""
    repository = make_repository(tmp_path / "repository")
    with subprocess.Popen(
        [sys.executable, "-m", "muonlab.cli", "study", "run"], cwd=repository.root, env=repository.environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as driver:  # fmt: skip

        def stage_runs() -> bool:
            return any(
                "stages.prepare_data" in " ".join(process.cmdline()) for process in in_repository(repository.root)
            )

        assert wait_for(stage_runs, seconds=120)
        assert len(in_repository(repository.root)) >= 3
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert wait_for(lambda: not in_repository(repository.root), seconds=20), in_repository(repository.root)
    assert not (repository.root / "data/toy").exists()
    # DVC's lock was freed with its holder.
    repository.muon("study", "run")


@pytest.mark.parametrize("left", [b"", b'{"write": {"data/to'], ids=["truncated", "half written"])
def test_a_dvc_that_was_killed_while_it_noted_its_locks_stops_no_further_one(
    repository: Repository, left: bytes
) -> None:
    """`make chaos` met it. The instant is DVC's own, between opening and writing: its outcome is laid here."""
    noted = repository.root / ".dvc" / "tmp" / "rwlock"
    noted.write_bytes(left)
    assert "rwlock" in repository.dvc("repro", "data/dvc.yaml:prepare_data@toy", check=False).stderr, (
        "DVC mends nothing"
    )
    done = repository.muon("study", "run")
    assert "rwlock was cut short when a dvc was killed; it is removed" in done.stderr
    assert "4 in place" in done.stderr, done.stderr
    repository.dvc("repro", "data/dvc.yaml:prepare_data@toy")
    assert "cut short" not in repository.muon("study", "run").stderr


@pytest.mark.parametrize("blocker", ["zombie", "later"])
def test_a_dvc_whose_number_is_still_there_or_another_process_has_by_now_stops_no_further_one(
    repository: Repository, blocker: str
) -> None:
    """The first process of a container may wait for nobody; and after a restart numbers are given anew."""
    command = ["true"] if blocker == "zombie" else ["sleep", "600"]
    with subprocess.Popen(command) as process:
        noted = {"pid": process.pid, "cmd": "dvc repro"}
        path = repository.root / ".dvc" / "tmp" / "rwlock"
        path.write_text(json.dumps({"write": {str(repository.root / "data/toy"): noted}, "read": {}}))
        if blocker == "zombie":
            assert wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, seconds=20)
        else:
            os.utime(path, (time.time() - 3600,) * 2)
        refused = repository.dvc("repro", "data/dvc.yaml:prepare_data@toy", check=False)
        assert "it is being blocked by" in refused.stderr, "DVC mends nothing"
        if blocker == "later":
            os.utime(path, (time.time() - 3600,) * 2)
        done = repository.muon("study", "run")
        assert "nothing to train: all 4 cells are in place" in done.stderr
        process.kill()


def test_a_dvc_that_is_at_work_keeps_what_it_has_noted(repository: Repository) -> None:
    path = repository.root / ".dvc" / "tmp" / "rwlock"
    noted = {"pid": os.getpid(), "cmd": "dvc repro"}
    path.write_text(whole := json.dumps({"write": {str(repository.root / "data/toy"): noted}}))
    mend_rwlock(Layout(root=repository.root, main=repository.root))
    assert path.read_text() == whole


@pytest.mark.parametrize(
    ("left", "committed"),
    [("", False), ("schema: '2.0'\nstages:\n  eval", True), ("schema: '2.0'\nstages:\n  evaluate:\n", False)],
    ids=["truncated", "half a line", "half a stage"],
)
def test_a_dvc_that_was_killed_while_it_wrote_a_lock_file_costs_no_training(
    repository: Repository, left: str, committed: bool
) -> None:
    """`make chaos` met it, too: the file is truncated, and then written."""
    path = f"experiments/{STUDY}/dvc.lock"
    if not committed:  # as `muon commit` has done
        repository.git("rm", "-q", "--cached", path)
        repository.git("commit", "-qm", "not yet")
    (repository.root / path).write_text(left)
    done = repository.muon("study", "run")
    how = "taken back from git" if committed else "removed, and dvc makes it anew"
    assert f"{path} was cut short when a dvc was killed; it is {how}." in done.stderr
    assert "nothing to train: all 4 cells are in place" in done.stderr
    assert "cut short" not in repository.muon("study", "run").stderr


def test_a_conflict_that_a_merge_has_left_in_a_lock_file_is_not_taken_away(repository: Repository) -> None:
    path = repository.root / f"experiments/{STUDY}/dvc.lock"
    path.write_text(conflict := f"<<<<<<< HEAD\n{path.read_text()}=======\nschema: '2.0'\n>>>>>>> theirs\n")
    done = repository.muon("study", "run", check=False)
    assert done.returncode == 2
    assert "dvc.lock" in done.stderr
    assert path.read_text() == conflict


def test_a_dvc_that_runs_beside_is_named_in_a_sentence(repository: Repository) -> None:
    with filelock.FileLock(repository.root / ".dvc" / "tmp" / "lock"):
        done = repository.muon("study", "run", check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Most likely another DVC process is running" in done.stderr
