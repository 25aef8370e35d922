"""Each optimizer against a readable reference in numpy and float64, and against torch where it has one.

The references share no code with the optimizers: numpy's SVD, QR and quantile, plain loops over matrices.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

import optim

torch.set_num_threads(1)

SHAPES = [(6, 4), (4, 6), (5, 5), (1, 3), (6, 4)]
STEPS = 6
LR = 0.03
SEED = 11


class Matrices(nn.Module):
    """Only hidden matrices, so that a parameter's index is its place in SHAPES."""

    def __init__(self, dtype):
        super().__init__()
        draw = np.random.default_rng(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.from_numpy(draw.standard_normal(shape)).to(dtype)) for shape in SHAPES
        )


def gradients(step):
    draw = np.random.default_rng([1, step])
    return [draw.standard_normal(shape) for shape in SHAPES]


def run(kind, dtype=torch.float64, **options):
    model = Matrices(dtype)
    optimizer = optim.build(kind, model, seed=SEED, lr=LR, **options)
    for step in range(STEPS):
        for parameter, g in zip(model.weights, gradients(step), strict=True):
            parameter.grad = torch.from_numpy(g).to(dtype)
        optimizer.step()
    return [parameter.detach() for parameter in model.weights]


def np_polar(X):
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    return U @ Vh


def reference(to_orthogonalize, gate=lambda g: g, after=lambda M, g, t: M, weight_decay=0.0, factor=lambda m, n: 1.0):
    """Muon's loop, one matrix after the other, with the places where the others differ left open."""
    weights = []
    for index, shape in enumerate(SHAPES):
        w = Matrices(torch.float64).weights[index].detach().numpy().copy()
        M = np.zeros(shape)
        for step in range(STEPS):
            g = gradients(step)[index]
            M = after(0.95 * M + gate(g), g, step + 1)
            X = to_orthogonalize(M, g, step + 1, index)
            w = w * (1 - LR * weight_decay) - LR * factor(*shape) * np_polar(X)
        weights.append(torch.from_numpy(w))
    return weights


def assert_same(found, expected, atol=1e-10):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=atol, rtol=0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def effective_rank(M):
    s = np.linalg.svd(M, compute_uv=False)
    p = s / s.sum()
    return math.exp(-sum(x * math.log(x) for x in p if x > 0))


@pytest.mark.parametrize("orthogonalizer", ["svd", "gram_eigh"])
def test_muon(orthogonalizer):
    assert_same(run("muon", orthogonalizer=orthogonalizer), reference(lambda M, g, t, i: M))


def test_muon_in_float32_stays_within_its_rounding():
    # 6 steps, polar factors of condition up to about 10, weights near 1: 1e-5 is 100 ulps
    assert_same(run("muon", torch.float32), reference(lambda M, g, t, i: M), atol=1e-5)


def test_muon_with_nesterov_weight_decay_and_adjusted_lr():
    found = run("muon", nesterov=True, weight_decay=0.1, lr_adjust="match_rms_adamw")
    expected = reference(
        lambda M, g, t, i: g + 0.95 * M, weight_decay=0.1, factor=lambda m, n: 0.2 * math.sqrt(max(m, n))
    )
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("gate", "function"),
    [
        ("tanh", lambda g: np.tanh(g) * np.abs(g)),
        ("sigmoid", lambda g: sigmoid(g) * g),
        ("relu", lambda g: np.maximum(g, 0)),
    ],
)
def test_nolah(gate, function):
    def damp(M, g, t):
        return np.where(np.abs(g) > np.quantile(np.abs(g), 0.95), M * 0.90, M)

    expected = reference(lambda M, g, t, i: M * sigmoid(M), gate=function, after=damp)
    assert_same(run("nolah", gate=gate), expected)


def test_nolah_annealed_and_normalised():
    def damp(M, g, t):
        scale = 0.99 + (0.90 - 0.99) * min(1, (t - 1) / 4)
        return np.where(np.abs(g) > np.quantile(np.abs(g), 0.8), M * scale, M)

    def gate(g):
        g = g / np.sqrt(np.mean(g**2))
        return np.tanh(g) * np.abs(g)

    options = {"scale_start": 0.99, "scale_anneal_steps": 4, "quantile": 0.8, "normalize": "rms"}
    assert_same(run("nolah", **options), reference(lambda M, g, t, i: M * sigmoid(M), gate=gate, after=damp))


def orthonormal(G):
    m, n = G.shape
    Q, R = np.linalg.qr(G.T if m < n else G)
    Q = Q * np.sign(np.diag(R))
    return Q.T if m < n else Q


def isotropic(G):
    return G / np.linalg.norm(G) * math.sqrt(min(G.shape))


@pytest.mark.parametrize(("kind", "noise"), [("orthonoise", orthonormal), ("isotropic", isotropic)])
@pytest.mark.parametrize("trigger", ["always", "rank"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_noise(kind, noise, trigger, nesterov):
    threshold = 0.85  # between the effective ranks that these momenta have, so that some fire and some do not
    fired = []

    def perturbed(M, g, t, index):
        fires = trigger == "always" or effective_rank(M) < threshold * min(M.shape)
        fired.append(fires)
        A = g + 0.95 * M if nesterov else M  # the trigger looks at M in both cases
        if not fires:
            return A
        alpha = 0.3 * 0.1 ** min(1, (t - 1) / 4)
        G = np.random.default_rng([SEED, t, index]).standard_normal(M.shape, dtype=np.float32)
        return A + alpha * np.linalg.norm(g) * noise(G.astype(np.float64))

    expected = reference(perturbed)
    assert any(fired)
    assert all(fired) == (trigger == "always")
    options = {"alpha": 0.3, "anneal_steps": 4, "trigger": trigger, "rank_threshold": threshold}
    # the noise is drawn and made orthonormal in float32: 1e-6 of it, at lr 0.03 over 6 steps
    assert_same(run(kind, nesterov=nesterov, **options), expected, atol=1e-6)


def test_adamw_equals_torchs_bit_for_bit():
    model = Matrices(torch.float32)
    stock = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    for step in range(STEPS):
        for parameter, g in zip(model.weights, gradients(step), strict=True):
            parameter.grad = torch.from_numpy(g).float()
        stock.step()
    for a, b in zip(run("adamw", torch.float32), model.weights, strict=True):
        assert torch.equal(a, b)


def test_adamw_without_masters_equals_torchs_in_bf16_bit_for_bit():
    model = Matrices(torch.bfloat16)
    stock = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    for step in range(STEPS):
        for parameter, g in zip(model.weights, gradients(step), strict=True):
            parameter.grad = torch.from_numpy(g).bfloat16()
        stock.step()
    for a, b in zip(run("adamw", torch.bfloat16, masters=False), model.weights, strict=True):
        assert torch.equal(a, b)


def test_without_masters_muon_is_the_originals_bf16_loop():
    expected = Matrices(torch.bfloat16).weights
    for index, w in enumerate(expected):
        M = torch.zeros_like(w)
        for step in range(STEPS):
            M.mul_(0.95).add_(torch.from_numpy(gradients(step)[index]).bfloat16())
            U, _, Vh = torch.linalg.svd(M.float(), full_matrices=False)
            w.data.add_((U @ Vh).bfloat16(), alpha=-LR)
    found = run("muon", torch.bfloat16, masters=False, lr_adjust="none", route="all_matrices")
    wrong = [(a != b).double().mean().item() for a, b in zip(found, expected, strict=True)]
    # the polar factor may fall on the other side of a bf16 rounding: seen in none of these entries
    assert max(wrong) < 0.05
    rounded_once = run("muon", torch.bfloat16, lr_adjust="none", route="all_matrices")
    assert max((a != b).double().mean().item() for a, b in zip(rounded_once, expected, strict=True)) > 0.2


def test_adamw_by_its_formula():
    expected = []
    for index, shape in enumerate(SHAPES):
        w = Matrices(torch.float64).weights[index].detach().numpy().copy()
        m, v = np.zeros(shape), np.zeros(shape)
        for t in range(1, STEPS + 1):
            g = gradients(t - 1)[index]
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            w = w * (1 - LR * 0.01) - LR * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        expected.append(torch.from_numpy(w))
    assert_same(run("adamw"), expected)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_equals_torchs_but_for_the_orthogonaliser(nesterov, adjust, monkeypatch):
    # torch averages the momentum where we accumulate, which the polar factor cannot see. Its five bf16
    # Newton-Schulz steps are exchanged for the exact factor: at 20 % to 76 % off they would hide all else.
    def exact(grad, *_):
        return optim.orthogonalize(grad)

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", exact)
    model = Matrices(torch.float64)
    stock = torch.optim.Muon(
        model.parameters(), lr=LR, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=adjust
    )
    for step in range(STEPS):
        for parameter, g in zip(model.weights, gradients(step), strict=True):
            parameter.grad = torch.from_numpy(g)
        stock.step()
    found = run("muon", nesterov=nesterov, lr_adjust=adjust, weight_decay=0.1)
    assert_same(found, [parameter.detach() for parameter in model.weights], atol=1e-12)


def test_polar_factor_by_hand():
    # X = [[3, 0], [4, 5]] has singular values 3*sqrt(5) and sqrt(5); U V^T worked out on paper
    X = torch.tensor([[3.0, 0.0], [4.0, 5.0]], dtype=torch.float64)
    exact = torch.tensor([[2.0, -1.0], [1.0, 2.0]], dtype=torch.float64) / math.sqrt(5)
    for method in ("svd", "gram_eigh"):
        torch.testing.assert_close(optim.orthogonalize(X, method), exact, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nolah", {"gate": "identity", "scale": 1.0, "project": "identity"}),
        ("orthonoise", {"alpha": 0.0, "trigger": "always"}),
        ("isotropic", {"alpha": 0.0, "trigger": "always"}),
    ],
)
@pytest.mark.parametrize(
    "shared",
    [
        {},
        {"nesterov": True, "orthogonalizer": "gram_eigh", "weight_decay": 0.1},
        {"nesterov": True, "orthogonalizer": "newton_schulz", "momentum_form": "averaged"},
    ],
    ids=["defaults", "exact", "as torch's"],
)
def test_switched_off_each_variant_is_muon_bit_for_bit(kind, options, shared, monkeypatch):
    def no_draw(*_):
        raise AssertionError("a random number was drawn")

    monkeypatch.setattr("optim.core.noise.gaussian", no_draw)
    for a, b in zip(run(kind, torch.float32, **options, **shared), run("muon", torch.float32, **shared), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("on", [{"gate": "tanh"}, {"scale": 0.9}, {"project": "sigmoid"}], ids=str)
def test_each_part_of_nolah_alone_is_not_muon(on):
    off = {"gate": "identity", "scale": 1.0, "project": "identity"}
    muon, nolah = run("muon", torch.float32), run("nolah", torch.float32, **{**off, **on})
    assert all((a - b).norm() > 1e-3 * LR for a, b in zip(nolah, muon, strict=True))


def test_switched_on_each_variant_is_not_muon():
    muon = run("muon")
    for kind, options in [
        ("nolah", {}),
        ("orthonoise", {"trigger": "always"}),
        ("isotropic", {"trigger": "always"}),
    ]:
        assert not torch.equal(run(kind, **options)[0], muon[0]), kind


def test_diagnostics_by_their_definitions(monkeypatch):
    monkeypatch.setattr("optim.core.diagnostics.SAMPLE_ENTRIES", 10**6)  # every matrix, not a sample
    model = Matrices(torch.float64)
    optimizer = optim.build("nolah", model, lr=LR, diagnose_every=2)
    momenta = [(np.zeros(shape), np.zeros(shape)) for shape in SHAPES]
    for step in range(2):
        rows = []
        for i, (w, g) in enumerate(zip(model.weights, gradients(step), strict=True)):
            w.grad = torch.from_numpy(g)
            M, own = momenta[i]
            gated = np.tanh(g) * np.abs(g)
            M, own = 0.95 * M + gated, 0.95 * own + g
            M = np.where(np.abs(g) > np.quantile(np.abs(g), 0.95), M * 0.90, M)
            momenta[i] = M, own
            X = M * sigmoid(M)
            k = min(g.shape)
            rows.append(
                {
                    "grad_norm": np.linalg.norm(g),
                    "update_rms": LR * math.sqrt(k / g.size),  # a full isometry has Frobenius norm sqrt(k)
                    "momentum_rms": np.sqrt(np.mean(M**2)),
                    "effective_rank_share_before": effective_rank(M) / k,
                    "effective_rank_share_after": effective_rank(X) / k,
                    "numerical_rank_share": 1.0,
                    "turn": 1 - np.sum(np_polar(own) * np_polar(X)) / k,  # against Muon's own momentum
                    "noise_fired_share": 0.0,
                }
            )
        optimizer.step()
    found = optimizer.diagnostics()
    assert found == pytest.approx({name: np.mean([row[name] for row in rows]) for name in rows[0]}, rel=1e-6)
