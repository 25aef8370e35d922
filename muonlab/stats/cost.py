"""Cost of one percentage point of improvement, in dollars or in seconds, with its Fieller interval.

    rel_i = 100 d_i / baseline_i [%],   cost per point = C / mean(rel),   interval C / U to C / L

C is the cost of a pair [USD or s], [L, U] the t interval of mean(rel). With a certain numerator Fieller's set is
this reciprocal; where [L, U] contains 0 the set is unbounded and only "at least C / U" can be said.
Assumes independent, normal relative differences and a known price. Source: Fieller (1954),
JRSS B 16, 175-185.
"""

from typing import Literal

from muonlab.stats.result import Result

Unit = Literal["usd", "s"]


class CostPerPoint(Result):
    """Cost per percentage point [USD or s]: point and interval where they exist, and a sentence in any case."""

    point: float | None
    low: float | None
    high: float | None
    sentence: str


def cost_per_point(
    mean_rel_pct: float | None,
    interval_pct: tuple[float, float] | None,
    cost_per_pair: float,
    *,
    unit: Unit = "usd",
) -> CostPerPoint:
    """Cost per point from the mean relative difference [%] and its interval.

    The mean is None without pairs, the interval at one pair; `cost_per_pair` and the result are in `unit`.
    """
    cost = cost_per_pair
    if mean_rel_pct is None:
        return _nothing("no pairs")
    if interval_pct is None and mean_rel_pct > 0:
        point, reason = cost / mean_rel_pct, "one pair gives no interval"
        return CostPerPoint(
            point=point,
            low=None,
            high=None,
            sentence=f"{_spell(point, unit)} per percentage point; {reason}",
            undefined={"low": reason, "high": reason},
        )
    low_pct, high_pct = interval_pct if interval_pct is not None else (mean_rel_pct, mean_rel_pct)
    if high_pct <= 0:
        return _nothing(
            "no improvement to divide by: the estimate"
            + (
                " of the single pair is not positive"
                if interval_pct is None
                else f"'s interval ends at {high_pct:.4g}%"
            )
        )
    low = cost / high_pct
    if low_pct <= 0:
        reason = f"the interval of the effect, [{low_pct:.4g}%, {high_pct:.4g}%], contains 0"
        return CostPerPoint(
            point=None,
            low=low,
            high=None,
            sentence=f"at least {_spell(low, unit)} per percentage point, unbounded above: {reason}",
            undefined=dict.fromkeys(("point", "high"), reason),
        )
    point, high = cost / mean_rel_pct, cost / low_pct
    interval = f"95% interval {_spell(low, unit)} to {_spell(high, unit)}"
    return CostPerPoint(
        point=point, low=low, high=high, sentence=f"{_spell(point, unit)} per percentage point ({interval})"
    )


def _nothing(reason: str) -> CostPerPoint:
    names = ("point", "low", "high")
    return CostPerPoint(point=None, low=None, high=None, sentence=reason, undefined=dict.fromkeys(names, reason))


def _spell(cost: float, unit: Unit) -> str:
    return f"${cost:,.2f}" if unit == "usd" else f"{cost:,.0f} s"
