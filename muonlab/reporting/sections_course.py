"""The report's sections on the way to the result: early stability, speed to target, cost, diagnostics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from muonlab.reporting.blocks import MOST_ROWS, Block, Bullets, Kind, Paragraph, Table
from muonlab.reporting.course_wording import (
    QUANTITIES,
    absences,
    diagnosed,
    grid_sentence,
    hypotheses,
    measured,
    ratio_interval,
    ratio_text,
    speed_sentence,
    worst_regress,
)
from muonlab.reporting.sections_result import pictures_of
from muonlab.reporting.standing import ArmComparison, Standing
from muonlab.reporting.wording import (
    ABSENT,
    DETAILED_CLAUSES,
    bracket,
    duration,
    half_width,
    money,
    percent_of,
    plain,
    same_seed,
    signed,
)
from muonlab.stats.guardrails import EARLY_SHARE
from muonlab.stats.instability import SPIKE_MAD
from muonlab.stats.speed import FIRST_LEVEL_SHARE, LEVELS, Speed
from muonlab.stats.spending import CostDifference

UNEVEN = 1.5
"""How many times as long as an arm's shortest run its longest may take before the seconds are called uneven."""


def early_stability(standing: Standing) -> tuple[Block, ...]:
    """How far each arm lags early, by seed, and how rough its curve is afterwards."""
    rows, reasons = [], []
    for c in standing.comparisons:
        early = c.early
        if early is None:
            reasons.append((c.arm, c.undefined["early"]))
            continue
        e = c.estimates
        spikes, ratio = ABSENT, ABSENT
        if early.challenger_spikes is not None and early.residual_variance_ratio is not None:
            spikes = f"{early.challenger_spikes} against {early.baseline_spikes}"
            ratio = plain(early.residual_variance_ratio)
        rows.append(
            (
                c.arm,
                ABSENT if e.early_regress is None else percent_of(e.early_regress),
                ABSENT if early.mean_regress is None else percent_of(early.mean_regress),
                worst_regress(standing, c) or ABSENT,
                spikes,
                ratio,
                str(len(c.curve_seeds)),
            )
        )
        reasons += [(f"{_EARLY[name]} of {c.arm}", why) for name, why in early.undefined.items() if name in _EARLY]
    if not rows:
        return ()
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"),
        ("largest mean lag", "number"),
        ("mean of each seed's largest", "number"),
        ("largest of any seed", "number"),
        ("spikes, its against the baseline's", "text"),
        ("roughness ratio", "number"),
        ("seeds", "number"),
    )
    study = standing.snapshot.study
    assert study.decision is not None
    note = (
        f"Lag: the arm's validation loss minus {study.baseline}'s at the same step {same_seed(standing)}, in percent "
        f"of {study.baseline}'s, in the first {EARLY_SHARE:.0%} of the steps; negative is ahead. The guardrail looks "
        "at the largest mean lag, over seeds at one evaluation, and allows "
        f"{study.decision.max_early_regress}. Spikes: later evaluations above the line between their neighbours by "
        f"{SPIKE_MAD:g} median absolute deviations of {study.baseline}'s. Roughness: the variance of the distances to "
        f"that line over {study.baseline}'s. No test is made of spikes and roughness."
    )
    return (Table(columns, tuple(rows)), Paragraph(" ".join([note, *absences(reasons)])))


_EARLY = {
    "worst_regress": "early lag",
    "residual_variance_ratio": "spikes and roughness",
}
"""What stands for the fields of an Instability that are undefined together."""


def speed_to_target(standing: Standing) -> tuple[Block, ...]:
    """How many steps each arm takes for the same loss, and what the evaluation grid leaves open."""
    held = [(c, c.speed) for c in standing.comparisons if c.speed is not None]
    if not held:
        return ()
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"),
        ("steps of the baseline / its", "number"),
        ("95% interval", "number"),
        ("steps saved", "number"),
        ("median ratio", "number"),
        ("never arrive: its, the baseline's", "text"),
        ("pairs", "number"),
        ("saved at the first level", "number"),
        ("the grid allows there", "number"),
    )
    rows = tuple((c.arm, *_speed_cells(speed), *_grid_cells(c.first_level)) for c, speed in held)
    baseline = standing.snapshot.study.baseline
    note = (
        "A level is reached when the lowest validation loss so far is at most that. The ratio is the geometric mean "
        f"over pairs and over {LEVELS} levels, from {baseline}'s loss at {FIRST_LEVEL_SHARE:.0%} of the run to the "
        f"worse of the two final losses; above 1 the arm is faster. A run that ends above {baseline}'s loss at "
        f"{FIRST_LEVEL_SHARE:.0%} never arrives: its pair counts in the median, and no mean is given, since leaving it "
        "out would flatter. A run that diverged counts as far as it went. No verdict rests on this."
    )
    said = tuple(speed_sentence(standing, c) for c, _ in held if c.decision is not None)
    return (
        *((Bullets(said),) if 0 < len(said) <= DETAILED_CLAUSES else ()),
        Table(columns, rows),
        Paragraph(" ".join([note, grid_sentence(standing), *absences(_no_speed(standing))])),
    )


def _no_speed(standing: Standing) -> Iterator[tuple[str, str]]:
    """(what, why) of the dashes in the table of speeds."""
    for c in standing.comparisons:
        if c.speed is None:
            yield c.arm, c.undefined["speed"]
            continue
        if c.speed.ratio_ci95 is None:
            yield f"the interval of {c.arm}", c.speed.undefined["ratio_ci95"]
        if c.speed.median_ratio is None:
            yield f"the median of {c.arm}", c.speed.undefined["median_ratio"]
        if c.first_level is None:
            yield f"the first level of {c.arm}", c.undefined["first_level"]
        elif c.first_level.grid_saved_pct is None:
            yield f"the grid's bounds of {c.arm}", c.first_level.undefined["grid_saved_pct"]


def _speed_cells(speed: Speed) -> tuple[str, ...]:
    ratio, saved, median = speed.geometric_mean_ratio, speed.steps_saved_pct, speed.median_ratio
    return (
        ABSENT if ratio is None else ratio_text(ratio, speed.ratio_ci95),
        ABSENT if speed.ratio_ci95 is None else ratio_interval(speed.ratio_ci95),
        ABSENT if saved is None else f"{signed(saved, 1.0)}%",
        ABSENT if median is None else ratio_text(median, speed.ratio_ci95),
        f"{speed.challenger_never}, {speed.baseline_never}",
        str(speed.n),
    )


def _grid_cells(speed: Speed | None) -> tuple[str, str]:
    if speed is None:
        return (ABSENT, ABSENT)
    saved, grid = speed.steps_saved_pct, speed.grid_saved_pct
    return (
        ABSENT if saved is None else f"{signed(saved, 1.0)}%",
        ABSENT if grid is None else bracket(grid, "%"),
    )


def diagnostics(standing: Standing, drawn: Sequence[str]) -> tuple[Block, ...]:
    """What the training measured on its way, arm by arm, and what it says on each open hypothesis."""
    rows = [
        (
            d.arm,
            named,
            measured(d.first),
            ABSENT if d.early is None else measured(d.early),
            measured(d.mean),
            measured(d.last),
            f"{d.first_step} to {d.last_step}" if d.last_step > d.first_step else str(d.last_step),
            str(len(d.seeds)),
        )
        for quantity, named in QUANTITIES.items()
        for d in diagnosed(standing, quantity)
    ]
    if not rows:
        return ()
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"),
        ("quantity", "prose"),
        ("first", "number"),
        ("early mean", "number"),
        ("mean", "number"),
        ("last", "number"),
        ("steps", "text"),
        ("seeds", "number"),
    )
    note = (
        "Means over the seeds, at the first and the last step that all of an arm's runs have, over those of them in "
        f"the first {EARLY_SHARE:.0%} of the run, and over all of them. "
        "An arm has no row for what it does not have, or for what is 0 throughout."
    )
    said = tuple(hypotheses(standing))
    return (
        *((Bullets(said),) if said else ()),
        *pictures_of(drawn, "diagnostics"),
        Paragraph(note),
        Table(columns, tuple(rows), collapsed=len(rows) > MOST_ROWS),
    )


def _per_point(standing: Standing, c: ArmComparison) -> str:
    if standing.snapshot.study.price_usd_per_gpu_hour > 0:
        return c.estimates.usd_per_pp.sentence
    return c.seconds_per_point.sentence


def usd_of(standing: Standing, usd: float) -> str:
    """An amount, or a dash where the study has no price and nothing was paid."""
    return money(usd) if standing.snapshot.study.price_usd_per_gpu_hour > 0 or usd > 0 else ABSENT


def cost(standing: Standing) -> tuple[Block, ...]:
    """What was spent, what a pair costs, and what a percentage point of improvement does."""
    study = standing.snapshot.study
    total, lost = duration(standing.total_seconds), duration(standing.lost_seconds)
    priced = study.price_usd_per_gpu_hour > 0
    if priced:
        left = study.budget_usd - standing.total_cost_usd
        text = (
            f"All attempts took {total} of computing and {money(standing.total_cost_usd)} at "
            f"{money(study.price_usd_per_gpu_hour)} a GPU hour; of this, {lost} and {money(standing.lost_cost_usd)} "
            "went into attempts that did not become an outcome. "
        ) + (
            f"Of the budget of {money(study.budget_usd)}, {money(left)} is left."
            if left >= 0
            else f"This is {money(-left)} over the budget of {money(study.budget_usd)}."
        )
    else:
        text = (
            f"All attempts took {total} of computing; of this, {lost} went into attempts that did not become an "
            "outcome. The declared price is 0, so that an improvement is priced in seconds."
        )
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"),
        ("seconds a pair", "number"),
        *((("cost a pair", "number"),) if priced else ()),
        ("a run is cheaper by [s]", "number"),
        ("95% interval", "number"),
        *((("a run is cheaper by [$]", "number"), ("95% interval", "number")) if priced else ()),
        ("cost per percentage point of improvement", "prose"),
    )
    rows = [
        (
            c.arm,
            f"{c.pair_seconds:,.1f}" if c.pair_seconds else ABSENT,
            *((money(c.pair_cost_usd),) if priced else ()),
            *_cheaper(c.seconds_difference),
            *(_cheaper(c.usd_difference) if priced else ()),
            _per_point(standing, c),
        )
        for c in standing.comparisons
    ]
    note = (
        f"Cheaper by: what a run of {study.baseline} took minus what the arm's took {same_seed(standing)}, averaged "
        "over the pairs; negative is dearer. All attempts at a run count, and a run that diverged early is a cheap one."
        f"{_uneven(standing)}"
    )
    return (Paragraph(text), Table(columns, tuple(rows)), Paragraph(note))


def _uneven(standing: Standing) -> str:
    """That the seconds are those of a machine that was busy otherwise, where runs of one arm differ widely."""
    spent: dict[str, list[float]] = {}
    for cell in standing.cells:
        if cell.state == "completed" and cell.attempts == 1:
            spent.setdefault(cell.arm, []).append(cell.wall_seconds)
    uneven = {arm: (min(s), max(s)) for arm, s in spent.items() if max(s) >= UNEVEN * min(s) > 0}
    if not uneven:
        return ""
    arm, (least, most) = max(uneven.items(), key=lambda found: found[1][1] / found[1][0])
    return (
        f" Seconds are wall time: runs of {arm} alone took from {least:,.1f} to {most:,.1f}, so that what else the "
        "machine did is in every figure here."
    )


def _cheaper(difference: CostDifference | None) -> tuple[str, str]:
    """A difference of costs and its interval; stats.json says why one is absent."""
    if difference is None:
        return (ABSENT, ABSENT)
    mean = signed(difference.mean_diff, half_width(difference.ci95, difference.mean_diff))
    return (mean, bracket(difference.ci95) if difference.ci95 else ABSENT)
