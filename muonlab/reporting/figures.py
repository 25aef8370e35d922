"""The figures of a report as SVG texts: paired differences, loss curves, differences by step, evidence.

Each function takes a Standing and returns the SVG, or None where there is nothing to draw. The same standing
gives the same bytes: fixed hash salt, no date, matplotlib's defaults whatever the machine's, glyphs as paths.
Colours are those of Okabe and Ito (2008, "Color Universal Design"); arms differ in marker and dash as well, so
that greyscale suffices. Every difference has the sign of the statistics: up or right is better than the baseline.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from muonlab.reporting.standing import ArmComparison, CellStanding, Standing
from muonlab.reporting.wording import bracket, half_width, margin_text, signed
from muonlab.stats.guardrails import EARLY_SHARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, BAND, PAPER = "#1b1e23", "#5b6169", "#c9ced6", "#edf0f4", "#ffffff"
ARM_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#b3508f", "#b07d00", "#2f93cc", "#7a5230", "#6b6fd0")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES: tuple[tuple[int, tuple[float, ...]] | str, ...] = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (7, 1.5, 1.5, 1.5)))

DARK = {
    INK: "#e8eaed",
    MUTED: "#a4abb6",
    RULE: "#434a55",
    BAND: "#232831",
    PAPER: "#14171c",
    **dict(
        zip(
            ARM_COLOURS,
            ("#ff8f4a", "#5cb3f0", "#35cf9f", "#e593c8", "#e0b03f", "#86d0f7", "#c99a74", "#a5a8ff"),
            strict=True,
        )
    ),
}
"""Every colour of the light figures, and what it is on a dark page."""

WIDE_IN, HALF_IN = 8.6, 4.14
"""Widths: a full column, and half of one (also a phone's); both print text at the same size."""

FONT_PT = 8.5
LABEL_CHARS = 15
"""Longest arm name beside a line; with a longer one the figure has a legend below."""
LEGEND_CHARS = 44
FINISH_FROM = 0.6
"""Share of the steps after which the figure of the finish begins."""
CLIP_FACTOR = 3.0
"""A described arm this many times further out than the challengers doesn't stretch the scale, but leaves it."""

STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs on every machine
    "font.size": FONT_PT,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    "svg.hashsalt": "muonlab",
}


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, everywhere."""

    colour: str
    marker: str
    dash: tuple[int, tuple[float, ...]] | str


def look(standing: Standing, arm: str) -> Look:
    """The look of an arm, by its place in the declaration; the baseline is ink."""
    study = standing.snapshot.study
    if arm == study.baseline:
        return Look(INK, "o", "-")
    i = study.arms.index(arm) - 1
    return Look(
        ARM_COLOURS[i % len(ARM_COLOURS)],
        MARKERS[i % len(MARKERS)],
        DASHES[(i + i // len(ARM_COLOURS)) % len(DASHES)],
    )


def dark(svg: str) -> str:
    """The same figure for a dark page."""
    return re.sub("|".join(DARK), lambda match: DARK[match[0]], svg)


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


def text_width(text: str, size: float = FONT_PT, weight: str = "normal") -> float:
    """Width of a line of text in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font = FontProperties("DejaVu Sans", size=size, weight=weight)
    width, _, _ = TextToPath().get_text_width_height_descent(text, font, ismath=False)
    return float(width)


@contextmanager
def _styled() -> Iterator[None]:
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        yield


def _figure(width_in: float, height_in: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in))


def _axes(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Axes with margins in points."""
    width, height = (72 * size for size in figure.get_size_inches())
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return figure.add_axes(box)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg")
    # Without the document type and the metadata (a date!), which nothing needs, and digits that nobody can see.
    text = out.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (d|x|y)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


# Paired differences


def forest(standing: Standing, *, narrow: bool = False) -> str | None:
    """Paired differences by arm: every seed, the mean, its 95 % interval, zero and the smallest effect.

    `narrow` is the same for a phone: the names stand above the rows.
    """
    shown = [c for c in standing.comparisons if c.differences]
    if not shown:
        return None
    with _styled():
        return _forest(standing, shown, narrow)


def _forest(standing: Standing, shown: list[ArmComparison], narrow: bool) -> str:
    row, top, bottom = (40.0, 30.0, 36.0) if narrow else (34.0, 30.0, 36.0)
    height = top + bottom + row * len(shown)
    figure = _figure(HALF_IN if narrow else WIDE_IN, height / 72)
    names = short_names([c.arm for c in shown], 26)
    numbers = {c.arm: _interval_label(c) for c in shown}
    left = 10.0 if narrow else 12 + max(text_width(n, weight="bold") for n in [*names.values(), "control, described"])
    right = 10.0 if narrow else 14 + max(text_width(n) for n in numbers.values())
    axes = _axes(figure, left, bottom, right, top)
    low, high = _forest_limits(standing, shown)
    axes.set_xlim(low, high)
    axes.set_ylim(len(shown) * row, 0)  # points, downwards
    margin = standing.margin
    if margin is not None:
        axes.axvspan(-margin, margin, color=BAND, lw=0, zorder=0)
        axes.axvline(margin, color=MUTED, lw=0.9, ls=(0, (3, 2)), zorder=1)
        _above(axes, margin, f"smallest effect worth having: {signed(margin, margin)}")
    axes.axvline(0, color=INK, lw=0.9, zorder=1)
    for i, comparison in enumerate(shown):
        _forest_row(axes, standing, comparison, i * row + (27 if narrow else 19), (low, high))
        label, number = names[comparison.arm], numbers[comparison.arm]
        role = _verdict_label(comparison)
        if narrow:
            y = i * row + 9
            at = axes.get_yaxis_transform()
            texts = [
                axes.text(0, y, label, transform=at, va="center", weight="bold"),
                axes.text(1, y, number, transform=at, va="center", ha="right", size=FONT_PT - 0.5),
            ]
            for text in texts:
                text.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 1.0})
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
    return _svg(figure)


def _forest_limits(standing: Standing, shown: list[ArmComparison]) -> tuple[float, float]:
    def extent(comparisons: Sequence[ArmComparison]) -> tuple[float, float]:
        points = [0.0, *(p for c in comparisons for p in (d.difference for d in c.differences))]
        points += [end for c in comparisons if c.estimates.ci95 for end in c.estimates.ci95]
        return min(points), max(points)

    margin = standing.margin or 0.0
    low, high = _scale(shown, extent)
    low, high = min(low, -margin), max(high, margin)
    pad = 0.05 * (high - low) or 1.0
    return low - pad, high + pad


def _scale(
    shown: Sequence[ArmComparison], extent: Callable[[Sequence[ArmComparison]], tuple[float, float]]
) -> tuple[float, float]:
    """Limits that hold all challengers, and the described arms where they don't dwarf them."""
    decided = [c for c in shown if c.decision is not None]
    if not decided:
        return extent(shown)
    low, high = extent(decided)
    size = high - low
    for comparison in shown:
        own_low, own_high = extent([comparison])
        if own_high - own_low <= CLIP_FACTOR * size and min(own_low, low) > max(own_high, high) - CLIP_FACTOR * size:
            low, high = min(low, own_low), max(high, own_high)
    return low, high


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
    for pair in comparison.differences:
        marker = "x" if pair.seed in diverged else "o"
        axes.plot(pair.difference, y - 7, marker, ms=3.6, mfc="none", mec=style.colour, mew=0.9, zorder=3)
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


def _interval_label(comparison: ArmComparison) -> str:
    e = comparison.estimates
    assert e.mean_diff is not None
    mean = signed(e.mean_diff, half_width(e.ci95, e.mean_diff))
    return f"{mean} {bracket(e.ci95)}" if e.ci95 else f"{mean}, no interval"


def _verdict_label(comparison: ArmComparison) -> str:
    if comparison.decision is None:
        return f"{comparison.role}, described"
    return comparison.decision.verdict.value


def _above(axes: Axes, x: float, text: str) -> None:
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


# Curves


Curve = dict[int, float]


def losses(standing: Standing) -> str | None:
    """Validation loss by step: a faint line a run, and each arm's mean for as long as all its runs go on."""
    return _losses(standing, 0)


def finish(standing: Standing) -> str | None:
    """The last part of the loss curves, where what separates the arms can be seen."""
    return _losses(standing, round(FINISH_FROM * standing.snapshot.settings.steps))


def _losses(standing: Standing, first: int) -> str | None:
    """Loss curves from step `first` on; a described arm far above the rest leaves a figure of the finish."""
    study = standing.snapshot.study
    arms: dict[str, list[Curve]] = {}
    for arm in study.arms:
        tails = [{k: v for k, v in curve.items() if k >= first} for curve in _curves(standing, arm).values()]
        if tails := [tail for tail in tails if tail]:
            arms[arm] = tails
    if not arms:
        return None
    with _styled():
        figure, axes = _panel(list(arms))
        ends = {}
        for arm, curves in arms.items():
            style = look(standing, arm)
            for curve in curves:
                axes.plot(*_xy(curve), color=style.colour, lw=0.6, alpha=0.35, zorder=2)
            ends[arm] = _draw_mean(axes, _mean(curves), style, last=standing.snapshot.settings.steps)
        axes.set_xlabel("step")
        axes.set_ylabel("validation loss [nats/token]")
        axes.set_xlim(first, standing.snapshot.settings.steps)
        low, high = _loss_limits(standing, first)
        pad = 0.05 * (high - low) or 1.0
        axes.set_ylim(low - pad, high + pad)
        if first:
            axes.set_title(f"the same from step {first} on", size=FONT_PT - 0.5, color=MUTED, pad=8)
        _name_lines(figure, axes, standing, ends)
        return _svg(figure)


def _loss_limits(standing: Standing, first: int) -> tuple[float, float]:
    """Limits that hold the runs that didn't diverge: of all arms, or, of the finish, of those that are decided."""
    study = standing.snapshot.study
    compared = (study.baseline, *study.challengers)
    cells = [c for c in standing.cells if c.curve]
    # The narrowest choice that has a value; a figure is drawn only where the last one has.
    for chosen in (
        [c for c in cells if c.state == "completed" and (first == 0 or c.arm in compared)],
        [c for c in cells if c.state == "completed"],
        cells,
    ):
        if values := [loss for c in chosen for step, loss in _finite(c).items() if step >= first]:
            return min(values), max(values)
    raise ValueError("no finite loss to draw")


def differences(standing: Standing) -> str | None:
    """How much better than the baseline on the same seed, in % by step, with the early guardrail's zone."""
    study, steps = standing.snapshot.study, standing.snapshot.settings.steps
    base = _curves(standing, study.baseline)
    paths: dict[str, dict[int, Curve]] = {}
    for comparison in standing.comparisons:
        own = _curves(standing, comparison.arm)
        pairs = {
            seed: {k: 100 * (base[seed][k] - own[seed][k]) / base[seed][k] for k in own[seed] if k in base[seed]}
            for seed in own
            if seed in base
        }
        pairs = {seed: path for seed, path in pairs.items() if path}
        if pairs:
            paths[comparison.arm] = pairs
    if not paths:
        return None
    shown = [c for c in standing.comparisons if c.arm in paths]

    def extent(comparisons: Sequence[ArmComparison]) -> tuple[float, float]:
        values = [0.0, *(v for c in comparisons for path in paths[c.arm].values() for v in path.values())]
        return min(values), max(values)

    with _styled():
        figure, axes = _panel(list(paths))
        low, high = _scale(shown, extent)
        pad = 0.06 * (high - low) or 1.0
        axes.set_xlim(0, steps)
        axes.set_ylim(low - pad, high + pad)
        axes.axvspan(0, EARLY_SHARE * steps, color=BAND, lw=0, zorder=0)
        assert study.decision is not None
        limit = str(study.decision.max_early_regress)
        _above(axes, EARLY_SHARE * steps / 2, f"early: at most {limit} worse")
        if low - pad < -float(limit.rstrip("%")):
            axes.plot((0, EARLY_SHARE * steps), [-float(limit.rstrip("%"))] * 2, color=MUTED, lw=0.9, ls=(0, (3, 2)))
        axes.axhline(0, color=INK, lw=0.9, zorder=1)
        ends = {}
        for arm, pairs in paths.items():
            style = look(standing, arm)
            for path in pairs.values():
                axes.plot(*_xy(path), color=style.colour, lw=0.6, alpha=0.35, zorder=2)
            ends[arm] = _draw_mean(axes, _mean(list(pairs.values())), style, last=steps)
        baseline = short_names([study.baseline], 12)[study.baseline]
        axes.set_xlabel("step")
        axes.set_ylabel(f"better than {baseline} [% of its loss]")
        _name_lines(figure, axes, standing, ends)
        return _svg(figure)


def evidence(standing: Standing) -> str | None:
    """E-value against "effect <= 0" by number of pairs, with the thresholds that the plan tests at."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    paths = {c.arm: c.evidence for c in standing.comparisons if c.evidence}
    if not paths:
        return None
    with _styled():
        figure, axes = _panel(list(paths))
        axes.set_yscale("log")
        most = max(n for path in paths.values() for n, _ in path)
        axes.set_xlim(0.8, max(most, 2) + 0.2)
        values = [e for path in paths.values() for _, e in path]
        study = standing.snapshot.study
        assert study.decision is not None
        limits = sorted({1 / c.decision.level_improves for c in standing.decided if c.decision})
        sequential = study.decision.plan == "sequential"
        if sequential:
            for limit in limits:
                axes.axhline(limit, color=MUTED, lw=0.9, ls=(0, (3, 2)), zorder=1)
        axes.axhline(1, color=RULE, lw=0.9, zorder=1)
        axes.set_ylim(min([*values, 0.5]) / 1.6, max([*values, *(limits if sequential else []), 2]) * 1.6)
        if sequential:
            family = f", {len(study.challengers)} challengers" if len(study.challengers) > 1 else ""
            axes.set_title(
                f"established from E = {' or '.join(f'{limit:g}' for limit in limits)} (dashed{family})",
                size=FONT_PT - 0.5,
                color=MUTED,
                pad=8,
            )
        ends = {}
        for arm, path in paths.items():
            ends[arm] = _draw_mean(axes, dict(path), look(standing, arm))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        decades = LogLocator(base=10, numticks=7)
        axes.yaxis.set_major_locator(decades)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("pairs of runs")
        axes.set_ylabel("E-value against no improvement")
        _name_lines(figure, axes, standing, ends)
        return _svg(figure)


def _curves(standing: Standing, arm: str) -> dict[int, Curve]:
    """Seed -> the finite part of the curve from step 1 on, for the runs that count."""
    found = {}
    for cell in standing.cells:
        if cell.arm == arm and cell.curve:
            found[cell.seed] = _finite(cell)
    return {seed: curve for seed, curve in found.items() if curve}


def _finite(cell: CellStanding) -> Curve:
    return {step: loss for step, loss in cell.curve if step > 0 and loss is not None and math.isfinite(loss)}


def _mean(curves: list[Curve]) -> Curve:
    """Mean over the curves where all of them have a value: never a mean over survivors."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: math.fsum(curve[step] for curve in curves) / len(curves) for step in shared}


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]


def _draw_mean(axes: Axes, mean: Curve, style: Look, *, last: int | None = None) -> tuple[float, float] | None:
    """Draw the thick line and return its end, crossed where it stops before the step `last`."""
    if not mean:
        return None
    steps, values = _xy(mean)
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


LINE_GAP = 11.0  # points from one label's baseline to the next


def _panel(arms: list[str]) -> tuple[Figure, Axes]:
    """A half-width figure with room for the names of its lines, beside them or (long ones) below."""
    below = _long_names(arms)
    plot = max(150.0, 0.0 if below else LINE_GAP * len(arms) + 6)
    bottom = 36 + (LINE_GAP * len(arms) + 8 if below else 0)
    right = 10.0 if below else 20 + max(text_width(arm) for arm in arms)
    figure = _figure(HALF_IN, (26 + plot + bottom) / 72)
    return figure, _axes(figure, 52, bottom, right, 26)


def _long_names(arms: Sequence[str]) -> bool:
    return any(len(arm) > LABEL_CHARS for arm in arms)


def _name_lines(figure: Figure, axes: Axes, standing: Standing, ends: dict[str, tuple[float, float] | None]) -> None:
    if _long_names(list(ends)):
        _legend_below(figure, standing, list(ends))
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


def _legend_below(figure: Figure, standing: Standing, arms: list[str]) -> None:
    from matplotlib.lines import Line2D

    width, height = (72 * size for size in figure.get_size_inches())
    for i, (arm, text) in enumerate(short_names(arms, LEGEND_CHARS).items()):
        style = look(standing, arm)
        y = (LINE_GAP * (len(arms) - i) - 2) / height
        figure.add_artist(
            Line2D(
                [10 / width, 22 / width, 34 / width],
                [y, y, y],
                color=style.colour,
                lw=1.8,
                ls=style.dash,
                marker=style.marker,
                markevery=[1],
                ms=4,
            )
        )
        figure.text(40 / width, y, text, va="center", ha="left", size=FONT_PT - 1)


# What a figure shows, in words


def alternative_texts(standing: Standing) -> dict[str, str]:
    """Name of a figure -> what it shows, for those who don't see it."""
    baseline = standing.snapshot.study.baseline
    rows = "; ".join(f"{c.arm} {_interval_label(c)}" for c in standing.comparisons if c.differences)
    grown = "; ".join(
        f"{c.arm} {c.evidence[-1][1]:.3g} after {c.evidence[-1][0]}" for c in standing.comparisons if c.evidence
    )
    return {
        "forest": f"Paired differences of the final loss against {baseline} in nats/token, mean and 95% interval: "
        f"{rows}. The smallest effect worth having is {margin_text(standing)}.",
        "losses": "Validation loss by step, one faint line a run and a mean for every arm.",
        "finish": f"The loss curves from {FINISH_FROM:.0%} of the steps on.",
        "differences": f"Difference to {baseline} on the same seed in percent of its loss, by step.",
        "evidence": f"E-value against no improvement by number of pairs: {grown}.",
    }
