"""The schema of params.yaml: optimizers, workloads, and the one cell that `dvc exp run` trains.

A workload's settings are flat where people override them (`-S workloads.tiny.settings.steps=50`), with two
nested maps: `data` (all that data preparation depends on) and `model` (all that initialisation depends on).
Everything is frozen and closed: a typo is an error, never a silent default.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

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

    source: Literal["gensim-wiki", "files", "hub"] = "gensim-wiki"
    """`gensim-wiki`: the encyclopedia articles inside the gensim wheel (CC BY-SA), read offline; `files`: one's own
    jsonl, parquet or text; `hub`: a data set of the Hugging Face hub."""
    files: list[str] = []
    """Of `files`: paths or patterns, relative to the repository; .jsonl, .jsonl.gz, .parquet (a row is a document) and
    .txt (a file is a document)."""
    dataset: str | None = None
    """Of `hub`: its name there, such as HuggingFaceFW/fineweb-edu, or a folder in its layout, relative to the
    repository."""
    config: str | None = None
    """Of `hub`: the part of it, such as sample-10BT."""
    split: str = "train"
    """Of `hub`: a split or a slice of one, such as train[:1%]."""
    revision: str | None = None
    """Of `hub`: the commit (40 hex digits) that is read; of a folder there is none."""
    streaming: bool = False
    """Of `hub`: read as it downloads, and no more than is needed."""
    text_field: str = "text"
    """Of jsonl, parquet and `hub`: the field that holds a document's text."""
    max_documents: Count | None = None
    """The first so many are used, and no more are read."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents (not of the blocks: a split by block would leak articles)."""
    split_seed: Seed = 0
    tokenizer: str | None = None
    """A tokenizer of the hub, a folder with a tokenizer.json (relative to the repository), or `package:NAME` for that
    of an installed package's model; null: a byte-level BPE is trained on the training documents."""
    tokenizer_revision: str | None = None
    """Of the hub: the commit (40 hex digits) that is read; of a package: its version, null for any."""
    vocab_size: Annotated[int, Field(ge=257, le=262144, strict=True)] = 2048
    """Size of the vocabulary, end token included: of the BPE that is trained, or of the model that is loaded."""
    sequence_length: Count = 128

    @model_validator(mode="after")
    def _belongs_to_the_source(self) -> DataSettings:
        if self.source == "files" and not self.files:
            raise ValueError("source is files, and files names none; list paths or patterns.")
        if self.source == "hub" and self.dataset is None:
            raise ValueError("source is hub, and dataset names none; set it, such as HuggingFaceFW/fineweb-edu.")
        of = {"files": ("files",), "hub": ("dataset", "config", "split", "revision", "streaming")}
        for source, names in of.items():
            for name in names:
                if self.source != source and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} is set, which only source {source} reads, and source is {self.source}; "
                        "leave out one of the two."
                    )
        if self.streaming and "[" in self.split:
            raise ValueError(
                f"split is {self.split!r}, a slice, which cannot be streamed; set max_documents for its beginning, "
                "or streaming to false."
            )
        if self.tokenizer_revision is not None and self.tokenizer is None:
            raise ValueError("tokenizer_revision is set, and tokenizer names none; leave it out, or name one.")
        return self


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
class PretrainedSettings(Closed):
    """A model that others have made: its architecture, and its weights unless they are drawn anew."""

    pretrained: Annotated[str, StringConstraints(min_length=1)]
    """A model of the hub, a folder in the hub's layout (relative to the repository), or `package:NAME` for one that an
    installed package holds."""
    revision: str | None = None
    """Of the hub: the commit (40 hex digits) that is read; of a package: its version, null for any."""
    start: Literal["pretrained", "random"] = "pretrained"
    """Fine-tuned from its weights, or trained from scratch: weights drawn from the run's seed."""


def _kind_of_model(value: object) -> str:
    given = value.keys() if isinstance(value, dict) else getattr(value, "model_fields_set", ())
    pretrained = "pretrained" in given or isinstance(value, PretrainedSettings)
    return (PretrainedSettings if pretrained else ModelSettings).__name__


# The tags are the classes' names, which `explain` leaves out of the path that it shows.
Model = Annotated[
    Annotated[ModelSettings, Tag(ModelSettings.__name__)]
    | Annotated[PretrainedSettings, Tag(PretrainedSettings.__name__)],
    Discriminator(_kind_of_model),
]


@explains
class RunLength(Closed):
    """What goes with runs of up to so many steps, where the workload does not say otherwise."""

    up_to_steps: Count | None = None
    """Null: of any length; the last of a list."""
    batch_size: Count
    examples: Count


@explains
class WorkloadSettings(Closed):
    """One way to train and judge a model: data, model, steps, batch, precision, evaluation grid."""

    data: DataSettings = DataSettings()
    model: Model = ModelSettings()
    steps: Count
    by_run_length: list[RunLength] = []
    """Batch size and examples by the number of steps, shortest first; a value of its own takes their place."""
    batch_size: Count = 4
    """Sequences a step."""
    micro_batch_size: Count | None = None
    """Sequences in one pass forward and back, of which a step adds up as many as make a batch: less memory, the same
    gradient to rounding. Null: the whole batch, or a rank's share of it, at once."""
    examples: Count | None = None
    """Blocks of sequence_length tokens, from the start of the training split, that are trained on; null: all."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """The model's own dtype. Under bfloat16 an optimizer keeps float32 masters, unless its `masters` is off."""
    precision: Literal["auto", "float32", "bfloat16-autocast"] = "auto"
    """What is computed in: `bfloat16-autocast` rounds the factors of matrix products and leaves the weights alone.
    `auto` is that for float32 weights on CUDA, and elsewhere the dtype of the weights."""
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
    """Steps before which the top eigenvalue of the Hessian is measured, on the step's own batch: up to 30 steps' time
    each."""
    checkpoint_every: Count = 50
    sample_tokens: Annotated[int, Field(ge=0, strict=True)] = 48
    """Length of the sampled continuation that the evaluation writes; 0 is none."""

    @model_validator(mode="before")
    @classmethod
    def _by_run_length(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not given.get("by_run_length"):
            return given
        try:
            rows = TypeAdapter(list[RunLength]).validate_python(given["by_run_length"])
        except ValidationError:
            return given  # the field's own check says it, with the path
        limits = [row.up_to_steps for row in rows]
        bounded = [limit for limit in limits[:-1] if limit is not None]
        if limits != [*sorted(set(bounded)), None]:
            raise ValueError(
                f"by_run_length has up_to_steps {limits}; it should rise from row to row and be left out of the last."
            )
        steps = given.get("steps")
        if not isinstance(steps, int):
            return given
        row = next(row for row in rows if row.up_to_steps is None or steps <= row.up_to_steps)
        return {"batch_size": row.batch_size, "examples": row.examples, **given}

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
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}, which does not divide batch_size = {self.batch_size}; "
                "choose one that does."
            )
        if self.precision != "auto" and self.weights != "float32":
            raise ValueError(
                f"precision is {self.precision}, which is for float32 weights, and weights is {self.weights}; "
                "leave one of the two out."
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
class Pace(Closed):
    """How long a step is expected to take, before any run is recorded. Only plans and prices read it."""

    seconds_per_step: Annotated[float, Field(gt=0)]
    source: str
    """Who measured it, on what."""


@explains
class Workload(Closed):
    """A named workload: its settings and, per optimizer, the options that a tuning study chose for it."""

    settings: WorkloadSettings
    pace: Pace | None = None
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
