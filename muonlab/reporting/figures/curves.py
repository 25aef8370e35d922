"""Validation loss by step, whole, early and late, and the differences to the baseline by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from muonlab.reporting.figures.labels import above, name_lines, panel, short_names
from muonlab.reporting.figures.lines import EDGE, Curve, draw_lines, finite_losses, has_band, loss_curves
from muonlab.reporting.figures.paper import BAND, FONT_PT, INK, MUTED, limits_of, styled, to_svg
from muonlab.reporting.standing import ArmComparison, Standing
from muonlab.stats.guardrails import EARLY_SHARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FINISH_FROM = 0.6
"""Share of the steps after which the figure of the finish begins."""


def losses(standing: Standing) -> str | None:
    """Validation loss by step: a faint line a run, and each arm's mean for as long as all its runs go on."""
    return _losses(standing, 0, standing.snapshot.settings.steps)


def early(standing: Standing) -> str | None:
    """The loss curves where the early guardrail looks, over log steps; None with fewer than two evaluations there."""
    return _losses(standing, 0, round(EARLY_SHARE * standing.snapshot.settings.steps))


def finish(standing: Standing) -> str | None:
    """The last part of the loss curves, where what separates the arms can be seen."""
    steps = standing.snapshot.settings.steps
    return _losses(standing, round(FINISH_FROM * steps), steps)


def _losses(standing: Standing, first: int, last: int) -> str | None:
    """Loss curves of some steps; a described arm far above the rest leaves a figure of the finish."""
    study, steps = standing.snapshot.study, standing.snapshot.settings.steps
    arms: dict[str, list[Curve]] = {}
    for arm in study.arms:
        parts = [{k: v for k, v in c.items() if first <= k <= last} for c in loss_curves(standing, arm).values()]
        if parts := [part for part in parts if part]:
            arms[arm] = parts
    seen = sorted({step for parts in arms.values() for part in parts for step in part})
    if len(seen) < (1 if last == steps else 2):
        return None
    with styled():
        figure, axes = panel(list(arms))
        ends = draw_lines(axes, standing, arms, bands=True, last=last)
        axes.set_xlabel("step" if last == steps else "step [log]")
        axes.set_ylabel("validation loss [nats/token]")
        axes.set_xlim(first, last + EDGE * (last - first))
        if last < steps:
            _log_steps(axes, seen)
        low, high = _loss_limits(standing, first, last)
        pad = 0.05 * (high - low) or 1.0
        axes.set_ylim(low - pad, high + pad)
        if first or last < steps:
            title = f"the same from step {first} on" if first else f"the same up to step {last}"
        else:
            band = any(has_band(arms, curves) for curves in arms.values())
            title = "every run, and the mean of each arm" + (" ± 1 standard deviation" if band else "")
        axes.set_title(title, size=FONT_PT - 0.5, color=MUTED, pad=8)
        name_lines(figure, axes, standing, ends)
        return to_svg(figure)


def _log_steps(axes: Axes, seen: Sequence[int]) -> None:
    """A logarithmic axis from the first of the steps to the last, with ticks at steps that were evaluated."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    axes.set_xlim(seen[0], seen[-1] * (seen[-1] / seen[0]) ** EDGE)
    ticks = [seen[-1]]
    for step in reversed(seen):
        if step * 1.3 <= ticks[-1]:
            ticks.append(step)
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: 1 + len(ticks) // 6]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))


def _loss_limits(standing: Standing, first: int, last: int) -> tuple[float, float]:
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
        if values := [loss for c in chosen for step, loss in finite_losses(c).items() if first <= step <= last]:
            return min(values), max(values)
    raise ValueError("no finite loss to draw")


def differences(standing: Standing) -> str | None:
    """How much better than the baseline on the same seed, in % by step, with the early guardrail's zone."""
    study, steps = standing.snapshot.study, standing.snapshot.settings.steps
    base = loss_curves(standing, study.baseline)
    paths: dict[str, dict[int, Curve]] = {}
    for comparison in standing.comparisons:
        own = loss_curves(standing, comparison.arm)
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

    with styled():
        figure, axes = panel(list(paths))
        low, high = limits_of(shown, extent)
        pad = 0.06 * (high - low) or 1.0
        axes.set_xlim(0, (1 + EDGE) * steps)
        axes.set_ylim(low - pad, high + pad)
        axes.axvspan(0, EARLY_SHARE * steps, color=BAND, lw=0, zorder=0)
        assert study.decision is not None
        limit = str(study.decision.max_early_regress)
        above(axes, EARLY_SHARE * steps / 2, f"early: at most {limit} worse")
        if low - pad < -float(limit.rstrip("%")):
            axes.plot((0, EARLY_SHARE * steps), [-float(limit.rstrip("%"))] * 2, color=MUTED, lw=0.9, ls=(0, (3, 2)))
        axes.axhline(0, color=INK, lw=0.9, zorder=1)
        ends = draw_lines(axes, standing, {arm: list(pairs.values()) for arm, pairs in paths.items()}, last=steps)
        baseline = short_names([study.baseline], 12)[study.baseline]
        axes.set_xlabel("step")
        axes.set_ylabel(f"better than {baseline} [% of its loss]")
        name_lines(figure, axes, standing, ends)
        return to_svg(figure)
