"""The options that several optimizers share, as frozen and closed pydantic models. Imports no torch.

Defaults are those of the original runs, but for adamw_lr. Learning rates are per step, before the schedule.
`lr` is the rate of the hidden matrices; everything else is updated by AdamW at `adamw_lr`, which is `lr`
unless it is given, under the same schedule.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from optim.core.methods import method_options, options_fault

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]


class Options(BaseModel):
    """What every optimizer has. Strict: a string is no number, and an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    lr: Positive = Field(1e-4, description="learning rate of the hidden matrices")
    betas: tuple[BelowOne, BelowOne] = Field(
        (0.9, 0.95),
        strict=False,  # YAML has lists only
        description="decay of AdamW's first and second moment",
    )
    eps: Positive = Field(1e-8, description="added to the root of AdamW's second moment")
    on_nonfinite: Literal["raise", "skip_step"] = Field(
        "raise",
        description="a gradient or momentum with inf or NaN stops the run, naming the parameter, or the step changes "
        "nothing and is counted",
    )
    masters: bool = Field(
        True, description="float32 masters of narrower parameters; false (the original): updated in place, rounded"
    )
    shard: bool = Field(
        True, description="under torch.distributed, each rank orthogonalises its share; the result is the same"
    )
    diagnose_every: Count = Field(10, description="steps between two sets of diagnostics; 0 for none")

    def orthogonalized(self) -> Literal["none", "hidden", "all_matrices"]:
        """Which parameters Muon updates."""
        return "none"

    def adamw_settings(self) -> dict[str, Any]:
        """Plain values for the parameter groups that AdamW updates."""
        raise NotImplementedError

    def matrix_settings(self) -> dict[str, Any]:
        """Plain values for the parameter groups that Muon updates."""
        raise NotImplementedError


class MuonOptions(Options):
    """Muon, with AdamW for what is not a hidden matrix."""

    adamw_lr: Positive | None = Field(
        None, description="learning rate of what AdamW updates; null: the same as lr (the original runs: 3e-4)"
    )
    weight_decay: NotNegative = Field(0.0, description="decoupled weight decay of the orthogonalised matrices")
    adamw_weight_decay: NotNegative = Field(0.01, description="decoupled weight decay of what AdamW updates")
    warmup_adamw: bool = Field(
        True, description="what AdamW updates is warmed up with the rest (the original runs: false)"
    )
    momentum: BelowOne = Field(0.95, description="mu of the momentum")
    momentum_form: Literal["accumulated", "averaged"] = Field(
        "accumulated", description="M <- mu*M + g, or M <- mu*M + (1-mu)*g as in torch.optim.Muon"
    )
    nesterov: bool = Field(False, description="orthogonalise g + mu*M (averaged: (1-mu)*g + mu*M) in place of M")
    lr_adjust: Literal["none", "original", "match_rms_adamw"] = Field(
        "none", description="factor on lr by shape: 1, sqrt(max(1, m/n)), or 0.2*sqrt(max(m, n))"
    )
    orthogonalizer: Literal["auto", "svd", "gram_eigh", "newton_schulz", "polar_express"] = Field(
        "svd", description="how polar(M) is computed: exactly, or by one of the last two, approximately"
    )
    orthogonalizer_steps: PositiveCount | None = Field(
        None, description="steps of newton_schulz (null: 5) or polar_express (null: 6)"
    )
    orthogonalizer_dtype: Literal["bfloat16", "float32", "float64"] | None = Field(
        None, description="precision of newton_schulz (null: bfloat16) or polar_express (null: float32)"
    )
    orthogonalizer_lower: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="smallest singular value of M / ||M||_F that polar_express is made for (null: 1e-3)"
    )
    route: Literal["hidden", "all_matrices"] = Field(
        "hidden", description="orthogonalise hidden matrices only, or embedding and output head too"
    )

    noise: ClassVar[str] = "none"
    """Which noise a kind adds to the momentum: a part of its identity, not an option."""

    @model_validator(mode="after")
    def _orthogonalizer_takes_its_options(self) -> Self:
        fault = options_fault(*method_options(dict(self)))
        if fault is not None:
            raise ValueError(fault)
        return self

    def orthogonalized(self) -> Literal["none", "hidden", "all_matrices"]:
        """Which parameters Muon updates."""
        return self.route

    def adamw_settings(self) -> dict[str, Any]:
        """Plain values for the parameter groups that AdamW updates."""
        return {
            "lr": self.lr if self.adamw_lr is None else self.adamw_lr,
            "weight_decay": self.adamw_weight_decay,
            "betas": self.betas,
            "eps": self.eps,
            "warmup": self.warmup_adamw,
        }

    def matrix_settings(self) -> dict[str, Any]:
        """Plain values for the parameter groups that Muon updates."""
        others = {"adamw_lr", "adamw_weight_decay", "warmup_adamw", "betas", "eps", "route"}
        return {**self.model_dump(exclude=others), "noise": self.noise, "warmup": True}


class NoiseOptions(MuonOptions):
    """Muon with noise of Frobenius norm alpha * ||g||_F * sqrt(min(m, n)) added before orthogonalising."""

    alpha: NotNegative = Field(1e-2, description="noise per direction, relative to the gradient's Frobenius norm")
    schedule: Literal["constant", "linear", "exponential"] = Field(
        "exponential", description="how alpha falls to a tenth over anneal_steps, and then stays"
    )
    anneal_steps: PositiveCount = Field(1000, description="steps until alpha is a tenth of its first value")
    noise_start: Count = Field(0, description="steps before the first noise; annealing counts from there")
    trigger: Literal["always", "rank"] = Field(
        "rank", description="perturb always, or where effective rank(M) < rank_threshold * min(m, n)"
    )
    rank_threshold: Share = Field(0.5, description="share of min(m, n) below which the rank trigger fires")
