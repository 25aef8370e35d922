"""A tracking server that clones share: what they copy to it at once, and what its end in mid-study costs them.

The real `muon tracking`, a PostgreSQL with MLflow on it, is ended and started between the tests; what it holds is read
from the database itself. The clones are folders that share nothing but the server.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import STUDY as TOY
from conftest import Maker
from tracking_attempts import STUDY, Attempt, environment, wait_for, whole_curve

from muonlab.registry.errors import UsageError
from muonlab.registry.parent import end_with_parent
from muonlab.tracking import pending, start_follower, sync_once, tracking_uri
from muonlab.tracking.server import Address
from muonlab.tracking.sync import Mirror

psycopg2 = pytest.importorskip("psycopg2", reason="psycopg2 is missing: pip install -e '.[tracking]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("postgres") or list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))),
        reason="PostgreSQL is missing: apt install postgresql",
    ),
]

CLONES = 8
POINTS = 40


class Server:
    """`muon tracking` on one folder, ended and started again on one port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

    def command(self, *options: str, **variables: str) -> subprocess.Popen[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PYTEST_"))}
        return subprocess.Popen(
            [sys.executable, "-m", "muonlab.cli", "tracking", "--folder", str(self.folder), *options],
            env=kept | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: end_with_parent(signal.SIGINT),
        )  # fmt: skip

    def refusal(self, *options: str, **variables: str) -> str:
        """The sentence with which it does not start."""
        _, said = (process := self.command(*options, **variables)).communicate(timeout=300)
        assert process.returncode == 2, said
        assert said.count("\n") == 1, said
        return said

    def start(self) -> None:
        self.process = self.command("--port", str(self.port), "--workers", "1")
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith(f"MLflow on {self.uri}"), self.process.communicate()
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def ended(self) -> str:
        """Wait for its end; what it said then. Nothing that it started is left."""
        assert self.process is not None
        _, said = self.process.communicate(timeout=300)
        assert not [found for found in self.family if lives(found)]
        return said

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            assert "have ended" in self.ended()
            assert self.process.returncode == 0

    def one(self, part: str) -> psutil.Process:
        """The process itself whose program is `postgres`, or which leads MLflow's."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        (found,) = [child for child in children if (child.name() == "postgres") == (part == "postgres")]
        return found

    def query(self, text: str) -> list[tuple[Any, ...]]:
        sockets = (self.folder / "postgres" / "postmaster.pid").read_text().splitlines()[4]
        password = (self.folder / "password").read_text().strip()
        opened = psycopg2.connect(host=sockets, password=password, user="mlflow", dbname="postgres")
        try:
            with opened.cursor() as cursor:
                cursor.execute(text)
                return list(cursor.fetchall())
        finally:
            opened.close()

    def curves(self, study: str) -> dict[str, list[tuple[Any, ...]]]:
        """(step, timestamp, value) of all points of the losses of each attempt's run, duplicates included."""
        rows = self.query(
            "SELECT t.value, r.run_uuid, m.step, m.timestamp, m.value FROM experiments e "
            "JOIN runs r ON r.experiment_id = e.experiment_id AND r.lifecycle_stage = 'active' "
            "JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'attempt_id' "
            "LEFT JOIN metrics m ON m.run_uuid = r.run_uuid AND m.key = 'curve/val_loss' "
            f"WHERE e.name = '{study}' ORDER BY 1, 2, 3"
        )
        assert len({row[0] for row in rows}) == len({row[1] for row in rows}), "an attempt has two runs"
        found: dict[str, list[tuple[Any, ...]]] = {}
        for attempt, _, *point in rows:
            found.setdefault(attempt, []).append(tuple(point))
        return found

    def runs(self, study: str) -> list[tuple[Any, ...]]:
        """Name, status and parent of every run of a study, the study's own with no parent."""
        return self.query(
            "SELECT r.name, r.status, p.name FROM experiments e "
            "JOIN runs r ON r.experiment_id = e.experiment_id AND r.lifecycle_stage = 'active' "
            "LEFT JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'mlflow.parentRunId' "
            "LEFT JOIN runs p ON p.run_uuid = t.value AND p.experiment_id = e.experiment_id "
            f"WHERE e.name = '{study}' ORDER BY 1"
        )


def lives(process: psutil.Process) -> bool:
    """Whether it runs; one that waits for its parent to read its exit code does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # Not in pytest's own folder, which PostgreSQL's account may not enter when root runs the tests.
    with tempfile.TemporaryDirectory(prefix="tracking-server-") as name:
        Path(name).chmod(0o755)
        made = Server(Path(name) / "kept")
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture
def up(server: Server) -> Iterator[Server]:
    """The server, running whatever an earlier test did to it, and the environment that names it."""
    if server.process is None or server.process.poll() is not None:
        server.start()
    with environment(MLFLOW_TRACKING_URI=server.uri):
        yield server


def train_and_copy(main: Path, seed: int, together: Any) -> None:
    """One clone: an attempt that is shown while it grows and when it has ended, each time when all others copy too."""
    attempt = Attempt(main, seed=seed)
    for _ in range(2):
        attempt.train(POINTS // 2)
        together.wait()
        if problems := Mirror(main, tracking_uri(main)).sync(reports=True):
            sys.exit(str(problems))
    attempt.end()
    together.wait()
    if problems := Mirror(main, tracking_uri(main)).sync(reports=True):
        sys.exit(str(problems))


def test_eight_clones_that_show_one_study_at_once_lose_nothing_and_make_nothing_twice(
    up: Server, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    import mlflow  # noqa: F401 - once, for all eight

    together = context.Barrier(CLONES, timeout=300)
    clones = [
        context.Process(target=train_and_copy, args=(tmp_path / str(seed), seed, together)) for seed in range(CLONES)
    ]
    for clone in clones:
        clone.start()
    for clone in clones:
        clone.join(timeout=240)
    assert [clone.exitcode for clone in clones] == [0] * CLONES
    assert up.runs(STUDY) == [(STUDY, "SCHEDULED", None)] + [
        (f"muon/seed-{seed}", "FINISHED", STUDY) for seed in range(CLONES)
    ]
    assert up.curves(STUDY) == {f"muon-{seed}-1-{STUDY}": whole_curve(POINTS) for seed in range(CLONES)}
    for seed in range(CLONES):
        assert not pending(tmp_path / str(seed))


def test_a_database_that_stops_while_an_attempt_is_shown_costs_no_point(up: Server, tmp_path: Path) -> None:
    study = "002-stopped"
    attempt = Attempt(tmp_path, study=study).train(10)
    with start_follower(tmp_path):
        wait_for(lambda: len(next(iter(up.curves(study).values()), [])) == 10, seconds=200)
        up.one("postgres").send_signal(signal.SIGINT)
        assert "PostgreSQL ended by itself" in up.ended()
        attempt.train(10)
    attempt.end()
    assert pending(tmp_path)
    said = sync_once(tmp_path, timeout_s=300)
    assert said is not None
    assert "kept in scratch/" in said
    up.start()
    for _ in range(2):
        assert sync_once(tmp_path, timeout_s=300) is None
        assert up.runs(study) == [(study, "SCHEDULED", None), ("muon/seed-0", "FINISHED", study)]
        assert up.curves(study) == {attempt.id: whole_curve(20)}
        (attempt.folder / "mlflow.json").unlink()  # as if it was not known what the server has


def test_a_study_does_not_notice_that_its_server_is_killed_and_started(up: Server, make: Maker, tmp_path: Path) -> None:
    repository = replace(make(tmp_path / "repository"), tracking=True)
    study = subprocess.Popen(
        [sys.executable, "-m", "muonlab.cli", "study", "run", TOY, "-j", "1"], cwd=repository.root,
        env=repository.environment(MLFLOW_TRACKING_URI=up.uri), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, preexec_fn=lambda: end_with_parent(signal.SIGKILL),
    )  # fmt: skip
    try:
        wait_for(lambda: list(repository.root.glob("scratch/*/attempts/*/start.json")), seconds=200)
        paused = [found for found in psutil.Process(study.pid).children(recursive=True) if is_training(found)]
        for process in paused:
            process.suspend()
        wait_for(lambda: up.curves(TOY), seconds=200)  # by the follower, which is not paused
        leader = up.one("mlflow")
        os.killpg(leader.pid, signal.SIGKILL)
        assert "MLflow ended by itself" in up.ended()
        for process in paused:
            process.resume()
        wait_for(repository.attempts, seconds=200)  # one ends while nobody answers
        os.killpg(study.pid, signal.SIGSTOP)
        up.start()
        os.killpg(study.pid, signal.SIGCONT)
        out, said = study.communicate(timeout=600)
    finally:
        if study.poll() is None:
            os.killpg(study.pid, signal.SIGKILL)
    assert study.returncode == 0, out + said
    assert "Traceback" not in said
    records = repository.attempts()
    assert [record["status"] for record in records] == ["completed"] * 4
    sync_once(repository.root, timeout_s=300)  # the next start: what a slow machine had no time for
    assert not pending(repository.root)
    measured = {r["attempt_id"]: [(p["step"], p["val_loss"]) for p in r["curve"]] for r in records}
    shown = {attempt: [(step, value) for step, _, value in points] for attempt, points in up.curves(TOY).items()}
    assert shown == measured
    assert up.runs(TOY) == [
        (TOY, "FINISHED", None),
        *[(f"{arm}/seed-{seed}", "FINISHED", TOY) for arm in ("muon", "nolah") for seed in (0, 1)],
    ]


def is_training(process: psutil.Process) -> bool:
    return "muonlab.pipeline.worker" in process.cmdline()


def test_what_prevents_a_start_is_one_sentence_and_nothing_keeps_running(up: Server, tmp_path: Path) -> None:
    assert "in use" in up.refusal("--port", str(up.port))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert "running on this folder already" in up.refusal("--port", port)
    for secret in (up.folder / "password",):
        assert secret.stat().st_mode & 0o777 == 0o600
        told = [" ".join(found.cmdline()) for found in up.family if lives(found)]
        assert told
        assert not [line for line in told if secret.read_text().strip() in line]
    up.stop()
    assert "refuses the password" in up.refusal("--port", port, MUONLAB_POSTGRES_PASSWORD="another")
    data = up.folder / "postgres" / "PG_VERSION"
    found = data.read_text()
    data.write_text("9\n")
    assert f"installed is {found.strip()}" in up.refusal("--port", port)
    data.write_text(found)
    assert not list(up.folder.glob("postgres/postmaster.pid"))


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (Address(host="0.0.0.0"), "--basic-auth"),
        (Address(host="192.0.2.1"), "--basic-auth"),
        (Address(host="0.0.0.0", basic_auth=True), "--allowed-host"),
        (Address(names=("*.example.org",)), "'\\*'"),
    ],
)
def test_nobody_else_gets_in_without_being_asked_who_they_are(address: Address, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        address.check()
