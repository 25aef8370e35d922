"""The same comparison at several model sizes: random-effects meta-analysis, and whether the sizes agree.

    effect_j = theta + u_j + e_j,  u_j ~ N(0, tau^2) between sizes,  e_j ~ N(0, variance_j) within
    Q = sum w_j (effect_j - fixed-effect mean)^2 ~ chi^2_{J-1} if the sizes agree (tau = 0)

tau^2 by Paule-Mandel, the interval of theta by Hartung and Knapp (t with J - 1 degrees of freedom), never
narrower than without their scale. Effects should be
relative (percent of the baseline), since losses of different sizes are not on one scale.
Assumes independent comparisons with known within-variances; with two or three sizes the test of heterogeneity has
little power, and its silence is not evidence that a gain survives scale.
Sources: DerSimonian and Kacker (2007) doi:10.1016/j.cct.2006.04.004; Hartung and Knapp (2001) doi:10.1002/sim.791.
"""

import numpy as np
from numpy.typing import ArrayLike

from muonlab.stats.effect import Interval
from muonlab.stats.result import Result


class MetaAnalysis(Result):
    """Pooled effect over sizes in the unit of the effects (percent of the baseline), and their heterogeneity."""

    sizes: int
    pooled: float
    ci95: Interval
    tau: float
    """Standard deviation of the true effects between sizes."""
    i2: float
    q: float
    p_heterogeneity: float
    sentence: str


def across_sizes(effects: ArrayLike, standard_errors: ArrayLike) -> MetaAnalysis:
    """Combine one effect [J] with its standard error [J] per model size, J >= 2.

    Raises ValueError on fewer than two sizes, or a standard error that is not positive.
    """
    effect, se = np.asarray(effects, dtype=np.float64), np.asarray(standard_errors, dtype=np.float64)
    if effect.shape != se.shape or effect.ndim != 1 or effect.size < 2 or not (se > 0).all():
        raise ValueError(
            f"across sizes: effects {effect.shape}, standard errors {se.shape}; give one effect and one positive "
            "standard error for each of at least two sizes"
        )
    from statsmodels.stats.meta_analysis import combine_effects

    combined = combine_effects(effect, se**2, method_re="iterated", use_t=True)
    # Random effects: row 1 with t quantiles, row 3 also with Hartung and Knapp's scale, which can shrink it below
    # what the within-variances allow where the sizes agree by chance. The wider of the two.
    intervals = combined.conf_int()
    low, high = min(intervals[1][0], intervals[3][0]), max(intervals[1][1], intervals[3][1])
    p = float(combined.test_homogeneity().pvalue)
    survives = (
        "the interval is above 0: the gain survives scale, as far as these sizes go"
        if low > 0
        else "the interval contains 0 or lies below it: a gain over all sizes is not established"
    )
    agreement = "the sizes disagree" if p < 0.05 else "no disagreement between the sizes is established"
    return MetaAnalysis(
        sizes=effect.size,
        pooled=float(combined.mean_effect_re),
        ci95=(float(low), float(high)),
        tau=float(np.sqrt(max(combined.tau2, 0.0))),
        i2=float(max(combined.i2, 0.0)),
        q=float(combined.q),
        p_heterogeneity=p,
        sentence=f"{agreement} (Q = {combined.q:.3g}, p = {p:.3g}); {survives}",
    )
