"""The evidence as it grew: E-value against "effect <= 0" by number of pairs, and the thresholds of the plan."""

from __future__ import annotations

from muonlab.reporting.figures.labels import name_lines, panel, power_of_ten
from muonlab.reporting.figures.lines import draw_mean
from muonlab.reporting.figures.paper import FONT_PT, MUTED, RULE, look, styled, to_svg
from muonlab.reporting.standing import Standing


def evidence(standing: Standing) -> str | None:
    """The figure, or None without a pair; a plan that looks once has no thresholds to show."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    paths = {c.arm: c.evidence for c in standing.comparisons if c.evidence}
    if not paths:
        return None
    with styled():
        figure, axes = panel(list(paths))
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
            ends[arm] = draw_mean(axes, dict(path), look(standing, arm))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        decades = LogLocator(base=10, numticks=7)
        axes.yaxis.set_major_locator(decades)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
        axes.set_xlabel("pairs of runs")
        axes.set_ylabel("E-value against no improvement")
        name_lines(figure, axes, standing, ends)
        return to_svg(figure)
