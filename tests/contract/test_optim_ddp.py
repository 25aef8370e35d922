"""Replicas under torch.distributed: the same bits on every rank, and as in one process, for half of the work.

Run as a script (`python test_optim_ddp.py FOLDER RANK`) it is one of two ranks, which meet in a file.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_optim_contract import cases, given, same, tiny, train
from torch import distributed as dist

import optim
from optim.core import sharding

torch.set_num_threads(1)

RANKS, STEPS, BAD_STEP = 2, 3, 1


def outcome(model, optimizer):
    return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "found": optimizer.diagnostics()}


def same_gradients(kind, options):
    """A run whose gradients are the same on every rank."""
    model = tiny()
    optimizer = optim.build(kind, model, seed=7, lr=0.02, **options)
    train(model, optimizer, range(STEPS))
    return outcome(model, optimizer)


def one_bad_rank(kind, options, rank):
    """A run in which the last rank alone meets a NaN: (end of the run that skips, sentence of the one that stops)."""
    ends = []
    for rule in ("skip_step", "raise"):
        model = tiny()
        optimizer = optim.build(kind, model, seed=7, lr=0.02, **options, on_nonfinite=rule)
        try:
            for step in range(STEPS):
                optimizer.zero_grad()
                model.loss(step).backward()
                if step == BAD_STEP and rank == RANKS - 1:
                    model.norm.bias.grad[0] = float("nan")
                optimizer.step()
            ends.append(outcome(model, optimizer))
        except optim.NonFiniteError as error:
            ends.append(str(error))
    return ends


def variants():
    yield from cases()
    for kind in optim.names():
        if given(kind, orthogonalizer="auto"):
            yield kind, {"orthogonalizer": "auto", "route": "all_matrices"}
            yield kind, {"orthogonalizer": "newton_schulz", "momentum_form": "averaged"}


def counted(run, *arguments):
    """The outcome of a run, and what this process orthogonalised in it [multiply-adds of a Gram matrix]."""
    done = []
    compute = sharding.polar

    def counting(X, *args, **options):
        done.append(X.numel() * min(X.shape[-2:]))
        return compute(X, *args, **options)

    sharding.polar = counting
    try:
        return {"end": run(*arguments), "work": sum(done)}
    finally:
        sharding.polar = compute


def on_a_rank(folder, rank):
    """Every run as one of the ranks."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = {
        "split": [counted(same_gradients, kind, options) for kind, options in variants()],
        "whole": counted(same_gradients, "muon", {"shard": False}),
        "bad": [one_bad_rank(kind, {}, rank) for kind in optim.names()],
    }
    dist.destroy_process_group()
    torch.save(found, Path(folder) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(optim.__file__).parents[1]
    commands = [[sys.executable, __file__, str(folder), str(rank)] for rank in range(RANKS)]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, cwd=root, env=environment) for command in commands]
    assert [process.wait(timeout=300) for process in processes] == [0] * RANKS
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.slow
def test_ranks_agree_with_each_other_and_with_one_process_for_half_of_the_work(ranks):
    for first, second, (kind, options) in zip(*(found["split"] for found in ranks), variants(), strict=True):
        alone = counted(same_gradients, kind, options)
        assert same(first["end"], second["end"]), (kind, options)
        assert same(first["end"], alone["end"]), (kind, options)
        assert first["work"] + second["work"] == alone["work"]
        if kind != "adamw":
            assert 0.4 < first["work"] / alone["work"] < 0.6


@pytest.mark.slow
def test_a_run_that_is_not_split_does_all_of_the_work(ranks):
    alone = counted(same_gradients, "muon", {"shard": False})
    assert all(same(found["whole"], alone) for found in ranks)


@pytest.mark.slow
def test_a_bad_gradient_on_one_rank_is_skipped_or_refused_on_both(ranks):
    for first, second in zip(*(found["bad"] for found in ranks), strict=True):
        skipped, refused = zip(first, second, strict=True)
        assert same(*skipped)
        assert skipped[0]["found"]["skipped_steps"] == 1
        assert refused[0].startswith("another rank's gradient or momentum holds inf or NaN")
        assert refused[1].startswith("parameter 'norm.bias': its gradient holds inf or NaN")


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_work_is_shared_out_by_cost_and_the_same_everywhere(count):
    costs = np.random.default_rng(count).integers(1, 100, 40).tolist()
    owners = sharding.assign(costs, count)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(count)]
    assert max(loads) - min(loads) <= max(costs)
    assert owners == sharding.assign(list(costs), count)
    assert sharding.assign([4, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1]  # by cost, not by number


if __name__ == "__main__":
    on_a_rank(sys.argv[1], int(sys.argv[2]))
