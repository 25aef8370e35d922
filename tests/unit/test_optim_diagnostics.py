"""The sample of the costly diagnostics: deterministic, spread over the layers, weighted by what it stands for."""

import numpy as np
import pytest
import torch

from optim.core import diagnostics

torch.set_num_threads(1)


def random(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


@pytest.mark.parametrize(
    ("b", "m", "n", "chosen"),
    [
        (28, 3376, 768, [0]),  # the shapes of a 350M model: one each
        (8, 768, 768, [0]),
        (6, 64, 64, [0]),
        (6, 32, 64, [0, 3]),
        (1, 64, 64, [0]),
        (3, 32, 32, [0, 1, 2]),
        (40, 32, 32, [0, 10, 20, 30]),
    ],
)
def test_the_sample_is_what_fits_at_even_distances(b, m, n, chosen):
    assert diagnostics.sample(b, m, n) == chosen


def polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize(("entries", "chosen"), [(1, [0]), (2 * 6 * 4, [0, 1]), (10**6, [0, 1, 2])])
def test_the_mean_of_the_sample_stands_for_every_matrix(entries, chosen, monkeypatch):
    monkeypatch.setattr(diagnostics, "SAMPLE_ENTRIES", entries)
    plain = random(1, 3, 6, 4)
    plain[1, :, 1:] = plain[1, :, :1]  # rank one
    matrix = plain * plain.sigmoid()
    found = diagnostics.of_orthogonalized(plain, matrix, polar(matrix), polar(plain)[chosen])
    alone = [
        diagnostics.of_orthogonalized(*(x[i : i + 1] for x in (plain, matrix, polar(matrix), polar(plain))))
        for i in chosen
    ]
    for name, values in found.items():
        mean = np.mean([one[name][0] for one in alone])
        assert values == pytest.approx([mean] * 3, abs=1e-6), name


def test_a_matrix_that_nothing_touched_has_no_turn_and_one_spectrum():
    plain = random(2, 2, 5, 3)
    found = diagnostics.of_orthogonalized(plain, plain, polar(plain), None)
    assert found["turn"] == [0.0, 0.0]
    assert found["effective_rank_share_before"] == found["effective_rank_share_after"]
    copied = diagnostics.of_orthogonalized(plain, plain.clone(), polar(plain), polar(plain))
    assert copied["turn"] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert copied["effective_rank_share_after"] == found["effective_rank_share_after"]


def test_the_turn_is_one_minus_the_cosine():
    update, muons = polar(random(3, 1, 5, 3)), polar(random(4, 1, 5, 3))
    plain = random(5, 1, 5, 3)

    def turn(a, b):
        return diagnostics.of_orthogonalized(plain, plain, a, b)["turn"][0]

    assert turn(update, muons) == pytest.approx(1 - (update * muons).sum().item() / 3, abs=1e-6)
    assert turn(update, -update) == pytest.approx(2, abs=1e-6)
    zero = torch.zeros_like(update)
    assert turn(zero, zero) == 0
    assert turn(update, zero) == turn(zero, update) == 1
    assert np.isnan(turn(update, torch.full_like(update, np.nan)))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_norms_are_those_in_float64_at_every_scale(scale):
    large = random(6, diagnostics.QUICK_ENTRIES + 1)
    for stacked in (random(7, 3, 64, 32) * scale, [large * scale, random(8, 2048, 64) * scale]):
        found = diagnostics.of_parameters(stacked, stacked, stacked)
        norms = [x.double().norm().item() for x in stacked]
        assert found["grad_norm"] == pytest.approx(norms, rel=1e-5)
        assert found["update_rms"] == pytest.approx(
            [x.double().square().mean().sqrt().item() for x in stacked], rel=1e-5
        )
