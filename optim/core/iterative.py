"""The approximate orthogonalisers: a few odd polynomials of degree 5 in X, matrix products only.

    X_0 = X / ||X||_F,   X_t+1 = a_t X_t + (b_t G + c_t G^2) X_t,   G = X_t X_t^T

    newton_schulz  the same (a, b, c) in each step, chosen to raise small singular values fast: it does not
                   converge, it moves singular values to about [0.7, 1.2].
    polar_express  (a, b, c) of each step by `optim.core.polar_express`: it converges where the singular values
                   of X / ||X||_F are at least `lower`.

An optimizer with one of these is a different optimizer, not a faster one. Relative errors ||Q - U V^T||_F / sqrt(k)
by `optim.certificate`, 256 x 768, entries drawn from a normal distribution, and singular values even in the
logarithm with the condition number given (tests/property/test_optim_orthogonalize.py repeats them):

    method, defaults                  normal   10      100     1000   10000
    newton_schulz                     0.16     0.19    0.18    0.40   0.58
    polar_express                     9e-4     9e-4    9e-4    0.14   0.42
    polar_express, bfloat16           0.004    0.004   0.009   0.17   0.44
    polar_express, lower 1e-5, 10     2e-6     2e-6    2e-6    3e-6   2e-5
Sources: K. Jordan, https://kellerjordan.github.io/posts/muon/; arXiv:2505.16932.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.core.gram import one_by_one, scaled_to_one
from optim.core.polar_express import Quintic, coefficients, stretched

JORDAN: Quintic = (3.4445, -4.7750, 2.0315)

SMALLEST_NORM = 1e-7
"""What the Frobenius norm is raised to, as in torch.optim.Muon. Here only a zero matrix is that small."""


def newton_schulz(X: Tensor, steps: int = 5, dtype: str = "bfloat16") -> Tensor:
    """`steps` steps with Jordan's coefficients. In bfloat16, one matrix is what torch.optim.Muon computes, bit for
    bit, wherever torch's own norm neither overflows nor falls under 1e-7.

    Measured error: 0.16 to 0.58; see the table above."""
    return _iterate(X, [JORDAN] * steps, getattr(torch, dtype), margin=1.0)


def polar_express(X: Tensor, steps: int = 6, dtype: str = "float32", lower: float = 1e-3) -> Tensor:
    """`steps` steps, each the best polynomial for what the one before it left of [`lower`, 1].

    Measured error: 9e-4 where the singular values of X / ||X||_F are above `lower`, up to 0.42 where many are
    below; see the table above. More steps, or fewer with a higher `lower`, trade time for error.
    """
    precision = getattr(torch, dtype)
    # Rounding must not push a singular value above the interval that the next step was made for.
    margin = 1 + 2 * torch.finfo(precision).eps
    *early, last = coefficients(lower, steps)
    return _iterate(X, [*(stretched(quintic, margin) for quintic in early), last], precision, margin)


def _iterate(X: Tensor, quintics: Sequence[Quintic], precision: torch.dtype, margin: float) -> Tensor:
    # One by one, with the operations of torch.optim.Muon: of 9048 small matrices in bfloat16, 6 came out with
    # other bits from a batched product.
    return one_by_one(lambda one: _iterate_one(one, quintics, margin), scaled_to_one(X).to(precision), precision)


def _iterate_one(X: Tensor, quintics: Sequence[Quintic], margin: float) -> Tensor:
    tall = X.shape[0] > X.shape[1]
    Y = X.mT if tall else X
    Y = Y / (Y.norm().clamp(min=SMALLEST_NORM) * margin)
    for a, b, c in quintics:
        gram = Y @ Y.mT
        Y = torch.addmm(Y, torch.addmm(gram, gram, gram, beta=b, alpha=c), Y, beta=a)
    return Y.mT if tall else Y
