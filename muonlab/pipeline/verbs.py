"""From the verbs `baseline`, `nolah` and `pretrain` to the `dvc exp run -S ...` that each stands for.

    an option of the optimizer -> optimizers.<name>.<option>
    steps                      -> workloads.<workload>.settings.steps
    seed, workload             -> seed, workload; and study, where that of params.yaml is on another workload

Batch size and examples follow the number of steps by themselves where the workload declares them by run length. A key
that params.yaml does not name takes a `+`, as DVC's overrides want it. What the line would make of params.yaml is
checked first: DVC writes its values into the file before any stage could refuse them.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from muonlab.pipeline.declare import declared_params
from muonlab.pipeline.doors import dvc_environment, mend_rwlock
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.price import by_run_length, size_text
from muonlab.pipeline.ranks import ON_PROCESSOR, RANKS, check_ranks
from muonlab.pipeline.resolve import load_params, load_study, resolve_settings, studies_on, unknown_optimizer
from muonlab.registry.errors import unknown_name
from muonlab.registry.settings import Params
from muonlab.registry.yamlfile import read_yaml

Value = str | int | float | bool | list[int]


def overrides(
    layout: Layout,
    arm: str,
    options: Mapping[str, Value],
    *,
    steps: int | None,
    seed: int,
    workload: str | None,
) -> dict[str, Value]:
    """Dotted key of params.yaml -> value: the cell that is wanted, as `dvc exp run -S` takes it.

    Steps that are too few for the warm-up (the workload's, and the optimizer's own), the evaluations or the Hessian's
    steps shorten these too: the warm-up to its share of the steps, the evaluations to the last step, the Hessian's to
    those that are left. Raises UsageError for a cell that could not be trained.
    """
    params = load_params(layout.params)
    if arm not in params.optimizers:
        raise unknown_optimizer(params, arm, where="params.yaml: optimizers")
    name = workload or params.workload
    if name not in params.workloads:
        raise unknown_name("--workload", "workload", name, params.workloads, all_in="params.yaml")
    wanted: dict[str, Value] = {"optimizer": arm, "seed": seed}
    if workload is not None:
        wanted["workload"] = workload
        wanted |= _study_on(layout, params, workload)
    wanted |= {f"optimizers.{arm}.{key}": value for key, value in options.items()}
    if steps is not None:
        settings, at = params.workloads[name].settings, f"workloads.{name}.settings"
        wanted[f"{at}.steps"] = steps
        own = params.optimizers[arm].get("warmup_steps", 0)
        for place, warmup in ((at, settings.warmup_steps), (f"optimizers.{arm}", own)):
            if warmup >= steps:
                wanted[f"{place}.warmup_steps"] = warmup * steps // settings.steps
        if settings.eval_every > steps:
            wanted[f"{at}.eval_every"] = steps
        if max(settings.hessian_steps, default=0) > steps:
            wanted[f"{at}.hessian_steps"] = [step for step in settings.hessian_steps if step <= steps]
    _made(layout, wanted)
    return wanted


def _study_on(layout: Layout, params: Params, workload: str) -> dict[str, Value]:
    """The study that is to report on the run, where that of params.yaml is on another workload and one is on this."""
    if load_study(layout, params.study).workload == workload:
        return {}
    fitting = studies_on(layout, workload)
    return {"study": fitting[0]} if fitting else {}


def size_by_run_length(layout: Layout, wanted: dict[str, Value]) -> str | None:
    """What the cell trains, where the workload declares batch size or examples by run length; else None."""
    params = _made(layout, wanted)
    settings = resolve_settings(params, params.workload, params.optimizer)
    return size_text(settings) if settings.by_run_length else None


def _made(layout: Layout, wanted: dict[str, Value]) -> Params:
    """What the line would make of params.yaml, checked."""
    content = read_yaml(layout.params, where=layout.params.name)
    for key, value in wanted.items():
        *folders, last = key.split(".")
        place: Any = content
        for folder in folders:
            place = place[folder]
        place[last] = value
    with tempfile.TemporaryDirectory() as folder:
        tried = Path(folder) / layout.params.name
        tried.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        params = load_params(tried)
    resolve_settings(params, params.workload, params.optimizer)
    return params


def exp_run(layout: Layout, wanted: dict[str, Value]) -> list[str]:
    """The arguments of `dvc` that run the cell."""
    content = read_yaml(layout.params, where=layout.params.name)
    settings = []
    for key, value in wanted.items():
        new = "" if _holds(content, key.split(".")) else "+"
        settings += ["-S", f"{new}{key}={_spell(value)}"]
    return ["exp", "run", *settings]


def _holds(content: Any, parts: list[str]) -> bool:
    return not parts or (isinstance(content, dict) and parts[0] in content and _holds(content[parts[0]], parts[1:]))


def _spell(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def leftovers(layout: Layout, wanted: dict[str, Value]) -> list[str]:
    """Keys of the cell that are not asked for and read otherwise in params.yaml than in the last commit."""
    here, committed = load_params(layout.params), declared_params(layout)
    arm, workload = str(wanted["optimizer"]), str(wanted.get("workload", here.workload))
    ours, theirs = _cell_keys(here, arm, workload), _cell_keys(committed, arm, workload)
    return sorted(key for key in ours | theirs if key not in wanted and ours.get(key) != theirs.get(key))


def _cell_keys(params: Params, arm: str, workload: str) -> dict[str, Any]:
    """Dotted key -> value of all that a cell reads in params.yaml, but for its seed."""
    entry = params.workloads.get(workload)
    places: dict[str, dict[str, Any]] = {f"optimizers.{arm}": params.optimizers.get(arm, {})}
    if entry is not None:
        # What follows from the number of steps stands in no file.
        settings = entry.settings.model_dump(mode="json", exclude=set(by_run_length(entry.settings)))
        places[f"workloads.{workload}.settings"] = settings
        places[f"workloads.{workload}.tuned.{arm}"] = entry.tuned.get(arm, {})
    return {f"{place}.{key}": value for place, found in places.items() for key, value in found.items()}


def for_ranks(layout: Layout, wanted: dict[str, Value], ranks: int, *, on_processor: bool) -> dict[str, str]:
    """What the environment must say for the cell to be trained by so many processes.

    Raises UsageError where they do not divide its batch, and where there are not as many GPUs.
    """
    if ranks == 1:
        return {}
    params = _made(layout, wanted)
    asked = {RANKS: str(ranks), **(ON_PROCESSOR if on_processor else {})}
    check_ranks(ranks, resolve_settings(params, params.workload, params.optimizer), {**os.environ, **asked})
    return asked


def run_dvc(layout: Layout, arguments: list[str], asked: Mapping[str, str]) -> None:
    """Become dvc, with `asked` in its environment: output, exit code and interrupts are the command's own."""
    mend_rwlock(layout)
    os.chdir(layout.root)
    environment = {**dvc_environment(layout), **asked}
    os.execve(sys.executable, [sys.executable, "-m", "dvc", *arguments], environment)  # noqa: S606 - no shell is wanted


def spoken(arguments: list[str], environment: Mapping[str, str]) -> str:
    """The line as a person types it."""
    return " ".join(
        [*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(["dvc", *arguments])]
    )
