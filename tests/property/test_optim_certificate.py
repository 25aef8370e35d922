"""What a certificate says, on matrices whose answers are known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optim
from optim.core.methods import TAKES

torch.set_num_threads(1)

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 12)


def known(seed, m, n, s):
    """U diag(s) V^T in float64, and U, V."""
    draw = np.random.default_rng(seed)
    U = np.linalg.qr(draw.standard_normal((m, len(s))))[0]
    V = np.linalg.qr(draw.standard_normal((n, len(s))))[0]
    return torch.from_numpy((U * s) @ V.T), U, V


@given(seed=seeds, m=sizes, n=sizes, data=st.data())
@quick
def test_rank_and_condition_are_those_of_the_matrix(seed, m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    condition = data.draw(st.floats(1, 1e5)) if rank > 1 else 1.0
    X, _, _ = known(seed, m, n, np.geomspace(1, 1 / condition, rank))
    found = optim.certificate(X, "gram_eigh")
    assert found.rank.item() == rank
    assert found.condition.item() == pytest.approx(condition, rel=1e-6)


@pytest.mark.parametrize("method", ["auto", "svd", "gram_eigh"])
@given(seed=seeds, m=sizes, n=sizes, data=st.data())
@quick
def test_an_exact_method_has_no_error_on_the_range_of_a_rank_deficient_matrix(method, seed, m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    X, _, _ = known(seed, m, n, np.geomspace(1, 0.1, rank))
    found = optim.certificate(X, method)
    assert found.error.item() < 1e-11
    assert found.orthogonality.item() < 1e-11


@given(seed=seeds, m=st.integers(2, 12), n=st.integers(2, 12))
@quick
def test_an_approximation_s_error_is_what_its_polynomial_does_to_the_singular_values(seed, m, n):
    X, _, _ = known(seed, m, n, np.geomspace(1, 0.05, min(m, n)))
    s = np.geomspace(1, 0.05, min(m, n))
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = optim.certificate(X, "newton_schulz", dtype="float64")
    assert found.error.item() == pytest.approx(np.linalg.norm(s - 1) / len(s) ** 0.5, rel=1e-8)
    assert found.orthogonality.item() == pytest.approx(abs(s**2 - 1).max(), rel=1e-8)


@pytest.mark.parametrize("method", list(TAKES))
def test_a_zero_matrix_is_asked_nothing(method):
    found = optim.certificate(torch.zeros(3, 4), method)
    assert (found.rank.item(), found.condition.item()) == (0, 1)
    assert (found.error.item(), found.orthogonality.item()) == (0, 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_one_row_has_rank_and_condition_one(shape, scale):
    found = optim.certificate(torch.full(shape, scale), "gram_eigh")
    assert (found.rank.item(), found.condition.item()) == (1, 1)
    assert found.error.item() < 1e-6


def test_one_value_per_matrix_of_the_batch():
    X = torch.stack(
        [torch.eye(3, 4), torch.zeros(3, 4), torch.ones(3, 4), torch.diag(torch.tensor([1.0, 2, 4, 8]))[:3]]
    )
    found = optim.certificate(X.reshape(2, 2, 3, 4), "gram_eigh")
    assert found.rank.tolist() == [[3, 0], [1, 3]]
    torch.testing.assert_close(found.condition, torch.tensor([[1.0, 1], [1, 4]], dtype=torch.float64))
    for values in (found.error, found.orthogonality):
        assert values.shape == (2, 2)
        assert values.max() < 1e-6


def test_it_names_the_method_that_auto_meant():
    assert optim.certificate(torch.ones(2, 2), "auto").method == "gram_eigh"
    assert optim.certificate(torch.ones(2, 2, dtype=torch.float64), "auto").method == "svd"


def test_wrong_requests_are_refused_as_by_orthogonalize():
    with pytest.raises(optim.OptionError, match=r"certificate: method 'gram' is unknown.*Did you mean 'gram_eigh'"):
        optim.certificate(torch.ones(2, 2), "gram")
    with pytest.raises(optim.OptionError, match="takes no options, found steps"):
        optim.certificate(torch.ones(2, 2), "svd", steps=3)
    with pytest.raises(optim.OptionError, match=r"certificate: X is torch\.int64"):
        optim.certificate(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(optim.NonFiniteError, match="certificate: X of shape"):
        optim.certificate(torch.tensor([[1.0, float("inf")]]))
