"""Where a study's cells are trained, as options: on this machine, or on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from muonlab.cli.options import FiniteRange
from muonlab.registry.errors import UsageError, nearest

if TYPE_CHECKING:
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.plan import Plan
    from muonlab.pipeline.pool import Place
    from muonlab.registry.study import Study

RAY = "ray"

on_option = click.option(
    "--on",
    metavar="WHERE",
    help="Train elsewhere: `ray`, on a Ray cluster, or NAME, on a machine of `muon remote list`.",
)
gpus_per_cell_option = click.option(
    "--gpus-per-cell", type=click.IntRange(1), help="With --on ray: GPUs of one node a cell, 1 by default."
)
address_option = click.option(
    "--address", metavar="HOST:PORT", help="With --on ray: of the cluster; by default $RAY_ADDRESS, or 127.0.0.1:6379."
)


def schedule_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a plan for a cluster."""
    options = (
        click.option("--on", metavar="WHERE", help="The schedule elsewhere: `ray`, on a Ray cluster."),
        click.option("--gpus", type=click.IntRange(1), help="With --on ray: GPUs of the cluster."),
        gpus_per_cell_option,
        click.option(
            "--step-seconds", type=FiniteRange(0, min_open=True),
            help="With --on ray: seconds a step, instead of the estimate.",
        ),
        click.option(
            "--start-seconds", type=FiniteRange(0), help="With --on ray: seconds before the steps of a cell."
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def scheduler(
    on: str | None = None, *, gpus: int | None = None, gpus_per_cell: int | None = None,
    step_seconds: float | None = None, start_seconds: float | None = None,
) -> Callable[[Plan], Plan]:  # fmt: skip
    """Adds the schedule that the options ask for to a plan. Raises UsageError for options that make none."""
    check_place(on, gpus=gpus, gpus_per_cell=gpus_per_cell, step_seconds=step_seconds, start_seconds=start_seconds)
    if on is None:
        return lambda plan: plan
    from muonlab.pipeline.plan_cluster import refuse_no_fit, schedule_of

    number = refuse_no_fit(gpus, gpus_per_cell or 1, step_seconds)
    return lambda plan: schedule_of(
        plan, gpus=number, gpus_per_cell=gpus_per_cell or 1, step_seconds=step_seconds,
        start_seconds=start_seconds or 0.0,
    )  # fmt: skip


def place_of(
    layout: Layout, study: Study, *, on: str | None, jobs: int, address: str | None, gpus_per_cell: int | None,
    say: Callable[[str], None],
) -> Place:  # fmt: skip
    """The place that the options name, connected. Raises UsageError for one that there is not."""
    check_place(on, address=address, gpus_per_cell=gpus_per_cell)
    if on is None:
        from muonlab.pipeline.pool import ThisMachine

        return ThisMachine(layout, jobs)
    from muonlab.pipeline.cluster import DEFAULT_ADDRESS, Cluster
    from muonlab.pipeline.resolve import load_params

    params = load_params(layout.params)
    kinds = sorted({str(params.optimizers.get(arm, {}).get("kind", arm)) for arm in study.arms})
    address = address or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    return Cluster(layout, study, kinds, address=address, gpus_per_cell=gpus_per_cell or 1, say=say)


def check_place(on: str | None, **of_ray: Any) -> None:
    """Raise UsageError for an unknown place, and for options of one that is not asked for."""
    if on is not None and on != RAY:
        raise UsageError(f"--on: unknown place {on!r}; allowed: {RAY}.{nearest(on, [RAY])}")
    given = [f"--{name.replace('_', '-')}" for name, value in of_ray.items() if value is not None]
    if on is None and given:
        raise UsageError(f"{given[0]}: it says how a cluster is used, and none is asked for; add --on ray.")
