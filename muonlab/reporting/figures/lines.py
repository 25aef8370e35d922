"""Lines over steps: what a run or a pair measured, faint; the mean of an arm, thick; a band around it.

mean_k = sum_i y_ik / n        over the runs of an arm, at the steps k where all n have a value
band_k = mean_k +- s_k         s_k the standard deviation of the runs (n - 1), from BAND_RUNS runs on
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from muonlab.reporting.figures.paper import Look, look
from muonlab.reporting.standing import CellStanding, Standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = dict[int, float]
"""Step -> value."""

BAND_RUNS = 3
"""With fewer runs a standard deviation says nothing that the lines do not."""
EDGE = 0.02
"""Share of the axis beyond the last step, for its marker."""
MANY_ARMS, MANY_LINES = 8, 60
"""From more arms on no bands, which would cover each other; from more lines on fainter ones."""


def loss_curves(standing: Standing, arm: str) -> dict[int, Curve]:
    """Seed -> the finite part of the loss curve from step 1 on, for the runs that count."""
    found = {cell.seed: finite_losses(cell) for cell in standing.cells if cell.arm == arm}
    return {seed: curve for seed, curve in found.items() if curve}


def finite_losses(cell: CellStanding) -> Curve:
    """The finite part of one curve from step 1 on."""
    return {step: loss for step, loss in cell.curve if step > 0 and loss is not None and math.isfinite(loss)}


def mean(curves: Sequence[Curve]) -> Curve:
    """Mean over the curves where all of them have a value: never a mean over survivors."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: math.fsum(curve[step] for curve in curves) / len(curves) for step in shared}


def xy(curve: Curve) -> tuple[list[int], list[float]]:
    """Steps in order, and their values."""
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]


def draw_lines(
    axes: Axes, standing: Standing, arms: Mapping[str, Sequence[Curve]], *, last: int, bands: bool = False
) -> dict[str, tuple[float, float] | None]:
    """Draw the lines of all runs and the means of their arms; returns where each mean ends.

    A mean that ends before the step `last` is crossed there: one of its runs has diverged.
    """
    many = sum(map(len, arms.values())) > MANY_LINES
    ends = {}
    for arm, curves in arms.items():
        style = look(standing, arm)
        xs: list[float] = []
        ys: list[float] = []
        for curve in curves:  # one path an arm, broken between its runs
            x, y = xy(curve)
            xs += [*x, math.nan]
            ys += [*y, math.nan]
        axes.plot(xs, ys, color=style.colour, lw=0.4 if many else 0.6, alpha=0.2 if many else 0.35, zorder=2)
        average = mean(curves)
        if bands and has_band(arms, curves) and average:
            x, y = xy(average)
            spread = [statistics.stdev(curve[step] for curve in curves) for step in x]
            low, high = ([m + sign * s for m, s in zip(y, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=style.colour, alpha=0.1, lw=0, zorder=1)
        ends[arm] = draw_mean(axes, average, style, last=last)
    return ends


def has_band(arms: Mapping[str, Sequence[Curve]], curves: Sequence[Curve]) -> bool:
    """Whether an arm with these curves gets a band among these arms."""
    return len(curves) >= BAND_RUNS and len(arms) <= MANY_ARMS


def draw_mean(axes: Axes, average: Curve, style: Look, *, last: int | None = None) -> tuple[float, float] | None:
    """Draw the thick line and return its end, crossed where it stops before the step `last`."""
    if not average:
        return None
    steps, values = xy(average)
    every = max(1, len(steps) // 5)
    axes.plot(
        steps,
        values,
        color=style.colour,
        lw=1.8,
        ls=style.dash,
        marker=style.marker,
        ms=4,
        markevery=((len(steps) - 1) % every, every),  # the end always has its marker
        zorder=4,
    )
    if last is not None and steps[-1] < last:
        axes.plot(steps[-1], values[-1], "x", ms=8, mew=1.6, color=style.colour, zorder=5)
    return steps[-1], values[-1]
