"""What must hold of a run wherever it computes: each law for the processor, and for CUDA where there is a device.

The laws of CUDA are marked `gpu`, and are skipped, and said so, where there is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_optim_contract import tiny
from test_training_ways import assert_same_losses, farthest, two_ranks
from training_toy import TOY, optimizer_state, timeless, toy_cell, train_quietly, train_until

import optim
from muonlab.pipeline import doctor
from muonlab.training import model as models
from muonlab.training.device import place
from muonlab.training.evaluate import evaluate

pytest_plugins = ["training_fixtures"]

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
STEPS = 5


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the test's runs compute; torch's switches are put back."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield request.param
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


def test_masters_are_float32_and_products_are_rounded_under_autocast(
    device: str, toy_data: Path, tmp_path: Path
) -> None:
    cell = toy_cell(precision="bfloat16-autocast")
    placement = place(cell.settings)
    model = models.build(cell.settings, seed=0).to(placement.device)
    with placement.computing():
        assert model(torch.zeros(1, 4, dtype=torch.long, device=placement.device)).logits.dtype == torch.bfloat16
    run = train_quietly(cell, toy_data, tmp_path)
    assert run.precision == "bfloat16 autocast over float32"
    kept = [
        *load_file(run.weights).values(),
        *(v for state in optimizer_state(tmp_path)["state"].values() for v in state.values() if torch.is_tensor(v)),
    ]
    assert {tensor.dtype for tensor in kept if tensor.is_floating_point()} == {torch.float32}


def test_a_run_says_where_it_computed_and_what_memory_it_took(device: str, toy_data: Path, tmp_path: Path) -> None:
    if device == "cuda":
        held = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        del held  # what an earlier run of this process took is not this one's
    run = train_quietly(toy_cell(), toy_data, tmp_path)
    assert run.device == (torch.cuda.get_device_name(0) if device == "cuda" else "cpu")
    # Of a process it is all that it has loaded; of a GPU, the run's alone.
    least, most = (2**20, 2**30) if device == "cuda" else (2**26, 2**36)
    assert least < run.peak_memory_bytes < most
    assert all(seconds >= 0 for seconds in run.seconds_by_part.values())


def test_placing_a_run_sets_what_makes_it_repeat(device: str) -> None:
    placement = place(TOY)
    assert placement.device.type == device
    assert torch.get_num_threads() == 1
    if device == "cuda":
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
        assert placement.repeats.startswith("to rounding")
    else:
        assert placement.repeats.startswith("bit for bit")


def test_a_run_that_was_stopped_goes_on_bit_for_bit(device: str, toy_data: Path, tmp_path: Path) -> None:
    whole = train_quietly(toy_cell(), toy_data, tmp_path / "whole")
    train_until(toy_cell(), toy_data, tmp_path / "stopped", step=5)
    resumed = train_quietly(toy_cell(), toy_data, tmp_path / "stopped")
    assert resumed.resumed_from_step == 4
    assert (resumed.weights_sha256, resumed.val_loss) == (whole.weights_sha256, whole.val_loss)
    assert timeless(resumed.curve) == timeless(whole.curve)


@pytest.mark.parametrize("kind", optim.names())
def test_an_optimizer_makes_the_same_weights_on_every_device(device: str, kind: str) -> None:
    """In float32: bit for bit where it is the same device, and within 1e-3 of the way that the weights went elsewhere.

    The decompositions of another library differ by more than a product does, and the update is an orthogonal factor.
    """
    start = torch.cat([weight.flatten() for weight in tiny().state_dict().values()])
    ends = []
    for where in ("cpu", device):
        model = tiny().to(where)
        optimizer = optim.build(kind, model, seed=7, lr=0.02)
        for step in range(STEPS):
            optimizer.zero_grad()
            reference = tiny()
            reference.load_state_dict({name: weight.cpu() for name, weight in model.state_dict().items()})
            reference.loss(step).backward()  # on the processor, whose batch is the same for both
            for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                ours.grad = None if theirs.grad is None else theirs.grad.to(where)
            optimizer.step()
        ends.append(torch.cat([weight.cpu().flatten() for weight in model.state_dict().values()]))
    assert torch.isfinite(ends[0]).all()
    if device == "cpu":
        assert torch.equal(*ends)
    apart, went = torch.linalg.vector_norm(ends[1] - ends[0]), torch.linalg.vector_norm(ends[0] - start)
    assert went > 0
    assert apart <= 1e-3 * went


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_processes_over_nccl_make_the_run_of_one(toy_data: Path, tmp_path: Path) -> None:
    """As over gloo (test_training_ways), but that products are rounded to bfloat16."""
    one = train_quietly(toy_cell(), toy_data, tmp_path / "one")
    done = two_ranks("muon", toy_data, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == list(range(8))
    two = evaluate(tmp_path / "two" / "weights.safetensors", TOY, toy_data)
    assert two.val_loss == pytest.approx(one.val_loss, rel=0.01)
    assert farthest(one, tmp_path / "two" / "weights.safetensors") < 0.05
    again = train_quietly(toy_cell(), toy_data, tmp_path / "two")
    assert again.resumed_from_step == 7
    assert_same_losses(again, one, 0.01)


def test_doctor_names_what_computes_here() -> None:
    found = doctor._gpu()
    assert found.state == "ok"
    if torch.cuda.is_available():
        assert found.found == torch.cuda.get_device_name(0)
        assert doctor._torch().state == "ok"
        assert "built for CUDA" in doctor._torch().found
    else:
        assert found.found.startswith("none; the processor is ") or doctor._torch().state == "note"
