"""`muon calibrate`: how often a decision rule errs, measured."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from muonlab.cli.options import t_star_cache
from muonlab.registry.errors import UsageError

if TYPE_CHECKING:
    from muonlab.reporting.standing import Standing
    from muonlab.stats.rule import Rule
    from muonlab.stats.sample import Floats


@click.command()
@click.option(
    "--studies", default=100_000, show_default=True, type=click.IntRange(1_000), help="Simulated, each noise."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--alpha", type=float, help="One-sided error rate of the family.  [default: 0.05]")
@click.option("--n-min", type=int, help="No verdict below so many pairs.  [default: 4]")
@click.option("--n-max", type=int, help="Pairs at which the plan ends.  [default: 12]")
@click.option("--g", type=float, help="Prior scale of the e-process.  [default: 2]")
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


def standing_of(slug: str) -> Standing:
    """The last standing of a study; UsageError where it has none, and for a tuning study, which never has one."""
    from muonlab.pipeline.conclude import read_standing
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.resolve import load_study

    layout = Layout.find()
    if load_study(layout, slug).kind == "tuning":
        raise UsageError(
            f"experiments/{slug}: it is a tuning study, which has no pairs and no verdict; name a comparison."
        )
    return read_standing(layout, slug)


def declared_rule(standing: Standing) -> dict[str, Any]:
    """A study's rule as it decides, under the names of the options; Holm's correction and `amended` have none.

    Raises UsageError where Dunnett's test decides between several challengers, which is not simulated.
    """
    snapshot = standing.snapshot
    decision = snapshot.study.decision
    assert decision is not None  # only a comparison has a standing
    size = family_size(standing)
    if decision.correction == "dunnett" and not snapshot.amended and size > 1:
        raise UsageError(
            f"experiments/{snapshot.study.slug}: Dunnett's test decides over its family of {size}, and only Holm's "
            "correction is simulated; give the rule and the noise by options, without this study."
        )
    fixed = decision.plan != "sequential"
    return {
        "alpha": decision.alpha,
        "n_min": decision.n_min,
        "n_max": decision.plan.fixed if not isinstance(decision.plan, str) else decision.n_max,
        "g": decision.g,
        "plan": "fixed" if fixed else "sequential",
        "amended": snapshot.amended,
    }


def family_size(standing: Standing) -> int:
    """Over how many arms a study's error rate is kept: its challengers, and the undeclared arms that count."""
    return len(standing.decided) + standing.undeclared


def rule_of(asked: dict[str, Any]) -> Rule:
    """The rule of what is asked for, under the names of `Rule`, at a min_effect of no consequence if none is given.

    Raises UsageError, which names the option.
    """
    from pydantic import ValidationError

    from muonlab.stats.rule import Rule

    n_min, n_max = asked.get("n_min", 4), asked.get("n_max", 12)
    if n_max < n_min:
        raise UsageError(f"--n-max is {n_max} and --n-min is {n_min}; n_max must be at least n_min: raise --n-max.")
    fixed_n = n_max if asked.get("plan") == "fixed" else None
    declared: dict[str, Any] = {"min_effect": 1.0, "min_effect_unit": "nats", **asked, "fixed_n": fixed_n}
    try:
        return Rule.model_validate(declared)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + str(first["loc"][0] if first["loc"] else "plan").replace("_", "-").replace("fixed-n", "n-max")
        message = str(first["msg"]).replace("Input", "it")
        raise UsageError(f"{option}: found {first['input']}; {message}.") from None


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
