"""NOLAH (Non-Linear Activation Heuristics): Muon with gated gradient, damped peaks, projected momentum.

    g' = gate(g);  M <- mu*M + g';  M[|g| > q(|g|)] *= scale (kept)
    p <- p - lr * adjust(m, n) * polar(M * sigmoid(M))

The heuristics depend on the gradient's scale: at a momentum rms of 1e-4 the projection halves M and changes
nothing, at 1 it changes half of the update. `normalize: rms` removes that dependence and is a variant to
declare. With gate identity, scale 1 and project identity this is Muon, bit for bit.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from optim.core.options import MuonOptions, Positive, PositiveCount
from optim.core.registry import register


class NolahOptions(MuonOptions):
    """Options of NOLAH; defaults are the original's."""

    gate: Literal["tanh", "sigmoid", "relu", "identity"] = Field(
        "tanh", description="tanh(g)*|g|, sigmoid(g)*g, relu(g), or g"
    )
    scale: Positive = Field(0.90, description="factor on the momentum where |g| exceeds its quantile")
    scale_start: Positive | None = Field(None, description="scale of the first step; null: scale throughout")
    scale_anneal_steps: PositiveCount | None = Field(
        None, description="steps in which the factor goes from scale_start to scale, linearly"
    )
    quantile: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="exact quantile of |g|, per matrix")
    project: Literal["sigmoid", "identity"] = Field("sigmoid", description="orthogonalise M*sigmoid(M), or M")
    normalize: Literal["none", "rms"] = Field("none", description="divide each gradient by its rms first")

    @model_validator(mode="after")
    def _anneal_is_whole(self) -> NolahOptions:
        if (self.scale_start is None) != (self.scale_anneal_steps is None):
            raise ValueError("scale_start and scale_anneal_steps go together; give both, or neither")
        return self


register("nolah", NolahOptions)
