"""The evidence as it grew: E-values by number of pairs, and the thresholds of the plan.

One figure against "effect <= 0", which a GO needs, one against "effect >= min_effect", which a NO_GO or an
EQUIVALENT needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from muonlab.reporting.figures.labels import name_lines, panel, power_of_ten
from muonlab.reporting.figures.lines import draw_mean
from muonlab.reporting.figures.paper import FONT_PT, MUTED, RULE, look, styled, to_svg
from muonlab.reporting.standing import Standing


def evidence(standing: Standing) -> str | None:
    """Evidence for an improvement; None without a pair. A plan that looks once has no thresholds to show."""
    paths = {c.arm: c.evidence for c in standing.comparisons if c.evidence}
    levels = [c.decision.level_improves for c in standing.decided if c.decision]
    return _drawn(standing, paths, levels, "E for an improvement")


def evidence_below(standing: Standing) -> str | None:
    """Evidence that there is no improvement worth having; None without a pair."""
    paths = {c.arm: c.evidence_below for c in standing.comparisons if c.evidence_below}
    levels = [c.decision.level_below_margin for c in standing.decided if c.decision]
    return _drawn(standing, paths, levels, "E for none worth having")


def _drawn(
    standing: Standing, paths: dict[str, list[tuple[int, float]]], levels: Sequence[float], label: str
) -> str | None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

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
        limits = sorted({1 / level for level in levels})
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
        axes.set_ylabel(label)
        name_lines(figure, axes, standing, ends)
        return to_svg(figure)
