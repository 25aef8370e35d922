"""The decision rule as pure numbers: what a study declares before its first paired result.

Defaults are those of the protocol: alpha 0.05 one-sided, sequential looks after pairs 4 to 12, prior scale
g = 2, an early regress of at most 2 %. `min_effect` has no default: what is worth having is the researcher's
to say. A percentage is of the baseline's mean at hand, and is treated as a fixed margin.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

N_LIMIT = 100  # beyond it nobody pairs training runs, and E-values of 1e115 stay finite


class Rule(BaseModel):
    """How challengers are decided. Losses in nats/token, alpha one-sided, money in USD."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_effect: PositiveFloat
    """Smallest improvement worth having, in the unit of `min_effect_unit` (percent: of the baseline's mean)."""
    min_effect_unit: Literal["nats", "percent"]
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    plan: Literal["sequential", "fixed"] = "sequential"
    fixed_n: Annotated[int, Field(ge=2, le=N_LIMIT)] | Literal["at_hand"] | None = None
    """Pairs of a fixed plan, or "at_hand": as many as there are. None under a sequential plan, and only there."""
    n_min: Annotated[int, Field(ge=2, le=N_LIMIT)] = 4
    n_max: Annotated[int, Field(ge=2, le=N_LIMIT)] = 12
    first_seed: Annotated[int, Field(ge=0)] = 0
    """Where the seeds of a sequential plan begin."""
    g: PositiveFloat = 2.0
    correction: Literal["holm", "dunnett"] = "holm"
    """How the family's error rate is kept; Dunnett's test, blocked by seed, needs equal variances and one look."""
    max_early_regress: NonNegativeFloat = 0.02
    """Largest early regress that a GO allows, as a fraction of the baseline's loss."""
    diverged_loss: PositiveFloat | None = None
    """The loss that a diverged run counts with, ln(vocabulary size); None where no run diverged."""
    amended: bool = False
    """Whether the declaration was changed after a result: then only the pure e-process decides."""
    price_per_pair_usd: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _plan_is_consistent(self) -> Self:
        if self.n_max < self.n_min:
            raise ValueError(
                f"decision: n_max is {self.n_max} and n_min is {self.n_min}; n_max must be at least n_min: raise n_max"
            )
        if (self.plan == "fixed") != (self.fixed_n is not None):
            raise ValueError(
                f"decision: plan is {self.plan} with fixed_n {self.fixed_n}; a fixed plan declares fixed_n "
                "(a number of pairs, or at_hand) and a sequential plan does not: declare one of the two"
            )
        if isinstance(self.fixed_n, int) and self.fixed_n < self.n_min:
            raise ValueError(
                f"decision: the fixed plan has {self.fixed_n} pairs and n_min is {self.n_min}; no verdict "
                f"would be possible: declare at least {self.n_min} pairs"
            )
        if self.correction == "dunnett" and self.plan != "fixed":
            raise ValueError(
                "decision: correction is dunnett and plan is sequential; Dunnett's test looks once: declare a fixed "
                "plan, or correction holm"
            )
        return self

    def pairs_used_at_most(self) -> int | None:
        """How many pairs, in seed order, this plan may use; None where a fixed plan takes all at hand."""
        if self.plan == "sequential":
            return self.n_max
        return self.fixed_n if isinstance(self.fixed_n, int) else None
