"""The same run made another way: in micro-batches, on two processes, in another precision; what it says of itself."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_toy
from pydantic import ValidationError
from safetensors.torch import load_file
from training_toy import TOY, toy_cell, train_quietly
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from muonlab.registry.errors import UsageError
from muonlab.registry.settings import DataSettings, WorkloadSettings
from muonlab.training import model as models
from muonlab.training.data import prepare
from muonlab.training.device import place
from muonlab.training.distributed import Ranks
from muonlab.training.evaluate import EVALUATION_BATCH, EVALUATION_LOGITS, evaluate, evaluation_batch
from muonlab.training.loop import TrainOutcome
from muonlab.training.timing import PARTS

pytest_plugins = ["training_fixtures"]


def farthest(a: TrainOutcome, b_weights: Path) -> float:
    """Relative distance of the final weights of two runs."""
    mine, other = load_file(a.weights), load_file(b_weights)
    norm = torch.linalg.vector_norm
    apart = torch.cat([(mine[name] - other[name]).flatten() for name in mine])
    return (norm(apart) / norm(torch.cat([weight.flatten() for weight in mine.values()]))).item()


def assert_same_losses(a: TrainOutcome, b: TrainOutcome, tolerance: float) -> None:
    assert [row["step"] for row in a.curve] == [row["step"] for row in b.curve]
    for mine, other in zip(a.curve, b.curve, strict=True):
        assert mine["val_loss"] == pytest.approx(other["val_loss"], rel=tolerance)


# ---------------------------------------------------------------------- accumulation


def test_micro_batches_make_the_run_of_the_whole_batch(toy_data: Path, tmp_path: Path) -> None:
    """To the rounding of a sum of two halves, through seven steps of an optimizer that amplifies it."""
    whole = train_quietly(toy_cell("adamw", batch_size=4), toy_data, tmp_path / "whole")
    for size in (1, 2, 4):
        cell = toy_cell("adamw", batch_size=4, micro_batch_size=size)
        parts = train_quietly(cell, toy_data, tmp_path / str(size))
        assert (parts.tokens, parts.order_sha256, parts.init_sha256) == (
            *(whole.tokens, whole.order_sha256),
            whole.init_sha256,
        )
        assert_same_losses(parts, whole, 1e-5)
        assert farthest(parts, whole.weights) < 1e-4
        assert (parts.weights_sha256 == whole.weights_sha256) == (size == 4)
        assert parts.curve[1]["grad_norm"] == pytest.approx(whole.curve[1]["grad_norm"], rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValidationError, match="micro_batch_size is 3, which does not divide batch_size = 4"):
        WorkloadSettings(steps=1, eval_every=1, batch_size=4, micro_batch_size=3)
    with pytest.raises(UsageError, match="batch_size is 4, which 3 processes do not divide"):
        Ranks(0, 3).share(4)


def test_every_sequence_of_a_batch_is_some_ranks() -> None:
    for size in (1, 2, 4):
        shares = [list(range(8))[Ranks(rank, size).share(8)] for rank in range(size)]
        assert [i for share in shares for i in share] == list(range(8))
        assert len({len(share) for share in shares}) == 1


# ---------------------------------------------------------------------- ranks


def two_ranks(kind: str, data: Path, work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The toy run under torchrun, gloo on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    return subprocess.run(
        [*launcher, f"--master-port={port}", training_toy.__file__, kind, str(data), str(work), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(toy_data: Path, tmp_path: Path) -> None:
    """Losses within 1e-6, as the sum over ranks rounds otherwise; every point is told once, by the first."""
    one = train_quietly(toy_cell(), toy_data, tmp_path / "one")
    done = two_ranks("muon", toy_data, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == list(range(8))
    two = evaluate(tmp_path / "two" / "weights.safetensors", TOY, toy_data)
    assert two.val_loss == pytest.approx(one.val_loss, rel=1e-6)
    assert farthest(one, tmp_path / "two" / "weights.safetensors") < 1e-5
    # What two began, one goes on with: nothing in a checkpoint depends on their number.
    again = train_quietly(toy_cell(), toy_data, tmp_path / "two")
    assert (again.resumed_from_step, again.weights_sha256) == (7, two.weights_sha256)
    assert_same_losses(again, one, 1e-6)


# ---------------------------------------------------------------------- precision


def test_autocast_rounds_products_and_leaves_float32_weights(toy_data: Path, tmp_path: Path) -> None:
    """On a CPU, where torch can do the same: the losses are those of float32 to bfloat16's 8 bits, and no closer."""
    exact = train_quietly(toy_cell("adamw"), toy_data, tmp_path / "exact")
    cell = toy_cell("adamw", precision="bfloat16-autocast")
    rounded = train_quietly(cell, toy_data, tmp_path / "rounded")
    assert (exact.precision, rounded.precision) == ("float32", "bfloat16 autocast over float32")
    assert rounded.init_sha256 == exact.init_sha256
    assert {weight.dtype for weight in load_file(rounded.weights).values()} == {torch.float32}
    assert_same_losses(rounded, exact, 0.02)
    assert rounded.curve[0]["val_loss"] != exact.curve[0]["val_loss"]
    assert evaluate(rounded.weights, cell.settings, toy_data).val_loss == rounded.val_loss


def test_an_update_smaller_than_bfloat16_can_hold_is_kept_under_autocast(toy_data: Path, tmp_path: Path) -> None:
    """Mistake 1 of the original runs: at their rate the weights move all the same, since they are float32."""
    cell = toy_cell(lr=1e-6, precision="bfloat16-autocast", warmup_steps=0, schedule="constant")
    run = train_quietly(cell, toy_data, tmp_path)
    before, after = models.weights_of(models.build(cell.settings, seed=cell.seed)), load_file(run.weights)
    hidden = [name for name in before if before[name].ndim == 2 and "embed" not in name]
    moved = torch.cat([(after[name] != before[name]).flatten() for name in hidden]).double().mean()
    assert moved > 0.9


@pytest.mark.parametrize("precision", ["float32", "bfloat16-autocast"])
def test_two_precisions_at_once_are_refused(precision: str) -> None:
    with pytest.raises(ValidationError, match="for float32 weights, and weights is bfloat16"):
        WorkloadSettings(steps=1, eval_every=1, weights="bfloat16", precision=precision)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_run_is_that_of_the_cpu_to_bfloat16(toy_data: Path, tmp_path: Path) -> None:
    run = train_quietly(toy_cell("adamw"), toy_data, tmp_path / "cuda")
    assert run.precision == "bfloat16 autocast over float32"
    assert run.device == torch.cuda.get_device_name(0)
    assert run.status == "completed"
    assert run.peak_memory_bytes < 2**30
    exact = train_quietly(toy_cell("adamw", precision="float32"), toy_data, tmp_path / "float32")
    assert_same_losses(run, exact, 0.02)
    again = train_quietly(toy_cell("adamw"), toy_data, tmp_path / "cuda")
    assert (again.resumed_from_step, again.weights_sha256) == (7, run.weights_sha256)


# ---------------------------------------------------------------------- what a run says of itself


def test_seconds_by_part_are_of_the_runs_own(toy_data: Path, tmp_path: Path) -> None:
    run = train_quietly(toy_cell(hessian_steps=[2]), toy_data, tmp_path)
    assert tuple(run.seconds_by_part) == PARTS
    assert all(seconds > 0 for seconds in run.seconds_by_part.values())
    assert 0.5 * run.seconds < math.fsum(run.seconds_by_part.values()) <= run.seconds
    assert run.device == "cpu"
    assert run.repeats.startswith("bit for bit")
    assert (run.ranks, run.precision) == (1, "float32")
    assert 2**26 < run.peak_memory_bytes < 2**36


def test_evaluation_takes_as_many_blocks_as_memory_bears() -> None:
    assert evaluation_batch(128, 2048) == EVALUATION_BATCH == 32
    for length, vocabulary in ((512, 100352), (128, 49152), (64, 100352), (8192, 262144)):
        blocks = evaluation_batch(length, vocabulary)
        assert 1 <= blocks <= EVALUATION_BATCH
        assert blocks == 1 or blocks * length * vocabulary <= EVALUATION_LOGITS


def test_placing_a_run_on_a_cpu_leaves_torchs_switches_alone() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    assert place(TOY).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.cuda.is_available() or torch.are_deterministic_algorithms_enabled() == before


GRANITE_350M = {
    "vocab_size": 100352,
    "hidden_size": 768,
    "num_hidden_layers": 32,
    "layer_types": ["full_attention" if i in (10, 13, 17, 27) else "linear_attention" for i in range(32)],
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "mamba_n_heads": 48,
    "mamba_d_head": 32,
    "mamba_d_state": 128,
    "shared_intermediate_size": 2048,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "max_position_embeddings": 32768,
    "position_embedding_type": "nope",
    "tie_word_embeddings": True,
}
"""Granite 4.0 h-350m; multipliers, which change no size, are left at 1."""


def test_a_hybrid_of_the_hubs_shape_has_the_published_size() -> None:
    with torch.device("meta"):
        model = GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**GRANITE_350M))
    assert sum(weight.numel() for weight in models.weights_of(model).values()) == 340_332_224


BIG_STEP = """
import json, sys
from pathlib import Path
import numpy as np
from training_toy import toy_cell
from muonlab.training.data import TokenData
from muonlab.training.device import place
from muonlab.training.distributed import ALONE
from muonlab.training.loop import NOTHING_DUE, Run
cell = toy_cell(**json.loads(sys.argv[1]))
data, placement = TokenData.open(Path(sys.argv[2])), place(cell.settings)
run = Run(cell, data, Path(sys.argv[3]), placement, ALONE, lambda _: None, lambda _: None)
loss, _ = run.one_step(NOTHING_DUE)
print(loss, run.scorer.validation_loss(np.arange(4)), placement.peak_memory_bytes(), run.clock.seconds)
"""


@pytest.mark.skipif("MUONLAB_BIG" not in os.environ, reason="takes minutes and 8 GB (set MUONLAB_BIG=1 to run it)")
def test_a_step_of_granite_350m_fits_in_8_gb(tmp_path: Path) -> None:
    """At its true size, from scratch, one step of Muon on 1 x 64 tokens and an evaluation, in a process of its own."""
    config = GraniteMoeHybridConfig(architectures=["GraniteMoeHybridForCausalLM"], **GRANITE_350M)
    config.save_pretrained(tmp_path / "g")
    data = DataSettings(max_documents=6, vocab_size=100352, sequence_length=64)
    prepare(data, tmp_path / "data", progress=lambda _: None)
    model = {"pretrained": str(tmp_path / "g"), "start": "random"}
    changed = {"data": data.model_dump(), "model": model, "batch_size": 1, "diagnose_every": 0}
    done = subprocess.run(
        [sys.executable, "-c", BIG_STEP, json.dumps(changed), str(tmp_path / "data"), str(tmp_path / "work")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(training_toy.__file__).parent), *sys.path]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loss, val_loss, peak_bytes, *_ = done.stdout.split()
    print(done.stdout)
    assert math.isfinite(float(loss) + float(val_loss))
    assert int(peak_bytes) < 8e9
