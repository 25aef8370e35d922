"""What is kept of a run: one record for every attempt at a cell, failed and abandoned ones included.

A record is written once, by the process that made the attempt (or by the next start, for one that was
killed), and becomes one line of `experiments/ledger.jsonl`. Losses are in nats/token.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

from muonlab.registry.settings import Closed, Name, Seed

Status = Literal["completed", "diverged", "failed", "abandoned"]


class Hashes(Closed):
    """SHA-256 of what the run started from; two runs are a pair when data, tokenizer, init and order agree."""

    data: str
    tokenizer: str
    init: str | None
    """Initial weights."""
    order: str | None
    """Block indices of every step, in order."""
    weights: str | None
    """Final weights; null when the run did not finish."""
    code: str
    environment: str


class Provenance(Closed):
    """Where and with what the run was made."""

    commit: str | None
    dirty: bool | None
    """Tracked code differed from the commit."""
    diff_sha256: str | None = None
    """SHA-256 of how it differed (`git diff HEAD`, the one cell's keys in params.yaml aside); null where it did not."""
    python: str
    torch: str
    transformers: str
    device: str
    host_os: str


class Computing(Closed):
    """How the numbers were computed, and what that took."""

    device: str
    precision: str
    """Dtype of the weights, and `bfloat16 autocast` where products of matrices were rounded to that."""
    repeats: str
    """How far a repetition on the same kind of machine agrees; in words."""
    seconds_by_part: dict[str, float]
    """Wall seconds of the attempt: data, forward, backward, optimizer, measures, evaluation, logging, checkpoint."""
    peak_memory_bytes: int


class CurvePoint(Closed):
    """Validation loss [nats/token] after `step` optimizer steps; null where it was not finite."""

    step: int
    val_loss: float | None


class RunRecord(Closed):
    """One attempt at one cell."""

    schema_version: Literal[1] = 1
    study: Name | None
    """The study whose grid holds the cell, or null for exploration."""
    workload: Name
    arm: Name
    seed: Seed
    cell_digest: str
    registration: str | None
    """Hash of the study's declaration as registered when the attempt began."""
    status: Status
    attempt: int
    attempt_id: str
    """Random name of the attempt, unique across machines."""
    started_at: str
    """UTC, ISO 8601."""
    resumed_from_step: int
    val_loss: float | None
    """Final loss on the whole validation split; null unless completed."""
    perplexity: float | None
    final_step: int
    tokens: int
    wall_seconds: float
    """Wall time of this attempt alone."""
    device_count: int
    cost_usd: float
    curve: list[CurvePoint]
    orthogonalizers: dict[str, str] = {}
    """Which method made the updates of the matrices of each shape, `m x n`, orthogonal: what `auto` came to."""
    computing: Computing | None = None
    """Null where the attempt did not come to an end."""
    hashes: Hashes
    provenance: Provenance
    error: str | None = None

    @model_validator(mode="after")
    def _loss_matches_status(self) -> RunRecord:
        if (self.status == "completed") != (self.val_loss is not None):
            raise ValueError(f"status {self.status!r} does not go with val_loss {self.val_loss!r}.")
        if self.val_loss is not None and not math.isfinite(self.val_loss):
            raise ValueError(f"val_loss is {self.val_loss}; a run without a finite loss is 'diverged'.")
        return self

    @property
    def repeats(self) -> Literal["bit for bit", "to rounding"] | None:
        """How far a repetition of the attempt agrees, by its own word; None where it has none.

        Several processes add their gradients in an order of their own, whatever each of them says of itself.
        """
        if self.computing is None:
            return None
        exact = self.computing.repeats.startswith("bit for bit") and self.device_count == 1
        return "bit for bit" if exact else "to rounding"

    @property
    def device_seconds(self) -> float:
        """Wall time of all its devices together: what its cost counts."""
        return self.wall_seconds * self.device_count

    @property
    def is_result(self) -> bool:
        """Whether the attempt ended with an outcome (a divergence is one) rather than a failure."""
        return self.status in ("completed", "diverged")

    def outcome(self) -> tuple[object, ...]:
        """What a repetition of the same cell must reproduce, where it agrees bit for bit: all but time, cost, place."""
        return (self.status, self.val_loss, self.final_step, self.hashes.weights)
