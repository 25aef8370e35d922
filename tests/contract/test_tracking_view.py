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
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from tracking_attempts import COMMIT, STARTED, STARTED_MS, STUDY, Attempt, environment, wait_for, whole_curve

import muonlab.tracking
from muonlab.registry import ledger
from muonlab.tracking import pending, rebuild, start_follower, sync_once, tracking_uri
from muonlab.tracking.content import colours, views
from muonlab.tracking.markers import FORM, AttemptMarker, system_lines, write_marker
from muonlab.tracking.process import Sampler, lives
from muonlab.tracking.sync import Mirror

pytestmark = pytest.mark.slow

CANARY = "canary-5f0e8a1b"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """An sqlite store without runs: made once, since its migrations take seconds."""
    main = tmp_path_factory.mktemp("store")
    assert Mirror(main, tracking_uri(main)).store.client.search_experiments()
    return main / "mlflow.db"


@pytest.fixture
def main(tmp_path, monkeypatch, empty_store):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def sync(main: Path, *, ledger=False) -> list[str]:
    """One pass by a process that knows nothing of earlier ones, but in this process."""
    return Mirror(main, tracking_uri(main)).sync(reports=True, ledger=ledger)


def enter(main: Path, *attempts: Attempt) -> None:
    """Append the attempts' records to the ledger."""
    ledger.append(main / "experiments" / "ledger.jsonl", [attempt.record() for attempt in attempts])


def content_of(main: Path) -> dict:
    """All that a store shows of a study, but for the random ids of its runs."""
    named = everything(main)
    parent = named[STUDY].info.run_id if STUDY in named else None
    shown = {}
    for name, run in named.items():
        tags = {k: "the study's" if v == parent else v for k, v in run.data.tags.items()}
        data = [(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs]
        with closing(sqlite3.connect(main / "mlflow.db")) as store:
            query = "SELECT key, step, timestamp, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY 1, 2, 3"
            metrics = store.execute(query, (run.info.run_id,)).fetchall()
        span = (run.info.status, run.info.start_time, run.info.end_time)
        shown[name] = (span, tags, run.data.params, data, metrics)
    return shown


def everything(main: Path, experiment: str = STUDY) -> dict:
    """All runs of an experiment by name; a name that is there twice fails."""
    client = Mirror(main, tracking_uri(main)).store.client
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    named = {run.info.run_name: run for run in found}
    assert len(named) == len(found), [run.info.run_name for run in found]
    return named


def runs(main: Path, experiment: str = STUDY) -> dict:
    """The runs of an experiment's attempts, each under the study's run if it is one of a study."""
    named = everything(main, experiment)
    parent = named.pop(experiment, None)
    for name, run in named.items():
        expected = parent.info.run_id if parent else None
        assert run.data.tags.get("mlflow.parentRunId") == expected, name
    return named


def rows(main: Path, run, key: str) -> list[tuple]:
    """(step, timestamp, value) of every stored point of a series, duplicates included."""
    with closing(sqlite3.connect(main / "mlflow.db")) as store:
        query = "SELECT step, timestamp, value FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step"
        return store.execute(query, (run.info.run_id, key)).fetchall()


def test_a_finished_attempt_is_one_whole_run(main):
    attempt = Attempt(main, "nolah", 3).train(5).end()
    assert sync(main) == []
    ((name, run),) = runs(main).items()
    assert name == "nolah/seed-3"
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
    assert runs(main)["muon/seed-3"].info.status == "RUNNING"
    killed.scratch.sweep()  # what the next start does first
    assert sync(main) == []
    found = runs(main)
    assert {name: (run.info.status, run.data.tags["status"]) for name, run in found.items()} == {
        "muon/seed-0": ("FINISHED", "completed"),
        "muon/seed-1": ("FINISHED", "diverged"),
        "muon/seed-2": ("FAILED", "failed"),
        "muon/seed-3": ("KILLED", "abandoned"),
    }
    diverged = found["muon/seed-1"]
    assert "val_loss" not in diverged.data.metrics
    assert math.isnan(diverged.data.metrics["curve/val_loss"])
    assert diverged.data.tags["error"] == "step 2: the validation loss is nan"


def test_each_attempt_has_its_run_and_explorations_their_experiment(main):
    Attempt(main, number=1).train(1).end("failed", "x")
    Attempt(main, number=2).train(1).end()
    Attempt(main, "nolah", study=None).train(1).end()
    assert sync(main) == []
    assert set(runs(main)) == {"muon/seed-0", "muon/seed-0 (attempt 2)"}
    assert set(runs(main, "exploration")) == {"nolah/seed-0"}


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
    client = Mirror(main, tracking_uri(main)).store.client
    client.delete_run(ids["nolah/seed-0"])
    with closing(sqlite3.connect(main / "mlflow.db")) as store, store:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            column = "run_uuid"
            store.execute(f"DELETE FROM {table} WHERE {column} = ?", (ids["muon/seed-0"],))
    for folder in main.glob("scratch/*/attempts/1"):
        if json.loads((folder / "start.json").read_text())["record"]["arm"] == "nolah":
            with (folder / "curve.jsonl").open("a") as file:
                file.write('{"step": 9, "val_loss": 1.0}\n')
    assert sync(main) == []
    found = runs(main)
    assert set(found) == {"muon/seed-0", "orthonoise/seed-0"}
    assert rows(main, found["muon/seed-0"], "curve/val_loss") == whole_curve(3)
    assert not pending(main)


def test_an_attempt_that_cannot_be_read_is_named_and_stops_no_other(main):
    broken = Attempt(main, "muon").train(2).end()
    (broken.folder / "record.json").write_text('{"status": "compl')
    Attempt(main, "nolah").train(2).end()
    (problem,) = sync(main)
    assert str(broken.folder.relative_to(main)) in problem
    assert runs(main)["nolah/seed-0"].info.status == "FINISHED"


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
    estimates = {"n": 4, "ci95": [-0.125, 0.625]}
    comparisons = [
        {"arm": arm, "decision": {}, "estimates": estimates | {"mean_diff": 0.25, "e_value": e_value}}
        for arm in verdicts
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
    before = everything(main)[STUDY]
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
    after = everything(main)[STUDY]
    assert after.info.run_id == before.info.run_id
    assert after.data.tags["verdict.nolah"] == "INVALID"
    assert "verdict.orthonoise" not in after.data.tags
    assert math.isnan(after.data.metrics["e_value/nolah"])
    assert (artifacts / "report.md").read_text() == "# {'nolah': 'INVALID'}"


# ---- studies


def test_a_study_has_one_run_before_any_report_and_its_attempts_lie_under_it(main):
    declare(main)
    attempt = Attempt(main, "nolah").train(2)
    assert sync(main) == []
    study = everything(main)[STUDY]
    assert (study.info.status, study.data.tags["status"]) == ("SCHEDULED", "incomplete")
    attempt.train(1).end()
    Attempt(main, "muon").train(1).end()
    write_report(main, {"nolah": "GO"}, e_value=30.0)
    assert sync(main) == []
    found = runs(main)  # which looks at their parent
    assert everything(main)[STUDY].info.run_id == study.info.run_id
    assert everything(main)[STUDY].info.status == "FINISHED"
    palette = colours(["muon", "nolah", "orthonoise"])
    assert {name: run.data.tags["mlflow.runColor"] for name, run in found.items()} == {
        "muon/seed-0": palette["muon"],
        "nolah/seed-0": palette["nolah"],
    }


def declare(main: Path) -> None:
    folder = main / "experiments" / STUDY
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(
        f"study: {{slug: {STUDY}, question: Which, workload: toy, baseline: muon, challengers: [nolah, orthonoise], "
        "seeds: [0], decision: {min_effect: 1%}, price_usd_per_gpu_hour: 0, budget_usd: 0}\n"
    )


def test_the_colours_are_those_of_the_report():
    from muonlab.reporting.figures import paper

    assert list(colours([str(i) for i in range(9)]).values()) == [paper.INK, *paper.ARM_COLOURS]


def test_a_store_of_the_earlier_form_is_taken_along(main):
    write_report(main, {"nolah": "GO"}, e_value=30.0)
    done, running = Attempt(main, "nolah", number=2).train(3).end(), Attempt(main, "muon").train(3)
    client = Mirror(main, tracking_uri(main)).store.client
    experiment = client.create_experiment(STUDY, artifact_location=str(main / "mlartifacts" / STUDY))
    old = client.create_run(experiment, tags={"kind": "report", "study": STUDY}, run_name="report")
    client.set_terminated(old.info.run_id)
    ids = set()
    for attempt in (done, running):
        name = f"{attempt.cell.arm}/seed-0"
        run = client.create_run(experiment, tags={"kind": "attempt", "attempt_id": attempt.id}, run_name=name)
        ids.add(run.info.run_id)
        promise = {"uri": tracking_uri(main), "run_id": run.info.run_id, "points": 3, "done": attempt is done}
        (attempt.folder / "mlflow.json").write_text(json.dumps(promise))
    assert sync(main) == []
    found = runs(main)
    assert set(found) == {"nolah/seed-0 (attempt 2)", "muon/seed-0"}
    assert {run.info.run_id for run in found.values()} == ids
    assert everything(main)[STUDY].info.run_id == old.info.run_id
    assert not pending(main)


def test_a_study_whose_run_was_deleted_by_hand_gets_no_other(main):
    Attempt(main).train(1).end()
    assert sync(main) == []
    client = Mirror(main, tracking_uri(main)).store.client
    client.delete_run(everything(main)[STUDY].info.run_id)
    Attempt(main, "nolah").train(1).end()
    write_report(main, {"nolah": "GO"}, e_value=30.0)
    assert sync(main) == []
    assert set(everything(main)) == {"muon/seed-0", "nolah/seed-0"}
    assert not pending(main)


def test_a_view_that_a_person_changed_stays(main):
    Attempt(main).train(1).end()
    assert sync(main) == []
    client = Mirror(main, tracking_uri(main)).store.client
    tag, *others = views()
    experiment = client.get_experiment_by_name(STUDY)
    assert views().items() <= experiment.tags.items()
    client.set_experiment_tag(experiment.experiment_id, tag, "mine")
    Attempt(main, "nolah").train(1).end()
    assert sync(main) == []
    found = client.get_experiment_by_name(STUDY).tags
    assert found[tag] == "mine"
    assert {other: views()[other] for other in others}.items() <= found.items()


# ---- runs whose process is gone


def dead_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_a_run_whose_process_is_gone_is_closed_and_its_record_has_the_last_word(main):
    Attempt(main, "nolah").train(4)  # by process 1, which lives
    dead = Attempt(main, "muon").train(4).begin(dead_process(), STARTED)
    reused = Attempt(main, "orthonoise").train(1).begin(os.getpid(), "2001-01-01T00:00:00+00:00")
    assert sync(main) == []
    assert not pending(main)
    assert {name: (run.info.status, run.data.tags["status"]) for name, run in runs(main).items()} == {
        "nolah/seed-0": ("RUNNING", "running"),
        "muon/seed-0": ("KILLED", "abandoned"),
        "orthonoise/seed-0": ("KILLED", "abandoned"),
    }
    assert runs(main)["muon/seed-0"].info.end_time == STARTED_MS + 125 * 3
    dead.train(1).end()
    reused.scratch.sweep()
    assert pending(main)
    assert sync(main) == []
    found = runs(main)
    assert (found["muon/seed-0"].info.status, found["muon/seed-0"].data.tags["status"]) == ("FINISHED", "completed")
    assert "error" not in found["muon/seed-0"].data.tags
    assert found["orthonoise/seed-0"].info.status == "KILLED"
    assert rows(main, found["muon/seed-0"], "curve/val_loss") == whole_curve(5)


def test_a_process_that_dies_between_two_looks_is_noticed_from_the_files(main):
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        attempt = Attempt(main).train(2).begin(alive.pid, STARTED)
        assert lives(json.loads((attempt.folder / "start.json").read_text()))
        assert sync(main) == []
        assert not pending(main)
    finally:
        alive.kill()
        alive.wait()
    assert pending(main)


@pytest.mark.parametrize("whose", ["own", "another"])
def test_a_run_without_anything_on_disk_is_closed_in_the_own_store_only(main, tmp_path, whose):
    variables = {} if whose == "own" else {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/other.db"}
    shutil.copyfile(main / "mlflow.db", main / "other.db")
    with environment(**variables):
        Attempt(main).train(3)
        assert sync(main) == []
        shutil.rmtree(main / "scratch")
        assert sync(main) == []
        (run,) = runs(main).values()
    closed = ("KILLED", "abandoned", STARTED_MS + 250)
    found = (run.info.status, run.data.tags["status"], run.info.end_time)
    assert found == (closed if whose == "own" else ("RUNNING", "running", None))


# ---- the ledger


def test_a_store_that_was_deleted_is_the_same_again_from_ledger_and_outputs(main, empty_store):
    """The golden rule of a view: all of it can be made again, with or without the scratch folder."""
    declare(main)
    write_report(main, {"nolah": "GO"}, e_value=30.0)
    made = [
        Attempt(main, "muon").train(4).end().adopt(),
        Attempt(main, "nolah").train(3, lambda step: math.nan if step == 2 else 5 - step / 1000).end("diverged", "nan"),
        Attempt(main, "orthonoise").train(2).end("failed", "no more memory"),
        Attempt(main, "orthonoise", number=2).train(4).end().adopt(),
    ]
    made[1].adopt()
    enter(main, *made)
    snapshot = {
        "cells": [{"arm": a.cell.arm, "seed": 0, "digest": a.cell.digest} for a in made],
        "optimizers": {a.cell.arm: a.cell.optimizer.model_dump(mode="json") for a in made},
        "settings": made[0].cell.settings.model_dump(mode="json"),
    }
    (main / "reports" / STUDY / "registry.json").write_text(json.dumps(snapshot))
    assert sync(main) == []
    before = content_of(main)
    assert len(before) == 5
    shutil.copyfile(empty_store, main / "mlflow.db")
    shutil.rmtree(main / "scratch")
    assert sync(main, ledger=True) == []
    after = content_of(main)
    # Of an attempt whose curve.csv is not kept the record has the losses, but neither their times nor other columns.
    lost, kept = (shown.pop("orthonoise/seed-0") for shown in (after, before))
    assert after == before
    assert lost[:4] == kept[:4]
    points = [(key, step, value) for key, step, _, value, _ in kept[4]]
    assert [(key, step, value) for key, step, _, value, _ in lost[4]] == [
        point for point in points if point[0] == "curve/val_loss" or "/" not in point[0]
    ]
    assert rebuild(main)
    assert sync(main, ledger=True) == []
    again = content_of(main)
    assert again.pop("orthonoise/seed-0") == lost
    assert again == after


def test_an_attempt_in_scratch_and_in_the_ledger_is_one_run(main):
    enter(main, Attempt(main).train(3).end(), Attempt(main, "nolah").train(3).end())
    for _ in range(2):
        assert sync(main, ledger=True) == []
        assert set(runs(main)) == {"muon/seed-0", "nolah/seed-0"}
        for run in runs(main).values():
            assert rows(main, run, "curve/val_loss") == whole_curve(3)


@pytest.mark.parametrize("has_outputs", [True, False])
def test_what_was_copied_live_is_finished_from_the_ledger(main, has_outputs):
    attempt = Attempt(main).train(3)
    assert sync(main) == []
    attempt.train(2).end()
    if has_outputs:
        attempt.adopt()
    enter(main, attempt)
    shutil.rmtree(main / "scratch")
    assert sync(main) == []  # which finds the run that nobody finishes any more
    (run,) = runs(main).values()
    assert (run.info.status, run.data.tags["status"]) == ("FINISHED", "completed")
    found = rows(main, run, "curve/val_loss")
    assert [(step, value) for step, _, value in found] == [(step, value) for step, _, value in whole_curve(5)]
    if has_outputs:
        assert found == whole_curve(5)


def test_the_ledger_goes_on_where_it_was_and_an_edited_line_is_told_and_not_shown(main):
    path = main / "experiments" / "ledger.jsonl"
    first, second = Attempt(main).train(1).end(), Attempt(main, "nolah").train(1).end()
    third = Attempt(main, "orthonoise").train(1).end().record()
    enter(main, first, second)
    path.write_text(path.read_text().replace('"status":"completed"', '"status":"diverged"', 1))
    shutil.rmtree(main / "scratch")
    (problem,) = sync(main, ledger=True)
    assert "ledger.jsonl line 1" in problem
    assert "edited" in problem
    assert set(runs(main)) == {"nolah/seed-0"}
    with path.open("a") as file:
        file.write(ledger.to_line(third) + "\n" + ledger.to_line(third)[:40])
    assert sync(main, ledger=True) == []
    assert set(runs(main)) == {"nolah/seed-0", "orthonoise/seed-0"}


def test_a_run_that_was_deleted_while_it_ran_is_not_revived_by_the_ledger(main):
    attempt = Attempt(main).train(1)
    assert sync(main) == []
    client = Mirror(main, tracking_uri(main)).store.client
    client.delete_run(runs(main)["muon/seed-0"].info.run_id)
    enter(main, attempt.end())
    shutil.rmtree(main / "scratch")
    assert sync(main, ledger=True) == []
    assert runs(main) == {}


# ---- what the process uses


def test_the_process_of_a_running_attempt_is_read_and_shown(main):
    began = time.time()
    attempt = Attempt(main).begin(os.getpid(), datetime.fromtimestamp(began, UTC).isoformat())
    start = json.loads((attempt.folder / "start.json").read_text())
    sampler = Sampler(from_s=0.2, every_s=0.2)
    while len(system_lines(attempt.folder)) < 3:
        sampler.sample([(attempt.folder, start)])  # at full load, so near 100 % of one core
        assert time.time() < began + 30
    assert sync(main) == []
    attempt.end()
    assert sync(main) == []
    (run,) = runs(main).values()
    shown = rows(main, run, "system/process_cpu_percent")
    assert len(shown) == len(rows(main, run, "system/process_memory_megabytes")) == 3
    assert all(began * 1000 + 150 < at < (time.time() + 1) * 1000 for _, at, _ in shown)
    assert 5 < max(value for *_, value in shown) < 150 * max(1, psutil.Process().num_threads())
    memory = psutil.Process().memory_info().rss / 1e6
    assert run.data.metrics["system/process_memory_megabytes"] == pytest.approx(memory, rel=0.5)


def test_short_attempts_and_those_of_dead_processes_are_not_read(main):
    now = datetime.now(UTC).isoformat()
    attempts = [Attempt(main).begin(os.getpid(), now), Attempt(main, "nolah").begin(dead_process(), now)]
    starts = [(a.folder, json.loads((a.folder / "start.json").read_text())) for a in attempts]
    young, eager = Sampler(), Sampler(from_s=0, every_s=0)
    for _ in range(3):
        young.sample(starts)
        eager.sample(starts[1:])
    assert not list(main.rglob("system.jsonl"))


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
        promise = AttemptMarker(uri=tracking_uri(main), run_id="0" * 32, form=FORM, points=50, done=True)
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
    assert runs(main)["muon/seed-0"].info.status == "FINISHED"
    assert "verdict.nolah" in everything(main)[STUDY].data.tags
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
    assert runs(main)["muon/seed-0"].info.status == "FINISHED"
