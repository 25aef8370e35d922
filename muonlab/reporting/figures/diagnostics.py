"""What the optimizers did, step by step: small multiples of the columns of curve.csv that bear on the hypotheses.

A faint line is one run, a thick line the mean of an arm over the steps that all its runs have measured. An axis is
logarithmic where all values are positive and span more than LOG_FROM.
"""

from __future__ import annotations

from muonlab.reporting.courses import converged
from muonlab.reporting.figures.labels import LINE_GAP, legend_below, legend_columns, legend_rows, power_of_ten
from muonlab.reporting.figures.lines import EDGE, Curve, draw_lines
from muonlab.reporting.figures.paper import FONT_PT, INK, MUTED, WIDE_IN, axes_in, blank, styled, to_svg
from muonlab.reporting.standing import Standing

QUANTITIES = {
    "grad_norm": ("norm of the gradient", "‖g‖₂"),
    "opt_momentum_rms": ("size of the momentum", "rms of M"),
    "opt_effective_rank_share_after": ("effective rank of the momentum used", "share of full rank"),
    "opt_turn": ("turn from Muon's own update", "1 − cosine"),
    "hessian_top": ("largest eigenvalue of the Hessian", "eigenvalue"),
}
"""Column of curve.csv -> what it is, and its unit."""

LOG_FROM = 30.0
PANEL_PT = 118.0


def diagnostics(standing: Standing) -> str | None:
    """The figure, or None where the evaluations carry no series that differ anywhere."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    found = {name: _series(standing, name) for name in QUANTITIES}
    found = {name: arms for name, arms in found.items() if _says_something(arms)}
    if not found:
        return None
    names = [arm for arm in standing.snapshot.study.arms if any(arm in arms for arms in found.values())]
    columns = len(found) if len(found) < 4 else (2 if len(found) == 4 else 3)
    rows = -(-len(found) // columns)
    with styled():
        legend = legend_columns(names, 72 * WIDE_IN)
        below = LINE_GAP * legend_rows(len(names), legend) + 8
        left, gap, top, foot = 46.0, 44.0, 22.0, 34.0
        width = (72 * WIDE_IN - left - 10 - gap * (columns - 1)) / columns
        height = rows * (PANEL_PT + top + foot) + below
        figure = blank(WIDE_IN, height / 72)
        for i, (name, arms) in enumerate(found.items()):
            column, row = i % columns, i // columns
            x0, y0 = left + column * (width + gap), row * (PANEL_PT + top + foot) + top
            axes = axes_in(figure, x0, height - y0 - PANEL_PT, 72 * WIDE_IN - x0 - width, y0)
            title, unit = QUANTITIES[name]
            draw_lines(axes, standing, arms, last=max(step for curves in arms.values() for c in curves for step in c))
            values = [value for curves in arms.values() for curve in curves for value in curve.values()]
            if min(values) > 0 and max(values) > LOG_FROM * min(values):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
                axes.yaxis.set_minor_formatter(NullFormatter())
            else:
                axes.yaxis.set_major_locator(MaxNLocator(5))
                if min(values) < 0:
                    axes.axhline(0, color=INK, lw=0.8, zorder=1)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
            axes.set_xlim(0, (1 + EDGE) * standing.snapshot.settings.steps)
            # Flush with the labels of the axis, where a long one has room.
            axes.annotate(
                title, (0, 1), xycoords="axes fraction", xytext=(-30, 9), textcoords="offset points", weight="bold"
            )
            axes.set_ylabel(unit, color=MUTED, size=FONT_PT - 0.5)
            axes.set_xlabel("step", color=MUTED, size=FONT_PT - 0.5)
        legend_below(figure, standing, names, legend)
        return to_svg(figure)


def shown_quantities(standing: Standing) -> list[str]:
    """What the panels of the figure are called, in order."""
    return [title for name, (title, _) in QUANTITIES.items() if _says_something(_series(standing, name))]


def _series(standing: Standing, name: str) -> dict[str, list[Curve]]:
    """Arm -> the curves of one column, of the runs that have it."""
    declared = standing.snapshot.digests
    found: dict[str, list[Curve]] = {arm: [] for arm in standing.snapshot.study.arms}
    for line in standing.evaluations:
        if line.cell_digest not in declared:
            continue
        # An eigenvalue that the iteration has not found is not drawn, as it is not in the tables.
        curve = converged(line.series) if name == "hessian_top" else dict(line.series.get(name, ()))
        if curve:
            found[line.arm].append(curve)
    return {arm: curves for arm, curves in found.items() if curves}


def _says_something(arms: dict[str, list[Curve]]) -> bool:
    return len({value for curves in arms.values() for curve in curves for value in curve.values()}) > 1
