"""The optimizers against what else could be used: the exact step, the whole step, heuristics, diagnostics, ranks.

    exact      orthogonalize(X, "auto") against U V^T of a float32 torch.linalg.svd, on every matrix shape of the
               350M and of the tiny model; the error of both against a float64 SVD at condition number 1e6
    batched    one call on a stack of small matrices against a Python loop over them
    whole      one `step` of Muon with five Newton-Schulz steps against the Muon of torch, pytorch_optimizer and
               heavyball: same matrices, same gradients, same number of steps, in the same dtype
    heuristics a step of NOLAH against a step of Muon
    rank       the effective rank against the same from torch.linalg.svdvals
    diagnosis  what diagnostics every tenth step add to ten training steps of the tiny model
    ranks      orthogonalisation split over two gloo processes against one process

Errors are ||Q - UV^T||_F / sqrt(k), k = min(m, n). The matrices are Gaussian where speed is measured, and have
singular values from 1 to 1e-6, evenly spaced in the logarithm, where the error is.

All three peers iterate in bfloat16, whatever they are given. To compare like with like, each is also made to
iterate in float32, by replacing in this process only the one function or argument that rounds. heavyball has
other coefficients, so its update differs, in as many operations. It runs without torch.compile, which took a minute
for three shapes and gave slower steps on the CPU it was tried on.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import optim
from benchmarks.harness import Comparison, Row, cpu_field, per_call, seconds_text, weighted
from benchmarks.harness import run as measure
from muonlab.registry.settings import WorkloadSettings
from muonlab.training import model as models
from optim.core.spectrum import effective_rank, singular_values

SHAPES: dict[str, tuple[tuple[int, int], int]] = {
    "in_proj": ((3376, 768), 28),
    "MLP in": ((4096, 768), 32),
    "MLP out": ((768, 2048), 32),
    "out_proj": ((768, 1536), 28),
    "q, o": ((768, 768), 8),
    "k, v": ((256, 768), 8),
}
"""Hidden matrices of the 350M model (28 Mamba and 4 attention layers): name -> (shape, how many)."""

SVD = "fp32 linalg.svd"
ERROR_GOAL = 1e-4
WITHIN = 1 / 1.1  # the goal "at most 10% slower"
DIAGNOSIS_GOAL = 2.0  # percent
BF16_GOAL = 15.0
RANK_GOAL = 2.0
BATCH_GOAL = 4.0
STEPS = 5
MOMENTUM = 0.95
LR = 0.02


def exact() -> Iterator[Row]:
    """The exact step on every shape of the 350M model, its total by count, and the errors."""
    every = "350M model, exact step of every matrix"
    by_count = "Each shape's time by its count, 136 in all."
    parts, hard = [], []
    for name, (shape, count) in SHAPES.items():
        what = f"{name} {shape[0]}x{shape[1]}"
        parts.append((count, _exact_row(f"{what}, exact step", gaussian(*shape), 1.0)))
        yield parts[-1][1]
        hard.append((count, _exact_row(f"{what}, condition 1e6", conditioned(*shape, 1e6), 1.0)))
        yield hard[-1][1]
        yield from _errors(name, *shape)
    yield weighted(every, parts, 1.5, by_count)
    yield weighted(f"{every}, condition 1e6", hard, 1.5, by_count)
    for (m, n), count in tiny_shapes().items():
        stack = torch.stack([gaussian(m, n, seed=i) for i in range(count)])
        yield _exact_row(f"tiny: {count} x ({m}x{n}), exact step", stack, 1.0)


def _exact_row(name: str, X: Tensor, goal: float) -> Row:
    ours, peer = partial(optim.orthogonalize, X, "auto"), partial(svd_polar, X)
    row = measure(Comparison(name, ours, peer, SVD, goal))
    method = optim.resolve_orthogonalizer(tuple(X.shape), X.dtype, X.device.type)
    return replace(row, note=f"{method}; {per_call(row)}.")


def _errors(name: str, m: int, n: int) -> Iterator[Row]:
    X = conditioned(m, n, 1e6)
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    truth = U @ Vh
    ours, peer = (relative_error(Q, truth) for Q in (optim.orthogonalize(X, "auto"), svd_polar(X)))
    yield Row(
        f"{name} {m}x{n}, error at condition 1e6",
        "float64 SVD",
        value=ours,
        unit="",
        goal=ERROR_GOAL,
        at_least=False,
        note=f"{SVD}: {peer:.2g}.",
    )


def batched() -> Iterator[Row]:
    """A stack of 64 small matrices in one call, against loops over them."""
    for m, n in ((32, 64), (64, 64)):
        stack = torch.stack([gaussian(m, n, seed=i) for i in range(64)])
        name = f"64 x ({m}x{n}), one call"
        ours = partial(optim.orthogonalize, stack, "auto")
        loops: dict[str, tuple[Callable[[Tensor], Tensor], float | None]] = {
            "loop of the same": (partial(optim.orthogonalize, method="auto"), BATCH_GOAL),
            f"loop of {SVD}": (svd_polar, None),
        }
        for peer, (one, goal) in loops.items():
            row = measure(Comparison(name, ours, partial(_each, one, stack), peer, goal))
            yield replace(row, note=f"{per_call(row)}.")


def _each(one: Callable[[Tensor], Tensor], stack: Tensor) -> list[Tensor]:
    return [one(X) for X in stack]


# ---------------------------------------------------------------------- the whole step


class Matrices(nn.Module):
    """Hidden matrices of some shapes, with weights and gradients that depend on their position alone."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(0.02 * gaussian(*shape, seed=i) for i, shape in enumerate(shapes))
        self.gradients = [gaussian(*shape, seed=1000 + i) for i, shape in enumerate(shapes)]

    def renew_gradients(self) -> None:
        """Fresh copies: some optimizers overwrite or drop what they are given."""
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient.clone()


Stepped = tuple[Matrices, torch.optim.Optimizer]


def muon(shapes: list[tuple[int, int]], dtype: str) -> Stepped:
    """Ours, with torch.optim.Muon's momentum and learning rates."""
    model = Matrices(shapes)
    options: dict[str, Any] = {
        "momentum_form": "averaged",
        "nesterov": True,
        "lr_adjust": "original",
        "diagnose_every": 0,
    }
    iteration: dict[str, Any] = {
        "orthogonalizer": "newton_schulz",
        "orthogonalizer_steps": STEPS,
        "orthogonalizer_dtype": dtype,
    }
    return model, optim.build("muon", model, lr=LR, momentum=MOMENTUM, **options, **iteration)


def torch_muon(shapes: list[tuple[int, int]]) -> Stepped:
    """torch.optim.Muon, with its defaults but for the weight decay."""
    model = Matrices(shapes)
    return model, torch.optim.Muon(model.weights, lr=LR, momentum=MOMENTUM, weight_decay=0.0, ns_steps=STEPS)


def pytorch_optimizer_muon(shapes: list[tuple[int, int]]) -> Stepped:
    """pytorch_optimizer's Muon, with its defaults. Raises ImportError where it is not installed."""
    from pytorch_optimizer import Muon

    model = Matrices(shapes)
    group = {"params": list(model.weights), "use_muon": True}
    return model, Muon([group], lr=LR, momentum=MOMENTUM, ns_steps=STEPS)


def heavyball_muon(shapes: list[tuple[int, int]]) -> Stepped:
    """heavyball's Muon, with its defaults but for the compiler. Raises ImportError where it is not installed."""
    import heavyball.utils

    heavyball.utils.compile_mode = None
    model = Matrices(shapes)
    return model, heavyball.Muon(list(model.weights), lr=LR, betas=(MOMENTUM, 0.99))


def _torch_float32(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """The iteration of torch.optim.Muon, operation by operation, without its rounding to bfloat16."""
    a, b, c = ns_coefficients
    tall = grad.size(0) > grad.size(1)
    X = grad.T if tall else grad
    X = X / X.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = X @ X.T
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.T if tall else X


@contextlib.contextmanager
def replaced(module: Any, name: str, value: object) -> Iterator[None]:
    """`module.name` is `value` inside, and what it was again after."""
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


def torch_in_float32() -> contextlib.AbstractContextManager[None]:
    """torch.optim.Muon iterates in float32 inside."""
    from torch.optim import _muon

    return replaced(_muon, "_zeropower_via_newtonschulz", _torch_float32)


def pytorch_optimizer_in_float32() -> contextlib.AbstractContextManager[None]:
    """pytorch_optimizer's Muon iterates in float32 inside, by its function's own argument."""
    from pytorch_optimizer.optimizer.muon import base

    iterate = base.zero_power_via_newton_schulz_5
    return replaced(base, "zero_power_via_newton_schulz_5", partial(iterate, dtype=torch.float32))


def heavyball_in_float32() -> contextlib.AbstractContextManager[None]:
    """heavyball's Muon does not round to bfloat16 inside."""
    import heavyball.utils

    return replaced(heavyball.utils, "stochastic_round_", lambda ref, source=None: ref if source is None else source)


PEERS: dict[str, tuple[Callable[[list[tuple[int, int]]], Stepped], Callable[[], Any]]] = {
    "torch": (torch_muon, torch_in_float32),
    "pytorch_optimizer": (pytorch_optimizer_muon, pytorch_optimizer_in_float32),
    "heavyball": (heavyball_muon, heavyball_in_float32),
}
"""Distribution -> (its Muon, what makes it iterate in float32)."""


def whole() -> Iterator[Row]:
    """One step on one matrix of every shape of the 350M model."""
    shapes = [shape for shape, _ in SHAPES.values()]
    for library, (build, in_float32) in PEERS.items():
        name = f"Muon step, {len(shapes)} matrices"
        try:
            build([(2, 2)])
        except ImportError as missing:
            reason = f"{library} cannot be imported ({missing}); pip install '.[bench]'."
            yield Row(f"{name}, float32", f"{library} Muon", goal=WITHIN, note=reason)
            continue
        peer = f"{library} {importlib.metadata.version(library)}"
        yield _step_row(f"{name}, float32", f"{peer}, float32", "float32", build, shapes, WITHIN, in_float32)
        yield _step_row(f"{name}, bfloat16", f"{peer}, bfloat16", "bfloat16", build, shapes, None)
    yield from _against_bfloat16(shapes)


def _step_row(
    name: str,
    peer_name: str,
    dtype: str,
    build: Callable[[list[tuple[int, int]]], Stepped],
    shapes: list[tuple[int, int]],
    goal: float | None,
    inside: Callable[[], Any] = contextlib.nullcontext,
    rounds: int = 5,
) -> Row:
    model, ours = muon(shapes, dtype)
    peer_model, peer = build(shapes)

    def renew() -> None:
        model.renew_gradients()
        peer_model.renew_gradients()

    with inside():
        renew()
        start = [weight.detach().clone() for weight in model.weights]
        ours.step()
        peer.step()
        gap = max(
            relative_error(theirs.detach() - old, mine.detach() - old, scale=(mine.detach() - old).norm())
            for mine, theirs, old in zip(model.weights, peer_model.weights, start, strict=True)
        )
        row = measure(Comparison(name, ours.step, peer.step, peer_name, goal, rounds=rounds, setup=renew))
    return replace(row, note=f"{per_call(row)}; the first step's changes of a matrix differ by {gap:.2g} at most.")


def _against_bfloat16(shapes: list[tuple[int, int]]) -> Iterator[Row]:
    """Our float32 against torch's only dtype: what that dtype costs depends on the processor."""
    flags = cpu_field("flags").split()
    units = sorted(flag for flag in flags if flag.endswith("bf16"))
    name = "Muon step, ours float32"
    peer = "torch, its bfloat16"
    row = _step_row(name, peer, "float32", torch_muon, shapes, BF16_GOAL if flags and not units else None)
    if units:
        why = (
            f"The goal of {BF16_GOAL:g} is for a processor without bfloat16 units. This one has them "
            f"({', '.join(units)}), so bfloat16 is the fast dtype here and float32 costs what this ratio says."
        )
        yield replace(row, note=f"{row.note} For information.")
        yield Row(f"{name}, no bfloat16 units", peer, goal=BF16_GOAL, note=why)
    elif flags:
        yield replace(row, note=f"{row.note} Without bfloat16 units torch multiplies in scalar code.")
    else:
        yield replace(row, note=f"{row.note} Whether the processor has bfloat16 units is not known here: no goal.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch mentions a setting of other devices when oneDNN is switched
        small = _step_row(
            "256x768 Muon step, ours float32",
            "torch, its bfloat16, oneDNN off",
            "float32",
            torch_muon,
            [(256, 768)],
            None,
            partial(torch.backends.mkldnn.flags, enabled=False),
            rounds=3,
        )
    why = "With oneDNN switched off torch takes the path of a processor whose bfloat16 oneDNN does not serve."
    yield replace(small, note=f"{small.note} {why} An emulation, so no goal is judged by it.")


# ---------------------------------------------------------------------- heuristics, ranks, diagnostics


def heuristics() -> Iterator[Row]:
    """A step of NOLAH (gate, quantile, projection) against one of Muon, both with the exact orthogonaliser."""
    shapes = [shape for shape, _ in SHAPES.values()]
    models_of: dict[str, Callable[[], nn.Module]] = {
        f"{len(shapes)} matrices of 350M": lambda: Matrices(shapes),
        "tiny model": tiny_model,
    }
    cases: list[tuple[str, dict[str, Any], float | None]] = [
        ("auto", {"orthogonalizer": "auto"}, WITHIN),
        ("newton_schulz fp32", {"orthogonalizer": "newton_schulz", "orthogonalizer_dtype": "float32"}, None),
    ]
    for where, build in models_of.items():
        for how, options, goal in cases:
            sides = {kind: build() for kind in ("nolah", "muon")}
            nolah, plain = (optim.build(k, m, lr=1e-4, diagnose_every=0, **options) for k, m in sides.items())
            for model in sides.values():
                give_gradients(model)
            row = measure(Comparison(f"NOLAH step, {where}", nolah.step, plain.step, f"our Muon, {how}", goal))
            yield replace(row, note=f"{per_call(row)}: {_slower(row)}.")


def rank() -> Iterator[Row]:
    """The effective rank of every shape's matrix."""
    for name, (shape, _) in SHAPES.items():
        X = gaussian(*shape)
        ours = partial(_effective_rank, X, singular_values)
        peer = partial(_effective_rank, X, torch.linalg.svdvals)
        row = measure(Comparison(f"effective rank, {name} {shape[0]}x{shape[1]}", ours, peer, "svdvals", RANK_GOAL))
        yield replace(row, note=f"{per_call(row)}; {ours():.6g} against {peer():.6g}.")


def _effective_rank(X: Tensor, values: Callable[[Tensor], Tensor]) -> float:
    return effective_rank(values(X)).item()


def diagnosis() -> Iterator[Row]:
    """What diagnostics every tenth step add to training the tiny model.

    The extra time of ten optimizer steps, one of them diagnosed, over ten without diagnostics, as a share of ten
    training steps (forward, backward, optimizer). The whole of ten training steps with and without says the same with
    a spread wider than the goal.
    """
    for kind in ("muon", "nolah", "orthonoise"):
        name = f"diagnostics of tiny, {kind}"
        diagnosed, plain = (_ten_optimizer_steps(kind, diagnose_every=every) for every in (10, 0))
        step = measure(Comparison(name, diagnosed, plain, "without diagnostics", rounds=15))
        with_them, without = (_ten_steps(kind, diagnose_every=every) for every in (10, 0))
        ten = measure(Comparison(f"10 training steps of tiny, {kind}", with_them, without, step.peer))
        ten_s = median(ten.seconds["peer"])
        shares = [100 * (more - less) / ten_s for more, less in zip(*step.seconds.values(), strict=True)]
        yield Row(
            name,
            "10 training steps",
            value=median(shares),
            low=min(shares),
            high=max(shares),
            unit="%",
            goal=DIAGNOSIS_GOAL,
            at_least=False,
            note=f"Ten optimizer steps take {per_call(step)}, ten training steps {seconds_text(ten_s)}.",
            seconds={**step.seconds, "ten_steps": ten.seconds["peer"]},
        )
        yield replace(ten, note=f"{per_call(ten)}: {_slower(ten)}.")


def _ten_optimizer_steps(kind: str, *, diagnose_every: int) -> Callable[[], None]:
    model = tiny_model()
    give_gradients(model)
    optimizer = optim.build(kind, model, lr=1e-4, orthogonalizer="auto", diagnose_every=diagnose_every)

    def ten_steps() -> None:
        for _ in range(10):
            optimizer.step()

    return ten_steps


def _ten_steps(kind: str, *, diagnose_every: int) -> Callable[[], None]:
    settings = tiny_settings()
    model = tiny_model()
    optimizer = optim.build(kind, model, lr=1e-3, orthogonalizer="auto", diagnose_every=diagnose_every)
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch_size, settings.data.sequence_length + 1)
    tokens = torch.randint(settings.data.vocab_size, shape, generator=generator)

    def ten_steps() -> None:
        for _ in range(10):
            loss = models.mean_loss(model, tokens)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return ten_steps


def _slower(row: Row) -> str:
    assert row.value is not None
    return f"{100 * (1 / row.value - 1):+.1f}% time"


def ranks() -> Iterator[Row]:
    """A step whose orthogonalisation two processes share against the same step by one, while the other waits."""
    name, peer = "Muon step, exact, split over 2 gloo ranks", "1 rank"
    if (os.cpu_count() or 1) < 2:
        yield Row(name, peer, note="This machine has one processor.")
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "benchmarks.rank_worker", str(Path(folder) / "store")]
        workers = [
            stack.enter_context(
                subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for i in range(2)
        ]

        def ask(word: str, *asked: subprocess.Popen[str]) -> list[str]:
            for worker in asked:
                assert worker.stdin is not None
                print(word, file=worker.stdin, flush=True)
            return [worker.stdout.readline().strip() for worker in asked if worker.stdout is not None]

        row = measure(
            Comparison(
                name,
                lambda: ask("split", *workers),
                lambda: ask("alone", workers[0]),
                peer,
                clock=time.perf_counter,
                rounds=5,
            )
        )
        sums = {*ask("sum split", *workers), *ask("sum alone", workers[0])}
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.close()
    same = "the weights are bit-identical" if len(sums) == 1 else f"THE WEIGHTS DIFFER: {sorted(sums)}"
    yield replace(row, note=f"{per_call(row)}, on the wall; {same} after as many steps.")


SECTIONS = {
    "exact": exact,
    "batched": batched,
    "whole": whole,
    "heuristics": heuristics,
    "rank": rank,
    "diagnosis": diagnosis,
    "ranks": ranks,
}


# ---------------------------------------------------------------------- matrices and models


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    """A standard normal matrix [m, n]."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def conditioned(m: int, n: int, condition: float) -> Tensor:
    """A float32 matrix [m, n] with singular values from 1 to 1 / condition, evenly spaced in the logarithm."""
    k = min(m, n)
    U, V = (torch.linalg.qr(gaussian(rows, k, seed).double()).Q for rows, seed in ((m, 1), (n, 2)))
    singular = torch.logspace(0, -math.log10(condition), k, dtype=torch.float64)
    product: Tensor = U * singular @ V.mT
    return product.float()


def svd_polar(X: Tensor) -> Tensor:
    """U V^T [..., m, n] as anyone would write it."""
    wide = X.shape[-2] < X.shape[-1]
    # Of the transpose where that is the faster way, so that no gain is one of orientation.
    U, _, Vh = torch.linalg.svd(X.mT if wide else X, full_matrices=False)
    filled: Tensor = U @ Vh
    return filled.mT if wide else filled


def relative_error(X: Tensor, truth: Tensor, scale: float | Tensor | None = None) -> float:
    """||X - truth||_F over `scale`, which is sqrt(k), the norm of an orthogonal factor, unless it is given."""
    error = torch.linalg.vector_norm(X.double() - truth.double())
    return float(error / (math.sqrt(min(truth.shape)) if scale is None else scale))


def tiny_settings() -> WorkloadSettings:
    """The workload `tiny` of params.yaml."""
    workloads = yaml.safe_load(Path("params.yaml").read_text())["workloads"]
    return WorkloadSettings(**workloads["tiny"]["settings"])


def tiny_model() -> models.Model:
    """The model of the workload `tiny`."""
    return models.build(tiny_settings(), seed=0)


def tiny_shapes() -> dict[tuple[int, int], int]:
    """Shapes of the tiny model's hidden matrices, and how many there are of each."""
    table = optim.routing_table(optim.build("muon", tiny_model()))
    return dict(Counter((row.shape[0], row.shape[1]) for row in table if row.route == "muon"))


def give_gradients(model: nn.Module) -> None:
    """A Gaussian gradient of rms 1e-3 for every parameter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
