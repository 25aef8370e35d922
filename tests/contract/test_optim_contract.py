"""One contract for every registered optimizer, discovered, never listed.

Run as a script (`python test_optim_contract.py FOLDER`) it is the second half of the resume test: a new
process that continues what the first one saved.
"""

import copy
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optim

torch.set_num_threads(1)

each_kind = pytest.mark.parametrize("kind", optim.names())
VOCABULARY, WIDTH = 23, 8
SEEN = 12  # tokens of this id or above are never in a batch
HALF, STEPS = 3, 6


class Tiny(nn.Module):
    """A language model of one of everything: wide, tall, square and one-row matrices, convolution."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.mix_a = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mix_b = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gain = nn.Linear(WIDTH, 1, bias=False)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.tokens(ids)
        x = x + self.conv(x.mT).mT
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        x = x + self.mix_b(torch.tanh(self.mix_a(x))) * self.gain(x)
        return self.lm_head(x)

    def loss(self, step):
        ids = torch.from_numpy(np.random.default_rng([5, step]).integers(SEEN, size=(4, 16)))
        logits = self(ids[:, :-1]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def tiny(dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny().to(dtype)


def train(model, optimizer, steps, batch=None):
    """Steps of the training loop as the trainer writes it: one factor of the schedule on every group."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - 0.05 * step)
        optimizer.zero_grad()
        model.loss(step if batch is None else batch).backward()
        optimizer.step()


def without_decay(kind):
    return {name: 0.0 for name in optim.options_model(kind).model_fields if name.endswith("weight_decay")}


def cases():
    """Every kind at its defaults, and with each option that a kind has to make its state richer."""
    livelier = {
        "trigger": "always",
        "anneal_steps": 4,
        "scale_start": 0.99,
        "scale_anneal_steps": 4,
        "orthogonalizer": "gram_eigh",
        "nesterov": True,
        "diagnose_every": 1,
    }
    for kind in optim.names():
        yield kind, {}
        yield kind, given(kind, **livelier)


# ---------------------------------------------------------------- training


@each_kind
def test_the_loss_of_a_model_falls(kind):
    model = tiny()
    optimizer = optim.build(kind, model, lr=0.02)
    before = model.loss(0).item()
    train(model, optimizer, range(15), batch=0)
    assert model.loss(0).item() < 0.8 * before


@each_kind
def test_a_quadratic_falls_to_its_floor(kind):
    # the update of a matrix has a fixed length, so the floor is set by lr: distance about lr * sqrt(k)
    model = nn.Linear(6, 4, bias=False)
    goal = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 6))).float()
    nn.init.zeros_(model.weight)
    optimizer = optim.build(kind, model, lr=0.02, **without_decay(kind), **given(kind, momentum=0.5))
    for _ in range(400):
        optimizer.zero_grad()
        (model.weight - goal).square().sum().backward()
        optimizer.step()
    assert (model.weight - goal).norm() < 0.3 < 3 < goal.norm()


def given(kind, **options):
    """Those of the options that this kind has."""
    return {name: value for name, value in options.items() if name in optim.options_model(kind).model_fields}


@each_kind
def test_a_scheduler_of_torch_reaches_every_group(kind):
    model = tiny()
    optimizer = optim.build(kind, model, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
    kept = copy.deepcopy(model.state_dict())
    model.loss(0).backward()
    optimizer.step()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())  # lr is 0 yet
    schedule.step()
    assert {group["lr"] / group["initial_lr"] for group in optimizer.param_groups} == {0.25}
    optimizer.step()
    moved = [name for name, value in model.named_parameters() if not torch.equal(kept[name], value)]
    assert len(moved) == len(kept)


@each_kind
def test_a_zero_gradient_history_gives_a_zero_update(kind):
    model = tiny()
    kept = copy.deepcopy(model.state_dict())
    optimizer = optim.build(kind, model, lr=0.1, **without_decay(kind))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


@each_kind
def test_rows_of_unseen_tokens_are_not_touched(kind):
    model = tiny()
    kept = model.tokens.weight.detach().clone()
    train(model, optim.build(kind, model, lr=0.02, **without_decay(kind)), range(4))
    assert torch.equal(model.tokens.weight[SEEN:], kept[SEEN:])
    assert not torch.equal(model.tokens.weight[:SEEN], kept[:SEEN])


@each_kind
def test_a_parameter_without_gradient_is_left_alone_and_changes_no_other(kind):
    alone, beside = tiny(), tiny()
    for model in (alone, beside):
        optimizer = optim.build(kind, model, seed=1, lr=0.02, diagnose_every=0)
        for step in range(3):
            optimizer.zero_grad()
            model.loss(step).backward()
            if model is alone:
                model.mix_a.weight.grad = None
                optimizer.step()
            else:
                with torch.no_grad():
                    kept = model.mix_a.weight.clone()
                    optimizer.step()
                    model.mix_a.weight.copy_(kept)
    assert torch.equal(alone.mix_a.weight, tiny().mix_a.weight)
    for (name, a), b in zip(alone.named_parameters(), beside.parameters(), strict=True):
        assert torch.equal(a, b), name


@each_kind
def test_a_closure_is_called_once_and_its_loss_returned(kind):
    model = tiny()
    optimizer = optim.build(kind, model)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = model.loss(0)
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1


@pytest.mark.parametrize(("kind", "options"), cases())
def test_stacked_matrices_move_as_each_would_alone(kind, options, monkeypatch):
    weights = []
    for entries in (2**24, 1):
        monkeypatch.setattr("optim.core.optimizer.STACK_ENTRIES", entries)
        model = tiny()
        train(model, optim.build(kind, model, seed=7, lr=0.02, **options), range(4))
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# ---------------------------------------------------------------- randomness


def global_randomness():
    of_numpy = np.random.get_state()[1].tolist()  # noqa: NPY002  # it is what must not move
    return torch.get_rng_state().tolist(), of_numpy, random.getstate()


@pytest.mark.parametrize(("kind", "options"), cases())
def test_the_global_generators_are_neither_read_nor_moved_and_replicas_agree(kind, options):
    replicas = [tiny(), tiny()]
    for number, model in enumerate(replicas):
        torch.manual_seed(number)  # a different global state for each
        before = global_randomness()
        train(model, optim.build(kind, model, seed=7, lr=0.02, **options), range(4))
        assert global_randomness() == before
    for a, b in zip(replicas[0].parameters(), replicas[1].parameters(), strict=True):
        assert torch.equal(a, b)


@each_kind
def test_the_seed_matters_only_to_optimizers_that_draw(kind):
    draws = bool(given(kind, alpha=...))
    options = given(kind, trigger="always")
    weights = []
    for seed in (0, 1):
        model = tiny()
        train(model, optim.build(kind, model, seed=seed, lr=0.02, **options), range(2))
        weights.append(model.mix_a.weight.detach())
    assert torch.equal(*weights) != draws


# ---------------------------------------------------------------- precision


@each_kind
def test_bf16_parameters_move_through_their_fp32_masters(kind):
    model = tiny(torch.bfloat16)
    before = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    optimizer = optim.build(kind, model, lr=1e-5)
    model.loss(0).backward()
    optimizer.step()
    moved, moved_bf16, count = 0, 0, 0
    for group in optimizer.param_groups:
        if group["name"] != "hidden":
            continue
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            assert {value.dtype for value in state.values()} == {torch.float32}
            assert torch.equal(parameter, state["master"].bfloat16())
            moved += int((state["master"] != before[name]).sum())
            moved_bf16 += int((parameter.float() != before[name]).sum())
            count += parameter.numel()
    assert moved > 0.99 * count
    assert moved_bf16 < 0.2 * count  # the trap that masters are for: nearly no bf16 weight can move this little


@each_kind
def test_fp32_needs_no_master(kind):
    model = tiny()
    optimizer = optim.build(kind, model)
    train(model, optimizer, range(1))
    assert not any("master" in state for state in optimizer.state.values())


# ---------------------------------------------------------------- refusals


@each_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["down.weight", "tokens.weight", "norm.bias"])
def test_a_bad_gradient_stops_the_step_by_name_and_changes_nothing(kind, bad, name):
    model = tiny()
    optimizer = optim.build(kind, model, lr=0.02)
    train(model, optimizer, range(2))
    kept, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model.get_parameter(name).grad.view(-1)[0] = bad
    with pytest.raises(optim.NonFiniteError, match=f"parameter '{name}': its gradient holds inf or NaN"):
        optimizer.step()
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())
    assert same(state, optimizer.state_dict())


@each_kind
def test_a_momentum_that_overflows_stops_the_step_by_name(kind):
    if not given(kind, momentum=...):
        pytest.skip("AdamW has no momentum that is orthogonalised")
    model = tiny()
    optimizer = optim.build(kind, model, lr=0.02, momentum=0.99)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2e38)
    optimizer.step()  # 2e38 is a float32
    with pytest.raises(optim.NonFiniteError, match=r"parameter '\w+.weight': its momentum"):
        optimizer.step()  # 0.99 * 2e38 + 2e38 is none


# ---------------------------------------------------------------- state


def same(a, b):
    """Equal bit for bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def resume(folder):
    """In the new process: load what was saved half-way, run to the end, save again."""
    for path in sorted(Path(folder).glob("*.half")):
        saved = torch.load(path, weights_only=True)
        model = tiny(getattr(torch, saved["dtype"]), seed=1)  # other weights, to be overwritten
        model.load_state_dict(saved["model"])
        optimizer = optim.build(saved["kind"], model, seed=3, lr=0.02, **saved["options"])
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, range(HALF, STEPS))
        end = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "diagnostics": optimizer.diagnostics(),
        }
        torch.save(end, path.with_suffix(".end"))


def test_a_new_process_continues_bit_for_bit(tmp_path):
    expected = {}
    for number, (kind, options) in enumerate(cases()):
        for dtype in ("float32", "bfloat16"):
            name = f"{kind}-{number}-{dtype}"
            model = tiny(getattr(torch, dtype))
            optimizer = optim.build(kind, model, seed=3, lr=0.02, **options)
            train(model, optimizer, range(HALF))
            half = {
                "kind": kind,
                "options": options,
                "dtype": dtype,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(half, tmp_path / f"{name}.half")
            train(model, optimizer, range(HALF, STEPS))
            expected[name] = copy.deepcopy(
                {
                    "model": dict(model.state_dict()),
                    "optimizer": optimizer.state_dict(),
                    "diagnostics": optimizer.diagnostics(),
                }
            )
    root = Path(optim.__file__).parents[1]
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, cwd=root, env={"PYTHONPATH": str(root)})
    for name, end in expected.items():
        found = torch.load(tmp_path / f"{name}.end", weights_only=True)
        found["model"] = dict(found["model"])
        assert same(found, end), name


@each_kind
def test_state_is_loaded_in_its_own_precision_and_not_shared(kind):
    model = tiny(torch.bfloat16)
    optimizer = optim.build(kind, model, lr=0.02)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other = tiny(torch.bfloat16)
    copied = optim.build(kind, other, lr=0.02)
    copied.load_state_dict(saved)
    assert same(copied.state_dict(), kept)
    train(other, copied, range(2, 4))
    assert same(saved, kept)


@each_kind
def test_the_state_of_another_run_is_refused(kind):
    model = tiny()
    optimizer = optim.build(kind, model, lr=0.02)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    with pytest.raises(optim.StateMismatchError, match=r"initial_lr is 0\.03, but 0\.02 in the saved state"):
        optim.build(kind, tiny(), lr=0.03).load_state_dict(saved)
    with pytest.raises(optim.StateMismatchError, match="diagnose_every is 7, but 10"):
        optim.build(kind, tiny(), lr=0.02, diagnose_every=7).load_state_dict(saved)
    with pytest.raises(optim.StateMismatchError, match="saved groups are"):
        optim.build(kind, nn.Linear(2, 2), lr=0.02).load_state_dict(saved)
    narrow = tiny()
    narrow.mix_a = nn.Linear(WIDTH, 3, bias=False)
    with pytest.raises(optim.StateMismatchError, match=r"parameter 'mix_a\.weight' has shape"):
        optim.build(kind, narrow, lr=0.02).load_state_dict(saved)


@each_kind
def test_groups_hold_plain_values_and_state_holds_tensors(kind):
    model = tiny()
    optimizer = optim.build(kind, model, seed=2, lr=0.02)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()

    def plain(value):
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    for group in saved["param_groups"]:
        assert all(map(plain, group.values())), group
    for state in saved["state"].values():
        assert all(isinstance(value, torch.Tensor) for value in state.values())


# ---------------------------------------------------------------- diagnostics


@each_kind
def test_diagnostics_are_of_the_declared_steps_and_change_nothing(kind):
    quiet, observed = tiny(), tiny()
    silent = optim.build(kind, quiet, seed=1, lr=0.02, diagnose_every=0)
    speaking = optim.build(kind, observed, seed=1, lr=0.02, diagnose_every=2)
    assert speaking.diagnostics() == {}
    for step in range(4):
        train(quiet, silent, [step])
        train(observed, speaking, [step])
        found = speaking.diagnostics()
        assert silent.diagnostics() == {}
        assert bool(found) == (step % 2 == 1)
        assert all(type(value) is float and np.isfinite(value) and value >= -1e-12 for value in found.values())
        assert all(value <= 1 + 1e-12 for name, value in found.items() if name.endswith("_share"))
    assert {"grad_norm", "update_rms"} <= set(found)
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), observed.parameters(), strict=True))


@each_kind
def test_grad_norm_and_update_rms_are_means_over_the_hidden_matrices(kind):
    model = tiny()
    optimizer = optim.build(kind, model, lr=0.02, diagnose_every=1)
    model.loss(0).backward()
    hidden = [model.get_parameter(row.name) for row in optim.routing_table(optimizer) if row.group == "hidden"]
    norms = [parameter.grad.norm().item() for parameter in hidden]
    kept = [parameter.detach().clone() for parameter in hidden]
    optimizer.step()
    changes = [(p - old).square().mean().sqrt().item() for p, old in zip(hidden, kept, strict=True)]
    found = optimizer.diagnostics()
    assert found["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert found["update_rms"] == pytest.approx(np.mean(changes), rel=1e-5)


def test_turn_is_zero_for_muon_and_noise_is_counted():
    found = {}
    for kind, options in cases():
        model = tiny()
        optimizer = optim.build(kind, model, lr=0.02, **{**options, "diagnose_every": 1})
        train(model, optimizer, range(2))
        found[kind] = optimizer.diagnostics()  # the livelier case comes last
    assert found["muon"]["turn"] == 0
    assert found["muon"]["noise_fired_share"] == 0
    assert found["nolah"]["turn"] > 0
    for kind in ("orthonoise", "isotropic"):
        assert found[kind]["noise_fired_share"] == 1
        assert found[kind]["turn"] > 0
        assert found[kind]["effective_rank_share_before"] != found[kind]["effective_rank_share_after"]


if __name__ == "__main__":
    resume(sys.argv[1])
