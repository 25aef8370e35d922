"""Dunnett's test of K challengers against one baseline, blocked by seed.

    y_{a,i} = arm_a + seed_i + noise,  all noise of one variance;  MS = residual mean square of this two-way layout
    t_k = (mean_baseline - mean_k) / sqrt(2 MS / n),  K (n - 1) degrees of freedom,  correlation 1/2 between any two t
    p_k = P(max_j T_j >= t_k)   (one-sided: the challenger's loss is lower)

Used only where a study declares it: the pooled variance makes it wrong where arms differ in spread, and paired
t with Holm needs no such thing. Assumes independent normal noise.
Source: Dunnett (1955) doi:10.1080/01621459.1955.10501294; the integral is over the shared baseline and the scale.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from muonlab.stats.evidence import Floats
from muonlab.stats.result import Result

NODES = 100  # of each Gauss-Legendre quadrature; p agrees with 400 nodes to RESOLUTION
RESOLUTION = 1e-12  # a smaller p is not told from 0 (or from less), and stands as this
Z_END = 9.0  # beyond it the normal density is below 1e-18
NEGLIGIBLE = 1e-16  # upper tail of chi^2 that the quadrature leaves out


class Dunnett(Result):
    """t and single-step adjusted one-sided p, in the order of the challengers."""

    df: int
    t: tuple[float, ...]
    p_adjusted: tuple[float, ...]


def blocked_dunnett(baseline: ArrayLike, challengers: ArrayLike, *, family_size: int | None = None) -> Dunnett:
    """Compare K challengers [K, n] with the baseline [n] over the same n seeds; losses in nats/token.

    family_size: over how many challengers the maximum is taken, where some of the family are not given (K by default).
    Raises ValueError on fewer than two seeds, arms on other seeds, or a layout without residual variance.
    """
    base, chal = np.asarray(baseline, dtype=np.float64), np.atleast_2d(np.asarray(challengers, dtype=np.float64))
    if base.ndim != 1 or base.size < 2 or chal.shape[1] != base.size:
        raise ValueError(
            f"dunnett: baseline {base.shape}, challengers {chal.shape}; give [n] and [K, n] losses on the "
            "same n >= 2 seeds"
        )
    y = np.vstack([base, chal])
    k, n = chal.shape
    residual = y - y.mean(axis=1, keepdims=True) - y.mean(axis=0, keepdims=True) + y.mean()
    df = k * (n - 1)
    mean_square = (residual**2).sum() / df
    if mean_square <= 0:
        raise ValueError("dunnett: no residual variance (s = 0), which training noise never has; check the arms")
    t = (base.mean() - chal.mean(axis=1)) / np.sqrt(2 * mean_square / n)
    p = (dunnett_p(float(x), family_size or k, df) for x in t)
    return Dunnett(df=df, t=tuple(float(x) for x in t), p_adjusted=tuple(p))


def dunnett_p(t: float, k: int, df: int) -> float:
    """P(max of k equicorrelated (1/2) Student t with df degrees of freedom >= t), from RESOLUTION to 1."""
    from scipy.special import chdtri, gammaln, ndtr

    # T_j = (Z_j - Z_0) / sqrt(2) / S with df S^2 ~ chi^2_df: given Z_0 and S the k challengers are independent.
    nodes, weights = _quadrature()
    s_end = np.sqrt(chdtri(df, NEGLIGIBLE) / df)
    s, ds = s_end * (nodes + 1) / 2, s_end * weights / 2
    log_density = df / 2 * np.log(df / 2) - gammaln(df / 2) + np.log(2) + (df - 1) * np.log(s) - df * s**2 / 2
    z, dz = Z_END * nodes, Z_END * weights
    below = ndtr(np.sqrt(2) * t * s[:, np.newaxis] + z) ** k
    density_z = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    p = 1 - (ds * np.exp(log_density)) @ below @ (dz * density_z)
    return float(np.clip(p, RESOLUTION, 1))


@lru_cache(maxsize=1)
def _quadrature() -> tuple[Floats, Floats]:
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return nodes, weights
