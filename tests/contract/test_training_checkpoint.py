"""A checkpoint is whole or not there; a damaged one is passed over aloud, a foreign one is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import training_toy
from training_toy import assert_same_run, toy_cell, train_quietly, train_until

import optim
from muonlab.training.checkpoint import CheckpointError
from muonlab.training.loop import Progress, TrainOutcome, train

pytest_plugins = ["training_fixtures"]


@pytest.fixture(scope="module")
def whole(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainOutcome, Path]:
    """An uninterrupted run of 7 steps and its folder."""
    work = tmp_path_factory.mktemp("whole")
    return train_quietly(toy_cell(), toy_data, work), work


@pytest.fixture
def cut(toy_data: Path, tmp_path: Path) -> Path:
    """The folder of the same run, stopped in step 5: it holds the checkpoints of steps 2 and 4."""
    train_until(toy_cell(), toy_data, tmp_path / "cut", 5)
    assert [p.name for p in sorted((tmp_path / "cut/checkpoints").glob("step-*"))] == [
        "step-000002",
        "step-000004",
    ]
    return tmp_path / "cut"


def rerun(data: Path, work: Path) -> tuple[TrainOutcome, list[str]]:
    """Train on; the outcome and what was said aloud."""
    warnings: list[str] = []

    def listen(progress: Progress) -> None:
        if progress.warning:
            warnings.append(progress.warning)

    return train(toy_cell(), data, work, on_point=lambda _: None, on_progress=listen), warnings


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "state.json", "sha256.json"])
def test_a_damaged_checkpoint_is_passed_over_aloud(
    damage: object, name: str, cut: Path, toy_data: Path, whole: tuple[TrainOutcome, Path]
) -> None:
    damage(cut / "checkpoints" / "step-000004" / name)
    run, warnings = rerun(toy_data, cut)
    assert len(warnings) == 1
    assert "step-000004" in warnings[0]
    assert run.resumed_from_step == 2
    assert_same_run(*whole, run, cut)


def test_with_every_checkpoint_damaged_the_run_starts_afresh(
    cut: Path, toy_data: Path, whole: tuple[TrainOutcome, Path]
) -> None:
    for path in (cut / "checkpoints").glob("step-*/optimizer.pt"):
        flip_bit(path)
    run, warnings = rerun(toy_data, cut)
    assert (len(warnings), run.resumed_from_step) == (2, 0)
    assert_same_run(*whole, run, cut)


def test_only_two_checkpoints_are_kept_and_latest_names_the_newest(whole: tuple[TrainOutcome, Path]) -> None:
    folder = whole[1] / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000006", "step-000007"]
    assert (folder / "latest").read_text() == "step-000007\n"


def test_a_half_written_checkpoint_is_never_read(cut: Path, toy_data: Path) -> None:
    half = cut / "checkpoints" / ".writing-x" / "step-000006"
    shutil.copytree(cut / "checkpoints" / "step-000004", half)
    (half / "sha256.json").unlink()
    run, warnings = rerun(toy_data, cut)
    assert (run.resumed_from_step, warnings) == (4, [])
    assert not half.parent.exists()


@pytest.mark.parametrize("changed", [{"seed": 4}, {"kind": "nolah"}, {"steps": 8}])
def test_a_checkpoint_of_another_cell_is_refused(changed: dict[str, object], cut: Path, toy_data: Path) -> None:
    with pytest.raises(CheckpointError, match="belongs to the cell"):
        train_quietly(toy_cell(**changed), toy_data, cut)


class Payload:
    """Unpickled without `weights_only`, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_code_is_refused(cut: Path, toy_data: Path) -> None:
    folder = cut / "checkpoints" / "step-000004"
    torch.save({"state": Payload(cut / "ran")}, folder / "optimizer.pt")
    hashes = json.loads((folder / "sha256.json").read_text())
    hashes["optimizer.pt"] = hashlib.sha256((folder / "optimizer.pt").read_bytes()).hexdigest()
    (folder / "sha256.json").write_text(json.dumps(hashes))
    with pytest.raises(CheckpointError, match="hashes hold, but"):
        rerun(toy_data, cut)
    assert not (cut / "ran").exists()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow past 40 kB: the weights fit, the optimizer state does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_earlier_checkpoints(
    cut: Path, toy_data: Path, whole: tuple[TrainOutcome, Path]
) -> None:
    said = r"step 6 cannot be written .* intact: step-000004, step-000002"
    with full_disk(), pytest.raises(CheckpointError, match=said):
        rerun(toy_data, cut)
    assert sorted(p.name for p in (cut / "checkpoints").iterdir()) == ["latest", "step-000002", "step-000004"]
    run, warnings = rerun(toy_data, cut)
    assert (run.resumed_from_step, warnings) == (4, [])
    assert_same_run(*whole, run, cut)


@pytest.mark.slow
@pytest.mark.parametrize("kind", optim.names())
def test_killed_at_a_random_step_a_run_ends_as_if_it_had_not_been(kind: str, toy_data: Path, tmp_path: Path) -> None:
    """A real child gets SIGKILL when it has said a step, which is drawn afresh in every run."""
    cell = toy_cell(kind)
    whole = train_quietly(cell, toy_data, tmp_path / "whole")
    kill_at = random.SystemRandom().randrange(7)
    work = tmp_path / f"killed-{kill_at}"
    child = subprocess.Popen(
        [sys.executable, training_toy.__file__, kind, toy_data, work],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said = []
    for line in child.stdout:
        said.append(line.strip())
        if line.strip() == str(kill_at):
            child.kill()
            break
    assert child.wait() == -signal.SIGKILL, said
    resumed = train_quietly(cell, toy_data, work)
    assert_same_run(whole, tmp_path / "whole", resumed, work)
