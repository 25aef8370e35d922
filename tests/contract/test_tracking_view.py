"""MLflow shows exactly what lies on disk, however often, by how many, and however rudely it is copied there.

A real sqlite store, real processes, and real files: records by `RunRecord`, killed attempts
swept as the next start sweeps them.
"""

import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

import muonlab.tracking
from muonlab.pipeline.attempts import CellScratch, write_atomically
from muonlab.pipeline.layout import Layout
from muonlab.registry.canonical import canonical_json
from muonlab.registry.cell import Cell, Inputs, OptimizerSpec
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import DataSettings, WorkloadSettings
from muonlab.tracking import pending, start_follower, sync_once, tracking_uri
from muonlab.tracking.markers import AttemptMarker, write_marker
from muonlab.tracking.sync import Mirror

pytestmark = pytest.mark.slow

STUDY = "001-a-study"
STARTED = "2030-01-02T03:04:05+00:00"
STARTED_MS = 1893553445000
COMMIT = "c" * 40
CANARY = "canary-5f0e8a1b"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """An sqlite store without runs: made once, since its migrations take seconds."""
    main = tmp_path_factory.mktemp("store")
    assert Mirror(main, tracking_uri(main)).client.search_experiments()
    return main / "mlflow.db"


@pytest.fixture
def main(tmp_path, monkeypatch, empty_store):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def cell(arm="muon", seed=0) -> Cell:
    return Cell(
        workload="toy",
        arm=arm,
        seed=seed,
        settings=WorkloadSettings(steps=300, data=DataSettings(vocab_size=300)),
        optimizer=OptimizerSpec(kind="muon", options={"lr": 0.01, "nesterov": True, "gate": arm}),
        inputs=Inputs(data="d" * 64, tokenizer="t" * 64, code="c" * 64, environment="e" * 64),
    )


class Attempt:
    """An attempt on disk, as training leaves it."""

    def __init__(self, main: Path, arm="muon", seed=0, number=1, study: str | None = STUDY):
        self.cell = cell(arm, seed)
        self.scratch = CellScratch(Layout(root=main, main=main), self.cell.digest)
        self.folder = self.scratch.folder / "attempts" / str(number)
        self.folder.mkdir(parents=True)
        self.id = f"{arm}-{seed}-{number}-{study}"
        self.base = {
            "study": study,
            "workload": "toy",
            "arm": arm,
            "seed": seed,
            "cell_digest": self.cell.digest,
            "registration": None,
            "attempt": number,
            "attempt_id": self.id,
            "started_at": STARTED,
            "device_count": 1,
            "hashes": {"data": "d" * 64, "tokenizer": "t" * 64, "init": None, "order": None, "weights": None}
            | {"code": "c" * 64, "environment": "e" * 64},
            "provenance": {"commit": COMMIT, "dirty": False, "python": "3", "torch": "2", "transformers": "5"}
            | {"device": "a processor", "host_os": "an os"},
        }
        purpose = {"study": study, "registration": None, "price_usd_per_gpu_hour": 3.6, "device_count": 1}
        start = {"record": self.base, "purpose": purpose, "cell": self.cell.model_dump(mode="json"), "pid": 1}
        write_atomically(self.folder / "start.json", canonical_json(start))
        self.points = 0

    def train(self, points: int, val_loss=lambda step: 5 - step / 1000):
        """Log so many more points."""
        lines = []
        for step in range(self.points, self.points + points):
            row = {"step": step, "tokens": 512 * step, "seconds": step / 8, "train_loss": None if step == 0 else 4.0}
            loss = val_loss(step)
            row |= {"val_loss": loss if math.isfinite(loss) else None, "lr": 0.01, "opt_rank": 7.5}
            lines.append(json.dumps(row) + "\n")
        with (self.folder / "curve.jsonl").open("a") as file:
            file.writelines(lines)
        self.points += points
        return self

    def end(self, status="completed", error=None):
        """Write the record of an attempt that ended by itself."""
        record = RunRecord.model_validate(
            self.base
            | {"status": status, "resumed_from_step": 0, "final_step": self.points, "tokens": 512 * self.points}
            | {"val_loss": 4.5 if status == "completed" else None, "wall_seconds": 10.0, "cost_usd": 0.01}
            | {"perplexity": 90.0 if status == "completed" else None, "curve": [], "error": error}
        )
        write_atomically(self.folder / "record.json", record.model_dump_json(indent=2))
        return self


def sync(main: Path) -> list[str]:
    """One pass by a process that knows nothing of earlier ones, but in this process."""
    return Mirror(main, tracking_uri(main)).sync(reports=True)


def runs(main: Path, experiment: str = STUDY) -> dict:
    """All runs of an experiment by name; a name that is there twice fails."""
    client = Mirror(main, tracking_uri(main)).client
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    named = {f"{run.info.run_name}#{run.data.tags.get('attempt', '')}": run for run in found}
    assert len(named) == len(found), [run.info.run_name for run in found]
    return named


def rows(main: Path, run, key: str) -> list[tuple]:
    """(step, timestamp, value) of every stored point of a series, duplicates included."""
    with closing(sqlite3.connect(main / "mlflow.db")) as store:
        query = "SELECT step, timestamp, value FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step"
        return store.execute(query, (run.info.run_id, key)).fetchall()


def whole_curve(points: int) -> list[tuple]:
    return [(step, STARTED_MS + 125 * step, 5 - step / 1000) for step in range(points)]


@contextmanager
def environment(**variables: str):
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def wait_for(condition, seconds=30.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)
    return found


def test_a_finished_attempt_is_one_whole_run(main):
    attempt = Attempt(main, "nolah", 3).train(5).end()
    assert sync(main) == []
    ((name, run),) = runs(main).items()
    assert name == "nolah/seed-3#1"
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", STARTED_MS, STARTED_MS + 10000)
    assert run.data.params["optimizer"] == "muon"
    assert run.data.params["optimizer.lr"] == "0.01"
    assert run.data.params["optimizer.nesterov"] == "true"
    assert run.data.params["settings.data.vocab_size"] == "300"
    assert run.data.params["settings.model.layers"] == '["mamba","attention","mamba"]'
    assert run.data.params["seed"] == "3"
    tags = {"study": STUDY, "arm": "nolah", "seed": "3", "workload": "toy", "cell_digest": attempt.cell.digest}
    tags |= {"attempt": "1", "attempt_id": attempt.id, "device": "a processor", "status": "completed"}
    tags |= {"mlflow.source.git.commit": COMMIT}
    assert tags.items() <= run.data.tags.items()
    finals = {"val_loss": 4.5, "perplexity": 90.0, "cost_usd": 0.01, "wall_seconds": 10.0, "final_step": 5.0}
    assert finals.items() <= run.data.metrics.items()
    assert rows(main, run, "curve/val_loss") == whole_curve(5)
    assert [step for step, *_ in rows(main, run, "curve/train_loss")] == [1, 2, 3, 4]
    assert len(rows(main, run, "optimizer/rank")) == 5
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("toy", "d" * 16)
    assert not pending(main)


def test_a_running_attempt_is_shown_live_and_then_finished(main):
    attempt = Attempt(main).train(3)
    mirror = Mirror(main, tracking_uri(main))
    assert mirror.sync(reports=False) == []
    (run,) = runs(main).values()
    assert (run.info.status, run.data.tags["status"]) == ("RUNNING", "running")
    assert rows(main, run, "curve/val_loss") == whole_curve(3)
    attempt.train(4)
    assert mirror.sync(reports=False) == []
    assert rows(main, run, "curve/val_loss") == whole_curve(7)
    attempt.train(1).end()
    assert mirror.sync(reports=False) == []
    (run,) = runs(main).values()
    assert run.info.status == "FINISHED"
    assert rows(main, run, "curve/val_loss") == whole_curve(8)


@pytest.mark.parametrize("lost", ["nothing", "marker", "half the marker"])
def test_copying_again_adds_nothing(main, lost):
    attempt = Attempt(main).train(300).end()  # 4 series, hence more than one batch
    for _ in range(2):
        assert sync(main) == []
        (run,) = runs(main).values()
        assert rows(main, run, "curve/val_loss") == whole_curve(300)
        assert len(rows(main, run, "val_loss")) == 1
        assert len(run.inputs.dataset_inputs) == 1
        marker = attempt.folder / "mlflow.json"
        if lost == "marker":
            marker.unlink()
        elif lost == "half the marker":
            found = json.loads(marker.read_text())
            marker.write_text(json.dumps(found | {"points": 100, "done": False}))


def test_every_way_to_end_has_its_status(main):
    Attempt(main, "muon", 0).train(2).end()
    diverging = Attempt(main, "muon", 1).train(3, lambda step: math.nan if step == 2 else 5 - step / 1000)
    diverging.end("diverged", "step 2: the validation loss is nan")
    Attempt(main, "muon", 2).train(2).end("failed", "MemoryError: no more")
    killed = Attempt(main, "muon", 3).train(2)
    assert sync(main) == []
    assert runs(main)["muon/seed-3#1"].info.status == "RUNNING"
    killed.scratch.sweep()  # what the next start does first
    assert sync(main) == []
    found = runs(main)
    assert {name: (run.info.status, run.data.tags["status"]) for name, run in found.items()} == {
        "muon/seed-0#1": ("FINISHED", "completed"),
        "muon/seed-1#1": ("FINISHED", "diverged"),
        "muon/seed-2#1": ("FAILED", "failed"),
        "muon/seed-3#1": ("KILLED", "abandoned"),
    }
    diverged = found["muon/seed-1#1"]
    assert "val_loss" not in diverged.data.metrics
    assert math.isnan(diverged.data.metrics["curve/val_loss"])
    assert diverged.data.tags["error"] == "step 2: the validation loss is nan"


def test_each_attempt_has_its_run_and_explorations_their_experiment(main):
    Attempt(main, number=1).train(1).end("failed", "x")
    Attempt(main, number=2).train(1).end()
    Attempt(main, "nolah", study=None).train(1).end()
    assert sync(main) == []
    assert set(runs(main)) == {"muon/seed-0#1", "muon/seed-0#2"}
    assert set(runs(main, "exploration")) == {"nolah/seed-0#1"}


def test_a_store_that_is_deleted_under_a_running_process_gets_no_promises(main):
    Attempt(main).train(3)
    mirror = Mirror(main, tracking_uri(main))
    assert mirror.sync(reports=False) == []
    later = Attempt(main, "nolah").train(3)
    (main / "mlflow.db").unlink()
    (problem,) = mirror.sync(reports=False)
    assert "deleted while in use" in problem
    assert not (later.folder / "mlflow.json").exists()


def test_a_run_that_the_store_lost_is_made_again_and_one_that_was_deleted_by_hand_is_not(main):
    Attempt(main, "muon").train(3).end()
    Attempt(main, "nolah").train(3)
    Attempt(main, "orthonoise").train(3)
    assert sync(main) == []
    ids = {name: run.info.run_id for name, run in runs(main).items()}
    client = Mirror(main, tracking_uri(main)).client
    client.delete_run(ids["nolah/seed-0#1"])
    with closing(sqlite3.connect(main / "mlflow.db")) as store, store:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            column = "run_uuid"
            store.execute(f"DELETE FROM {table} WHERE {column} = ?", (ids["muon/seed-0#1"],))
    for folder in main.glob("scratch/*/attempts/1"):
        if json.loads((folder / "start.json").read_text())["record"]["arm"] == "nolah":
            with (folder / "curve.jsonl").open("a") as file:
                file.write('{"step": 9, "val_loss": 1.0}\n')
    assert sync(main) == []
    found = runs(main)
    assert set(found) == {"muon/seed-0#1", "orthonoise/seed-0#1"}
    assert rows(main, found["muon/seed-0#1"], "curve/val_loss") == whole_curve(3)
    assert not pending(main)


def test_an_attempt_that_cannot_be_read_is_named_and_stops_no_other(main):
    broken = Attempt(main, "muon").train(2).end()
    (broken.folder / "record.json").write_text('{"status": "compl')
    Attempt(main, "nolah").train(2).end()
    (problem,) = sync(main)
    assert str(broken.folder.relative_to(main)) in problem
    assert runs(main)["nolah/seed-0#1"].info.status == "FINISHED"


def test_a_line_that_was_cut_short_ends_the_curve(main):
    attempt = Attempt(main).train(3)
    with (attempt.folder / "curve.jsonl").open("a") as file:
        file.write('{"step": 3, "val_')
    attempt.scratch.sweep()
    assert sync(main) == []
    (run,) = runs(main).values()
    assert rows(main, run, "curve/val_loss") == whole_curve(3)


def test_a_locked_store_is_waited_for(main):
    Attempt(main).train(3).end()
    store = sqlite3.connect(main / "mlflow.db", check_same_thread=False)
    store.execute("BEGIN EXCLUSIVE")
    threading.Timer(3.0, store.rollback).start()
    began = time.monotonic()
    assert sync(main) == []
    assert time.monotonic() - began > 2
    store.close()
    (run,) = runs(main).values()
    assert rows(main, run, "curve/val_loss") == whole_curve(3)


# ---- reports


def write_report(main: Path, verdicts: dict[str, str], e_value: float | None):
    folder = main / "reports" / STUDY
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    verdict = {"study": STUDY, "complete": True, "decision": f"Decided: {verdicts}."}
    verdict["verdicts"] = {arm: {"verdict": found, "reasons": []} for arm, found in verdicts.items()}
    (folder / "verdict.json").write_text(json.dumps(verdict))
    comparisons = [
        {"arm": arm, "decision": {}, "estimates": {"mean_diff": 0.25, "e_value": e_value}} for arm in verdicts
    ]
    comparisons.append({"arm": "adamw", "decision": None, "estimates": {"mean_diff": 9.0, "e_value": 9.0}})
    (folder / "stats.json").write_text(json.dumps({"comparisons": comparisons}))
    (folder / "report.md").write_text(f"# {verdicts}")
    (folder / "report.html").write_text("<p>")
    (folder / "figures" / "loss.svg").write_text("<svg/>")


def test_a_report_is_one_run_that_follows_its_changes(main):
    write_report(main, {"nolah": "INCONCLUSIVE", "orthonoise": "GO"}, e_value=2.0)
    Attempt(main).train(1).end()
    assert sync(main) == []
    before = runs(main)["report#"]
    assert before.data.tags["kind"] == "report"
    assert before.data.tags["verdict.orthonoise"] == "GO"
    assert before.data.metrics == {
        "effect/nolah": 0.25,
        "e_value/nolah": 2.0,
        "effect/orthonoise": 0.25,
        "e_value/orthonoise": 2.0,
    }
    artifacts = main / "mlartifacts" / STUDY / before.info.run_id / "artifacts"
    assert (artifacts / "figures" / "loss.svg").read_text() == "<svg/>"
    assert not pending(main)

    (main / "scratch" / "mlflow-reports" / f"{STUDY}.json").unlink()
    write_report(main, {"nolah": "INVALID"}, e_value=None)
    assert sync(main) == []
    after = runs(main)["report#"]
    assert after.info.run_id == before.info.run_id
    assert after.data.tags["verdict.nolah"] == "INVALID"
    assert "verdict.orthonoise" not in after.data.tags
    assert math.isnan(after.data.metrics["e_value/nolah"])
    assert (artifacts / "report.md").read_text() == "# {'nolah': 'INVALID'}"


# ---- processes


def test_a_killed_follower_leaves_neither_gaps_nor_duplicates(main):
    for seed in range(3):
        Attempt(main, seed=seed).train(400).end()

    def points_logged() -> int:
        with closing(sqlite3.connect(main / "mlflow.db", timeout=30)) as store:
            return store.execute("SELECT count(*) FROM metrics").fetchone()[0]

    with start_follower(main) as follower:
        wait_for(lambda: points_logged() > 500)
        follower.process.send_signal(signal.SIGKILL)
        follower.process.wait()
    assert pending(main)
    assert sync(main) == []
    found = runs(main)
    assert len(found) == 3
    for run in found.values():
        assert rows(main, run, "curve/val_loss") == whole_curve(400)
        assert run.info.status == "FINISHED"


def test_a_kill_while_the_store_is_made_does_not_spoil_it(main):
    (main / "mlflow.db").unlink()
    Attempt(main).train(3).end()
    with start_follower(main) as follower:
        part = main / "mlflow.db-part"
        wait_for(lambda: part.exists() and part.stat().st_size > 100_000)  # amid the migrations
        follower.process.kill()
        follower.process.wait()
    assert not (main / "mlflow.db").exists()
    assert sync_once(main, timeout_s=60) is None
    assert not part.exists()
    (run,) = runs(main).values()
    assert rows(main, run, "curve/val_loss") == whole_curve(3)


def test_two_that_copy_at_once_into_a_store_that_was_deleted_make_one_run_an_attempt(main):
    for seed in range(3):
        promise = AttemptMarker(uri=tracking_uri(main), run_id="0" * 32, points=50, done=True)
        write_marker(Attempt(main, seed=seed).train(50).end().folder / "mlflow.json", promise)
    assert not pending(main)
    (main / "mlflow.db").unlink()
    assert pending(main)
    for seed in range(3, 6):
        Attempt(main, seed=seed).train(50).end()
    said = []
    threads = [threading.Thread(target=lambda: said.append(sync_once(main, timeout_s=60))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [None, None]
    assert not pending(main)
    assert len(runs(main)) == 6
    for run in runs(main).values():
        assert rows(main, run, "curve/val_loss") == whole_curve(50)


def test_the_follower_copies_live_makes_a_last_pass_and_tells_no_secret(main):
    attempt = Attempt(main).train(2)
    with environment(HF_TOKEN=CANARY, MLFLOW_TRACKING_TOKEN=CANARY, MUONLAB_SECRET=CANARY):
        with start_follower(main) as follower:
            wait_for((attempt.folder / "mlflow.json").exists)
            assert len(runs(main)) == 1
            attempt.train(2).end()
            write_report(main, {"nolah": "GO"}, e_value=30.0)
        assert follower.process.returncode == 0
    assert not pending(main)
    assert runs(main)["muon/seed-0#1"].info.status == "FINISHED"
    assert "report#" in runs(main)
    for path in main.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


def test_the_follower_dies_with_a_killed_parent(main):
    code = (
        "import sys, time; from pathlib import Path; from muonlab.tracking import start_follower; "
        "follower = start_follower(Path(sys.argv[1])); print(follower.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(main)], stdout=subprocess.PIPE, text=True)
    follower = psutil.Process(int(parent.stdout.readline()))
    assert follower.is_running()
    parent.kill()
    parent.wait()
    wait_for(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE, seconds=15)


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    return f"http://eva:{CANARY}@127.0.0.1:{port}"


def test_a_server_that_is_not_there_costs_a_sentence_and_no_point(main):
    Attempt(main).train(5).end()
    with environment(MLFLOW_TRACKING_URI=closed_port()):
        began = time.monotonic()
        said = sync_once(main, timeout_s=30)
        assert time.monotonic() - began < 30
        assert pending(main)
    assert said is not None
    assert said.startswith("MLflow at http://127.0.0.1:")
    assert "kept in scratch/" in said
    assert CANARY not in said + (main / "scratch" / "mlflow.log").read_text()
    assert "MlflowException" in (main / "scratch" / "mlflow.log").read_text()
    assert sync(main) == []
    (run,) = runs(main).values()
    assert rows(main, run, "curve/val_loss") == whole_curve(5)


def test_a_server_that_hangs_holds_nobody_up(main, monkeypatch):
    monkeypatch.setattr(muonlab.tracking, "EXIT_WAIT_S", 1.0)
    Attempt(main).train(5).end()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        address = f"http://eva:{CANARY}@127.0.0.1:{silent.getsockname()[1]}"
        with environment(MLFLOW_TRACKING_URI=address):
            with start_follower(main):
                connection, _ = silent.accept()
                began = time.monotonic()
            assert time.monotonic() - began < 3
            connection.close()
            began = time.monotonic()
            said = sync_once(main, timeout_s=4)
            assert time.monotonic() - began < 7
    assert said is not None
    assert "was not up to date within 4 s" in said
    assert CANARY not in said
    assert sync(main) == []
    assert runs(main)["muon/seed-0#1"].info.status == "FINISHED"
