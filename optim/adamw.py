"""AdamW for every parameter: the reference that each optimizer is judged against.

    m <- b1*m + (1-b1)*g,  v <- b2*v + (1-b2)*g^2
    p <- p*(1 - lr*weight_decay) - lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

Source: Loshchilov & Hutter, arXiv:1711.05101. Defaults are the original runs' (lr 3e-4, weight decay 0.01).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from optim.core.options import NotNegative, Options, Positive
from optim.core.registry import register


class AdamwOptions(Options):
    """Options of AdamW as an arm of its own."""

    lr: Positive = Field(3e-4, description="learning rate of every parameter")
    weight_decay: NotNegative = Field(0.01, description="decoupled weight decay of every parameter")

    def adamw_settings(self) -> dict[str, Any]:
        """Plain values for the parameter groups that AdamW updates: all of them."""
        return {**self.model_dump(include={"lr", "weight_decay", "betas", "eps"}), "warmup": True}


register("adamw", AdamwOptions)
