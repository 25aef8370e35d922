"""One-sided t-test e-process and the confidence sequence that inverts it.

    H0: effect <= 0 against a half-normal(0, g) prior on the standardised effect, right-Haar prior on sigma
    rho   = sqrt(n) mean / sqrt(n mean^2 + ss)  = t / sqrt(t^2 + n - 1), in [-1, 1], defined at n = 1 too
    c     = rho^2 n g / (1 + n g)
    log E = log 2 - log(1 + n g)/2 - n log(1 - c)/2 + log F_{t,n}(sign(rho) sqrt(n c / (1 - c)))

F_{t,n} is the CDF of Student's t with n degrees of freedom; ss the sum of squared deviations from the mean.
Under H0 with normal differences E is dominated by a nonnegative martingale of mean 1, so P(E ever >= 1/alpha)
<= alpha (Ville): one may look after every pair. E rises with rho, so every threshold on E is one on t.
Assumes independent, normal differences; symmetric heavy tails were measured to be safe, left-skewed ones are
not. Sources: Perez-Ortiz et al., Annals of Statistics (2024); Wang and Ramdas, arXiv:2310.03722; Grunwald, de Heide
and Koolen, Safe Testing, JRSS B (2024).
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LOG_E_CAP = 700.0
N_SEARCH_LIMIT = 1000  # no E-threshold in use needs more pairs than this to become attainable


def correlation_root(n: ArrayLike, mean: ArrayLike, ss: ArrayLike) -> Floats:
    """rho = sqrt(n) mean / sqrt(n mean^2 + ss), elementwise; 0 where every difference is 0."""
    n, mean, ss = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (n, mean, ss)))
    norm = np.sqrt(n * mean**2 + ss)
    rho = np.divide(np.sqrt(n) * mean, norm, out=np.zeros_like(norm), where=norm != 0)
    return np.asarray(rho, dtype=np.float64)


def log_e_of_root(rho: ArrayLike, n: ArrayLike, g: float) -> Floats:
    """log E of rho [-1, 1] at n pairs, elementwise."""
    from scipy.special import stdtr

    rho, n = np.asarray(rho, dtype=np.float64), np.asarray(n, dtype=np.float64)
    c = np.minimum(rho**2, 1.0) * n * g / (1 + n * g)
    quantile = np.sign(rho) * np.sqrt(n * c / (1 - c))
    with np.errstate(divide="ignore"):  # far in the left tail the CDF underflows to E = 0
        log_e = np.log(2) - np.log1p(n * g) / 2 - n * np.log1p(-c) / 2 + np.log(stdtr(n, quantile))
    return np.asarray(log_e, dtype=np.float64)


def log_e_value(n: ArrayLike, mean: ArrayLike, ss: ArrayLike, g: float) -> Floats:
    """log E against "effect <= 0", elementwise over n pairs with this mean and sum of squared deviations."""
    return log_e_of_root(correlation_root(n, mean, ss), n, g)


def e_from_log(log_e: ArrayLike) -> float:
    """E of one log E, capped where float64 ends: beyond 1e304 the size of E says nothing more."""
    return float(np.exp(np.minimum(log_e, LOG_E_CAP)))


def largest_log_e(n: int, g: float) -> float:
    """The supremum of log E over all data of n pairs (all differences equal and positive)."""
    return float(log_e_of_root(1.0, n, g))


def first_attainable_n(level: float, g: float) -> int:
    """The smallest number of pairs at which E can reach 1 / level at all."""
    for n in range(1, N_SEARCH_LIMIT):
        if largest_log_e(n, g) >= -np.log(level):
            return n
    raise ValueError(f"E cannot reach 1/{level:g} within {N_SEARCH_LIMIT} pairs at g = {g:g}; use a larger g or level")


def crossing(f: Callable[[float], float], low: float, high: float) -> float:
    """Where f, rising from f(low) < 0 to f(high) > 0, crosses 0: bisection down to neighbouring floats.

    Importing scipy.optimize for its root finders takes longer than a study's whole arithmetic.
    """
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return high


@lru_cache(maxsize=4096)
def critical_t(n: int, level: float, g: float) -> float | None:
    """The t at which E of n pairs equals 1 / level; None where E cannot reach it."""
    if n < 2 or largest_log_e(n, g) <= -np.log(level):
        return None
    rho = crossing(lambda r: float(log_e_of_root(r, n, g)) + np.log(level), -1.0, 1.0)
    return float(rho * np.sqrt((n - 1) / (1 - rho**2)))


def confidence_sequence(n: int, mean: float, sd: float, *, level: float, g: float) -> tuple[float, float] | None:
    """The effects that neither one-sided e-process rejects at `level`: a (1 - 2 level) confidence sequence.

    Valid at every n at once; no running intersection. None while E cannot reach 1 / level .
    """
    t_limit = critical_t(n, level, g)
    if t_limit is None:
        return None
    half_width = t_limit * sd / np.sqrt(n)
    return float(mean - half_width), float(mean + half_width)
