"""Laws of the orthogonal polar factor, for every method."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz

import optim
from optim.core.methods import TAKES, method_options
from optim.core.polar_express import coefficients, error_bound
from optim.core.spectrum import singular_values

torch.set_num_threads(1)

EXACT = [method for method, taken in TAKES.items() if not taken]
each_method = pytest.mark.parametrize("method", list(TAKES))
each_exact_method = pytest.mark.parametrize("method", EXACT)
quick = settings(max_examples=30, deadline=None)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)


def random(seed, *shape, dtype=torch.float32):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(draw).to(dtype)


def well_conditioned(seed, m, n, dtype=torch.float64):
    """U diag(s) V^T with s in [0.2, 1], and the exact answer U V^T."""
    k = min(m, n)
    U = torch.linalg.qr(random([seed, 1], m, k, dtype=torch.float64)).Q
    V = torch.linalg.qr(random([seed, 2], n, k, dtype=torch.float64)).Q
    s = torch.from_numpy(np.random.default_rng([seed, 3]).uniform(0.2, 1, k))
    return ((U * s) @ V.T).to(dtype), U @ V.T


@each_exact_method
@given(seed=seeds, m=sizes, n=sizes)
@quick
def test_the_factor_of_a_full_rank_matrix_is_u_v_transposed(method, seed, m, n):
    X, exact = well_conditioned(seed, m, n)
    # float64: the Gram matrix squares a condition number of at most 5
    torch.testing.assert_close(optim.orthogonalize(X, method), exact, atol=1e-12, rtol=0)


@each_exact_method
@given(seed=seeds, m=sizes, n=sizes)
@quick
def test_float32_is_within_its_rounding_of_the_exact_factor(method, seed, m, n):
    X, exact = well_conditioned(seed, m, n, torch.float32)
    found = optim.orthogonalize(X, method)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=5e-6, rtol=0)  # 5 (condition) * 9 * 2^-24, rounded up


@each_method
@pytest.mark.parametrize("shape", [(130, 257), (257, 130)])
def test_a_power_of_two_changes_no_bit_of_a_large_matrix(method, shape):
    X = random(12, *shape)
    for exponent in (-100, 3, 100):
        assert torch.equal(optim.orthogonalize(X * 2.0**exponent, method), optim.orthogonalize(X, method))


@each_method
@given(seed=seeds, m=sizes, n=sizes, exponent=st.integers(-100, 100))
@quick
def test_a_power_of_two_changes_no_bit(method, seed, m, n, exponent):
    X = random(seed, m, n)
    assert torch.equal(optim.orthogonalize(X * 2.0**exponent, method), optim.orthogonalize(X, method))


@each_exact_method
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_scale_does_not_matter(method, scale):
    X = random(0, 6, 4)
    torch.testing.assert_close(
        optim.orthogonalize(X * scale, method), optim.orthogonalize(X, method), atol=1e-5, rtol=0
    )


@each_exact_method
@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e308])
def test_the_ends_of_float64_do_not_overflow(method, scale):
    X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(optim.orthogonalize(X * scale, method), X)


@each_exact_method
@given(seed=seeds, m=sizes, n=sizes)
@quick
def test_rotating_the_input_rotates_the_factor(method, seed, m, n):
    X, _ = well_conditioned(seed, m, n)
    Q = torch.linalg.qr(random([seed, 4], m, m, dtype=torch.float64)).Q
    torch.testing.assert_close(
        optim.orthogonalize(Q @ X, method), Q @ optim.orthogonalize(X, method), atol=1e-12, rtol=0
    )


@each_exact_method
@given(seed=seeds, m=sizes, n=sizes)
@quick
def test_transposing_the_input_transposes_the_factor(method, seed, m, n):
    X, _ = well_conditioned(seed, m, n)
    torch.testing.assert_close(optim.orthogonalize(X.T, method), optim.orthogonalize(X, method).T, atol=1e-12, rtol=0)


@each_method
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (8, 8), (32, 64), (64, 32), (96, 96), (130, 257), (257, 130)])
def test_batched_equals_looped_bit_for_bit(method, shape):
    X = random(1, 2, 3, *shape)
    batched = optim.orthogonalize(X, method)
    assert batched.shape == X.shape
    for i in range(2):
        for j in range(3):
            assert torch.equal(batched[i, j], optim.orthogonalize(X[i, j], method))


@each_exact_method
@given(seed=seeds, n=sizes)
@quick
def test_one_row_is_divided_by_its_length(method, seed, n):
    x = random(seed, 1, n)
    torch.testing.assert_close(optim.orthogonalize(x, method), x / x.norm(), atol=1e-6, rtol=0)


@each_method
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (4, 4)])
def test_zero_gives_zero_also_beside_others(method, shape):
    X = torch.stack([torch.zeros(shape), random(2, *shape)])
    found = optim.orthogonalize(X, method)
    assert torch.equal(found[0], torch.zeros(shape))
    assert torch.equal(found[1], optim.orthogonalize(X[1], method))


@given(seed=seeds, m=sizes, n=sizes, data=st.data())
@quick
def test_gram_eigh_gives_the_partial_isometry_of_a_rank_deficient_matrix(seed, m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    s = torch.linspace(1, 0.2, rank, dtype=torch.float64)
    U = torch.linalg.qr(random([seed, 1], m, rank, dtype=torch.float64)).Q
    V = torch.linalg.qr(random([seed, 2], n, rank, dtype=torch.float64)).Q
    found = optim.orthogonalize((U * s) @ V.T, "gram_eigh")
    torch.testing.assert_close(found, U @ V.T, atol=1e-12, rtol=0)


@given(seed=seeds, n=sizes, copies=st.integers(2, 4))
@quick
def test_duplicated_rows_get_equal_updates_and_no_invented_direction(seed, n, copies):
    row = random(seed, 1, n)
    found = optim.orthogonalize(row.repeat(copies, 1), "gram_eigh")
    exact = (row / row.norm()).repeat(copies, 1) / copies**0.5
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)


def test_svd_completes_a_rank_deficient_matrix_to_an_isometry():
    found = optim.orthogonalize(random(3, 5, 1) @ random(4, 1, 3), "svd")
    torch.testing.assert_close(found.T @ found, torch.eye(3), atol=1e-5, rtol=0)


def test_gram_eigh_is_the_more_exact_one_at_condition_number_1e6():
    n = 64
    U = torch.linalg.qr(random(5, n, n, dtype=torch.float64)).Q
    V = torch.linalg.qr(random(6, n, n, dtype=torch.float64)).Q
    X = ((U * torch.logspace(0, -6, n, dtype=torch.float64)) @ V.T).float()
    left, _, right = np.linalg.svd(X.double().numpy())  # the float32 matrix's own factor, in float64
    exact = torch.from_numpy(left @ right)
    error = {
        method: float((optim.orthogonalize(X, method) - exact).norm() / exact.norm()) for method in ("svd", "gram_eigh")
    }
    assert error["gram_eigh"] < 1e-5  # 1.1e-6, beside 2.5e-3 of the SVD, where this was written
    assert error["gram_eigh"] < error["svd"] / 10


def spectrum(kind, k, condition):
    """k singular values from 1 down to 1 / condition."""
    if kind == "even in the logarithm":
        return torch.logspace(0, -np.log10(condition), k, dtype=torch.float64)
    s = torch.ones(k, dtype=torch.float64)
    s[1 if kind == "one large" else -1 :] = 1 / condition
    return s


@pytest.mark.parametrize("condition", [10, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("kind", ["even in the logarithm", "one large", "one small"])
@pytest.mark.parametrize("shape", [(40, 60), (130, 300), (300, 130), (140, 140)])
def test_gram_eigh_is_within_1e_4_up_to_condition_number_1e6(shape, kind, condition):
    m, n = shape
    U = torch.linalg.qr(random(8, m, min(shape), dtype=torch.float64)).Q
    V = torch.linalg.qr(random(9, n, min(shape), dtype=torch.float64)).Q
    X = ((U * spectrum(kind, min(shape), condition)) @ V.T).float()
    left, _, right = np.linalg.svd(X.double().numpy(), full_matrices=False)
    exact = torch.from_numpy(left @ right)
    error = (optim.orthogonalize(X, "gram_eigh") - exact).norm() / exact.norm()
    assert error < 1e-4  # 2.4e-5 from float32 where it is used, 7.5e-5 from the Gram matrix at 1e6


def test_a_large_rank_deficient_matrix_gives_the_partial_isometry():
    # Large: computed one by one, weak directions in float64. The last matrix is zero.
    rank, m, n = 100, 200, 300
    U = torch.linalg.qr(random(10, m, rank, dtype=torch.float64)).Q
    V = torch.linalg.qr(random(11, n, rank, dtype=torch.float64)).Q
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        X = ((U * spectrum("even in the logarithm", rank, 1e3)) @ V.T).to(dtype)
        found = optim.orthogonalize(torch.stack([X, torch.zeros_like(X)]), "gram_eigh")
        assert found.dtype == dtype
        torch.testing.assert_close(found[0].double(), U @ V.T, atol=tolerance, rtol=0)
        assert not found[1].any()


@each_method
def test_bfloat16_is_computed_wider_and_returned_as_it_came(method):
    X = random(7, 6, 4, dtype=torch.bfloat16)
    found = optim.orthogonalize(X, method)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, optim.orthogonalize(X.float(), method).bfloat16())


@each_method
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused(method, bad):
    X = torch.ones(2, 3, 3)
    X[1, 0, 2] = bad
    with pytest.raises(optim.NonFiniteError, match="inf or NaN"):
        optim.orthogonalize(X, method)


@pytest.mark.parametrize(
    ("X", "options", "sentence"),
    [
        (torch.ones(0, 3), {}, r"\(0, 3\)"),
        (torch.ones(3, 0), {}, r"\(3, 0\)"),
        (torch.ones(3), {}, r"\(3,\)"),
        (torch.ones(3, 3, dtype=torch.int64), {}, "int64"),
        (torch.ones(3, 3, dtype=torch.complex64), {}, "complex64"),
        (torch.ones(3, 3), {"method": "gram_eig"}, "Did you mean 'gram_eigh'"),
        (torch.ones(3, 3), {"steps": 5}, "takes no options, found steps"),
        (torch.ones(3, 3), {"method": "newton_schulz", "step": 5}, "no option 'step'.*Did you mean 'steps'"),
        (torch.ones(3, 3), {"method": "newton_schulz", "lower": 0.1}, "allowed: steps, dtype, found lower"),
        (torch.ones(3, 3), {"method": "newton_schulz", "steps": 0}, "steps is 0; give an integer of 1 or more"),
        (torch.ones(3, 3), {"method": "newton_schulz", "dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        (torch.ones(3, 3), {"method": "polar_express", "lower": 1.0}, "lower is 1.0; give a number between 0 and 1"),
    ],
)
def test_a_wrong_request_is_refused_in_a_sentence(X, options, sentence):
    with pytest.raises(optim.OptionError, match=sentence):
        optim.orthogonalize(X, **options)


def test_the_input_is_left_as_it_was():
    X = random(8, 4, 6)
    kept = X.clone()
    for method in TAKES:
        optim.orthogonalize(X, method)
    assert torch.equal(X, kept)


JORDAN = (3.4445, -4.7750, 2.0315)


@given(seed=seeds, m=st.integers(1, 80), n=st.integers(1, 80), scale=st.sampled_from([1e-3, 1.0, 37.3, 2.0**20]))
@settings(max_examples=60, deadline=None)
def test_newton_schulz_is_torch_s_own_bit_for_bit(seed, m, n, scale):
    X = random(seed, m, n) * scale
    expected = _zeropower_via_newtonschulz(X, JORDAN, 5, 1e-7)
    assert torch.equal(optim.orthogonalize(X, "newton_schulz"), expected.float())


def by_singular_values(X, steps, quintics):
    """U p(S) V^T: what odd polynomials do to the singular values of X / ||X||_F."""
    U, s, Vh = np.linalg.svd(X.double().numpy(), full_matrices=False)
    s = s / np.linalg.norm(s)
    for step in range(steps):
        a, b, c = quintics[step]
        s = a * s + b * s**3 + c * s**5
    return torch.from_numpy((U * s) @ Vh)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (1, 5)])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_newton_schulz_applies_its_polynomial_to_the_singular_values(shape, steps):
    X = random(13, *shape, dtype=torch.float64)
    found = optim.orthogonalize(X, "newton_schulz", steps=steps, dtype="float64")
    torch.testing.assert_close(found, by_singular_values(X, steps, [JORDAN] * steps), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (1, 5)])
@pytest.mark.parametrize("steps", [1, 4, 6])
def test_polar_express_applies_its_polynomials_to_the_singular_values(shape, steps):
    X = random(14, *shape, dtype=torch.float64)
    found = optim.orthogonalize(X, "polar_express", steps=steps, dtype="float64", lower=1e-2)
    expected = by_singular_values(X, steps, coefficients(1e-2, steps))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@given(seed=seeds, m=st.integers(1, 20), n=st.integers(1, 20))
@quick
def test_polar_express_keeps_its_bound_where_singular_values_are_above_lower(seed, m, n):
    X, exact = well_conditioned(seed, m, n)
    s = np.linalg.svd(X.numpy(), compute_uv=False)
    lower = float(s[-1] / np.linalg.norm(s)) * 0.999
    for steps in (2, 4):
        error = np.linalg.norm(
            (
                optim.orthogonalize(X, "polar_express", steps=steps, lower=min(lower, 0.9), dtype="float64") - exact
            ).numpy(),
            2,
        )
        assert error <= error_bound(min(lower, 0.9), steps) + 1e-9


ERRORS = {
    # condition: newton_schulz, polar_express, in bfloat16, with lower 1e-5 and 10 steps
    None: (0.16, 9e-4, 0.004, 2e-6),
    10: (0.19, 9e-4, 0.004, 2e-6),
    100: (0.18, 9e-4, 0.009, 2e-6),
    1000: (0.40, 0.14, 0.17, 3e-6),
    10000: (0.58, 0.42, 0.44, 2e-5),
}


@pytest.mark.parametrize("condition", list(ERRORS))
def test_the_approximations_err_as_their_description_says(condition):
    X = random(15, 256, 768)
    if condition:
        U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
        X = ((U * spectrum("even in the logarithm", 256, condition)) @ Vh).float()
    variants = (
        ("newton_schulz", {}),
        ("polar_express", {}),
        ("polar_express", {"dtype": "bfloat16"}),
        ("polar_express", {"lower": 1e-5, "steps": 10}),
    )
    measured = [optim.certificate(X, method, **options).error.item() for method, options in variants]
    np.testing.assert_allclose(measured, ERRORS[condition], rtol=0.25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (140, 130), (2, 300, 200)])
def test_auto_is_the_exact_method_it_resolves_to(shape, dtype):
    X = random(16, *shape).to(dtype)
    method = optim.resolve_orthogonalizer(shape, dtype, "cpu")
    assert method in {"svd", "gram_eigh"}
    assert method == optim.resolve_orthogonalizer(shape, dtype, "cpu")
    assert optim.resolve_orthogonalizer(shape, dtype, "cuda") in {"svd", "gram_eigh"}
    first = optim.orthogonalize(X, "auto")
    assert torch.equal(first, optim.orthogonalize(X, method))
    assert torch.equal(first, optim.orthogonalize(X, "auto"))


def test_auto_leaves_float64_its_digits():
    U, V = (torch.linalg.qr(random(seed, 20, 20, dtype=torch.float64)).Q for seed in (17, 18))
    X = (U * spectrum("even in the logarithm", 20, 1e6)) @ V.T
    left, _, right = np.linalg.svd(X.numpy())
    torch.testing.assert_close(optim.orthogonalize(X, "auto"), torch.from_numpy(left @ right), atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ("svd", {})),
        ({"orthogonalizer": "auto"}, ("auto", {})),
        ({"orthogonalizer": "newton_schulz"}, ("newton_schulz", {})),
        (
            {"orthogonalizer": "newton_schulz", "orthogonalizer_steps": 3, "orthogonalizer_dtype": "float32"},
            ("newton_schulz", {"steps": 3, "dtype": "float32"}),
        ),
        (
            {"orthogonalizer": "polar_express", "orthogonalizer_lower": 0.01, "orthogonalizer_steps": 4},
            ("polar_express", {"steps": 4, "lower": 0.01}),
        ),
    ],
)
def test_an_optimizer_s_plain_values_name_the_method_and_its_options(values, expected):
    settings_of_group = optim.parse_options("muon", values).matrix_settings()
    assert method_options(settings_of_group) == expected


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"orthogonalizer_steps": 5}, "method 'svd' takes no options, found steps"),
        ({"orthogonalizer": "auto", "orthogonalizer_dtype": "float32"}, "method 'auto' takes no options, found dtype"),
        (
            {"orthogonalizer": "newton_schulz", "orthogonalizer_lower": 0.1},
            "'newton_schulz' takes no option 'lower'; allowed: steps, dtype",
        ),
        ({"orthogonalizer": "polar_express", "orthogonalizer_lower": 1.0}, "less than 1"),
        ({"orthogonalizer": "polar_express", "orthogonalizer_steps": 0}, "greater than or equal to 1"),
        ({"orthogonalizer": "newton_schulz", "orthogonalizer_dtype": "float16"}, "'bfloat16', 'float32' or 'float64'"),
    ],
)
def test_an_option_the_method_does_not_take_is_refused_before_a_run(values, sentence):
    with pytest.raises(optim.OptionError, match=sentence):
        optim.parse_options("muon", values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 3, 4, 4), (130, 257), (257, 130), (1, 6)])
def test_singular_values_are_those_of_the_definition(shape, dtype):
    X = random(19, *shape).to(dtype)
    found = singular_values(X)
    exact = np.linalg.svd(X.double().numpy(), compute_uv=False)[..., ::-1]
    if dtype == torch.float64:  # up to one power of two
        exact = exact * 2.0 ** np.floor(-np.log2(np.abs(X.numpy()).max(axis=(-2, -1))))[..., None]
    assert found.shape == exact.shape
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-7)


@pytest.mark.parametrize("scale", [2.0**-130, 2.0**-100, 2.0**120])
def test_singular_values_of_float32_neither_over_nor_underflow(scale):
    X = random(20, 6, 4)
    found = singular_values(X * scale) / scale
    np.testing.assert_allclose(found.numpy(), singular_values(X).numpy(), rtol=1e-4 if scale < 2.0**-126 else 1e-12)
