"""The random matrices of OrthoNoise and of its control.

    orthonormal  Q from the QR of a Gaussian (of the transpose when m < n), signs by diag(R): uniform
    isotropic    the same Gaussian, rescaled to Q's Frobenius norm, sqrt(min(m, n))

The Gaussian is a function of (run seed, step, parameter index) alone: independent of the order in which
parameters are visited, of rank, device and resume, and of every global generator.
Source: Mezzadri, arXiv:math-ph/0609050 (without the signs, Q is not uniform).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def gaussian(seed: int, step: int, index: int, shape: tuple[int, int]) -> Tensor:
    """Standard normal [m, n], float32, on the CPU."""
    draw = np.random.default_rng([seed, step, index]).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(draw)


def orthonormal(G: Tensor) -> Tensor:
    """Orthonormal columns (rows when m < n) from a Gaussian G [..., m, n]."""
    m, n = G.shape[-2:]
    Q, R = torch.linalg.qr(G.mT if m < n else G)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    signed: Tensor = Q * torch.where(diagonal < 0, -1.0, 1.0).to(Q.dtype)[..., None, :]
    return signed.mT if m < n else signed


def isotropic(G: Tensor) -> Tensor:
    """G [..., m, n] at the Frobenius norm of an orthonormal matrix of its shape."""
    norm: Tensor = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True)
    return G * (math.sqrt(min(G.shape[-2:])) / norm)


SHAPES = {"orthonormal": orthonormal, "isotropic": isotropic}
