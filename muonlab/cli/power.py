"""`muon power`: how many pairs, what each verdict's chance is, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from muonlab.cli.options import (
    Finite,
    FiniteRange,
    columns,
    declared_rule,
    family_size,
    rule_of,
    size,
    standing_of,
    t_star_cache,
)
from muonlab.registry.errors import UsageError

if TYPE_CHECKING:
    from muonlab.analysis.power import Noise
    from muonlab.stats.rule import Rule


@click.command()
@click.argument("pilot", required=False)
@click.option("--baseline", help="Of a CSV: the arm that the challenger is compared with.")
@click.option("--challenger", help="Of a pilot with several: the arm whose pairs are taken.")
@click.option("--column", "columns", multiple=True, help="loss=val/loss: the CSV's name of a column; may be repeated.")
@click.option("--run-sd", help="Instead of a pilot: run-to-run sd of the loss, absolute or in %.")
@click.option("--correlation", type=Finite(), help="Of the two runs of a seed, with --run-sd.  [default: 0]")
@click.option("--sd-diff", help="Instead of a pilot: sd of a paired difference, absolute or in %.")
@click.option("--baseline-loss", type=FiniteRange(0, min_open=True), help="Connects percent and absolute sizes.")
@click.option("--min-effect", help="Smallest improvement worth having: 0.5%, or an absolute loss.")
@click.option("--effect", help="A further true effect to show, in the same unit as --min-effect.")
@click.option("--plan", type=click.Choice(["sequential", "fixed"]), help="[default: sequential, or the study's]")
@click.option("--n-min", type=int, help="No verdict below so many pairs.  [default: 4]")
@click.option("--n-max", type=int, help="Pairs at which the plan ends.  [default: 12]")
@click.option("--alpha", type=Finite(), help="One-sided error rate of the family.  [default: 0.05]")
@click.option("--g", type=Finite(), help="Prior scale of the e-process.  [default: 2]")
@click.option("--family", type=click.IntRange(1, 100), help="Number of challengers.  [default: 1, or the study's]")
@click.option("--cost-per-pair", type=FiniteRange(0), help="Dollars.  [default: 0, or the study's]")
@click.option("--studies", default=20_000, show_default=True, type=click.IntRange(1_000), help="Simulated.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--figure", type=click.Path(path_type=Path), help="Also draw the chances, e.g. to power.svg.")
def power(pilot: str | None, **asked: Any) -> None:
    """Plan a study: pairs needed, chance of each verdict, price.

    PILOT is a CSV of results (see `muon compare`) or a study; without one, give --sd-diff or --run-sd. A study also
    gives min_effect, plan, family and price where no option says otherwise; if its plan was amended, that holds here.
    """
    from muonlab.analysis.power import draw, plan_power, render
    from muonlab.stats.threshold import TooFewPathsError

    given = [name for name in ("run_sd", "sd_diff") if asked[name] is not None]
    if len(given) + (pilot is not None) != 1:
        raise UsageError(
            "muon power: give one of a pilot (a CSV or a study), --run-sd and --sd-diff, to know the noise."
        )
    if asked["correlation"] is not None and asked["run_sd"] is None:
        raise UsageError("--correlation: it belongs to --run-sd; a pilot and --sd-diff have it in them.")
    if pilot is not None and pilot.lower().endswith(".csv"):
        rule = _rule(asked, {})
        noise, family = _from_csv(Path(pilot), rule, asked), 1
    elif pilot is not None:
        noise, rule, family = _from_study(pilot, asked)
    else:
        rule, family = _rule(asked, {}), 1
        noise = _given(asked)
    effect = _effect(asked["effect"], rule)
    try:
        report = plan_power(
            noise,
            rule,
            effect=effect,
            family_size=asked["family"] or family,
            studies=asked["studies"],
            seed=asked["seed"],
            cache=t_star_cache(),
        )
    except TooFewPathsError as error:
        raise UsageError(f"--alpha: found {rule.alpha:g}; {error}.") from None
    if asked["figure"] is not None:
        draw(report, asked["figure"])
    click.echo(report.model_dump_json(indent=2) if asked["as_json"] else render(report))


def _rule(asked: dict[str, Any], declared: dict[str, Any]) -> Rule:
    names = ("alpha", "n_min", "n_max", "g", "plan")
    known = {**declared, **{name: asked[name] for name in names if asked[name] is not None}}
    if asked["min_effect"] is not None or "min_effect" not in known:
        known["min_effect"], known["min_effect_unit"] = _min_effect(asked["min_effect"])
    if asked["cost_per_pair"] is not None:
        known["price_per_pair_usd"] = asked["cost_per_pair"]
    return rule_of(known)


def _min_effect(text: str | None) -> tuple[float, str]:
    if text is None:
        raise UsageError(
            "--min-effect is missing; declare the smallest improvement worth having: 0.5% of the baseline's loss, say, "
            "or an absolute loss."
        )
    return size("--min-effect", text)


def _effect(text: str | None, rule: Rule) -> float | None:
    """A true effect, which may be 0 or negative, in the unit of min_effect."""
    if text is None:
        return None
    percent = text.strip().endswith("%")
    try:
        effect = float(text.strip().rstrip("%"))
    except ValueError:
        effect = float("nan")
    if not abs(effect) < float("inf") or percent != (rule.min_effect_unit == "percent"):
        unit = "a percentage like -0.2%" if rule.min_effect_unit == "percent" else "a number of nats/token"
        raise UsageError(f"--effect: found {text!r}; it should be {unit}, in the unit of min_effect.")
    return effect


def _given(asked: dict[str, Any]) -> Noise:
    from muonlab.analysis.power import Noise
    from muonlab.stats.power import sd_of_difference

    option = "--sd-diff" if asked["sd_diff"] is not None else "--run-sd"
    sd, unit = size(option, asked["sd_diff"] or asked["run_sd"])
    source = f"{option} {asked['sd_diff'] or asked['run_sd']}"
    if option == "--run-sd":
        correlation = 0.0 if asked["correlation"] is None else asked["correlation"]
        try:
            sd = sd_of_difference(sd, correlation)
        except ValueError:
            raise UsageError(f"--correlation: found {correlation:g}; it should be at least -1 and under 1.") from None
        source += f", correlation {correlation:g}"
    named = "%" if unit == "percent" else "nats/token"
    return Noise(sd_diff=sd, unit=named, source=source, baseline_loss=asked["baseline_loss"])


def _from_csv(path: Path, rule: Rule, asked: dict[str, Any]) -> Noise:
    from muonlab.analysis.power import noise_of_pilot
    from muonlab.analysis.table import read_results

    # Diverged runs are left out of the sd, and said to be: what they would count with does not matter.
    table = read_results(path, columns(asked["columns"]), diverged_loss=1.0)
    if asked["baseline"] is None:
        raise UsageError(f"--baseline is missing; name one of the arms of {path}: {', '.join(table.arms)}.")
    table.of(asked["baseline"])  # refuses an arm that is not there, with the nearest
    others = [arm for arm in table.arms if arm != asked["baseline"]]
    challenger = asked["challenger"] or (others[0] if len(others) == 1 else None)
    if challenger is None:
        raise UsageError(f"--challenger is missing; name one of the arms of {path}: {', '.join(others)}.")
    if challenger == asked["baseline"]:
        raise UsageError(f"--challenger: {challenger!r} is the baseline; name another arm of {path}.")
    sample = table.paired(asked["baseline"], challenger)
    if not table.common_seeds(asked["baseline"], challenger):
        raise UsageError(
            f"{path}: {asked['baseline']} and {challenger} share no seed, so there are no pairs; give --run-sd and "
            "--correlation instead."
        )
    return noise_of_pilot(sample, rule, f"{challenger} in {path.name}")


def _from_study(slug: str, asked: dict[str, Any]) -> tuple[Noise, Rule, int]:
    from muonlab.analysis.power import noise_of_pilot
    from muonlab.registry.errors import unknown_name
    from muonlab.stats.sample import PairedSample, Run

    standing = standing_of(slug)
    decision = standing.snapshot.study.decision
    assert decision is not None  # only a comparison has a standing
    decided = {c.arm: c for c in standing.decided}
    challenger = asked["challenger"] or next(iter(decided))
    if challenger not in decided:
        raise unknown_name("--challenger", "challenger", challenger, decided)
    arm = decided[challenger]
    margin, unit = size("min_effect", str(decision.min_effect))
    declared = {
        **declared_rule(standing),
        "min_effect": margin,
        "min_effect_unit": unit,
        "price_per_pair_usd": arm.pair_cost_usd,
        "diverged_loss": standing.snapshot.settings.diverged_loss,
    }
    rule = _rule(asked, declared)
    cells = {(cell.arm, cell.seed): cell for cell in standing.cells}

    def runs(name: str) -> tuple[Run, ...]:
        found = [cells[(name, pair.seed)] for pair in arm.differences]
        return tuple(Run.model_validate({"seed": c.seed, "loss": c.val_loss, "status": c.state}) for c in found)

    sample = PairedSample(arm=challenger, baseline=runs(standing.snapshot.study.baseline), challenger=runs(challenger))
    return noise_of_pilot(sample, rule, f"{challenger} in study {slug}"), rule, family_size(standing)
