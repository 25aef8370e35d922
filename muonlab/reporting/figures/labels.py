"""Names on a figure: shortened, kept apart, beside their lines or in a legend that never covers data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from muonlab.reporting.figures.paper import FONT_PT, HALF_IN, MUTED, axes_in, blank, look
from muonlab.reporting.standing import Standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL_CHARS = 15
"""Longest arm name beside a line; with a longer one the figure has a legend below."""
LEGEND_CHARS = 44
"""Longest arm name in a legend."""
LINE_GAP = 11.0
"""Points from one label's baseline to the next."""


def short_names(names: Sequence[str], limit: int) -> dict[str, str]:
    """Names elided in the middle to `limit` characters, numbered where that makes two of them alike."""

    def elide(name: str, size: int) -> str:
        if len(name) <= size:
            return name
        head = (size - 1) // 2
        return f"{name[:head]}…{name[len(name) - (size - 1 - head) :]}"

    short = {name: elide(name, limit) for name in names}
    seen = list(short.values())
    return {
        name: text if seen.count(text) == 1 else f"{elide(name, limit - 4)} ({i})"
        for i, (name, text) in enumerate(short.items(), start=1)
    }


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart, in the order of `wanted` and near it, inside [low, high] if they fit.

    Overlapping labels merge into blocks that are centred on what their members want (pool adjacent violators).
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[float]] = []  # [first position, number of labels]
    for i in order:
        blocks.append([min(max(wanted[i], low), high), 1])
        while len(blocks) > 1 and blocks[-1][0] < blocks[-2][0] + gap * blocks[-2][1]:
            start, size = blocks.pop()
            before, held = blocks[-1]
            # Means of (wanted - offset in the block): least squares for equal weights.
            merged = (before * held + (start - gap * held) * size) / (held + size)
            blocks[-1] = [min(max(merged, low), max(low, high - gap * (held + size - 1))), held + size]
    placed = [0.0] * len(wanted)
    positions = [start + gap * k for start, size in blocks for k in range(int(size))]
    # A block pushed in from the upper edge can have closed the gap to the one below it.
    for k in range(len(positions) - 2, -1, -1):
        positions[k] = min(positions[k], positions[k + 1] - gap)
    for i, position in zip(order, positions, strict=True):
        placed[i] = position
    return placed


def power_of_ten(value: float) -> str:
    """10⁻² and 10⁴; 0.1 to 1000 as they are."""
    exponent = round(math.log10(value))
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:g}" if -1 <= exponent <= 3 else f"10{raised}"


def text_width(text: str, size: float = FONT_PT, weight: str = "normal") -> float:
    """Width of a line of text in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font = FontProperties("DejaVu Sans", size=size, weight=weight)
    width, _, _ = TextToPath().get_text_width_height_descent(text, font, ismath=False)
    return float(width)


def above(axes: Axes, x: float, text: str) -> None:
    """A label above the axes at data position x, shifted to stay inside the figure."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    width_pt = 72 * figure.get_size_inches()[0]
    box = axes.get_position()
    low, high = axes.get_xlim()
    at = (box.x0 + box.width * (x - low) / (high - low)) * width_pt
    half = text_width(text, FONT_PT - 0.5) / 2 + 4
    centre = min(max(at, half), width_pt - half)
    axes.annotate(
        text,
        (x, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(centre - at, 6),
        textcoords="offset points",
        ha="center",
        va="bottom",
        size=FONT_PT - 0.5,
        color=MUTED,
    )


def panel(arms: list[str]) -> tuple[Figure, Axes]:
    """A half-width figure with room for the names of its lines, beside them or (long ones) below."""
    below = _long_names(arms)
    plot = max(150.0, 0.0 if below else LINE_GAP * len(arms) + 6)
    bottom = 36 + (LINE_GAP * len(arms) + 8 if below else 0)
    right = 10.0 if below else 20 + max(text_width(arm) for arm in arms)
    figure = blank(HALF_IN, (26 + plot + bottom) / 72)
    return figure, axes_in(figure, 52, bottom, right, 26)


def _long_names(arms: Sequence[str]) -> bool:
    return any(len(arm) > LABEL_CHARS for arm in arms)


def name_lines(figure: Figure, axes: Axes, standing: Standing, ends: dict[str, tuple[float, float] | None]) -> None:
    """Write each arm's name beside the end of its mean, with an arrow where that is beyond the scale."""
    if _long_names(list(ends)):
        legend_below(figure, standing, list(ends))
        return
    height = 72 * figure.get_size_inches()[1] * axes.get_position().height
    scale = axes.transData + axes.transAxes.inverted()
    at = {arm: scale.transform(end) for arm, end in ends.items() if end is not None}
    wanted = [float(point[1]) * height for point in at.values()]
    for (arm, point), y in zip(at.items(), spread(wanted, LINE_GAP, 3, height - 3), strict=True):
        style = look(standing, arm)
        # From the height of the line's end to its name, outside the axes: a name that moved finds its line.
        end = min(max(float(point[1]), 0.0), 1.0)
        axes.plot(
            (1.0, 1.035),
            (end, y / height),
            transform=axes.transAxes,
            color=style.colour,
            lw=0.7,
            clip_on=False,
            zorder=3,
        )
        beyond = "" if 0 <= point[1] <= 1 else (" ↓" if point[1] < 0 else " ↑")
        axes.text(1.045, y / height, arm + beyond, transform=axes.transAxes, va="center", ha="left")


def legend_below(figure: Figure, standing: Standing, arms: Sequence[str], columns: int = 1) -> None:
    """A line and a name for every arm at the lower edge of the figure, read by rows."""
    from matplotlib.lines import Line2D

    width, height = (72 * size for size in figure.get_size_inches())
    rows = legend_rows(len(arms), columns)
    for i, (arm, text) in enumerate(short_names(arms, LEGEND_CHARS).items()):
        style = look(standing, arm)
        x, y = 10 + (i % columns) * (width - 10) / columns, (LINE_GAP * (rows - i // columns) - 2) / height
        figure.add_artist(
            Line2D(
                [x / width, (x + 12) / width, (x + 24) / width],
                [y, y, y],
                color=style.colour,
                lw=1.8,
                ls=style.dash,
                marker=style.marker,
                markevery=[1],
                ms=4,
            )
        )
        figure.text((x + 30) / width, y, text, va="center", ha="left", size=FONT_PT - 1)


def legend_columns(names: Sequence[str], width_pt: float) -> int:
    """How many columns of a legend fit beside each other."""
    widest = max(text_width(text, FONT_PT - 1) for text in short_names(names, LEGEND_CHARS).values())
    return max(1, min(len(names), int((width_pt - 10) // (widest + 48))))


def legend_rows(names: int, columns: int) -> int:
    """How many lines a legend takes."""
    return -(-names // columns)
