"""The optimizers: named kinds, their options, and how to build one.

    optim.names()                                  every kind: one file of this folder each
    optim.options_model(kind)                      its options as a pydantic model (loads no torch)
    optim.parse_options(kind, values)              values checked against that model
    optim.build(kind, model, seed=3, lr=..., ...)  a torch.optim.Optimizer over the model's parameters
    optim.routing_table(optimizer)                 which parameter is updated by which rule
    optim.orthogonalize(X, method="svd")           polar(X) = U V^T, batched
    optim.resolve_orthogonalizer(shape, dtype, device_type)   the exact method that "auto" means
    optim.certificate(X, method="svd")             how far that is from the exact factor

Importing this package loads neither torch nor pydantic: command line and schema stay fast. A new optimizer is
one file `optim/<kind>.py` that calls `register`; nothing else names it. All kinds share one class,
`optim.core.optimizer.RoutedOptimizer`; a kind is an option model that switches that class's steps on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optim.core.errors import (
    GradientError,
    NonFiniteError,
    OptimError,
    OptionError,
    RoutingError,
    StateMismatchError,
    UnknownOptimizerError,
)
from optim.core.registry import names, parse_options, registered

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from optim.core.certificate import Certificate
    from optim.core.options import Options
    from optim.core.routing import RouteRow

__all__ = [
    "GradientError",
    "NonFiniteError",
    "OptimError",
    "OptionError",
    "RoutingError",
    "StateMismatchError",
    "UnknownOptimizerError",
    "build",
    "certificate",
    "names",
    "options_model",
    "orthogonalize",
    "parse_options",
    "resolve_orthogonalizer",
    "routing_table",
]


def options_model(kind: str) -> type[Options]:
    """The frozen, closed option model of `kind`. Raises UnknownOptimizerError."""
    return registered(kind).options_model


def build(name: str, model: torch.nn.Module, *, seed: int = 0, **options: Any) -> torch.optim.Optimizer:
    """The optimizer `name` over the trainable parameters of `model`.

    `seed` is the run's seed: with the step and the parameter's index it seeds the noise of the kinds that
    draw any. The rest are the options of `options_model(name)`. Every parameter group carries `initial_lr`,
    so that a schedule is one line: `group["lr"] = factor * group["initial_lr"]`. Raises
    UnknownOptimizerError, OptionError, RoutingError.
    """
    values = parse_options(name, options)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise OptionError(f"optimizer {name!r}: seed is {seed!r}; give the run's seed, an integer of 0 or more.")
    return registered(name).build(model, values, seed)


def orthogonalize(X: torch.Tensor, method: str = "svd", **options: Any) -> torch.Tensor:
    """polar(X) = U V^T for X = U S V^T, over the last two dimensions of X [..., m, n]; same shape and dtype.

    Exact: `svd` (the reference), `gram_eigh`, and `auto`, which is the one that `resolve_orthogonalizer` names.
    Approximations, each a different update: `newton_schulz` (steps=5, dtype="bfloat16") and `polar_express`
    (steps=6, dtype="float32", lower=1e-3). See `optim.core.exact` and `optim.core.iterative` for the numerics.
    Raises OptionError (method, options, shape, dtype) and NonFiniteError.
    """
    from optim.core.orthogonalize import orthogonalize as compute

    return compute(X, method, **options)


def resolve_orthogonalizer(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> str:
    """The exact method that `auto` means for X of this shape [..., m, n], dtype and device ("cpu", "cuda", ...).

    It depends on nothing else, so a run can be repeated.
    """
    from optim.core.orthogonalize import resolve

    return resolve(shape, dtype, device_type)


def certificate(X: torch.Tensor, method: str = "svd", **options: Any) -> Certificate:
    """How far `orthogonalize(X, method, **options)` is from the exact factor: see `optim.core.certificate`.

    Raises OptionError and NonFiniteError, as `orthogonalize` does.
    """
    from optim.core.certificate import certify

    return certify(X, method, **options)


def routing_table(optimizer: torch.optim.Optimizer) -> list[RouteRow]:
    """Rows (name, shape, route, group, orthogonalizer), in the order of the groups: what to print before a run."""
    from optim.core.routing import table

    return table(optimizer)
