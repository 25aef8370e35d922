"""Final loss over the option that was tuned, a panel an arm, all on one scale.

x is the learning rate if the grid has several, else its first option of several values. A line is the mean over the
seeds; a small mark is one run, a cross at the upper edge one that diverged, a triangle there one beyond the scale; the
ring is the point that was chosen. Where other options were tried as well, each of their combinations is a line.
Losses in nats/token.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from muonlab.reporting.figures.labels import LINE_GAP, short_names, text_width
from muonlab.reporting.figures.paper import (
    ARM_COLOURS,
    DASHES,
    FONT_PT,
    HALF_IN,
    INK,
    MARKERS,
    MUTED,
    WIDE_IN,
    Look,
    blank,
    look_in,
    styled,
    to_svg,
)
from muonlab.reporting.tuning_standing import ArmResult, PointResult, TuningStanding, numbers, spell_options

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_PT, COLUMNS = 150.0, 3
"""Height of a panel, and how many stand side by side on a full page."""
REACH = 4.0
"""What lies this many times further above the lowest loss than the middle one does not stretch the scale."""
MOST_COMBINATIONS = len(ARM_COLOURS)
"""With more combinations of the other options the chosen one's line is coloured, and the others are grey."""


def tuning(standing: TuningStanding, *, narrow: bool = False) -> str | None:
    """The figure, or None where no run has a loss; `narrow`: for a phone, one panel below the other."""
    shown = [result for result in standing.arms if any(point.losses for point in result.points) and result.runs]
    if not any(run.val_loss is not None for run in standing.runs):
        return None
    with styled():
        return _draw(standing, shown, narrow)


def swept(standing: TuningStanding) -> str:
    """The option along x: the learning rate if the grid has several, else an option of several values."""
    grid = standing.study.grid
    several = [option for option, values in grid.items() if len(values) > 1]
    return "lr" if "lr" in several else (several or list(grid))[0]


def _draw(standing: TuningStanding, shown: list[ArmResult], narrow: bool) -> str:
    x = swept(standing)
    lines = _combinations(standing, x)
    legend = list(lines) if 1 < len(lines) <= MOST_COMBINATIONS else []
    columns = 1 if narrow else min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    width = 72 * (HALF_IN if narrow else WIDE_IN)
    left, right, top, bottom, gap, between = 52.0, 12.0, 22.0, 36.0, 16.0, 26.0
    keys_per_row = max(1, int((width - 20) // (40 + max((text_width(key) for key in legend), default=0.0))))
    below = LINE_GAP * math.ceil(len(legend) / keys_per_row) + (8 if legend else 0)
    height = top + bottom + below + rows * PANEL_PT + (rows - 1) * between
    figure = blank(width / 72, height / 72)
    panel = min((width - left - right - (columns - 1) * gap) / columns, 300.0)
    low, high = _limits(standing)
    names = short_names([result.arm for result in shown], 26)
    for index, result in enumerate(shown):
        row, column = divmod(index, columns)
        y0 = bottom + below + (rows - 1 - row) * (PANEL_PT + between)
        axes = figure.add_axes(((left + column * (panel + gap)) / width, y0 / height, panel / width, PANEL_PT / height))
        axes.set_ylim(low, high)
        place = _x_axis(axes, standing, x)
        for key, look in lines.items():
            own = [point for point in result.points if _other(point.options, x) == key]
            _line(
                axes, standing.study.seeds, own, x, place, _look_of(standing, result, key, look, legend, x), (low, high)
            )
        if result.choice is not None and result.choice.mean is not None:
            at = place(result.choice.options[x])
            axes.plot(at, result.choice.mean, "o", ms=11, mfc="none", mec=INK, mew=1.1, zorder=6, clip_on=False)
        axes.set_title(_title(result, names[result.arm], x, lines, legend), size=FONT_PT, color=INK, pad=6, loc="left")
        last = index + columns >= len(shown)
        axes.tick_params(labelbottom=last, labelleft=column == 0)
        if last:
            axes.set_xlabel(x if x != "lr" else "learning rate")
        if column == 0:
            axes.set_ylabel("final validation loss")
    _legend(figure, lines, legend, keys_per_row)
    return to_svg(figure)


def _title(result: ArmResult, name: str, x: str, lines: dict[str, Look], legend: list[str]) -> str:
    if result.choice is None:
        return f"{name}: nothing chosen"
    if len(lines) > 1 and not legend:
        return f"{name}: {spell_options(result.choice.options)}"
    return f"{name}: {result.choice.options[x]}"


def _other(options: dict[str, Any], x: str) -> str:
    """The rest of a point, as text."""
    return spell_options({key: value for key, value in options.items() if key != x})


def _combinations(standing: TuningStanding, x: str) -> dict[str, Look]:
    """Combination of the other options -> its look; one without a name where there is no other option."""
    keys = list(dict.fromkeys(_other(run.options, x) for run in standing.runs))
    return {
        key: Look(ARM_COLOURS[i % len(ARM_COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
        for i, key in enumerate(keys)
    }


def _look_of(
    standing: TuningStanding, result: ArmResult, key: str, look: Look, legend: list[str], x: str
) -> Look:  # fmt: skip
    if legend:
        return look
    own = look_in(standing.study, result.arm)
    if result.choice is None or _other(result.choice.options, x) == key:
        return own
    return Look(MUTED, ".", (0, (1, 1.5)))


def _x_axis(axes: Axes, standing: TuningStanding, x: str) -> Any:
    """Set the axis up; returns where a value stands on it: numbers as they are, other values side by side."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    values = standing.study.grid[x]
    found = numbers(values)
    ticks = sorted(found) if found else [float(i) for i in range(len(values))]
    names = {tick: f"{tick:g}" for tick in ticks} if found else dict(zip(ticks, map(str, values), strict=True))
    if found and ticks[0] > 0 and (x == "lr" or ticks[-1] / ticks[0] >= 5):
        axes.set_xscale("log")
        pad = (ticks[-1] / ticks[0]) ** 0.08 if len(ticks) > 1 else 1.5
        axes.set_xlim(ticks[0] / pad, ticks[-1] * pad)
    else:
        pad = 0.08 * (ticks[-1] - ticks[0]) or 0.5
        axes.set_xlim(ticks[0] - pad, ticks[-1] + pad)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    every = 1 + len(ticks) // 7
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, index: names[ticks[index]] if index % every == 0 else ""))
    return (lambda value: float(value)) if found else (lambda value: float(values.index(value)))


def _limits(standing: TuningStanding) -> tuple[float, float]:
    """Limits that hold the runs that ended with a loss, but for those far above the middle one."""
    losses = sorted(run.val_loss for run in standing.runs if run.val_loss is not None)
    reach = losses[0] + REACH * (statistics.median(losses) - losses[0])
    high = max(loss for loss in losses if loss <= max(reach, losses[0]))
    pad = 0.07 * (high - losses[0]) or 0.05 * abs(losses[0]) or 1.0
    return losses[0] - pad, high + pad


def _line(
    axes: Axes, seeds: list[int], points: list[PointResult], x: str, place: Any, look: Look, limits: tuple[float, float]
) -> None:  # fmt: skip
    """One line of means, where all seeds have an outcome, and its runs."""
    top = limits[1]
    faint = look.colour == MUTED
    means = sorted((place(p.options[x]), p.mean) for p in points if p.mean is not None and p.mean <= top)
    axes.plot(
        [at for at, _ in means], [mean for _, mean in means], color=look.colour, lw=0.9 if faint else 1.7, ls=look.dash,
        marker="" if faint else look.marker, ms=4, zorder=2 if faint else 4,
    )  # fmt: skip
    if faint:
        return
    for point in points:
        at = place(point.options[x])
        ended = [(seed, loss) for seed, loss in zip(seeds, point.losses, strict=True) if loss is not None]
        finite = [loss for seed, loss in ended if seed not in point.diverged]
        inside = [loss for loss in finite if loss <= top]
        axes.plot([at] * len(inside), inside, "_", ms=7, mew=1.0, color=look.colour, alpha=0.65, zorder=3)
        for marker, some in (("x", len(point.diverged)), ("^", len(finite) - len(inside))):
            if some:
                axes.plot(at, top, marker, ms=6, mew=1.4, color=look.colour, clip_on=False, zorder=5)


def _legend(figure: Figure, lines: dict[str, Look], legend: list[str], per_row: int) -> None:
    from matplotlib.lines import Line2D

    width, height = (72 * size for size in figure.get_size_inches())
    rows = math.ceil(len(legend) / per_row)
    step = (width - 20) / per_row
    for i, key in enumerate(legend):
        row, column = divmod(i, per_row)
        x, y = 10 + column * step, (LINE_GAP * (rows - row) - 2) / height
        look = lines[key]
        xs = [x / width, (x + 12) / width, (x + 24) / width]
        figure.add_artist(
            Line2D(xs, [y] * 3, color=look.colour, lw=1.7, ls=look.dash, marker=look.marker, markevery=[1], ms=4)
        )
        figure.text((x + 30) / width, y, key, va="center", ha="left", size=FONT_PT - 1)
