"""`muon baseline`, `nolah` and `pretrain`: one run, by the line `dvc exp run -S ...` that each prints first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from muonlab.cli.options import Finite
from muonlab.cli.terminal import note
from muonlab.registry.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])


def cell_options(command: Command) -> Command:
    """The options of a single run."""
    for option in reversed(
        (
            click.option("--steps", type=click.IntRange(1), help="Optimizer steps.  [default: the workload's]"),
            click.option("--seed", default=0, show_default=True, type=click.IntRange(0)),
            click.option("--workload", help="An entry of params.yaml.  [default: the one it names]"),
            click.option("--dry-run", is_flag=True, help="Only print the line."),
        )
    ):
        command = option(command)
    return command


@click.command()
@cell_options
def baseline(**cell: Any) -> None:
    """Train one run of Muon, the baseline.

    Prints the `dvc exp run` line that this stands for, then runs it; exits as dvc does. A single run decides nothing:
    it is recorded as exploration, or in a study's name where a declared study holds this very cell.
    """
    _run("muon", {}, **cell)


@click.command()
@click.option("--gate", help="tanh, sigmoid, relu or identity.  [default: that of params.yaml]")
@click.option("--scale", type=Finite(), help="Factor on the momentum's peaks.  [default: that of params.yaml]")
@cell_options
def nolah(gate: str | None, scale: float | None, **cell: Any) -> None:
    """Train one run of NOLAH.

    Prints the `dvc exp run` line that this stands for, then runs it; exits as dvc does. Options other than those of
    params.yaml make another cell, recorded as exploration: a study compares declared optimizers only.
    """
    _run("nolah", {"gate": gate, "scale": scale}, **cell)


@click.command()
@click.option("--orthonoise", "arm", flag_value="orthonoise", help="Muon with orthonormal noise.")
@click.option("--isotropic", "arm", flag_value="isotropic", help="Its control: the same noise without the QR.")
@click.option("--nolah", "arm", flag_value="nolah", help="NOLAH as params.yaml has it.")
@click.option("--alpha", type=Finite(), help="Size of the noise.")
@click.option("--no-anneal", is_flag=True, help="Noise of one size throughout (schedule: constant).")
@click.option("--no-adaptive", is_flag=True, help="Noise at every step, whatever the rank (trigger: always).")
@click.option("--rank-threshold", type=Finite(), help="Share of full rank below which noise is added.")
@click.option("--ngpus", default=1, show_default=True, type=click.IntRange(1), help="Processes of the run, a GPU each.")
@click.option("--gloo", is_flag=True, help="Start them on the processor, to try --ngpus without GPUs.")
@cell_options
def pretrain(
    arm: str | None,
    alpha: float | None,
    no_anneal: bool,
    no_adaptive: bool,
    rank_threshold: float | None,
    ngpus: int,
    gloo: bool,
    **cell: Any,
) -> None:
    """Train one run from scratch: Muon, or the optimizer that is named.

    Prints the `dvc exp run` line that this stands for, then runs it; exits as dvc does. --alpha, --no-anneal,
    --no-adaptive and --rank-threshold belong to --orthonoise and --isotropic. With --ngpus each process takes its part
    of every batch, and the run costs the time of all GPUs.
    """
    if gloo and ngpus == 1:
        raise UsageError(
            "pretrain: --gloo says where the processes of --ngpus compute; give --ngpus 2 or more with it."
        )
    noise = {
        "alpha": alpha,
        "schedule": "constant" if no_anneal else None,
        "trigger": "always" if no_adaptive else None,
        "rank_threshold": rank_threshold,
    }
    if arm not in ("orthonoise", "isotropic") and any(value is not None for value in noise.values()):
        raise UsageError(
            "pretrain: --alpha, --no-anneal, --no-adaptive and --rank-threshold set the noise, and "
            f"{arm or 'muon'} adds none; name --orthonoise or --isotropic."
        )
    if no_adaptive and rank_threshold is not None:
        raise UsageError(
            "pretrain: --rank-threshold says when noise is added, and --no-adaptive says always; keep one."
        )
    _run(arm or "muon", noise, ranks=ngpus, on_processor=gloo, **cell)


def _run(
    arm: str,
    options: dict[str, str | float | None],
    *,
    steps: int | None,
    seed: int,
    workload: str | None,
    dry_run: bool,
    ranks: int = 1,
    on_processor: bool = False,
) -> None:
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.verbs import (
        exp_run,
        for_ranks,
        leftovers,
        overrides,
        run_dvc,
        size_by_run_length,
        spoken,
    )

    layout = Layout.find()
    given = {key: value for key, value in options.items() if value is not None}
    wanted = overrides(layout, arm, given, steps=steps, seed=seed, workload=workload)
    environment = for_ranks(layout, wanted, ranks, on_processor=on_processor)
    arguments = exp_run(layout, wanted)
    if left := leftovers(layout, wanted):
        note(
            f"muon: params.yaml reads otherwise than in the last commit, and this run too: {', '.join(left)}; "
            "`git checkout HEAD params.yaml` takes it back."
        )
    if (size := size_by_run_length(layout, wanted)) is not None:
        note(f"muon: {size}.")
    click.echo(spoken(arguments, environment))
    if not dry_run:
        note("muon: dvc leaves these values in params.yaml; `git checkout HEAD params.yaml` takes them back.")
        run_dvc(layout, arguments, environment)
