"""Laws of the pipeline's parts: what makes a cell another cell, how tuning chooses, what progress says."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import threading
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from muonlab.pipeline.attempts import AttemptProgress, CellScratch, Purpose
from muonlab.pipeline.conclude import read_evaluations, read_standing
from muonlab.pipeline.declare import read_registration
from muonlab.pipeline.fingerprint import code_fingerprint, environment
from muonlab.pipeline.gpus import accelerator, default_jobs, training_gpus
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.pool import Job, LocalWorker, PoolState
from muonlab.pipeline.processes import device_name, provenance
from muonlab.pipeline.progress import PoolWatcher, duration
from muonlab.registry.canonical import sha256_of
from muonlab.registry.cell import Cell, Inputs, OptimizerSpec
from muonlab.registry.errors import MuonlabError, UsageError
from muonlab.registry.settings import WorkloadSettings
from muonlab.stats.guardrails import diverged
from muonlab.training.loop import why_diverged

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    for name in ("optim", "muonlab"):
        shutil.copytree(PROJECT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def test_comments_and_docstrings_change_no_fingerprint(source: Path) -> None:
    before = code_fingerprint(source, "nolah")
    path = source / "optim" / "nolah.py"
    text = path.read_text()
    path.write_text('"""Other words."""\n' + text.partition('"""\n')[2] + "\n# a remark\n")
    assert path.read_text() != text
    assert code_fingerprint(source, "nolah") == before
    path.write_text(text)


@pytest.mark.parametrize(
    "file", ["optim/nolah.py", "optim/core/heuristics.py", "optim/__init__.py", "muonlab/training/loop.py"]
)
def test_code_that_can_change_a_run_changes_its_fingerprint(source: Path, file: str) -> None:
    before = code_fingerprint(source, "nolah")
    path = source / file
    text = path.read_text()
    path.write_text(text + "\nEXTRA = 1\n")
    assert code_fingerprint(source, "nolah") != before
    path.write_text(text)


def test_another_optimizers_file_changes_nothing(source: Path) -> None:
    before = code_fingerprint(source, "nolah")
    (source / "optim" / "newcomer.py").write_text("X = 1\n")
    path = source / "optim" / "muon.py"
    path.write_text(path.read_text() + "\nEXTRA = 1\n")
    assert code_fingerprint(source, "nolah") == before
    assert code_fingerprint(source, "muon") != before


def test_the_environment_names_what_computes() -> None:
    assert {"torch", "transformers", "numpy", "scipy", "python", "machine", "accelerator"} <= set(environment())


@pytest.mark.parametrize(
    ("torch_version", "visible", "seen"),
    [
        ("2.13.0", None, ["0", "1"]),
        ("2.13.0", "0", ["0"]),
        ("2.13.0+cu130", "1,0", ["1", "0"]),
        ("2.13.0", "1,-1,0", ["1"]),
        ("2.13.0", "", []),
        ("2.13.0", "-1", []),
        ("2.13.0+cpu", None, []),
    ],
)
def test_the_accelerator_is_what_torch_computes_on_and_not_what_is_built_in(
    torch_version: str, visible: str | None, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho Card A\necho Card A\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    install(tmp_path / "site", monkeypatch, "torch", torch_version)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert accelerator() == "Card A"
    assert environment()["accelerator"] == ("Card A" if seen else "none")
    assert (device_name() == "Card A") == bool(seen)
    assert training_gpus() == seen
    assert default_jobs() == (len(seen) or 2)


@pytest.mark.parametrize("gpu", ["1", None])
def test_a_worker_sees_its_own_gpu_alone(gpu: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    worker = LocalWorker(Layout(PROJECT, PROJECT), gpu=gpu)
    try:
        environ = psutil.Process(worker.process.pid).environ()
    finally:
        worker.stop()
    assert environ["CUDA_VISIBLE_DEVICES"] == (gpu or "0,1")


def test_kernels_that_compute_mamba_layers_are_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = environment()
    assert {"mamba_ssm", "causal_conv1d"} <= set(before)
    install(tmp_path, monkeypatch, "mamba-ssm", "2.2.4")
    install(tmp_path, monkeypatch, "causal_conv1d", "1.5.0")
    assert environment() == {**before, "mamba_ssm": "2.2.4", "causal_conv1d": "1.5.0"}


def install(site: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    """Lay the metadata of a package where Python looks first."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(site))


def cell(**changes: object) -> Cell:
    content: dict[str, object] = {
        "workload": "tiny",
        "arm": "muon",
        "seed": 0,
        "settings": WorkloadSettings(steps=300),
        "optimizer": OptimizerSpec(kind="muon", options={"lr": 0.01}),
        "inputs": Inputs(data="d", tokenizer="t", code="c", environment="e"),
    }
    return Cell.model_validate({**content, **changes})


def test_a_cell_of_a_model_built_here_keeps_the_digest_that_it_had_before_there_were_others() -> None:
    content = cell().model_dump(mode="json", exclude={"workload", "arm"})
    del content["inputs"]["model"]
    assert cell().digest == sha256_of(content)


def test_names_do_not_make_another_cell() -> None:
    assert cell(arm="muon-again", workload="small").digest == cell().digest


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"settings": WorkloadSettings(steps=301)},
        {"optimizer": OptimizerSpec(kind="muon", options={"lr": 0.02})},
        {"optimizer": OptimizerSpec(kind="nolah", options={"lr": 0.01})},
        *({"inputs": Inputs(**{"data": "d", "tokenizer": "t", "code": "c", "environment": "e", key: "x"})}
          for key in ("data", "tokenizer", "code", "environment", "model")),
    ],
)  # fmt: skip
def test_whatever_can_change_the_result_makes_another_cell(changes: dict[str, object]) -> None:
    assert cell(**changes).digest != cell().digest


def test_progress_counts_estimates_and_names_what_runs() -> None:
    out = io.StringIO()
    watcher = PoolWatcher("s", steps=1200, cells=4, out=out)
    watcher.began -= 60
    state = PoolState(waiting=[], done=["muon-0"], running={"muon-1": AttemptProgress(150, 300, 5.5, 30, 1, 0)})
    assert watcher.steps_done(state) == 450
    assert watcher.eta_s(state) == pytest.approx(100, rel=0.01)
    watcher(state)
    said = out.getvalue()
    for words in ("1/4 done", "1 running", "muon-1 150/300 loss 5.500", "ETA 1 min 40 s", "$0.00"):
        assert words in said


def test_steps_of_an_earlier_attempt_are_no_pace_of_this_one() -> None:
    watcher = PoolWatcher("s", steps=300, cells=1, out=io.StringIO())
    state = PoolState(waiting=[], running={"muon-0": AttemptProgress(150, 300, 5.5, 1, 1, 150)})
    assert watcher.eta_s(state) is None


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7800, "2 h 10 min")]
)
def test_durations_read_as_a_person_says_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@given(st.lists(st.one_of(st.floats(0.1, 20), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=12))
def test_trainer_and_statistics_agree_on_what_diverged(curve: list[float]) -> None:
    assert (why_diverged(curve) is not None) == diverged(curve)


def test_only_an_attempt_that_nobody_runs_is_recorded_as_abandoned(tmp_path: Path) -> None:
    scratch = CellScratch(Layout(root=tmp_path, main=tmp_path), "0" * 64)
    folder = scratch.folder / "attempts" / "1"
    hashes = dict.fromkeys(("data", "tokenizer", "code", "environment"), "x")
    started = {
        "study": None, "workload": "tiny", "arm": "muon", "seed": 0, "cell_digest": scratch.digest,
        "registration": None,
        "attempt": 1, "attempt_id": "a", "started_at": "2026-01-01T00:00:00+00:00", "device_count": 1,
        "hashes": {**hashes, "init": None, "order": None, "weights": None},
        "provenance": provenance(tmp_path).model_dump(),
    }  # fmt: skip
    with scratch.locked("muon-0"):
        folder.mkdir(parents=True)
        purpose = {"study": None, "registration": None, "price_usd_per_gpu_hour": 0}
        (folder / "start.json").write_text(json.dumps({"record": started, "purpose": purpose}))
        scratch.sweep_unless_held()
        assert scratch.records() == []
    scratch.sweep_unless_held()
    assert [record.status for record in scratch.records()] == ["abandoned"]


def test_what_a_worker_left_without_a_record_is_charged_and_what_it_recorded_is_not_charged_twice(
    tmp_path: Path,
) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "muonlab").symlink_to(PROJECT / "muonlab")
    layout = Layout(root=tmp_path, main=tmp_path)
    job = Job(cell(), Purpose("001-x", None, price_usd_per_gpu_hour=2.8, device_count=2))
    folder = CellScratch(layout, job.cell.digest).folder / "attempts" / "1"
    worker = LocalWorker(layout)
    try:
        worker.job = job
        assert worker.unrecorded_seconds() == 0  # before it begins
        folder.mkdir(parents=True)
        (folder / "alive.json").write_text('{"seconds": 900.0}')
        assert worker.unrecorded_seconds() == pytest.approx(900)
        (folder / "record.json").touch()
        assert worker.unrecorded_seconds() == 0
    finally:
        worker.stop()


def test_files_that_the_pipeline_did_not_write_are_named_and_not_read(tmp_path: Path) -> None:
    layout = Layout(root=tmp_path, main=tmp_path)
    for name, read in (
        ("experiments/s/registration.json", read_registration),
        ("reports/s/evaluations.jsonl", read_evaluations),
        ("reports/s/stats.json", read_standing),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
        with pytest.raises(MuonlabError, match=name):
            read(layout, "s")


def test_a_trainer_waits_for_a_sweep_and_not_for_a_trainer(tmp_path: Path) -> None:
    scratch = CellScratch(Layout(root=tmp_path, main=tmp_path), "0" * 64)
    scratch.folder.mkdir(parents=True)
    held = FileLock(scratch.folder / "lock", thread_local=False)
    held.acquire()
    with pytest.raises(UsageError, match="another process is training it"), scratch.locked("muon-0"):
        pass
    threading.Timer(0.2, held.release).start()
    with scratch.locked("muon-0"):
        pass
