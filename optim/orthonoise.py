"""OrthoNoise: Muon on a momentum that is nudged by a random orthonormal matrix when its rank collapses.

    X = M + alpha_t * ||g||_F * Q (M itself is kept);  p <- p - lr * adjust(m, n) * polar(X)

Q is uniformly distributed (QR of a Gaussian, signs fixed by diag(R): Mezzadri, arXiv:math-ph/0609050).
With alpha 0 this is Muon, bit for bit, and no random number is drawn.
"""

from typing import ClassVar

from optim.core.options import NoiseOptions
from optim.core.registry import register


class OrthonoiseOptions(NoiseOptions):
    """Options of OrthoNoise."""

    noise: ClassVar[str] = "orthonormal"


register("orthonoise", OrthonoiseOptions)
