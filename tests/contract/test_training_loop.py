"""What a training promises: it is a function of its cell, and being interrupted changes nothing."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from training_toy import (
    TOY,
    TOY_MODEL,
    assert_same_run,
    optimizer_state,
    timeless,
    toy_cell,
    train_quietly,
    train_until,
)

import optim
from muonlab.registry.errors import IntegrityError
from muonlab.registry.settings import ModelSettings, WorkloadSettings
from muonlab.training import model as models
from muonlab.training.data import TokenData, order_sha256
from muonlab.training.device import place
from muonlab.training.evaluate import Scorer, evaluate
from muonlab.training.loop import CURVE_COLUMNS, lr_factor, train, write_curve_csv

pytest_plugins = ["training_fixtures"]

KINDS = optim.names()


@pytest.fixture
def toy_tokens(toy_data: Path) -> TokenData:
    return TokenData.open(toy_data)


def toy_model(seed: int = 3, weights: str = "float32") -> models.Model:
    return models.build(TOY.model_copy(update={"weights": weights}), seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_anywhere_a_run_ends_as_if_it_had_not_been(kind: str, toy_data: Path, tmp_path: Path) -> None:
    cell = toy_cell(kind)
    whole = train_quietly(cell, toy_data, tmp_path / "whole")
    assert whole.status == "completed"
    # Before the first checkpoint (the run starts afresh), between two, and twice in one run.
    for stops in ([1], [5], [3, 6]):
        work = tmp_path / "-".join(map(str, stops))
        for stop in stops:
            train_until(cell, toy_data, work, stop)
        resumed = train_quietly(cell, toy_data, work)
        assert resumed.resumed_from_step == (stops[-1] - 1) // 2 * 2
        assert_same_run(whole, tmp_path / "whole", resumed, work)


def test_a_finished_run_started_again_gives_the_same_outcome(toy_data: Path, tmp_path: Path) -> None:
    cell = toy_cell()
    first, again = (train_quietly(cell, toy_data, tmp_path) for _ in range(2))
    assert again.resumed_from_step == first.final_step == 7
    assert (again.val_loss, again.weights_sha256) == (first.val_loss, first.weights_sha256)
    assert again.curve == first.curve


def test_an_interruption_between_points_keeps_the_mean_training_loss(toy_data: Path, tmp_path: Path) -> None:
    """With points every 3 steps and checkpoints every 2, the losses since the last point are in a checkpoint."""
    cell = toy_cell(eval_every=3, diagnose_every=0)
    whole = train_quietly(cell, toy_data, tmp_path / "whole")
    train_until(cell, toy_data, tmp_path / "cut", 6)
    resumed = train_quietly(cell, toy_data, tmp_path / "cut")
    assert resumed.resumed_from_step == 4
    assert [row["step"] for row in resumed.curve] == [0, 3, 6, 7]
    assert_same_run(whole, tmp_path / "whole", resumed, tmp_path / "cut")


def test_two_runs_of_one_cell_are_bit_identical_whatever_the_global_generators(toy_data: Path, tmp_path: Path) -> None:
    cell = toy_cell("orthonoise")
    torch.manual_seed(1)
    a = train_quietly(cell, toy_data, tmp_path / "a")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = train_quietly(cell, toy_data, tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_run(a, tmp_path / "a", b, tmp_path / "b")


def test_arms_of_one_seed_are_a_pair_and_seeds_differ(toy_data: Path, tmp_path: Path) -> None:
    runs = {
        (kind, seed): train_quietly(toy_cell(kind, seed=seed), toy_data, tmp_path / f"{kind}-{seed}")
        for kind in KINDS
        for seed in (0, 1)
    }
    for seed in (0, 1):
        alike = [runs[kind, seed] for kind in KINDS]
        assert len({(run.init_sha256, run.order_sha256, run.curve[0]["val_loss"]) for run in alike}) == 1
    a, b = runs["muon", 0], runs["muon", 1]
    assert a.init_sha256 != b.init_sha256
    assert a.order_sha256 != b.order_sha256
    assert len({run.weights_sha256 for run in runs.values()}) == len(runs)


def test_evaluation_of_the_saved_weights_gives_the_final_loss_bit_for_bit(toy_data: Path, tmp_path: Path) -> None:
    run = train_quietly(toy_cell(), toy_data, tmp_path)
    assert run.weights is not None
    found = evaluate(run.weights, TOY, toy_data)
    assert (found.val_loss, found.perplexity) == (run.val_loss, run.perplexity)
    assert found.weights_sha256 == run.weights_sha256
    assert found == evaluate(run.weights, TOY, toy_data)
    # A known loss stands for exactly the weights that gave it, and for no others.
    assert evaluate(run.weights, TOY, toy_data, known={"0" * 64: 1.0}) == found
    assert run.weights_sha256 is not None
    assert evaluate(run.weights, TOY, toy_data, known={run.weights_sha256: 1.0}).val_loss == 1.0
    assert found.prompt
    assert found.sample


def test_evaluation_refuses_weights_of_another_model(toy_data: Path, tmp_path: Path) -> None:
    run = train_quietly(toy_cell(), toy_data, tmp_path)
    other = TOY.model_copy(update={"model": TOY_MODEL.model_copy(update={"mlp_size": 8})})
    with pytest.raises(IntegrityError, match="another model"):
        evaluate(run.weights, other, toy_data)


def test_validation_loss_is_the_mean_over_every_target_once(toy_tokens: TokenData) -> None:
    """Against the model's own loss, block by block. Tolerance: fp32 sums of 32 terms in another order."""
    model, length = toy_model(), TOY.data.sequence_length
    start = toy_tokens.meta.splits["training"].tokens
    stream = np.fromfile(toy_tokens.folder / "tokens.bin", dtype=np.uint32)[start:].astype(np.int64)
    count = (len(stream) - 1) // length
    losses = []
    with torch.inference_mode():
        for i in range(count):
            ids = torch.from_numpy(stream[i * length : i * length + length + 1])[None]
            losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss.item())
    assert count == toy_tokens.block_count("validation")
    assert Scorer(model, toy_tokens, place(TOY)).validation_loss() == pytest.approx(math.fsum(losses) / count, rel=1e-6)


def test_every_group_is_warmed_up_and_annealed_alike(toy_data: Path, tmp_path: Path) -> None:
    """Mistake 12 of the original runs: their AdamW part was not warmed up with the rest."""
    run = train_quietly(toy_cell(steps=5, warmup_steps=2, final_lr_fraction=0.1), toy_data, tmp_path)
    assert [row["lr"] for row in run.curve[1:]] == pytest.approx([0.005, 0.01, 0.01, 0.0055, 0.001])
    newest = tmp_path / "checkpoints" / "step-000005" / "optimizer.pt"
    groups = torch.load(newest, weights_only=True)["param_groups"]
    assert len(groups) > 1
    assert [group["lr"] / group["initial_lr"] for group in groups] == pytest.approx([0.1] * len(groups))


def test_the_original_left_adamw_without_warmup(toy_data: Path, tmp_path: Path) -> None:
    """...and can be repeated: `warmup_adamw: false` gives its groups the whole rate from the first step."""
    cell = toy_cell(steps=2, warmup_steps=1)
    options = {**cell.optimizer.options, "warmup_adamw": False}
    cell = cell.model_copy(update={"optimizer": cell.optimizer.model_copy(update={"options": options})})
    settings = cell.settings.model_copy(update={"warmup_steps": 4})
    factors = {warmup: [lr_factor(step, settings, warmup=warmup) for step in range(5)] for warmup in (True, False)}
    assert factors == {True: [0.25, 0.5, 0.75, 1.0, factors[False][4]], False: [1.0, 1.0, 1.0, 1.0, factors[True][4]]}
    train_quietly(cell, toy_data, tmp_path)
    groups = optimizer_state(tmp_path)["param_groups"]
    assert {group["warmup"] for group in groups if group["route"] == "muon"} == {True}
    assert {group["warmup"] for group in groups if group["route"] == "adamw"} == {False}


def test_diagnostics_have_rows_of_their_own_between_evaluations(toy_data: Path, tmp_path: Path) -> None:
    """Evaluated at 0, 3, 6, 7 and diagnosed at 2, 4, 6; a diagnosis changes nothing but the curve."""
    seldom = train_quietly(toy_cell("nolah", eval_every=3, diagnose_every=0), toy_data, tmp_path / "seldom")
    often = train_quietly(toy_cell("nolah", eval_every=3, diagnose_every=2), toy_data, tmp_path / "often")
    assert [row["step"] for row in often.curve] == [0, 2, 3, 4, 6, 7]
    assert [row["step"] for row in often.curve if "opt_turn" in row] == [2, 4, 6]
    assert [row["step"] for row in often.curve if "val_loss" in row] == [0, 3, 6, 7]
    for row, same in zip(seldom.curve, (row for row in often.curve if "val_loss" in row), strict=True):
        assert {name: same[name] for name in row if name != "seconds"} == timeless((row,))[0]
    assert often.weights_sha256 == seldom.weights_sha256


def test_the_hessian_is_measured_where_declared_and_changes_nothing(toy_data: Path, tmp_path: Path) -> None:
    plain = train_quietly(toy_cell(), toy_data, tmp_path / "plain")
    measured = train_quietly(toy_cell(hessian_steps=[1, 4]), toy_data, tmp_path / "measured")
    assert [row["step"] for row in measured.curve if "hessian_top" in row] == [1, 4]
    assert all(math.isfinite(row["hessian_top"]) for row in measured.curve if "hessian_top" in row)
    assert measured.weights_sha256 == plain.weights_sha256


def test_narrow_weights_are_trained_through_masters_or_hardly_at_all(toy_data: Path, tmp_path: Path) -> None:
    """Mistake 1 of the original runs, at their rate: without masters most bf16 weights do not move."""
    moved = {}
    for masters in (True, False):
        cell = toy_cell(lr=1e-4, weights="bfloat16", warmup_steps=0, schedule="constant")
        options = {**cell.optimizer.options, "masters": masters}
        cell = cell.model_copy(update={"optimizer": cell.optimizer.model_copy(update={"options": options})})
        run = train_quietly(cell, toy_data, tmp_path / str(masters))
        after = load_file(run.weights)
        before = models.weights_of(toy_model(weights="bfloat16"))
        hidden = [name for name in before if before[name].ndim == 2 and "embed" not in name]
        assert {after[name].dtype for name in hidden} == {torch.bfloat16}
        changed = torch.cat([(after[name] != before[name]).flatten() for name in hidden])
        moved[masters] = changed.double().mean().item()
        assert evaluate(run.weights, cell.settings, toy_data).val_loss == run.val_loss
    assert moved[False] < moved[True] / 2


def test_a_learning_rate_that_explodes_is_a_result(toy_data: Path, tmp_path: Path) -> None:
    for kind, lr in (("adamw", 1e30), ("muon", 1e30), ("muon", 30.0)):
        cell = toy_cell(kind, lr=lr, warmup_steps=0, schedule="constant")
        first, again = (train_quietly(cell, toy_data, tmp_path / f"{kind}-{lr}") for _ in range(2))
        assert first.status == "diverged"
        assert (first.val_loss, first.perplexity, first.weights, first.weights_sha256) == (None,) * 4
        assert first.reason
        assert first.curve[0]["step"] == 0
        assert first.final_step < 7
        assert repr(timeless(first.curve)) == repr(timeless(again.curve))  # nan is not equal to itself
        assert (first.final_step, first.reason) == (again.final_step, again.reason)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_is_a_divergence(clip_norm: float | None, toy_data: Path, tmp_path: Path) -> None:
    """Weights of 1e4 give finite losses, whose gradient overflows. Clipping does not hide where."""
    model = TOY_MODEL.model_copy(update={"initializer_range": 1e4})
    run = train_quietly(toy_cell(model=model.model_dump(), clip_norm=clip_norm), toy_data, tmp_path)
    assert (run.status, run.final_step) == ("diverged", 0)
    assert re.search("parameter 'model.layers.0.*gradient holds inf or NaN", run.reason)
    assert math.isfinite(run.curve[0]["val_loss"])


def test_steps_whose_gradient_is_not_finite_can_be_skipped(toy_data: Path, tmp_path: Path) -> None:
    """The same gradients under the other policy: every step is skipped, counted, and leaves the weights alone."""
    model = TOY_MODEL.model_copy(update={"initializer_range": 1e4})
    cell = toy_cell(model=model.model_dump(), clip_norm=1.0)
    options = {**cell.optimizer.options, "on_nonfinite": "skip_step"}
    cell = cell.model_copy(update={"optimizer": cell.optimizer.model_copy(update={"options": options})})
    run = train_quietly(cell, toy_data, tmp_path)
    assert (run.status, run.final_step) == ("completed", 7)
    assert run.curve[6]["opt_skipped_steps"] == 6
    assert run.weights_sha256 == run.init_sha256


def test_a_training_loss_that_is_not_finite_ends_the_run_at_once(toy_data: Path, tmp_path: Path) -> None:
    cell = toy_cell(lr=1e30, warmup_steps=0, schedule="constant", eval_every=7)
    run = train_quietly(cell, toy_data, tmp_path)
    assert (run.status, run.reason) == ("diverged", "step 1: the training loss is nan")
    assert [row["step"] for row in run.curve] == [0]


def test_clipping_bounds_the_step_and_reports_the_norm_before(toy_data: Path, tmp_path: Path) -> None:
    free = train_quietly(toy_cell(steps=1, warmup_steps=0), toy_data, tmp_path / "free")
    loose = train_quietly(toy_cell(steps=1, warmup_steps=0, clip_norm=1e6), toy_data, tmp_path / "loose")
    tight = train_quietly(toy_cell(steps=1, warmup_steps=0, clip_norm=1e-9), toy_data, tmp_path / "tight")
    assert free.curve[1]["grad_norm"] == loose.curve[1]["grad_norm"] == tight.curve[1]["grad_norm"]
    assert free.weights_sha256 == loose.weights_sha256 != tight.weights_sha256


def test_update_rms_is_the_change_of_the_weights(toy_data: Path, tmp_path: Path) -> None:
    run = train_quietly(toy_cell(steps=1, warmup_steps=0), toy_data, tmp_path)
    before, after = models.weights_of(toy_model()), load_file(run.weights)
    change = torch.cat([(after[name] - before[name]).double().flatten() for name in before])
    assert run.curve[-1]["update_rms"] == pytest.approx(change.square().mean().sqrt().item(), rel=1e-12)


def test_curve_csv_holds_the_curve(toy_data: Path, tmp_path: Path) -> None:
    run = train_quietly(toy_cell("nolah"), toy_data, tmp_path)
    write_curve_csv(run.curve, tmp_path / "curve.csv")
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0])[: len(CURVE_COLUMNS)] == CURVE_COLUMNS
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert [float(row["val_loss"]) for row in rows] == [point["val_loss"] for point in run.curve]
    diagnosed = [int(row["step"]) for row in rows if row["opt_turn"]]
    assert diagnosed == [2, 4, 6]
    assert rows[0]["train_loss"] == ""


def test_data_of_other_settings_is_refused(toy_data: Path, tmp_path: Path) -> None:
    cell = toy_cell(data=TOY.data.model_copy(update={"split_seed": 1}))
    with pytest.raises(IntegrityError, match="other data settings"):
        train_quietly(cell, toy_data, tmp_path)


def test_order_hash_is_that_of_the_settings(toy_data: Path, toy_tokens: TokenData, tmp_path: Path) -> None:
    run = train_quietly(toy_cell(), toy_data, tmp_path)
    blocks = toy_tokens.block_count("training")
    assert run.order_sha256 == order_sha256(seed=3, steps=7, batch_size=2, blocks=blocks)


def test_progress_is_told_at_the_end(toy_data: Path, tmp_path: Path) -> None:
    told = []
    train(toy_cell(), toy_data, tmp_path, on_point=lambda _: None, on_progress=told.append)
    assert (told[-1].step, told[-1].steps, told[-1].warning) == (7, 7, None)
    assert told[-1].seconds_per_step > 0


# ---------------------------------------------------------------------- model


def test_tiny_model_is_the_declared_one() -> None:
    model = models.build(WorkloadSettings(steps=1, eval_every=1), seed=0)
    assert sum(weight.numel() for weight in models.weights_of(model).values()) == 273_176
    assert [layer.mamba is not None for layer in model.model.layers] == [True, False, True]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in models.weights_of(model).values()} == {torch.float32}


def test_initial_weights_depend_on_seed_and_settings_alone() -> None:
    torch.manual_seed(5)
    a = models.weights_sha256(toy_model(0))
    torch.rand(3)
    before = torch.get_rng_state()
    assert models.weights_sha256(toy_model(0)) == a
    assert torch.equal(torch.get_rng_state(), before)
    assert models.weights_sha256(toy_model(1)) != a


def test_token_losses_are_those_of_the_models_own_forward(toy_tokens: TokenData) -> None:
    model = toy_model()
    tokens = torch.from_numpy(toy_tokens.blocks("training", np.arange(4)))
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    reference = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(models.token_losses(model, tokens), reference)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"mamba_d_head": 5}, "mamba_d_head is 5"),
        ({"attention_heads": 3}, "attention_heads is 3"),
        ({"key_value_heads": 3}, "key_value_heads is 3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changed: dict[str, int], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ModelSettings.model_validate({**TOY_MODEL.model_dump(), **changed})
