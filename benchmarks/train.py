"""A training step of the tiny hybrid against the stock model, and against a bare PyTorch loop of the same model.

    step       `tiny`'s model, batch and optimizer (Muon), forward to update    peer: transformers, chunk 256
    gradient   |g - g_stock| / |g_stock| over all parameters together           the price of the faster step
    logging    what a run writes of itself in scratch/, of its seconds at steps: under 1%
    overhead   a step of `muonlab.training.loop` between two points             peer: the five lines that a step is

The stock side has the configuration that transformers gives a model that says nothing of chunks, on the same weights;
both sides have the same optimizer, whose time is in the step. One thread, float32.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import optim
from benchmarks.harness import Comparison, Row, per_call, run
from benchmarks.optim_step import tiny_settings
from muonlab.pipeline.attempts import ALIVE_EVERY_S, AttemptClock
from muonlab.registry.cell import Cell, Inputs, OptimizerSpec
from muonlab.registry.files import write_atomically
from muonlab.registry.settings import WorkloadSettings
from muonlab.training import mamba
from muonlab.training import model as models
from muonlab.training.data import TokenData, prepare
from muonlab.training.device import place
from muonlab.training.distributed import ALONE
from muonlab.training.loop import NOTHING_DUE, Run, train

STOCK_CHUNK = 256
OPTIONS = {"lr": 0.01, "lr_adjust": "match_rms_adamw", "orthogonalizer": "gram_eigh", "diagnose_every": 0}
GOALS = {128: 3.0, 512: 2.0}
GRADIENT_GOAL = 1e-6


def settings(length: int, chunk: int | None = None) -> WorkloadSettings:
    """`tiny` at a sequence length, and with another length of chunks in its configuration."""
    tiny = tiny_settings()
    model = tiny.model if chunk is None else tiny.model.model_copy(update={"mamba_chunk_size": chunk})
    data = tiny.data.model_copy(update={"sequence_length": length})
    return tiny.model_copy(update={"data": data, "model": model})


def batch_of(workload: WorkloadSettings) -> torch.Tensor:
    """Random tokens of a step's shape."""
    shape = (workload.batch_size, workload.data.sequence_length + 1)
    return torch.randint(workload.data.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def stepper(workload: WorkloadSettings, loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    """A bare step of the workload's model, forward to update."""
    model, tokens = models.build(workload, seed=0), batch_of(workload)
    optimizer = optim.build("muon", model, **OPTIONS)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, tokens).backward()
        optimizer.step()

    return step


def our_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """As the loop computes it."""
    return models.mean_loss(model, tokens)


def stock_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The model's own loss, with the functions that transformers ships."""
    mamba.uninstall()
    try:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss
    finally:
        mamba.install()


def gradient(workload: WorkloadSettings, loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The gradient of all parameters, flat, on the same weights and tokens."""
    model = models.build(workload, seed=0)
    loss(model, batch_of(workload)).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def steps() -> Iterator[Row]:
    """The step and its gradient at each sequence length."""
    for length, goal in GOALS.items():
        comparison = Comparison(
            f"tiny's step, {length} tokens",
            stepper(settings(length), our_loss),
            stepper(settings(length, STOCK_CHUNK), stock_loss),
            f"stock, chunk {STOCK_CHUNK}",
            goal=goal,
            rounds=11,
        )
        row = run(comparison)
        yield replace(row, note=per_call(row))
        stock = gradient(settings(length, STOCK_CHUNK), stock_loss)
        error = torch.linalg.vector_norm(gradient(settings(length), our_loss) - stock) / torch.linalg.vector_norm(stock)
        yield Row(
            f"its gradient's relative error, {length} tokens",
            f"stock, chunk {STOCK_CHUNK}",
            value=error.item(),
            unit="",
            goal=GRADIENT_GOAL,
            at_least=False,
        )


def cell_of(workload: WorkloadSettings) -> Cell:
    """A cell of Muon on the workload."""
    return Cell(
        workload="tiny",
        arm="muon",
        seed=0,
        settings=workload,
        optimizer=OptimizerSpec(kind="muon", options=optim.parse_options("muon", OPTIONS).model_dump(mode="json")),
        inputs=Inputs(data="", tokenizer="", code="", environment=""),
    )


def overhead() -> Iterator[Row]:
    """What the loop adds to a step between two points of the curve."""
    workload = tiny_settings()
    with tempfile.TemporaryDirectory() as scratch:
        prepare(workload.data, Path(scratch) / "data", progress=lambda _: None)
        cell = cell_of(workload)
        data = TokenData.open(Path(scratch) / "data")
        started = Run(cell, data, Path(scratch), place(workload), ALONE, lambda _: None, lambda _: None)
        row = run(
            Comparison(
                "the loop's step",
                lambda: started.one_step(NOTHING_DUE),
                stepper(workload, our_loss),
                "bare PyTorch loop",
                goal=1 / 1.05,
                rounds=41,
            )
        )
        yield replace(row, note=f"{per_call(row)}; 0.952 is an overhead of 5%.")


LOGGED_STEPS = 60
STEP_PARTS = ("data", "forward", "backward", "optimizer")


def logging() -> Iterator[Row]:
    """The share of `tiny`'s steps that an attempt spends on its files in scratch/, in seconds of the processor."""
    workload = tiny_settings().model_copy(update={"steps": LOGGED_STEPS, "warmup_steps": 10})
    shares = []
    with tempfile.TemporaryDirectory() as scratch:
        data, folder = Path(scratch) / "data", Path(scratch) / "attempt"
        prepare(workload.data, data, progress=lambda _: None)
        folder.mkdir()
        beat = cpu_seconds(lambda: write_atomically(folder / "alive.json", '{"seconds": 0}', durable=False), 100) / 100
        cell = cell_of(workload)
        for number in range(3):
            clock, spent = AttemptClock(folder, cell, lambda _: None, print), [0.0]
            began = time.process_time()
            ended = train(
                cell,
                data,
                Path(scratch) / str(number),
                on_point=lambda row, clock=clock, spent=spent: spent.append(cpu_seconds(lambda: clock.point(row))),
                on_progress=lambda at, clock=clock, spent=spent: spent.append(cpu_seconds(lambda: clock.progress(at))),
            )
            parts = ended.seconds_by_part
            at_steps = sum(parts[part] for part in STEP_PARTS) / ended.seconds
            logged = sum(spent) / ((time.process_time() - began) * at_steps)
            shares.append(100 * (logged + beat / ALIVE_EVERY_S))
    yield Row(
        "logging, of a step",
        "the step",
        value=median(shares),
        low=min(shares),
        high=max(shares),
        unit="%",
        goal=1.0,
        at_least=False,
        note="Points, progress, and once a second that it lives; MLflow is written by another process.",
    )


def cpu_seconds(call: Callable[[], object], times: int = 1) -> float:
    """Of the processor, for so many calls."""
    began = time.process_time()
    for _ in range(times):
        call()
    return time.process_time() - began


SECTIONS = {"step": steps, "logging": logging, "overhead": overhead}
