"""The coefficients of the Polar Express: the best odd polynomials of degree 5, one after the other.

Step t maps singular values in [l_t, u_t] by p_t(x) = a x + b x^3 + c x^5, where

    p_t = argmin_p  max { |1 - p(x)| : l_t <= x <= u_t },    [l_t+1, u_t+1] = [p_t(l_t), 2 - p_t(l_t)]

from l_1 = `lower` and u_1 = 1. Choosing each step so is optimal for the composition of all of them
(the source proves it). The best p_t is the one that equioscillates: 1 - p_t = E, -E, E, -E at
l_t < q < r < u_t, where q and r are the zeros of its derivative; Remez exchanges find it.

Rounding: the best polynomial takes an inner point r down to p_t(l_t) as well, so a small l_t / u_t would
lose half of the digits of a large singular value. As the source does for finite precision, p_t is computed for
max(l_t, CUSHION * u_t) in place of l_t and scaled to be centred on 1 over the true interval; later steps see
the true interval.
Source: Amsel, Persson, Musco, Gower, "The Polar Express" (2025), arXiv:2505.16932.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

Quintic = tuple[float, float, float]

CUSHION = 0.02407327424182761
"""l / u of the widest interval for which a step is optimised; the source's value."""

EXCHANGES = 100
"""Remez exchanges at most; from l / u = 1e-12 on, fewer than 40 are needed."""


def evaluate(quintic: Quintic, x: float) -> float:
    """p(x) = a x + b x^3 + c x^5."""
    a, b, c = quintic
    return x * (a + x * x * (b + x * x * c))


def stretched(quintic: Quintic, margin: float) -> Quintic:
    """p(x / margin) for p(x): made for an interval that is `margin` times as long."""
    a, b, c = quintic
    return a / margin, b / margin**3, c / margin**5


def best_quintic(lower: float, upper: float) -> Quintic:
    """(a, b, c) of the odd polynomial of degree 5 that is nearest to 1 on [lower, upper], 0 < lower < upper."""
    low = lower / upper  # solved on [low, 1]
    if low > 1 - 1e-5:  # the four points coincide to rounding: the Taylor polynomial at 1 is as good
        return stretched((15 / 8, -10 / 8, 3 / 8), upper)
    q, r = (3 * low + 1) / 4, (low + 3) / 4
    a = b = c = 0.0
    for _ in range(EXCHANGES):
        x = np.array([low, q, r, 1.0])
        system = np.stack([x, x**3, x**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        previous = q, r
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        if abs(q - previous[0]) + abs(r - previous[1]) < 1e-14:
            break
    return stretched((a, b, c), upper)


@lru_cache
def coefficients(lower: float, steps: int, cushion: float = CUSHION) -> tuple[Quintic, ...]:
    """(a, b, c) of each of `steps` steps, for singular values in [lower, 1], 0 < lower < 1."""
    found = []
    low, high = lower, 1.0
    for _ in range(steps):
        quintic = best_quintic(max(low, cushion * high), high)
        centre = (evaluate(quintic, low) + evaluate(quintic, high)) / 2
        a, b, c = (part / centre for part in quintic)
        found.append((a, b, c))
        low = evaluate((a, b, c), low)
        high = 2 - low
    return tuple(found)


def error_bound(lower: float, steps: int) -> float:
    """max |1 - p(x)| of the composed polynomial over [lower, 1]: the error in exact arithmetic."""
    low = lower
    for quintic in coefficients(lower, steps):
        low = evaluate(quintic, low)
    return 1 - low
