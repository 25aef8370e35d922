"""A cell small enough to train in a second: what the tests of `muonlab.training` share.

As a script it trains such a cell and prints each step it has done, to be killed:
    python training_toy.py KIND DATA_DIR WORK_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import optim
from muonlab.registry.cell import Cell, Inputs, OptimizerSpec
from muonlab.registry.settings import DataSettings, ModelSettings, WorkloadSettings
from muonlab.training.loop import CurveRow, Progress, TrainOutcome, train

TOY_DATA = DataSettings(max_documents=6, vocab_size=300, sequence_length=32)
TOY_MODEL = ModelSettings(
    hidden_size=16,
    layers=["mamba", "attention"],
    attention_heads=2,
    key_value_heads=1,
    mamba_d_head=16,
    mamba_d_state=4,
    mamba_chunk_size=16,
    mlp_size=16,
)
TOY = WorkloadSettings(
    data=TOY_DATA,
    model=TOY_MODEL,
    steps=7,
    batch_size=2,
    warmup_steps=2,
    eval_every=1,
    eval_blocks=4,
    diagnose_every=2,
    checkpoint_every=2,
    sample_tokens=5,
)


def toy_cell(kind: str = "muon", *, seed: int = 3, lr: float = 0.01, **changed: object) -> Cell:
    return Cell(
        workload="toy",
        arm=kind,
        seed=seed,
        settings=WorkloadSettings(**{**TOY.model_dump(), **changed}),
        optimizer=OptimizerSpec(kind=kind, options=optim.parse_options(kind, {"lr": lr}).model_dump(mode="json")),
        inputs=Inputs(data="0", tokenizer="0", code="0", environment="0"),
    )


def train_quietly(cell: Cell, data: Path, work: Path) -> TrainOutcome:
    return train(cell, data, work, on_point=lambda _: None, on_progress=lambda _: None)


def train_until(cell: Cell, data: Path, work: Path, step: int) -> None:
    """Train, and stop dead when the point of `step` is handed over: before that step's checkpoint."""

    class StopHere(Exception):
        pass

    def on_point(row: CurveRow) -> None:
        if row["step"] == step:
            raise StopHere

    with pytest.raises(StopHere):
        train(cell, data, work, on_point=on_point, on_progress=lambda _: None)


def timeless(curve: tuple[CurveRow, ...]) -> list[CurveRow]:
    """A curve without wall seconds: all of it that a repetition must reproduce."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in curve]


def optimizer_state(work: Path) -> dict:
    """Optimizer state of the newest checkpoint."""
    newest = work / "checkpoints" / (work / "checkpoints" / "latest").read_text().strip()
    return torch.load(newest / "optimizer.pt", weights_only=True)


def bitwise_equal(a: object, b: object) -> bool:
    """Whether two nests of dicts, sequences, tensors and plain values are the same to the last bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(bitwise_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(bitwise_equal, a, b))
    return a == b


def assert_same_run(a: TrainOutcome, a_work: Path, b: TrainOutcome, b_work: Path) -> None:
    assert (a.status, a.val_loss, a.weights_sha256) == (b.status, b.val_loss, b.weights_sha256)
    assert timeless(a.curve) == timeless(b.curve)
    assert bitwise_equal(optimizer_state(a_work), optimizer_state(b_work))


if __name__ == "__main__":
    kind, data_dir, work_dir = sys.argv[1:]

    def print_step(row: CurveRow) -> None:
        print(row["step"], flush=True)

    def print_warning(progress: Progress) -> None:
        if progress.warning:
            print(progress.warning, flush=True)

    train(toy_cell(kind), Path(data_dir), Path(work_dir), on_point=print_step, on_progress=print_warning)
