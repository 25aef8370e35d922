"""One contract for every registered optimizer, discovered, never listed.

Run as a script (`python test_optim_contract.py FOLDER`) it is the second half of the resume test: a new
process that continues what the first one saved.
"""

import copy
import io
import random
import re
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
        "momentum_form": "averaged",
        "noise_start": 1,
        "warmup_adamw": False,
        "on_nonfinite": "skip_step",
        "diagnose_every": STEPS,  # so that a resumed run must remember what it counted
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


@pytest.mark.parametrize("orthogonalizer", ["svd", "gram_eigh", "auto", "newton_schulz", "polar_express"])
@pytest.mark.parametrize("exponent", [-40, 13])
def test_a_power_of_two_on_all_gradients_changes_no_bit_of_muons_matrices(orthogonalizer, exponent):
    weights = []
    for factor in (1.0, 2.0**exponent):
        model = tiny()
        optimizer = optim.build("muon", model, lr=0.02, orthogonalizer=orthogonalizer)
        for step in range(3):
            for index, parameter in enumerate(model.parameters()):
                draw = np.random.default_rng([step, index]).standard_normal(parameter.shape, dtype=np.float32)
                parameter.grad = torch.from_numpy(draw) * factor
            optimizer.step()
        weights.append([model.get_parameter(row.name) for row in optim.routing_table(optimizer) if row.orthogonalizer])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


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


@each_kind
@pytest.mark.parametrize(("masters", "low", "high"), [(True, 0.99, 1.0), (False, 0.02, 0.1)])
def test_in_bf16_without_masters_few_weights_near_002_move_at_the_originals_lr(kind, masters, low, high):
    # bf16 numbers near 0.02 are 1.2e-4 apart, and an update is about 1e-4 / sqrt(256) an entry. Of normal
    # weights with deviation 0.02, measured: 7 % moved (of 768 x 768: 4 %), of those above 0.01 none.
    draw = np.random.default_rng(0)
    model = nn.Linear(256, 256, bias=False)
    start = torch.from_numpy(0.02 * draw.standard_normal((256, 256))).bfloat16()
    model.weight = nn.Parameter(start.clone())
    lr = 1e-4 if given(kind, momentum=...) else 1e-4 / 16  # AdamW's entries are about 1, not 1/16
    optimizer = optim.build(kind, model, lr=lr, masters=masters, **without_decay(kind))
    model.weight.grad = torch.from_numpy(draw.standard_normal((256, 256))).bfloat16()
    optimizer.step()
    state = optimizer.state[model.weight]
    assert ("master" in state) == masters
    assert all(
        value.dtype == (torch.float32 if masters or key == "step" else torch.bfloat16) for key, value in state.items()
    )
    moved = (state["master"] if masters else model.weight) != start
    assert low < moved.double().mean() <= high
    assert masters or moved[start.abs() > 0.01].double().mean() < 0.001


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
@pytest.mark.parametrize("rule", ["raise", "skip_step"])
def test_a_momentum_that_overflows_changes_nothing(kind, rule):
    if not given(kind, momentum=...):
        pytest.skip("AdamW has no momentum that is orthogonalised")
    model = tiny()
    optimizer = optim.build(kind, model, lr=0.02, momentum=0.99, on_nonfinite=rule)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e18)
    optimizer.step()
    model.down.weight.grad = torch.full_like(model.down.weight, 3e38)  # is a float32
    kept, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.state[model.down.weight]["momentum_buffer"].fill_(3e38)
    state[optimizer.param_groups[0]["param_names"].index("down.weight")]["momentum_buffer"].fill_(3e38)
    if rule == "raise":
        with pytest.raises(optim.NonFiniteError, match=r"parameter 'down\.weight': its momentum"):
            optimizer.step()  # 0.99 * 3e38 + 3e38 is none
    else:
        optimizer.step()
        assert optimizer.diagnostics()["skipped_steps"] == 1
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())
    assert same(state, optimizer.state_dict()["state"])


@each_kind
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_changes_nothing_but_its_count_and_says_so_once(kind, first, caplog):
    def fresh():
        model = tiny(torch.bfloat16)
        options = {**given(kind, trigger="always"), "on_nonfinite": "skip_step", "diagnose_every": 4}
        return model, optim.build(kind, model, seed=2, lr=0.02, **options)

    (model, optimizer), (calm, undisturbed) = fresh(), fresh()
    good = [2, 3] if first else [0, 1, 2, 3]
    train(calm, undisturbed, good)
    train(model, optimizer, [] if first else [0, 1])
    kept, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    for value in (float("nan"), float("inf")):
        model.loss(0).backward()
        model.up.weight.grad[0, 0] = model.norm.bias.grad[0] = value
        optimizer.step()
        assert all(torch.equal(kept[key], found) for key, found in model.state_dict().items())
        assert same(state, optimizer.state_dict()["state"])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith("parameter 'up.weight': its gradient holds inf or NaN: the step is skipped")

    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    other, resumed = fresh()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for net, stepped in ((model, optimizer), (other, resumed)):
        train(net, stepped, [2, 3])
        found = stepped.diagnostics()
        assert found["skipped_steps"] == 2
        assert ("grad_norm" in found) == first  # 4 calls: the skipped ones keep the trainer's count
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), calm.parameters(), strict=True))


@each_kind
def test_a_sparse_gradient_is_refused_in_one_sentence(kind):
    model = tiny()
    model.tokens = nn.Embedding(VOCABULARY, WIDTH, sparse=True)
    optimizer = optim.build(kind, model)
    kept = copy.deepcopy(model.state_dict())
    model.loss(0).backward()
    with pytest.raises(
        optim.OptimError, match=r"parameter 'tokens\.weight' has a sparse gradient.*sparse=False"
    ) as error:
        optimizer.step()
    assert isinstance(error.value, optim.GradientError)
    assert "\n" not in str(error.value)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


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


@each_kind
def test_a_gradient_whose_square_overflows_is_refused_where_adamw_would_freeze(kind):
    """A second moment of infinity stops a parameter for good; matrices take gradients of any finite size."""
    model = tiny()
    optimizer = optim.build(kind, model, lr=0.02)
    model.loss(0).backward()
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.ndim == 1)
    parameter.grad.fill_(1e20)
    with pytest.raises(optim.NonFiniteError, match=re.escape(repr(name))):
        optimizer.step()


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
    told = {
        index: {name: value for name, value in state.items() if name != "muon_momentum"}  # a diagnostic's alone
        for index, state in speaking.state_dict()["state"].items()
    }
    assert same(silent.state_dict()["state"], told)
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


@each_kind
def test_diagnostics_name_the_groups_and_the_sample_stands_for_its_shape(kind, monkeypatch):
    found = []
    for entries in (2**20, 1):
        monkeypatch.setattr("optim.core.diagnostics.SAMPLE_ENTRIES", entries)
        model = tiny()
        optimizer = optim.build(kind, model, lr=0.02, diagnose_every=1)
        model.mix_b.weight.requires_grad_(False)  # then no two hidden matrices have one shape
        train(model, optimizer, range(2))
        found.append(optimizer.diagnostics())
    assert found[0] == found[1]
    for group in ("embedding", "head", "vector", "tensor"):
        for name in ("grad_norm", "momentum_rms", "update_rms"):
            assert found[0][f"{name}_{group}"] > 0
            assert found[0][name] > 0


@pytest.mark.parametrize("kind", [kind for kind in optim.names() if given(kind, trigger=...)])
def test_the_share_of_steps_with_noise_is_counted_since_the_last_diagnosis(kind):
    model = tiny()
    optimizer = optim.build(kind, model, lr=0.02, trigger="always", noise_start=3, diagnose_every=4)
    shares = []
    for step in range(8):
        train(model, optimizer, [step])
        shares += [optimizer.diagnostics()["noise_fired_share"]] if (step + 1) % 4 == 0 else []
    assert shares == [0.25, 1.0]


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


def test_a_turn_without_muons_own_momentum_is_unknown_not_large():
    """A matrix that comes into the sample after its first step has no momentum of Muon's beside its own."""
    model = tiny()
    optimizer = optim.build("nolah", model, lr=0.02, gate="tanh", project="identity", diagnose_every=1)
    train(model, optimizer, range(2))
    assert 0 < optimizer.diagnostics()["turn"] < 1
    for parameter in model.parameters():
        optimizer.state[parameter].pop("muon_momentum", None)
    train(model, optimizer, [2])
    assert np.isnan(optimizer.diagnostics()["turn"])


@pytest.mark.parametrize("part", [{"gate": "tanh"}, {"scale": 0.5}, {"normalize": "rms"}], ids=str)
def test_the_turn_of_a_part_that_bends_the_momentum_survives_a_resume(part):
    """It is measured against Muon's own momentum, which is then state too, of the sample alone."""
    off = {"gate": "identity", "scale": 1.0, "project": "identity"}
    turns = []
    for resumed in (False, True):
        model = tiny()
        optimizer = optim.build("nolah", model, lr=0.02, diagnose_every=4, **{**off, **part})
        train(model, optimizer, range(3))
        if resumed:
            saved, optimizer = (
                optimizer.state_dict(),
                optim.build("nolah", model, lr=0.02, diagnose_every=4, **{**off, **part}),
            )
            optimizer.load_state_dict(saved)
        train(model, optimizer, [3])
        turns.append(optimizer.diagnostics()["turn"])
    assert turns[0] == turns[1] > 1e-4


if __name__ == "__main__":
    resume(sys.argv[1])
