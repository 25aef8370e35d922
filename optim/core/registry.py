"""Which optimizers exist: one file `optim/<kind>.py` each, found by looking, never from a list.

A kind's file calls `register` when it is imported, and must import no torch to do so. `build` of the
registration may import what it likes, since it is called only to make an optimizer.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from optim.core.errors import OptionError, UnknownOptimizerError, nearest

if TYPE_CHECKING:
    import torch

    from optim.core.options import Options

    Build = Callable[[torch.nn.Module, Options, int], torch.optim.Optimizer]


class Registration(NamedTuple):
    """What one file registers: its options, and (model, options, run seed) -> optimizer."""

    options_model: type[Options]
    build: Build


_REGISTERED: dict[str, Registration] = {}


def _build_routed(model: torch.nn.Module, options: Options, seed: int) -> torch.optim.Optimizer:
    from optim.core.optimizer import RoutedOptimizer

    return RoutedOptimizer(model, options, seed=seed)


def register(kind: str, options_model: type[Options], build: Build = _build_routed) -> None:
    """Makes `kind` known; called once, at the end of `optim/<kind>.py`."""
    _REGISTERED[kind] = Registration(options_model, build)


def names() -> list[str]:
    """Every kind, sorted: the modules of the package `optim` that are files."""
    import optim

    return sorted(module.name for module in pkgutil.iter_modules(optim.__path__) if not module.ispkg)


def registered(kind: str) -> Registration:
    """The registration of `kind`; imports its file alone. Raises UnknownOptimizerError."""
    if kind not in _REGISTERED:
        known = names()
        if kind not in known:
            raise UnknownOptimizerError(
                f"optimizer {kind!r} is unknown; allowed: {', '.join(known)}.{nearest(str(kind), known)}"
            )
        importlib.import_module(f"optim.{kind}")
        if kind not in _REGISTERED:
            raise UnknownOptimizerError(
                f"optim/{kind}.py does not register {kind!r}; end it with register({kind!r}, <options>)."
            )
    return _REGISTERED[kind]


def parse_options(kind: str, values: Mapping[str, Any]) -> Options:
    """`values` as the frozen options of `kind`. Raises UnknownOptimizerError, OptionError."""
    from pydantic import ValidationError

    model = registered(kind).options_model
    try:
        return model(**values)
    except ValidationError as error:
        raise OptionError(_one_sentence(kind, list(model.model_fields), error.errors())) from None


def _one_sentence(kind: str, allowed: list[str], problems: list[Any]) -> str:
    found = []
    for problem in problems:
        option = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            found.append(f"option {option!r} is unknown; allowed: {', '.join(allowed)}.{nearest(option, allowed)}")
        elif not option:  # a rule over several options
            found.append(f"{problem['msg'].removeprefix('Value error, ')}.")
        else:
            choices = re.findall(r"'([^']*)'", problem.get("ctx", {}).get("expected", ""))
            found.append(
                f"option {option!r} is {problem['input']!r}: {problem['msg']}.{nearest(str(problem['input']), choices)}"
            )
    return f"optimizer {kind!r}: {' '.join(found)}"
