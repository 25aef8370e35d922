"""Whether every arm of a tuning study can be built at every point of its grid, asked before anything is run."""

from __future__ import annotations

import math
from typing import Any

import optim
from muonlab.registry.errors import UsageError, unknown_name
from muonlab.registry.settings import Params
from muonlab.registry.study import Study


def check_grid(params: Params, study: Study, points: list[dict[str, Any]], *, where: str) -> None:
    """Check a tuning study's grid against each arm's options; `points`: its combinations, `where`: its file.

    Raises UsageError for a value that stands twice, an option that a kind has not or that params.yaml sets for the arm
    itself, and for a value or a combination of values that the kind refuses. An arm that params.yaml does not have is
    passed over: `resolve.check_study` names it.
    """
    for option, values in study.grid.items():
        for index, value in enumerate(values):
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{where}: study.grid.{option}: found {value}; it should be a finite number.")
            if value in values[:index]:
                raise UsageError(
                    f"{where}: study.grid.{option}: the value {value!r} stands twice; name each value once."
                )
    for arm in study.arms:
        if arm not in params.optimizers:
            continue
        entry = params.optimizers[arm]
        kind = str(entry.get("kind", arm))
        allowed = set(optim.options_model(kind).model_fields) - {"seed", "diagnose_every"}
        for option in study.grid:
            if option not in allowed:
                raise unknown_name(f"{where}: study.grid", f"option of {arm!r} (kind {kind})", option, allowed)
            if option in entry:
                raise UsageError(
                    f"{where}: study.grid.{option}: params.yaml sets {option!r} in optimizers.{arm}, where no choice "
                    f"can take its place; move it to workloads.{study.workload}.tuned.{arm}, or leave it out."
                )
        if "lr" not in study.grid and "lr" not in entry:
            raise UsageError(
                f"{where}: study.grid: {arm!r} has no learning rate in it, and none of its own in params.yaml "
                f"(optimizers.{arm}); what is tuned on {study.workload} makes room for the grid: add lr to the grid."
            )
        own = {key: value for key, value in entry.items() if key not in ("kind", "warmup_steps")}
        for point in points:
            try:
                optim.parse_options(kind, {**own, **point})
            except optim.OptimError as error:
                at = ", ".join(f"{option} {value}" for option, value in point.items())
                raise UsageError(f"{where}: study.grid: {arm!r} at {at}: {error}") from None
