"""The sample of the costly diagnostics: deterministic, spread over the layers, weighted by what it stands for."""

import numpy as np
import pytest
import torch

from optim.core import diagnostics, heuristics

torch.set_num_threads(1)

GROUP = {**heuristics.OFF, "orthogonalizer": "svd"}


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


@pytest.mark.parametrize(("entries", "chosen"), [(1, [0]), (2 * 6 * 4, [0, 1]), (10**6, [0, 1, 2])])
def test_the_mean_of_the_sample_stands_for_every_matrix(entries, chosen, monkeypatch):
    monkeypatch.setattr(diagnostics, "SAMPLE_ENTRIES", entries)
    plain = random(1, 3, 6, 4)
    plain[1, :, 1:] = plain[1, :, :1]  # rank one
    matrix = plain * plain.sigmoid()
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    found = diagnostics.of_orthogonalized(plain, matrix, U @ Vh, None, GROUP)
    alone = [
        diagnostics.of_orthogonalized(*(x[i : i + 1] for x in (plain, matrix, U @ Vh)), None, GROUP) for i in chosen
    ]
    for name, values in found.items():
        mean = np.mean([one[name][0] for one in alone])
        assert values == pytest.approx([mean] * 3, abs=1e-6), name


def test_a_matrix_that_nothing_touched_has_no_turn_and_one_spectrum():
    plain = random(2, 2, 5, 3)
    U, _, Vh = torch.linalg.svd(plain, full_matrices=False)
    found = diagnostics.of_orthogonalized(plain, plain, U @ Vh, None, GROUP)
    assert found["turn"] == [0.0, 0.0]
    assert found["effective_rank_share_before"] == found["effective_rank_share_after"]
    copied = diagnostics.of_orthogonalized(plain, plain.clone(), U @ Vh, None, GROUP)
    assert copied["turn"] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert copied["effective_rank_share_after"] == found["effective_rank_share_after"]
