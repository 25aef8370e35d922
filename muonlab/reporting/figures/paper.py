"""What all figures are drawn on: colours, looks, sizes, and the SVG that comes out.

The same figure gives the same bytes: fixed hash salt, no date, matplotlib's defaults whatever the machine's, glyphs
as paths. Colours are those of Okabe and Ito (2008, "Color Universal Design"); arms differ in marker and dash as well,
so that greyscale suffices.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from muonlab.registry.study import Study
from muonlab.reporting.standing import ArmComparison, Standing

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
    """The look of an arm in a report of this standing."""
    return look_in(standing.snapshot.study, arm)


def look_in(study: Study, arm: str) -> Look:
    """The look of an arm, by its place in the declaration; the baseline is ink."""
    if arm == study.baseline:
        return Look(INK, "o", "-")
    # Two arms of one colour differ in marker and dash; 32 arms differ in the two together, which is what print keeps.
    turn, place = divmod(study.arms.index(arm) - 1, len(ARM_COLOURS))
    marker = (place + 3 * turn) % len(MARKERS)
    return Look(ARM_COLOURS[place], MARKERS[marker], DASHES[(marker + 3 * turn) % len(DASHES)])


def dark(svg: str) -> str:
    """The same figure for a dark page."""
    return re.sub("|".join(DARK), lambda match: DARK[match[0]], svg)


def limits_of(
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


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this style and no other, whatever the machine's own."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        yield


def blank(width_in: float, height_in: float) -> Figure:
    """An empty figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in))


def axes_in(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Axes with margins in points."""
    width, height = (72 * size for size in figure.get_size_inches())
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return figure.add_axes(box)


def to_svg(figure: Figure) -> str:
    """The figure as SVG without what nobody sees: a document type, a date, names of groups, a hundredth of a point."""
    out = io.StringIO()
    figure.savefig(out, format="svg")
    text = out.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>|\s*<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # A glyph is placed by `use`: half of the file, by its long way to say so.
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href", "href")
    text = re.sub(r'(id="|href="#)DejaVuSans(-Bold)?-', lambda m: m[1] + ("b" if m[2] else "n"), text)
    text = re.sub(r'(<use href="#[bn]\w+") transform="translate\(([\d.]+) 0\)"', r'\1 x="\2"', text)
    text = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _rounded, text)
    text = re.sub(r' d="([^"]*)"', lambda m: f' d="{compact(m[1])}"', text)
    text = re.sub(r' style="[^"]*"', lambda m: m[0].replace(": ", ":").replace("; ", ";"), text)
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _rounded(attribute: re.Match[str]) -> str:
    if "scale" in attribute[0]:
        return re.sub(r"(translate|rotate)\([^)]*\)", lambda m: _to_tenths(m[0]), attribute[0])
    return _to_tenths(attribute[0])


def _to_tenths(text: str) -> str:
    return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), text)


def compact(path: str) -> str:
    """A path without the letters that repeat the one before: a line goes on after its start, a curve after a curve."""
    words: list[str] = []
    last = ""
    for word in path.split():
        if not word.isalpha() or not ((word == last and word in "LQC") or (word == "L" and last == "M")):
            words.append(word)
        last = word if word.isalpha() else last
    return " ".join(words)
