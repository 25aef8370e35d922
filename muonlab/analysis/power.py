"""How many pairs a study needs, what each verdict's chance is, and what it costs, before its first run.

Chances come from `muonlab.stats.power`; here a pilot becomes an sd, and the chances a table within 80 columns and a
figure. Effects, sd and min_effect are in `unit`: nats/token, or percent of the baseline's loss.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Literal

from muonlab.registry.errors import UsageError
from muonlab.registry.settings import Closed
from muonlab.stats.kernel import Cache
from muonlab.stats.power import EffectPower, Power, power_of_plan, sd_interval
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample, pair

WIDTH = 80
MULTIPLES = (0.0, 0.5, 1.0, 2.0)
"""True effects that are always shown, in min_effect."""
FEWEST_PAIRS = 2

Unit = Literal["nats/token", "%"]


class Noise(Closed):
    """The sd of a paired difference, in `unit`, and where it is known from."""

    sd_diff: float
    unit: Unit
    source: str
    pairs: int | None = None
    """Pairs of the pilot; None where the sd is simply given."""
    sd_interval95: tuple[float, float] | None = None
    baseline_loss: float | None = None
    """nats/token; None where no pilot or option tells it."""


class PowerReport(Closed):
    """Chances of every verdict of one plan, for the sd of the pilot."""

    rule: Rule
    noise: Noise
    unit: Unit
    family_size: int
    power: Power
    pairs_to_go_at_sd95: tuple[int | None, int | None] | None
    """Pairs of a fixed plan with an 80 % chance of GO at twice min_effect, at the two ends of the sd's interval."""
    notes: tuple[str, ...]


def noise_of_pilot(sample: PairedSample, rule: Rule, source: str) -> Noise:
    """sd of the differences of a pilot's pairs in which both runs converged [nats/token].

    Raises UsageError on fewer than two such pairs, or on differences that don't vary.
    """
    # Diverged runs are left out below, so that what they count with does not matter.
    every = rule.model_copy(update={"plan": "fixed", "fixed_n": "at_hand", "diverged_loss": 1.0})
    pairs = pair(sample, every)
    kept = ~(pairs.baseline_diverged | pairs.challenger_diverged)
    d = pairs.d[kept]
    if d.size < FEWEST_PAIRS or (d == d[0]).all():
        raise UsageError(
            f"{source}: {d.size} pairs of converged runs on common seeds, or differences that do not vary; a pilot "
            f"needs at least {FEWEST_PAIRS} pairs with a spread: add pairs, or give --run-sd or --sd-diff."
        )
    left_out = int((~kept).sum())
    said = f"{source}, {d.size} pairs" + (f" ({left_out} with a diverged run left out)" if left_out else "")
    sd = float(d.std(ddof=1))
    return Noise(
        sd_diff=sd,
        unit="nats/token",
        source=said,
        pairs=d.size,
        sd_interval95=sd_interval(sd, d.size),
        baseline_loss=float(pairs.baseline[kept].mean()),
    )


def plan_power(
    noise: Noise,
    rule: Rule,
    *,
    effect: float | None = None,
    family_size: int = 1,
    studies: int = 20_000,
    seed: int = 0,
    cache: Cache | None = None,
) -> PowerReport:
    """Chances for true effects of 0, a half, one and two min_effect, and for `effect` (in min_effect's unit) if given.

    Raises UsageError where min_effect and the sd are in different units and no baseline's loss connects them.
    """
    sd, margin, unit, scale = _in_one_unit(noise, rule)
    effects = sorted({m * margin for m in MULTIPLES} | ({effect} if effect is not None else set()))
    power = power_of_plan(sd, margin, rule, effects, family_size=family_size, studies=studies, seed=seed, cache=cache)
    ends = None
    notes = ["guardrails and divergence are left out; they can only lower the chance of a GO"]
    if rule.price_per_pair_usd == 0:
        notes.append("no price is declared, so that none is shown; --cost-per-pair gives one, in dollars")
    if rule.amended:
        notes.append(
            "the study's plan was amended, so that only the e-process decides, here as there; the number of pairs for "
            "80% power against 0 is that of a t-test"
        )
    if noise.sd_interval95 is not None:
        low, high = (
            power_of_plan(x * scale, margin, rule, [2 * margin], family_size=family_size, studies=1_000, seed=seed)
            .effects[0]
            .pairs_to_go
            for x in noise.sd_interval95
        )
        ends = (low, high)
        notes.append(
            "the pilot's pairs planned this study; they do not count again in its verdict unless declared before"
        )
    return PowerReport(
        rule=rule,
        noise=noise,
        unit=unit,
        family_size=family_size,
        power=power,
        pairs_to_go_at_sd95=ends,
        notes=tuple(notes),
    )


def _in_one_unit(noise: Noise, rule: Rule) -> tuple[float, float, Unit, float]:
    """sd, min_effect, their unit, and what the noise's unit was multiplied by: that of min_effect where possible."""
    unit: Unit = "%" if rule.min_effect_unit == "percent" else "nats/token"
    if noise.unit == unit:
        return noise.sd_diff, rule.min_effect, unit, 1.0
    if noise.baseline_loss is None:
        raise UsageError(
            f"--min-effect is in {unit} and the sd in {noise.unit}; give --baseline-loss, or both in one unit (an sd "
            "may be a percentage too)."
        )
    scale = 100 / noise.baseline_loss if unit == "%" else noise.baseline_loss / 100
    return noise.sd_diff * scale, rule.min_effect, unit, scale


def render(report: PowerReport) -> str:
    """The chances as tables within 80 columns: one a true effect, one line a number of pairs."""
    p = report.power
    lines = [
        _head(report),
        _wrap(
            f"sd of a paired difference {_size(p.sd_diff, report)} ({report.noise.source}){_interval(report)}; "
            f"min_effect {_size(p.margin, report)} is {p.margin / p.sd_diff:.2f} of it"
        ),
    ]
    if report.pairs_to_go_at_sd95 is not None:
        low, high = (_pairs(n) for n in report.pairs_to_go_at_sd95)
        lines.append(
            _wrap(
                "at the ends of the sd's interval, a fixed plan needs "
                f"{low} and {high} for an 80% chance of GO at twice min_effect"
            )
        )
    for effect in p.effects:
        lines += ["", *_table(effect, report)]
    lines += ["", *(_wrap(note + ".") for note in (_reading(report), *report.notes))]
    return "\n".join(lines)


def _table(e: EffectPower, report: PowerReport) -> list[str]:
    lines = [
        f"True effect {_size(e.effect, report)} ({e.effect / report.power.margin:.3g} min_effect):",
        f"  {'pairs':>5} {'GO':>8} {'NO_GO':>8} {'EQUIVALENT':>11} {'INCONCLUSIVE':>13} {'price':>12}",
    ]
    lines += [
        f"  {c.n:>5} {c.go:>8.1%} {c.no_go:>8.1%} {c.equivalent:>11.1%} {c.inconclusive:>13.1%} "
        f"{_price(c.cost_usd, report):>12}"
        for c in e.chances
    ]
    stops = "stops after" if report.rule.plan == "sequential" else "takes"
    price = f" ({_price(e.expected_cost_usd, report)})" if report.rule.price_per_pair_usd else ""
    mean = f"{stops} {e.expected_pairs:.1f} pairs on average{price}"
    needed = [
        f"{_pairs(n)} for {what}"
        for n, what in ((e.pairs_to_detect, "80% power against 0"), (e.pairs_to_go, "an 80% chance of GO"))
        if n is not None
    ]
    return [*lines, _wrap("; ".join([mean, *([f"fixed: {', '.join(needed)}"] if needed else [])]), "  ")]


def _reading(report: PowerReport) -> str:
    studies = report.power.studies
    error = 0.5 / studies**0.5
    if report.rule.plan == "sequential":
        return (
            f"a row gives the chance that the plan has stopped by then with this verdict ({studies:,} simulated "
            f"studies, Monte Carlo standard error at most {error:.1%})"
        )
    return (
        f"a row is a fixed plan of its own, with one look at that many pairs ({studies:,} simulated studies, Monte "
        f"Carlo standard error at most {error:.1%})"
    )


def _head(report: PowerReport) -> str:
    rule = report.rule
    family = f", 1 of a family of {report.family_size}" if report.family_size > 1 else ""
    kind = "sequential plan" if rule.plan == "sequential" else "fixed plans"
    amended = ", amended" if rule.amended else ""
    return f"{kind[:1].upper()}{kind[1:]}{amended}, {rule.n_min} to {rule.n_max} pairs, alpha {rule.alpha:g}{family}"


def _interval(report: PowerReport) -> str:
    if report.noise.sd_interval95 is None:
        return ""
    *_, scale = _in_one_unit(report.noise, report.rule)
    low, high = (x * scale for x in report.noise.sd_interval95)
    return f", 95% interval {_size(low, report)} to {_size(high, report)}"


def _pairs(n: int | None) -> str:
    return "more than 100 pairs" if n is None else f"{n} pairs"


def _price(usd: float, report: PowerReport) -> str:
    return f"${usd:,.2f}" if report.rule.price_per_pair_usd else "-"


def _size(value: float, report: PowerReport) -> str:
    return f"{value:.3g}%" if report.unit == "%" else f"{value:.3g} nats/token"


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


SHADES = {"go": "#202020", "no_go": "#808080", "equivalent": "#c0c0c0", "inconclusive": "#ffffff"}
HATCHES = {"go": "", "no_go": "///", "equivalent": "...", "inconclusive": ""}


def draw(report: PowerReport, path: Path) -> None:
    """Write the chances as a figure: a panel a true effect, stacked by verdict in greys and hatches.

    The format follows the name's ending; UsageError for one that matplotlib does not write.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    formats = FigureCanvasAgg(Figure()).get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise UsageError(f"--figure {path}: unknown ending {path.suffix!r}; allowed: {', '.join(sorted(formats))}.")
    effects = report.power.effects
    with mpl.rc_context({"svg.hashsalt": "muonlab", "font.size": 8.5, "hatch.linewidth": 0.5}):
        figure = Figure(figsize=(8.6, 2.4 * ((len(effects) + 1) // 2)), layout="constrained")
        axes = figure.subplots((len(effects) + 1) // 2, 2, sharex=True, sharey=True, squeeze=False).ravel()
        for axis, effect in zip(axes, effects, strict=False):
            n = [c.n for c in effect.chances]
            bottom = [0.0] * len(n)
            for name, shade in SHADES.items():
                height = [100 * getattr(c, name) for c in effect.chances]
                label = name.upper()
                axis.bar(
                    n, height, 0.85, bottom, color=shade, edgecolor="#202020", lw=0.5, hatch=HATCHES[name], label=label
                )
                bottom = [b + h for b, h in zip(bottom, height, strict=True)]
            axis.set_title(
                f"true effect {_size(effect.effect, report)} ({effect.effect / report.power.margin:.3g} min_effect)",
                fontsize="medium",
            )
            axis.set_ylim(0, 100)
        for axis in axes[len(effects) :]:
            axis.set_visible(False)
        figure.supxlabel("pairs [number of seeds run with both arms]", fontsize="medium")
        figure.supylabel("chance of the verdict [%]", fontsize="medium")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
