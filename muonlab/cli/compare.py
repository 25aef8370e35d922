"""`muon compare`: a verdict on results that are already there, from a CSV."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from muonlab.cli.options import Finite, FiniteRange, columns, size, t_star_cache
from muonlab.registry.errors import UsageError

if TYPE_CHECKING:
    from muonlab.analysis.compare import ArmSteps, Comparison, Report
    from muonlab.stats.rule import Rule

WIDTH = 80
SMALLEST_ALPHA = 1e-9  # far below, the t at which E reaches 1 / alpha is lost in rounding


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--baseline", help="The arm that the others are compared with.")
@click.option("--challenger", "challengers", multiple=True, help="Print only this arm; may be given again.")
@click.option("--family", help="a,b,...: the challengers that the correction counts  [default: every other arm]")
@click.option(
    "--min-effect", help="Smallest improvement worth having: 0.5%, or an absolute loss; under --target, % of steps."
)
@click.option("--plan", type=click.Choice(["sequential", "fixed"]), help="[default: sequential; fixed with --unpaired]")
@click.option("--n-min", default=4, show_default=True, help="No verdict below so many pairs.")
@click.option("--n-max", type=int, help="Pairs at which a sequential plan ends.  [default: 12]")
@click.option("--alpha", default=0.05, type=Finite(), show_default=True, help="One-sided error rate of the family.")
@click.option("--target", type=Finite(), help="Compare the steps to this loss, not the final losses; needs curves.")
@click.option("--unpaired", is_flag=True, help="The runs share no seeds: Welch's test, or Mann-Whitney's, at one look.")
@click.option("--column", "columns", multiple=True, help="loss=val/loss: the file's name of a column; may be repeated.")
@click.option("--diverged-loss", type=Finite(), help="What a diverged run counts with: ln(vocabulary size).")
@click.option("--cost-per-pair", type=FiniteRange(0), help="Dollars.  [default: from the column cost_usd]")
@click.option(
    "--provenance",
    type=click.Choice(["run", "reported"]),
    default="run",
    show_default=True,
    help="reported: by others; the verdict is capped at INCONCLUSIVE.",
)
@click.option("--fail-on-no-go", is_flag=True, help="Exit with 1 when a challenger is NO_GO.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(results: Path, **asked: Any) -> None:
    """Compare arms on results at hand: GO, NO_GO, EQUIVALENT or INCONCLUSIVE.

    RESULTS is a CSV with the columns arm, seed, loss and, where known, step, status, cost_usd, seconds; with steps, a
    run has a row an evaluation, and its loss is its last. Runs are paired by seed. Exits with 3 where runs are missing
    or failed and with 5 where the results contradict themselves.
    """
    from muonlab.analysis.compare import Question, exit_code
    from muonlab.analysis.compare import compare as answer
    from muonlab.analysis.table import read_results

    if (diverged := asked["diverged_loss"]) is not None and not 0 < diverged < float("inf"):
        raise UsageError(
            f"--diverged-loss: found {diverged:g}; it should be a loss above 0, such as ln(vocabulary size)."
        )
    if (target := asked["target"]) is not None and not 0 < target < float("inf"):
        raise UsageError(f"--target: found {target:g}; it should be a loss above 0.")
    rule = _rule(**asked)
    table = read_results(results, columns(asked["columns"]), diverged_loss=diverged)
    if asked["baseline"] is None:
        raise UsageError(f"--baseline is missing; name one of the arms of {results}: {', '.join(table.arms)}.")
    report = answer(
        table,
        Question(
            baseline=asked["baseline"],
            rule=rule,
            family=_listed(asked["family"]),
            printed=asked["challengers"],
            target=target,
            unpaired=asked["unpaired"],
            provenance=asked["provenance"],
            cost_per_pair_usd=asked["cost_per_pair"],
        ),
        t_star_cache=t_star_cache(),
    )
    click.echo(report.model_dump_json(indent=2) if asked["as_json"] else render(report))
    sys.exit(exit_code(report, fail_on_no_go=asked["fail_on_no_go"]))


def _rule(**asked: Any) -> Rule:
    """The rule that the options declare; each refusal names its option."""
    from pydantic import ValidationError

    from muonlab.stats.rule import Rule

    margin, unit = _min_effect(asked["min_effect"], of_steps=asked["target"] is not None)
    if asked["unpaired"] and asked["plan"] == "sequential":
        raise UsageError(
            "--unpaired with --plan sequential: no test of unpaired runs here may be looked at more than once; use "
            "--plan fixed, with a number of runs that was set before the first result."
        )
    plan = asked["plan"] or ("fixed" if asked["unpaired"] else "sequential")
    n_min, n_max = asked["n_min"], asked["n_max"]
    if n_max is None:
        n_max = 12 if plan == "sequential" else max(12, n_min)
    if 0 < asked["alpha"] < SMALLEST_ALPHA:
        raise UsageError(f"--alpha: found {asked['alpha']:g}; it should be {SMALLEST_ALPHA:g} or more.")
    if n_max < n_min:
        raise UsageError(
            f"--n-max is {n_max} and --n-min is {n_min}; the plan must not end before it begins: raise --n-max."
        )
    declared = {"min_effect": margin, "min_effect_unit": unit, "alpha": asked["alpha"], "n_min": n_min, "n_max": n_max}
    try:
        return Rule(
            **declared,
            plan=plan,
            fixed_n="at_hand" if plan == "fixed" else None,
            diverged_loss=asked["diverged_loss"],
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise UsageError(f"{option}: found {first['input']}; {str(first['msg']).replace('Input', 'it')}.") from None


def _min_effect(text: str | None, *, of_steps: bool) -> tuple[float, str]:
    """(size, unit); under a target a bare number is a percentage of steps too."""
    if text is None:
        raise UsageError(
            "--min-effect is missing; declare the smallest improvement worth having before looking at the results: "
            + ("1% of the steps, say." if of_steps else "0.5% of the baseline's loss, say, or an absolute loss.")
        )
    bare = of_steps and not text.rstrip().endswith("%")
    return size("--min-effect", f"{text.strip()}%" if bare else text)


def _listed(names: str | None) -> tuple[str, ...]:
    if names is None:
        return ()
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not found:
        raise UsageError(f"--family: found {names!r}; it should be names of arms with commas between them.")
    return found


# What is printed for people


def render(report: Report) -> str:
    """The report within 80 columns: verdicts, then each comparison, then what holds for all."""
    blocks = []
    if len(report.comparisons) > 1:
        blocks.append(_overview(report))
    first = report.comparisons[0].reasons[1:]
    said_of_all = [r for r in first if len(report.comparisons) > 1 and all(r in c.reasons for c in report.comparisons)]
    blocks += [_comparison(report, comparison, said_of_all) for comparison in report.comparisons]
    if said_of_all:
        blocks.append("\n".join(["Of every arm:", *(_wrap(reason + ".", "  - ") for reason in said_of_all)]))
    if report.steps_to_target:
        blocks.append(_steps(report))
    blocks.append(_declared(report))
    return "\n\n".join(blocks)


def _overview(report: Report) -> str:
    width = min(28, max(len(c.arm) for c in report.comparisons))
    lines = [_head(report)]
    for c in report.comparisons:
        effect = "effect unknown" if c.rel_diff_pct is None else f"{c.rel_diff_pct:+.3g}%"
        interval = "" if c.rel_ci95_pct is None else f" [{c.rel_ci95_pct[0]:+.3g}%, {c.rel_ci95_pct[1]:+.3g}%]"
        lines.append(f"  {c.arm:<{width}}  {c.verdict:<12}  {effect}{interval}")
    what = "steps saved" if report.target is not None else "improvement of the loss"
    return "\n".join(
        [*lines, _wrap(f"({what}, with 95% intervals that are not corrected for the number of arms)", "  ")]
    )


def _head(report: Report) -> str:
    found: dict[str, int] = {}
    for c in report.comparisons:
        found[c.verdict] = found.get(c.verdict, 0) + 1
    return f"Against {report.baseline}: " + ", ".join(f"{number} {verdict}" for verdict, number in found.items())


def _comparison(report: Report, c: Comparison, left_out: list[str]) -> str:
    lines = [f"{c.arm} against {report.baseline}: {c.verdict}"]
    first, *rest = c.reasons
    lines += [_wrap(first[:1].upper() + first[1:] + ".", "  ")]
    if c.next_pairs is not None:
        price = f" (${c.next_cost_usd:,.2f})" if c.next_cost_usd is not None else ""
        lines.append(f"  Next: {c.next_pairs} more {'pair' if c.next_pairs == 1 else 'pairs'}{price}")
    for cost in (c.usd_per_pp, c.seconds_per_pp):
        if "low" not in cost.undefined or "point" not in cost.undefined:
            lines.append(_wrap(f"Price: {cost.sentence}.", "  "))
    lines += [_wrap(sentence, "  ") for sentence in _cost(report, c)]
    if c.e_value is not None:
        lines.append(f"  E-value against no improvement: {c.e_value:.4g}")
    lines += [_wrap(reason + ".", "  - ") for reason in rest if reason not in left_out]
    return "\n".join(lines)


def _cost(report: Report, c: Comparison) -> list[str]:
    """What a run of either arm costs, or what it costs until the target; nothing where the file does not tell."""
    arms = (report.baseline, c.arm)
    if (to := c.cost_to_target) is not None:
        if to.geometric_mean_ratio is not None:
            interval = (
                "no interval" if to.ratio_ci95 is None else "95% interval [{:.4g}, {:.4g}]".format(*to.ratio_ci95)
            )
            means = zip((to.baseline_mean, to.challenger_mean), arms, strict=True)
            said = " and ".join(f"{_amount(mean, c.cost_unit)} for {arm}" for mean, arm in means if mean is not None)
            return [f"Cost to {to.target:g}: {said}, ratio {to.geometric_mean_ratio:.4g}, {interval}."]
        if to.median_ratio is None or 2 * min(to.baseline_never, to.challenger_never) >= to.n:
            return [f"Cost to {to.target:g}: no ratio, half of an arm's runs or more never arrive."]
        return [f"Cost to {to.target:g}: {arms[0]} over {arms[1]}, ratio of the median pair {to.median_ratio:.4g}."]
    if (run := c.cost_difference) is not None:
        size = f"{_amount(abs(run.mean_diff), c.cost_unit)} {'less' if run.mean_diff > 0 else 'more'} than with"
        if run.mean_diff == 0:
            size = "the same as with"
        if run.ci95 is None:
            interval = f"no interval: {run.undefined['ci95']}"
        else:
            low, high = (_amount(end, c.cost_unit) for end in run.ci95)
            interval = f"95% interval of what is saved [{low}, {high}]"
        return [f"Cost of a run: {size} {arms[0]}, {interval}."]
    return []


def _amount(cost: float, unit: str | None) -> str:
    size = f"{abs(cost):,.2f}" if abs(cost) >= 1 else f"{abs(cost):.3g}"
    return f"{'-' if cost < 0 else ''}{f'${size}' if unit == 'usd' else f'{size} s'}"


def _steps(report: Report) -> str:
    lines = [f"Steps to a loss of {report.target:g}, median with its order-statistic 95% interval:"]
    width = min(24, max(len(a.arm) for a in report.steps_to_target))
    lines += [_wrap(f"{a.arm:<{width}}  {_median(a):<23}  {_arrivals(a)}", "  ") for a in report.steps_to_target]
    return "\n".join(lines)


def _median(arm: ArmSteps) -> str:
    m = arm.median
    middle = "never" if m.median is None else f"{m.median:,.0f}"
    if m.low is None:
        return f"{middle} [{'too few runs' if m.n < 6 else 'never'}]"
    return f"{middle} [{m.low:,.0f}, {'never' if m.high is None else format(m.high, ',.0f')}]"


def _arrivals(arm: ArmSteps) -> str:
    if not arm.never:
        all_of_them = f"all {arm.n} runs arrive"
        if arm.median.low is not None or arm.geometric_mean_ci95 is None:
            return all_of_them
        low, high = arm.geometric_mean_ci95
        return f"{all_of_them}; geometric mean {arm.geometric_mean:,.0f} [{low:,.0f}, {high:,.0f}]"
    seeds = ", ".join(map(str, arm.never_seeds))
    return f"{arm.never} of {arm.n} never (seed{'s' if arm.never > 1 else ''} {seeds})"


def _declared(report: Report) -> str:
    plan = (
        "fixed plan, one look" if report.plan == "fixed" else f"sequential plan, {report.n_min} to {report.n_max} pairs"
    )
    family = f"{len(report.family)} challenger{'s' if len(report.family) > 1 else ''} in the family"
    said = (
        f"Compared: {report.metric}, {report.pairing}, {plan}, one-sided alpha {report.alpha:g}, {family}, smallest "
        f"effect worth having {report.min_effect}."
    )
    return "\n".join(_wrap(text, "") for text in (said, *report.notes))


def _wrap(text: str, indent: str) -> str:
    import textwrap

    # "n = 5" stays on one line.
    held = text.replace(" = ", "\u00a0=\u00a0")
    wrapped = textwrap.fill(
        held, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
    )
    return wrapped.replace("\u00a0", " ")
