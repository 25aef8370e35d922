"""The training of one cell: a plain loop, resumable at any step without a trace.

    lr of group g at step t (from 0) of T, warm-up W:  initial_lr_g * factor(t)
    factor(t) = (t + 1) / W                                              for t < W
              = 1                                                        then, constant
              = f + (1 - f) * (1 + cos(pi * (t - W) / (T - 1 - W))) / 2  or cosine: 1 at t = W, f at t = T - 1

for every parameter group alike, but for one that says `warmup: False`: its factor is 1 for t < W. A batch may be
taken in micro-batches whose gradients are added up, and be split over ranks (see `distributed`). Everything that a
step depends on is a function of (cell, step) or is in the checkpoint, so a run that was killed and resumed has the
same weights, optimizer state and curve (its `seconds` apart) as one that was not.

A run has diverged when a training or validation loss is not finite, when the optimizer meets a gradient or
momentum that is not, or when the validation loss is above `EXPLODED` times the lowest so far at
`EXPLODED_EVALUATIONS` evaluations. That is a result, with the curve up to there, and not an error.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

import optim
from muonlab.registry.cell import Cell
from muonlab.registry.errors import IntegrityError
from muonlab.registry.settings import WorkloadSettings
from muonlab.training import checkpoint
from muonlab.training import model as models
from muonlab.training.data import Order, TokenData, order_sha256, validation_subset
from muonlab.training.device import Placement, place
from muonlab.training.distributed import Ranks, joined
from muonlab.training.evaluate import Scorer, perplexity
from muonlab.training.timing import Stopwatch

if TYPE_CHECKING:
    from muonlab.training.model import Model

CurveRow = dict[str, float | None]

CURVE_COLUMNS = ("step", "tokens", "seconds", "train_loss", "val_loss", "lr", "grad_norm", "update_rms")
"""Columns of every curve, in order; `hessian_top`, `hessian_residual` and the optimizer's diagnostics (these with
`DIAGNOSTIC_PREFIX`) follow. A row has `val_loss` where there was an evaluation, else only measures of its step."""
DIAGNOSTIC_PREFIX = "opt_"

EXPLODED, EXPLODED_EVALUATIONS = 1.5, 2

HESSIAN_TOLERANCE = 0.01
"""Relative residual at which the Hessian's top eigenvalue is known well enough: seeds differ by far more."""

WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where the training stands, about once a second; or, with a `warning`, at once."""

    step: int
    steps: int
    loss: float | None
    """Last training loss [nats/token]."""
    seconds_per_step: float | None
    resumed_from_step: int = 0
    warning: str | None = None


@dataclass(frozen=True)
class TrainOutcome:
    """How a training ended. Losses in nats/token; `curve` rows have `CURVE_COLUMNS` and the diagnostics."""

    status: Literal["completed", "diverged"]
    reason: str | None
    """Why it counts as diverged; null when completed."""
    val_loss: float | None
    """On the whole validation split; null when diverged."""
    perplexity: float | None
    final_step: int
    """Optimizer steps done, those of earlier attempts included."""
    tokens: int
    """Targets trained on, those of earlier attempts included."""
    resumed_from_step: int
    """0 for a run from the start."""
    seconds: float
    """Wall seconds of this attempt, from the built model to the loss on the whole split."""
    orthogonalizers: dict[str, str]
    """Method by shape `m x n`, for the matrices that are orthogonalised."""
    init_sha256: str
    order_sha256: str
    weights_sha256: str | None
    weights: Path | None
    """The final weights as safetensors; null, as their hash, when diverged."""
    device: str
    precision: str
    """Dtype of the weights, and `bfloat16 autocast` where products of matrices are rounded to that."""
    repeats: str
    """How far a repetition on the same kind of machine agrees; in words."""
    ranks: int
    """Processes that made the run."""
    seconds_by_part: dict[str, float]
    """Of `seconds`, by `timing.PARTS`."""
    peak_memory_bytes: int
    """Of the device by this run, or of this process since it began; the largest of the ranks is not looked for."""
    curve: tuple[CurveRow, ...] = field(repr=False)


class _Diverged(Exception):
    """Ends the loop; the message says why."""


def train(
    cell: Cell,
    data_dir: Path,
    work_dir: Path,
    *,
    on_point: Callable[[CurveRow], None],
    on_progress: Callable[[Progress], None],
) -> TrainOutcome:
    """Train the cell on the tokens in `data_dir`, or go on from the newest good checkpoint in `work_dir`.

    `on_point` gets each curve row that this call computes; a resumed run repeats those after its checkpoint,
    the same but for `seconds`. Under torchrun every process calls this, with one `work_dir`; the first alone calls
    back and writes, all return the outcome. Sets torch to one thread: the summation order, hence the result, depends
    on their number. Raises IntegrityError for data of other settings, UsageError for a batch that the ranks do not
    divide and for a model that is not there, CheckpointError (see `checkpoint`), and what `optim.build` raises.
    """
    data = TokenData.open(data_dir)
    if data.meta.settings != cell.settings.data:
        raise IntegrityError(f"{data_dir}: made with other data settings than the cell's; prepare the data again.")
    with joined() as ranks:
        placement = place(cell.settings, local_rank=ranks.local_rank)
        return _train(Run(cell, data, work_dir, placement, ranks, on_point, on_progress), work_dir)


def _train(run: Run, work_dir: Path) -> TrainOutcome:
    cell, placement = run.cell, run.placement
    began = time.monotonic()
    resumed_from_step = run.resume()
    reason, loss = None, None
    try:
        loss = run.to_the_end()
    except (_Diverged, optim.NonFiniteError) as end:
        reason = f"step {run.step}: {end}"
    weights = work_dir / WEIGHTS_FILE if reason is None else None
    if weights is not None and run.ranks.writes:
        checkpoint.write_weights(weights, run.model)
    run.ranks.wait()
    autocast = "bfloat16 autocast over " if placement.autocast else ""
    return TrainOutcome(
        status="completed" if reason is None else "diverged",
        reason=reason,
        val_loss=loss,
        perplexity=None if loss is None else perplexity(loss),
        final_step=run.step,
        tokens=run.step * run.tokens_per_step,
        resumed_from_step=resumed_from_step,
        seconds=time.monotonic() - began,
        orthogonalizers={
            f"{row.shape[0]} x {row.shape[1]}": row.orthogonalizer
            for row in optim.routing_table(run.optimizer)
            if row.orthogonalizer is not None
        },
        init_sha256=run.init_sha256,
        order_sha256=order_sha256(
            seed=cell.seed,
            steps=cell.settings.steps,
            batch_size=cell.settings.batch_size,
            blocks=run.order.blocks,
        ),
        weights_sha256=None if weights is None else models.weights_sha256(run.model),
        weights=weights,
        device=placement.name,
        precision=f"{autocast}{cell.settings.weights}",
        repeats=placement.repeats,
        ranks=run.ranks.size,
        seconds_by_part=run.clock.seconds,
        peak_memory_bytes=placement.peak_memory_bytes(),
        curve=tuple(run.curve),
    )


def _ignore(_: object) -> None:
    """What ranks other than the first tell their callers."""


class Due(NamedTuple):
    """What a step is to tell beside its training loss."""

    point: bool
    """An evaluation, hence a point of the curve."""
    hessian: bool
    measures: bool
    """Gradient, update and the optimizer's diagnostics; with every point and every eigenvalue too."""

    @classmethod
    def at(cls, step: int, settings: WorkloadSettings) -> Due:
        point = step % settings.eval_every == 0 or step == settings.steps
        hessian = step in settings.hessian_steps
        diagnosis = settings.diagnose_every > 0 and step % settings.diagnose_every == 0
        return cls(point, hessian, point or hessian or diagnosis)


NOTHING_DUE = Due(point=False, hessian=False, measures=False)


class Run:
    """The mutable state of one training."""

    def __init__(
        self,
        cell: Cell,
        data: TokenData,
        work_dir: Path,
        placement: Placement,
        ranks: Ranks,
        on_point: Callable[[CurveRow], None],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.cell, self.settings, self.data = cell, cell.settings, data
        self.checkpoints = work_dir / "checkpoints"
        self.placement, self.ranks = placement, ranks
        self.on_point = on_point if ranks.writes else _ignore
        self.on_progress = on_progress if ranks.writes else _ignore
        self.clock = Stopwatch(placement.synchronize)
        settings = cell.settings
        self.tokens_per_step = settings.batch_size * settings.data.sequence_length
        self.share = ranks.share(settings.batch_size)
        self.micro_batch = ranks.micro_batch(settings.batch_size, settings.micro_batch_size)
        # On the CPU first: the initial weights and their hash are the same on every device.
        self.model = models.build(settings, seed=cell.seed)
        self.init_sha256 = models.weights_sha256(self.model)
        self.model.to(placement.device)  # type: ignore[arg-type]
        self.parameters = list(self.model.parameters())
        self.optimizer = build_optimizer(cell, self.model)
        self.scorer = Scorer(self.model, data, placement, ranks)
        blocks = min(data.block_count("training"), settings.examples or sys.maxsize)
        self.order = Order(seed=cell.seed, batch_size=settings.batch_size, blocks=blocks)
        self.subset = validation_subset(data.block_count("validation"), settings.eval_blocks)
        self.began = time.monotonic()
        """When the first attempt would have begun, had it never been interrupted."""
        self.step = self.resumed_from_step = 0
        self.curve: list[CurveRow] = []
        self.losses_since_point: list[float] = []

    def resume(self) -> int:
        """Take over the newest good checkpoint; return its step, or 0."""
        if self.ranks.writes:
            checkpoint.sweep(self.checkpoints)
        self.ranks.wait()
        state = checkpoint.resume(self.checkpoints, self.cell.digest, self.model, self.optimizer, warn=self._warn)
        if state is None:
            return 0
        self.step, self.curve, self.losses_since_point = state.step, state.curve, state.losses_since_point
        self.resumed_from_step = state.step
        self.began -= state.seconds
        return state.step

    def to_the_end(self) -> float:
        """Do the steps that are left; return the loss on the whole validation split. Raises _Diverged."""
        steps = self.settings.steps
        if not self.curve:
            self._add_point({})
        told_at, told_step = time.monotonic(), self.step
        while self.step < steps:
            at_step = self.step + 1
            due = Due.at(at_step, self.settings)
            loss, measures = self.one_step(due)
            self.step = at_step
            self.losses_since_point.append(loss)
            if due.point:
                self._add_point(measures)
            elif due.measures:
                self._add_row(measures)
            if at_step % self.settings.checkpoint_every == 0 or at_step == steps:
                self._save()
            if (now := time.monotonic()) - told_at >= 1 or at_step == steps:
                per_step = (now - told_at) / (at_step - told_step)
                with self.clock.part("logging"):
                    self.on_progress(Progress(at_step, steps, loss, per_step, self.resumed_from_step))
                told_at, told_step = now, at_step
        with self.clock.part("evaluation"):
            loss = self.scorer.validation_loss()
        if not math.isfinite(loss):
            raise _Diverged(f"the loss on the whole validation split is {loss}")
        return loss

    def one_step(self, due: Due) -> tuple[float, CurveRow]:
        """One optimizer step: its training loss and, where that is due, what a row of the curve says of it."""
        with self.clock.part("data"):
            batch = torch.from_numpy(self.data.blocks("training", self.order.step(self.step)))
        measures: CurveRow = {}
        if due.hessian:
            with self.clock.part("measures"):
                measures |= self._curvature(batch)
        loss = self._gradient(batch[self.share])
        if not math.isfinite(loss):
            raise _Diverged(f"the training loss is {loss}")
        with self.clock.part("optimizer"):
            self.ranks.average_gradients(self.parameters)
            if due.measures or self.settings.clip_norm is not None:
                grad_norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
                measures["grad_norm"] = grad_norm.item()
                # What a non-finite gradient leads to is the optimizer's policy; clipping by it would hide whose it is.
                if self.settings.clip_norm is not None and math.isfinite(grad_norm.item()):
                    nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr_factor(self.step, self.settings, warmup=group["warmup"]) * group["initial_lr"]
        before: list[torch.Tensor] = []
        if due.measures:
            with self.clock.part("measures"):
                before = [p.detach().clone() for p in self.parameters]
        with self.clock.part("optimizer"):
            self.optimizer.step()
            # At once, not before the next step: an evaluation in between then has their memory.
            self.optimizer.zero_grad(set_to_none=True)
        if due.measures:
            with self.clock.part("measures"):
                measures["lr"] = self.optimizer.param_groups[0]["lr"]
                measures["update_rms"] = _rms_change(before, self.parameters)
                found = self.optimizer.diagnostics()  # type: ignore[attr-defined]
                measures |= {f"{DIAGNOSTIC_PREFIX}{name}": value for name, value in found.items()}
        return loss, measures

    def _gradient(self, tokens: torch.Tensor) -> float:
        """Leave the gradient of this rank's mean loss over `tokens` [b, S + 1]; return the mean loss of all ranks."""
        total = 0.0
        for part in torch.split(tokens, self.micro_batch):
            with self.clock.part("forward"):
                loss = self.scorer.mean_loss(part) * (len(part) / len(tokens))
                total += loss.item()
            # Where it is not finite the step ends before the gradient is looked at, on all ranks alike.
            with self.clock.part("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
        return self.ranks.sums([total], self.placement.device)[0] / self.ranks.size

    def _curvature(self, tokens: torch.Tensor) -> CurveRow:
        """The top eigenvalue of the Hessian of the batch's loss at the present weights, and how well it is known."""
        from optim.core.curvature import top_hessian_eigenvalue

        def batch_loss() -> torch.Tensor:
            return self.scorer.token_losses(tokens).mean()

        try:
            value, residual = top_hessian_eigenvalue(
                batch_loss, self.parameters, tolerance=HESSIAN_TOLERANCE, seed=self.cell.seed
            )
        except optim.NonFiniteError:  # of the second derivative: no reason to end a run whose first is finite
            value = residual = math.nan
        return {"hessian_top": value, "hessian_residual": residual}

    def _add_row(self, measures: CurveRow) -> None:
        """A row between two evaluations: it has no `val_loss`, where an evaluation's is a number, finite or not."""
        row: CurveRow = {
            **measures,
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "seconds": time.monotonic() - self.began,
        }
        self.curve.append(row)
        with self.clock.part("logging"):
            self.on_point(row)

    def _add_point(self, measures: CurveRow) -> None:
        losses = self.losses_since_point
        with self.clock.part("evaluation"):
            val_loss = self.scorer.validation_loss(self.subset)
        train_loss = math.fsum(losses) / len(losses) if losses else None
        self.losses_since_point = []
        self._add_row({**measures, "train_loss": train_loss, "val_loss": val_loss})
        if why := why_diverged([row["val_loss"] for row in self.curve if "val_loss" in row]):
            raise _Diverged(why)

    def _save(self) -> None:
        state = checkpoint.LoopState(
            cell_digest=self.cell.digest,
            step=self.step,
            seconds=time.monotonic() - self.began,
            losses_since_point=self.losses_since_point,
            curve=self.curve,
        )
        with self.clock.part("checkpoint"):
            if self.ranks.writes:
                checkpoint.save(self.checkpoints, self.model, self.optimizer, state)

    def _warn(self, warning: str) -> None:
        self.on_progress(Progress(self.step, self.settings.steps, None, None, warning=warning))


def build_optimizer(cell: Cell, model: Model) -> torch.optim.Optimizer:
    """The cell's optimizer over the model. How often it diagnoses is the workload's to say."""
    options = {**cell.optimizer.options, "diagnose_every": cell.settings.diagnose_every}
    return optim.build(cell.optimizer.kind, model, seed=cell.seed, **options)


def lr_factor(step: int, settings: WorkloadSettings, *, warmup: bool = True) -> float:
    """The factor on a group's learning rate at `step`, counted from 0; see the module's formula."""
    warmup_steps, last = settings.warmup_steps, settings.steps - 1
    if step < warmup_steps:
        return (step + 1) / warmup_steps if warmup else 1.0
    if settings.schedule == "constant":
        return 1.0
    share_done = (step - warmup_steps) / max(1, last - warmup_steps)
    floor = settings.final_lr_fraction
    return floor + (1 - floor) * (1 + math.cos(math.pi * share_done)) / 2


def why_diverged(val_losses: Sequence[float | None]) -> str | None:
    """Why a run with these validation losses, in order, has diverged; None where it has not."""
    lowest, exploded = math.inf, 0
    for loss in val_losses:
        if loss is None or not math.isfinite(loss):
            return f"the validation loss is {loss}"
        if loss > EXPLODED * lowest:
            exploded += 1
            if exploded >= EXPLODED_EVALUATIONS:
                return (
                    f"the validation loss is {loss:.4g}, above {EXPLODED} times the lowest ({lowest:.4g}) "
                    f"at {exploded} evaluations"
                )
        lowest = min(lowest, loss)
    return None


def write_curve_csv(rows: Sequence[CurveRow], path: Path) -> None:
    """Write a curve as CSV: `CURVE_COLUMNS`, then the diagnostics by name; what was not measured is empty."""
    extra = sorted({name for row in rows for name in row} - set(CURVE_COLUMNS))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*CURVE_COLUMNS, *extra], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _rms_change(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """Root mean square over all parameters' entries of what a step changed, learning rate included."""
    squares = [(new.detach() - old).double().square().sum().item() for old, new in zip(before, after, strict=True)]
    return math.sqrt(math.fsum(squares) / sum(old.numel() for old in before))
