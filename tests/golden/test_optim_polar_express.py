"""The coefficients of the Polar Express against the source's own, and against linear programming on a grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from optim.core.polar_express import CUSHION, best_quintic, coefficients, error_bound, evaluate, stretched

# arXiv:2505.16932, listing 1: computed there for l = 1e-3 (before its safety factor).
PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
]

lowers = st.floats(1e-4, 0.99)


def test_they_are_the_published_ones():
    np.testing.assert_allclose(coefficients(1e-3, 6), PUBLISHED, rtol=1e-12)


@pytest.mark.parametrize("lower", [1e-3, 0.03, 0.3, 0.9])
def test_each_is_the_best_polynomial_that_linear_programming_finds(lower):
    """min E subject to |1 - p(x)| <= E at 4000 points, denser towards the ends."""
    x = lower + (1 - lower) * (1 - np.cos(np.linspace(0, np.pi, 4000))) / 2
    powers = np.stack([x, x**3, x**5], axis=1)
    slack = np.ones((len(x), 1))
    found = linprog(
        [0, 0, 0, 1],
        A_ub=np.block([[powers, -slack], [-powers, -slack]]),
        b_ub=np.concatenate([np.ones_like(x), -np.ones_like(x)]),
        bounds=[(None, None)] * 3 + [(0, None)],
    )
    p = best_quintic(lower, 1.0)
    np.testing.assert_allclose(p, found.x[:3], rtol=1e-3)
    assert 1 - evaluate(p, lower) == pytest.approx(found.x[3], rel=1e-5)


@given(lower=lowers, upper=st.floats(0.1, 3))
@settings(max_examples=100, deadline=None)
def test_the_error_equioscillates_at_four_points(lower, upper):
    """1 - p takes E, -E, E, -E in turn, and nothing outside [-E, E]: Chebyshev's sign of a best approximation."""
    p = best_quintic(lower * upper, upper)
    x = np.linspace(lower, 1, 20001) * upper
    off = np.array([1 - evaluate(p, point) for point in x])
    E = abs(off).max()
    extreme = off[abs(off) > 0.99 * E]
    turns = np.flatnonzero(np.diff(np.sign(extreme)))
    if lower < 0.9:  # nearer to 1, E is 1e-7 of the values and less
        assert len(turns) == 3
        assert extreme[0] > 0 > extreme[-1]
        np.testing.assert_allclose([off[0], off[-1]], [E, -E], rtol=1e-6)


@pytest.mark.parametrize("lower", [1e-6, 1e-3, 0.1, 0.5])
def test_without_cushion_every_step_is_best_on_the_interval_that_is_left(lower):
    low, high = lower, 1.0
    for found in coefficients(lower, 8, cushion=0.0):
        np.testing.assert_allclose(found, best_quintic(low, high), rtol=1e-12)
        x = np.linspace(low, high, 2001)
        image = np.array([evaluate(found, point) for point in x])
        low, high = evaluate(found, low), 2 - evaluate(found, low)
        assert image.min() >= low - 1e-12
        assert image.max() <= high + 1e-12


@given(lower=lowers, steps=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_the_composition_maps_the_interval_into_its_error_bound(lower, steps):
    x = np.geomspace(lower, 1, 3000)
    bound = error_bound(lower, steps)
    for p in coefficients(lower, steps):
        x = np.array([evaluate(p, point) for point in x])
    assert abs(1 - x).max() <= bound + 1e-9
    assert bound <= error_bound(lower, steps - 1) + 1e-12 if steps > 1 else bound < 1


def test_the_cushion_costs_little_and_keeps_large_values_large():
    """At lower 1e-6, a large singular value must not be squeezed to 1e-5 in between: rounding would eat it."""
    x = np.geomspace(CUSHION, 1, 2000)
    for cushion, smallest in ((CUSHION, 0.02), (0.0, 1e-5)):
        first = coefficients(1e-6, 1, cushion=cushion)[0]
        image = min(evaluate(first, point) for point in x)
        assert (image > smallest) == (cushion == CUSHION)
    assert error_bound(1e-3, 6) < 1.3e-3  # 1.2e-3, beside 9.2e-4 without cushion


@given(x=st.floats(0, 2), margin=st.floats(1, 1.1))
def test_a_stretched_polynomial_is_the_same_at_a_stretched_point(x, margin):
    p = PUBLISHED[0]
    assert evaluate(stretched(p, margin), x * margin) == pytest.approx(evaluate(p, x), rel=1e-9, abs=1e-9)
