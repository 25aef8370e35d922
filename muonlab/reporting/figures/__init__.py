"""The figures of a report as SVG texts, and in words for those who don't see them.

Each figure takes a Standing and returns the SVG, or None where there is nothing to draw. Every difference has the
sign of the statistics: up or right is better than the baseline.
"""

from __future__ import annotations

from muonlab.reporting.figures.curves import FINISH_FROM, differences, early, finish, losses
from muonlab.reporting.figures.diagnostics import diagnostics, shown_quantities
from muonlab.reporting.figures.evidence import evidence, evidence_below
from muonlab.reporting.figures.forest import forest, interval_label
from muonlab.reporting.standing import Standing
from muonlab.reporting.wording import listed, margin_text
from muonlab.stats.guardrails import EARLY_SHARE

WIDE = ("forest", "diagnostics", "tuning")
"""Figures of the full width of a page; the others stand in halves."""


def draw(standing: Standing, *, partial: bool) -> dict[str, str | None]:
    """Every figure by name, None where it has nothing to show; no verdict stands in a partial or rehearsal's one."""
    verdicts = not partial and standing.snapshot.study.twin_of is None
    return {
        "forest": forest(standing, verdicts=verdicts),
        "evidence": evidence(standing),
        "evidence_below": evidence_below(standing),
        "differences": differences(standing),
        "losses": losses(standing),
        "early": early(standing),
        "finish": finish(standing),
        "diagnostics": diagnostics(standing),
    }


def alternative_texts(standing: Standing) -> dict[str, str]:
    """Name of a figure -> what it shows, for those who don't see it."""
    baseline = standing.snapshot.study.baseline
    rows = "; ".join(f"{c.arm} {interval_label(c)}" for c in standing.comparisons if c.differences)
    grown, shrunk = (
        "; ".join(f"{arm} {path[-1][1]:.3g} after {path[-1][0]}" for arm, path in paths if path)
        for paths in (
            [(c.arm, c.evidence) for c in standing.comparisons],
            [(c.arm, c.evidence_below) for c in standing.comparisons],
        )
    )
    return {
        "forest": f"Paired differences of the final loss against {baseline} in nats/token, mean and 95% interval: "
        f"{rows}. The smallest effect worth having is {margin_text(standing)}.",
        "losses": "Validation loss by step: one faint line a run, for every arm its mean and a band of one standard "
        "deviation of its runs to each side.",
        "early": f"The loss curves of the first {EARLY_SHARE:.0%} of the steps, on a logarithmic axis of steps.",
        "finish": f"The loss curves from {FINISH_FROM:.0%} of the steps on.",
        "differences": f"Difference to {baseline} on the same seed in percent of its loss, by step.",
        "evidence": f"E-value for an improvement by number of pairs: {grown}.",
        "evidence_below": f"E-value for there being no improvement worth having, by number of pairs: {shrunk}.",
        "diagnostics": f"By step, one faint line a run and a mean for every arm: {listed(shown_quantities(standing))}.",
    }
