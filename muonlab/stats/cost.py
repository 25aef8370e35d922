"""Cost of one percentage point of improvement, with its Fieller interval.

    rel_i = 100 d_i / baseline_i [%],   usd per point = C / mean(rel),   interval C / U to C / L

C is the price of a pair [USD], [L, U] the t interval of mean(rel). With a certain numerator Fieller's set is
this reciprocal; where [L, U] contains 0 the set is unbounded and only "at least C / U" can be said.
Assumes independent, normal relative differences and a known price. Source: Fieller (1954),
JRSS B 16, 175-185.
"""

from muonlab.stats.result import Result


class UsdPerPoint(Result):
    """USD per percentage point: point and interval where they exist, and a sentence in any case."""

    point: float | None
    low: float | None
    high: float | None
    sentence: str


def usd_per_point(
    mean_rel_pct: float, interval_pct: tuple[float, float] | None, price_per_pair_usd: float
) -> UsdPerPoint:
    """Cost per point from the mean relative difference [%] and its interval, None at one pair."""
    price = price_per_pair_usd
    no_interval = "one pair gives no interval"
    if interval_pct is None and mean_rel_pct > 0:
        point = price / mean_rel_pct
        sentence = f"${point:,.2f} per percentage point; {no_interval}"
        return UsdPerPoint(
            point=point,
            low=None,
            high=None,
            sentence=sentence,
            undefined={"low": no_interval, "high": no_interval},
        )
    low_pct, high_pct = interval_pct if interval_pct is not None else (mean_rel_pct, mean_rel_pct)
    if high_pct <= 0:
        reason = "no improvement to divide by: the estimate" + (
            " of the single pair is not positive" if interval_pct is None else f"'s interval ends at {high_pct:.4g}%"
        )
        return UsdPerPoint(
            point=None,
            low=None,
            high=None,
            sentence=reason,
            undefined=dict.fromkeys(("point", "low", "high"), reason),
        )
    low = price / high_pct
    if low_pct <= 0:
        reason = f"the interval of the effect, [{low_pct:.4g}%, {high_pct:.4g}%], contains 0"
        sentence = f"at least ${low:,.2f} per percentage point, unbounded above: {reason}"
        return UsdPerPoint(
            point=None,
            low=low,
            high=None,
            sentence=sentence,
            undefined=dict.fromkeys(("point", "high"), reason),
        )
    point, high = price / mean_rel_pct, price / low_pct
    sentence = f"${point:,.2f} per percentage point (95% interval ${low:,.2f} to ${high:,.2f})"
    return UsdPerPoint(point=point, low=low, high=high, sentence=sentence)
