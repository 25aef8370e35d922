"""Isotropic, the control of OrthoNoise: same Gaussian, trigger, schedule and Frobenius norm, no QR.

    X = M + alpha_t * ||g||_F * G * (sqrt(min(m, n)) / ||G||_F);  p <- p - lr * adjust(m, n) * polar(X)

If this does as well as OrthoNoise, then orthogonality of the noise is not what helps.
"""

from typing import ClassVar

from optim.core.options import NoiseOptions
from optim.core.registry import register


class IsotropicOptions(NoiseOptions):
    """Options of the isotropic control: those of OrthoNoise."""

    noise: ClassVar[str] = "isotropic"


register("isotropic", IsotropicOptions)
