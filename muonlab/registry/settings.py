"""The schema of params.yaml: optimizers, workloads, and the one cell that `dvc exp run` trains.

A workload's settings are flat where people override them (`-S workloads.tiny.settings.steps=50`), with two
nested maps: `data` (all that data preparation depends on) and `model` (all that initialisation depends on).
Everything is frozen and closed: a typo is an error, never a silent default.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from muonlab.registry.errors import explains

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}$"
"""Names of arms, optimizers, workloads and studies: safe as a folder, a stage name and a table cell."""

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Count = Annotated[int, Field(gt=0, strict=True)]


MAMBA_EXPAND = 2
"""Width of Mamba's inner stream in units of hidden_size, as in the Granite 4.0 hybrid models."""


class Closed(BaseModel):
    """Base of every declaration: immutable, and a key that is not declared is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@explains
class DataSettings(Closed):
    """What the token file is made of. Units: documents, tokens."""

    source: Literal["gensim-wiki"] = "gensim-wiki"
    """`gensim-wiki`: the encyclopedia articles inside the gensim wheel (CC BY-SA), read offline."""
    max_documents: Count | None = None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents (not of the blocks: a split by block would leak articles)."""
    split_seed: Seed = 0
    vocab_size: Annotated[int, Field(ge=257, le=65536, strict=True)] = 2048
    """Size of the byte-level BPE vocabulary that is trained on the training documents, end token included."""
    sequence_length: Count = 128


@explains
class ModelSettings(Closed):
    """A GraniteMoeHybrid (Mamba2 + attention) from random initialisation. Units: dimensions."""

    hidden_size: Count = 64
    layers: Annotated[list[Literal["mamba", "attention"]], Field(min_length=1)] = [
        "mamba",
        "attention",
        "mamba",
    ]
    attention_heads: Count = 4
    key_value_heads: Count = 2
    mamba_d_head: Count = 32
    mamba_d_state: Count = 16
    mamba_chunk_size: Count = 32
    """Length of the scan's chunks. Sequences are padded to it, so the 256 of transformers is slow on short ones."""
    mlp_size: Count = 128
    initializer_range: Annotated[float, Field(gt=0)] = 0.05

    @model_validator(mode="after")
    def _sizes_divide(self) -> ModelSettings:
        for name, whole, part_name, part in (
            (f"{MAMBA_EXPAND} * hidden_size", MAMBA_EXPAND * self.hidden_size, "mamba_d_head", self.mamba_d_head),
            ("hidden_size", self.hidden_size, "attention_heads", self.attention_heads),
            ("attention_heads", self.attention_heads, "key_value_heads", self.key_value_heads),
        ):
            if whole % part:
                raise ValueError(
                    f"{part_name} is {part}, which does not divide {name} = {whole}; choose one that does."
                )
        return self


@explains
class WorkloadSettings(Closed):
    """One way to train and judge a model: data, model, steps, batch, precision, evaluation grid."""

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    steps: Count
    batch_size: Count = 4
    """Sequences a step."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """The model's own dtype. Under bfloat16 an optimizer keeps float32 masters, unless its `masters` is off."""
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] = 0
    """Linear warm-up from 0, of every parameter group."""
    schedule: Literal["constant", "cosine"] = "cosine"
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The cosine ends at this fraction of the peak learning rate."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    eval_every: Count = 30
    """Steps between evaluations on the validation subset."""
    eval_blocks: Count = 32
    """Blocks in the fixed validation subset; the final evaluation uses the whole split."""
    diagnose_every: Annotated[int, Field(ge=0, strict=True)] = 10
    """Steps between the optimizer's diagnostics; 0 is never."""
    hessian_steps: list[Count] = []
    """Steps before which the top eigenvalue of the Hessian is measured, on the step's own batch: about 30 steps' time
    each."""
    checkpoint_every: Count = 50
    sample_tokens: Annotated[int, Field(ge=0, strict=True)] = 48
    """Length of the sampled continuation that the evaluation writes; 0 is none."""

    @property
    def diverged_loss(self) -> float:
        """What a diverged run counts with [nats/token]: uniform guessing, ln(vocabulary size)."""
        return math.log(self.data.vocab_size)

    @model_validator(mode="after")
    def _grid_fits(self) -> WorkloadSettings:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, which leaves nothing of {self.steps} steps; set it below steps."
            )
        if self.hessian_steps and max(self.hessian_steps) > self.steps:
            raise ValueError(
                f"hessian_steps holds {max(self.hessian_steps)}, after the last of {self.steps} steps; leave it out."
            )
        if self.eval_every > self.steps:
            raise ValueError(
                f"eval_every is {self.eval_every}, more than the {self.steps} steps; set it to at most steps."
            )
        return self


@explains
class Workload(Closed):
    """A named workload: its settings and, per optimizer, the options that a tuning study chose for it."""

    settings: WorkloadSettings
    tuned: dict[Name, dict[str, Any]] = {}


@explains
class Params(Closed):
    """All of params.yaml."""

    optimizer: Name
    seed: Seed
    workload: Name
    study: Name
    """The study against whose declaration the one cell is reported, and the default of `muon study run`."""
    optimizers: dict[Name, dict[str, Any]]
    workloads: dict[Name, Workload]
