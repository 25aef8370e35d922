"""`muon calibrate`: how often a decision rule errs, measured."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from muonlab.cli.options import Finite, declared_rule, rule_of, standing_of, t_star_cache
from muonlab.registry.errors import UsageError

if TYPE_CHECKING:
    from muonlab.reporting.standing import Standing
    from muonlab.stats.sample import Floats


@click.command()
@click.option(
    "--studies", default=100_000, show_default=True, type=click.IntRange(1_000), help="Simulated, each noise."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--alpha", type=Finite(), help="One-sided error rate of the family.  [default: 0.05]")
@click.option("--n-min", type=int, help="No verdict below so many pairs.  [default: 4]")
@click.option("--n-max", type=int, help="Pairs at which the plan ends.  [default: 12]")
@click.option("--g", type=Finite(), help="Prior scale of the e-process.  [default: 2]")
@click.option("--plan", type=click.Choice(["sequential", "fixed"]), help="fixed: one look, at n-max.")
@click.option("--noise-from", metavar="STUDY", help="Also resample this study's paired differences, by its own rule.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate(studies: int, seed: int, noise_from: str | None, as_json: bool, **asked: Any) -> None:
    """Measure the error of every verdict on simulated studies, beside its promise.

    With --noise-from the rule is that study's, where no option says otherwise. Exits with 1 where a promise is broken
    by more than Monte Carlo error.
    """
    from muonlab.analysis.calibrate import calibrate as simulate
    from muonlab.analysis.calibrate import render
    from muonlab.stats.threshold import TooFewPathsError

    declared: dict[str, Any] = {}
    own = None
    undeclared = 0
    if noise_from is not None:
        standing = standing_of(noise_from)
        declared, own = declared_rule(standing), _own_noise(noise_from, standing)
        undeclared = standing.undeclared
    rule = rule_of({**declared, **{name: value for name, value in asked.items() if value is not None}})
    try:
        report = simulate(rule, studies=studies, seed=seed, own=own, undeclared=undeclared, cache=t_star_cache())
    except TooFewPathsError as error:
        raise UsageError(f"--alpha: found {rule.alpha:g}; {error}.") from None
    except ValueError as error:
        raise UsageError(f"muon calibrate: {error}") from None
    click.echo(report.model_dump_json(indent=2) if as_json else render(report))
    sys.exit(0 if report.kept else 1)


def _own_noise(slug: str, standing: Standing) -> tuple[str, tuple[str, ...], Floats]:
    """The challengers' paired differences [n, J] on the seeds that all of them have."""
    import numpy as np

    held = {c.arm: {pair.seed: pair.difference for pair in c.differences} for c in standing.decided}
    seeds = [seed for seed in standing.snapshot.study.seeds if all(seed in of_arm for of_arm in held.values())]
    if len(seeds) < 2:
        raise UsageError(
            f"--noise-from {slug}: its challengers share {len(seeds)} finished pairs; noise is drawn from at least 2."
        )
    return slug, tuple(held), np.array([[of_arm[seed] for of_arm in held.values()] for seed in seeds])
