"""Paired differences by arm: every seed, the mean, its 95 % interval, zero and the smallest effect.

A difference is baseline - arm, in nats/token: right is better than the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from muonlab.reporting.figures.labels import above, short_names, text_width
from muonlab.reporting.figures.paper import (
    BAND,
    FONT_PT,
    HALF_IN,
    INK,
    MUTED,
    WIDE_IN,
    axes_in,
    blank,
    limits_of,
    look,
    styled,
    to_svg,
)
from muonlab.reporting.standing import ArmComparison, Standing
from muonlab.reporting.wording import bracket, half_width, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def forest(standing: Standing, *, narrow: bool = False, verdicts: bool = True) -> str | None:
    """The figure, or None without a pair; `narrow` is the same for a phone: the names stand above the rows."""
    shown = [c for c in standing.comparisons if c.differences]
    if not shown:
        return None
    with styled():
        return _forest(standing, shown, narrow, verdicts)


def _forest(standing: Standing, shown: list[ArmComparison], narrow: bool, verdicts: bool) -> str:
    row, top, bottom = (40.0, 30.0, 36.0) if narrow else (34.0, 30.0, 36.0)
    height = top + bottom + row * len(shown)
    figure = blank(HALF_IN if narrow else WIDE_IN, height / 72)
    names = short_names([c.arm for c in shown], 26)
    numbers = {c.arm: interval_label(c).replace("-", "−") for c in shown}
    left = 10.0 if narrow else 12 + max(text_width(n, weight="bold") for n in [*names.values(), "control, described"])
    right = 10.0 if narrow else 14 + max(text_width(n) for n in numbers.values())
    axes = axes_in(figure, left, bottom, right, top)
    low, high = _forest_limits(standing, shown)
    axes.set_xlim(low, high)
    axes.set_ylim(len(shown) * row, 0)  # points, downwards
    margin = standing.margin
    # A phone's rows have their names and numbers above them, free of the guides.
    spans = [(i * row + 15, (i + 1) * row) for i in range(len(shown))] if narrow else [(0.0, len(shown) * row)]
    for start, end in spans:
        if margin is not None:
            axes.fill_between((-margin, margin), start, end, color=BAND, lw=0, zorder=0)
            axes.plot((margin, margin), (start, end), color=MUTED, lw=0.9, ls=(0, (3, 2)), zorder=1)
        axes.plot((0, 0), (start, end), color=INK, lw=0.9, zorder=1)
    if margin is not None:
        above(axes, margin, f"smallest effect worth having: {signed(margin, margin)}")
    for i, comparison in enumerate(shown):
        _forest_row(axes, standing, comparison, i * row + (27 if narrow else 19), (low, high))
        label, number = names[comparison.arm], numbers[comparison.arm]
        role = _verdict_label(comparison) if verdicts else comparison.role
        if narrow:
            y = i * row + 9
            at = axes.get_yaxis_transform()
            axes.text(0, y, label, transform=at, va="center", weight="bold")
            axes.text(1, y, number, transform=at, va="center", ha="right", size=FONT_PT - 0.5)
        else:
            x0 = -10 / (72 * WIDE_IN - left - right)
            at = axes.get_yaxis_transform()
            axes.text(x0, i * row + 13, label, transform=at, va="center", ha="right", weight="bold")
            axes.text(x0, i * row + 24, role, transform=at, va="center", ha="right", color=MUTED, size=FONT_PT - 1)
            axes.text(1 - x0, i * row + 19, number, transform=at, va="center", ha="left")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5 if narrow else 8)
    baseline = short_names([standing.snapshot.study.baseline], 22)[standing.snapshot.study.baseline]
    what = "loss" if narrow else "final validation loss"
    axes.set_xlabel(f"{baseline}'s {what} − the arm's [nats/token]; right: better")
    return to_svg(figure)


def _forest_limits(standing: Standing, shown: list[ArmComparison]) -> tuple[float, float]:
    def extent(comparisons: Sequence[ArmComparison]) -> tuple[float, float]:
        points = [0.0, *(p for c in comparisons for p in (d.difference for d in c.differences))]
        points += [end for c in comparisons if c.estimates.ci95 for end in c.estimates.ci95]
        return min(points), max(points)

    margin = standing.margin or 0.0
    low, high = limits_of(shown, extent)
    low, high = min(low, -margin), max(high, margin)
    pad = 0.05 * (high - low) or 1.0
    return low - pad, high + pad


def _forest_row(
    axes: Axes, standing: Standing, comparison: ArmComparison, y: float, limits: tuple[float, float]
) -> None:
    style, e = look(standing, comparison.arm), comparison.estimates
    assert e.mean_diff is not None
    diverged = {
        c.seed
        for c in standing.cells
        if c.state == "diverged" and c.arm in (comparison.arm, standing.snapshot.study.baseline)
    }
    for marker, crossed in (("o", False), ("x", True)):
        points = [pair.difference for pair in comparison.differences if (pair.seed in diverged) == crossed]
        axes.plot(points, [y - 7] * len(points), marker, ms=3.6, mfc="none", mec=style.colour, mew=0.9, zorder=3)
    if e.ci95:
        axes.plot(e.ci95, (y, y), color=style.colour, lw=2.4, solid_capstyle="butt", zorder=3)
    axes.plot(e.mean_diff, y, "D", ms=5.5, color=style.colour, zorder=4)
    ends = [*(d.difference for d in comparison.differences), *(e.ci95 or ())]
    inset = 0.015 * (limits[1] - limits[0])
    for outside, x, marker in (
        (min(ends) < limits[0], limits[0] + inset, "<"),
        (max(ends) > limits[1], limits[1] - inset, ">"),
    ):
        if outside:
            axes.plot(x, y, marker, ms=6, color=style.colour, zorder=5)


def interval_label(comparison: ArmComparison) -> str:
    """The mean difference and its interval, in nats/token."""
    e = comparison.estimates
    assert e.mean_diff is not None
    mean = signed(e.mean_diff, half_width(e.ci95, e.mean_diff))
    return f"{mean} {bracket(e.ci95)}" if e.ci95 else f"{mean}, no interval"


def _verdict_label(comparison: ArmComparison) -> str:
    if comparison.decision is None:
        return f"{comparison.role}, described"
    return comparison.decision.verdict.value
