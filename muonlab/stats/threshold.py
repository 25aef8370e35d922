"""t*: the level that the e-process leaves unspent, spent at the last planned pair.

    P( E_n >= 1/alpha at some look n_first <= n < n_max,  or  t_{n_max} >= t* ) = alpha

The e-process alone rejects a true null in at most 3.5 % of studies at alpha 5 %; a sequential plan that was
not amended may also reject at t >= t* when its last pair is in, and only then.
Assumes independent normal differences, of mean 0 under H0. Solved by simulation with a fixed seed: the same arguments
give the same t*. Common settings are in `threshold_table.py`, made by `simulate_t_star` with more paths.
"""

from collections.abc import MutableMapping
from functools import lru_cache

import numpy as np

from muonlab.stats.evidence import critical_t, first_attainable_n
from muonlab.stats.threshold_table import T_STAR, T_STAR_ALPHA, T_STAR_FIRST_LOOK, T_STAR_G

N_PATHS = 1_000_000  # standard error of t* about 0.003 at alpha 0.05, 0.006 at 0.05/8
CHUNK_PATHS = 100_000  # keeps one chunk's arrays under 20 MB


class TooFewPathsError(ValueError):
    """The level is so small that the simulated paths say nothing of its t*."""


def simulate_t_star(n_max: int, level: float, *, n_first: int, g: float, n_paths: int, seed: int) -> float:
    """t* from `n_paths` simulated null studies that look after every pair from `n_first` to `n_max`.

    Raises TooFewPathsError where fewer than one of the paths would reject at `level`.
    """
    rng = np.random.default_rng(seed)
    limits = [(n, critical_t(n, level, g)) for n in range(n_first, n_max)]
    kept: list[np.ndarray] = []
    stopped = 0
    for start in range(0, n_paths, CHUNK_PATHS):
        d = rng.standard_normal((n_max, min(CHUNK_PATHS, n_paths - start)))
        sums, squares = d.cumsum(axis=0), (d * d).cumsum(axis=0)
        alive = np.ones(d.shape[1], dtype=bool)
        for n, limit in limits:
            if limit is not None:
                alive &= _t(sums[n - 1], squares[n - 1], n) < limit
        stopped += int((~alive).sum())
        kept.append(_t(sums[-1, alive], squares[-1, alive], n_max))
    to_reject = round(level * n_paths) - stopped
    last = np.concatenate(kept)
    if not 0 < to_reject < last.size:
        raise TooFewPathsError(
            f"{n_paths:,} simulated paths are too few for t* at level {level:g} and n_max {n_max}; raise alpha, or "
            "declare a fixed plan"
        )
    return float(np.partition(last, last.size - to_reject)[last.size - to_reject])


def _t(total: np.ndarray, squares: np.ndarray, n: int) -> np.ndarray:
    ss = squares - total**2 / n
    return np.asarray(total / np.sqrt(n) * np.sqrt((n - 1) / ss))


@lru_cache(maxsize=256)
def _simulated_once(n_max: int, level: float, n_first: int, g: float) -> float:
    return simulate_t_star(n_max, level, n_first=n_first, g=g, n_paths=N_PATHS, seed=20240601)


def t_star(n_max: int, level: float, *, n_min: int, g: float, cache: MutableMapping[str, float] | None = None) -> float:
    """The t at which the last planned pair of a sequential plan rejects at `level` (one-sided).

    Taken from the shipped table, else from `cache` (the caller's, kept between processes; filled here), else
    simulated once in this process. A cached value that no t* can have is simulated again.
    """
    # Below this n no look can reject, so that an earlier n_min changes nothing.
    n_first = min(max(n_min, first_attainable_n(level, g)), n_max)
    family = T_STAR_ALPHA / level
    shipped = abs(family - round(family)) < 1e-9 and g == T_STAR_G and n_min <= T_STAR_FIRST_LOOK
    if shipped and (n_max, round(family)) in T_STAR:
        return T_STAR[n_max, round(family)]
    key = f"t_star n_max={n_max} level={level:.10g} n_first={n_first} g={g:.10g} paths={N_PATHS}"
    if cache is not None and key in cache and _is_plausible(cache[key], n_max, level, g):
        return cache[key]
    value = _simulated_once(n_max, level, n_first, g)
    if cache is not None:
        cache[key] = value
    return value


def _is_plausible(value: float, n_max: int, level: float, g: float) -> bool:
    """Whether a t* lies where every t* does: not under the t of a single look, not over the t at which E rejects."""
    from scipy.special import stdtrit

    highest = critical_t(n_max, level, g)
    return bool(stdtrit(n_max - 1, 1 - level) <= value <= (np.inf if highest is None else highest))
