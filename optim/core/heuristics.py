"""From gradient and momentum to the matrix that is orthogonalised: every rule but the polar factor.

    g' = gate(normalize(g));  M <- mu*M + c*g';  M[|g| > q(|g|)] *= scale;  A = M, or c*g' + mu*M with Nesterov
    X  = project(A) + alpha_t * ||g||_F * N

c is 1 (accumulated momentum), or 1 - mu (averaged), which the polar factor alone cannot see; but the projection
and the noise, whose sizes are relative to M and g, meet an averaged M of about 1 - mu times the size.

Each step is a function that returns its input itself when it is switched off, so that a kind with every
switch off is Muon bit for bit. Settings are the plain values of a parameter group; `OFF` is every switch off.
Shapes: b matrices of one shape m x n are stacked, [b, m, n]; a step number or an index is one per matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optim.core import noise
from optim.core.spectrum import effective_rank, singular_values

OFF: dict[str, Any] = {
    "gate": "identity",
    "normalize": "none",
    "scale": 1.0,
    "scale_start": None,
    "scale_anneal_steps": None,
    "quantile": 0.95,
    "project": "identity",
    "noise": "none",
}

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda g: g,
    "tanh": lambda g: g.tanh() * g.abs(),
    "sigmoid": lambda g: g.sigmoid() * g,
    "relu": lambda g: g.relu(),
}

ALPHA_LEFT = 0.1
"""The share of alpha that is left when annealing ends: the original anneals to a tenth."""


def advance(grad: Tensor, momentum: Tensor, steps: Sequence[int], group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The new M, and A (M itself without Nesterov). `steps` count from 1; `momentum` is left as it was."""
    gated = gated_gradient(grad, group)
    momentum = accumulate_(momentum.clone(), gated, group)
    momentum = damp_peaks(momentum, grad, scales_at(steps, group), group["quantile"])
    return momentum, looked_ahead(momentum, gated, group)


def accumulate_(momentum: Tensor, gated: Tensor, group: Mapping[str, Any]) -> Tensor:
    """M <- mu*M + c*g', in place."""
    mu = group["momentum"]
    # The average in torch.optim.Muon's own operation, so that it rounds as it does there.
    return momentum.lerp_(gated, 1 - mu) if group["momentum_form"] == "averaged" else momentum.mul_(mu).add_(gated)


def looked_ahead(momentum: Tensor, gated: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A = c*g' + mu*M with Nesterov, or M itself."""
    if not group["nesterov"]:
        return momentum
    mu = group["momentum"]
    return gated.lerp(momentum, mu) if group["momentum_form"] == "averaged" else gated + mu * momentum


def bends_momentum(group: Mapping[str, Any]) -> bool:
    """Whether M is another than Muon's on the same gradients."""
    return any(group[name] != OFF[name] for name in ("gate", "normalize", "scale", "scale_start"))


def gated_gradient(grad: Tensor, group: Mapping[str, Any]) -> Tensor:
    """gate(normalize(g)): what the momentum accumulates."""
    return gate(normalize(grad, group["normalize"]), group["gate"])


def normalize(grad: Tensor, how: str) -> Tensor:
    """Each gradient divided by its root mean square (`rms`), or itself. A zero gradient stays zero."""
    if how == "none":
        return grad
    m, n = grad.shape[-2:]
    rms: Tensor = frobenius(grad) / math.sqrt(m * n)
    return torch.where(rms > 0, grad / rms, 0).to(grad.dtype)


def gate(grad: Tensor, how: str) -> Tensor:
    """gate(g), entry by entry."""
    return GATES[how](grad)


def scale_at(step: int, scale: float, start: float | None, anneal_steps: int | None) -> float:
    """The damping factor of a step: `start` in step 1, linear, `scale` from step 1 + anneal_steps on."""
    if start is None or anneal_steps is None:
        return scale
    return start + (scale - start) * min(1.0, (step - 1) / anneal_steps)


def scales_at(steps: Sequence[int], group: Mapping[str, Any]) -> list[float]:
    """The damping factor of each matrix at its step."""
    return [scale_at(step, group["scale"], group["scale_start"], group["scale_anneal_steps"]) for step in steps]


def damp_peaks(momentum: Tensor, grad: Tensor, scales: Sequence[float], quantile: float) -> Tensor:
    """M with the entries where |g| exceeds its exact quantile multiplied by the matrix's scale.

    The linearly interpolated quantile lies in [v_j, v_j+1) with v the sorted |g| and j = floor(quantile*(m*n
    - 1)), or at v_j = v_j+1, so |g| exceeds it exactly where |g| > v_j: one order statistic, no sorting, no
    limit on size.
    """
    if all(scale == 1.0 for scale in scales):
        return momentum
    # A bf16 momentum meets the factor in float32 and is rounded once, as if multiplied by a number.
    wide = torch.promote_types(momentum.dtype, torch.float32)
    factor = torch.tensor(scales, dtype=wide, device=momentum.device)[:, None, None]
    size = grad.abs()
    flat = size.flatten(start_dim=-2)
    lower = _order_statistic(flat, math.floor(quantile * (flat.shape[-1] - 1)))
    return torch.where(size > lower[:, None, None], (momentum * factor).to(momentum.dtype), momentum)


def _order_statistic(rows: Tensor, j: int) -> Tensor:
    """The j-th smallest entry, from 0, of each row of finite [b, l]."""
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):
        # The same value as kthvalue's; the introselect of numpy took a seventh of the time at 3376 x 768.
        return torch.from_numpy(np.partition(rows.numpy(), j, axis=-1)[:, j].copy())
    return rows.kthvalue(j + 1, dim=-1).values


def project(momentum: Tensor, how: str) -> Tensor:
    """M * sigmoid(M), or M itself. Never kept."""
    return momentum * momentum.sigmoid() if how == "sigmoid" else momentum


def alpha_at(step: int, alpha: float, schedule: str, anneal_steps: int, start: int = 0) -> float:
    """The noise level of a step: 0 in the first `start` steps, then alpha, a tenth of it anneal_steps later."""
    if step <= start:
        return 0.0
    done = min(1.0, (step - 1 - start) / anneal_steps)
    if schedule == "linear":
        return alpha * (1 - (1 - ALPHA_LEFT) * done)
    if schedule == "exponential":
        return alpha * math.pow(ALPHA_LEFT, done)
    return alpha


def perturb(
    matrix: Tensor,
    grad: Tensor,
    momentum: Tensor,
    steps: Sequence[int],
    indices: Sequence[int],
    group: Mapping[str, Any],
) -> tuple[Tensor, list[bool]]:
    """matrix + alpha_t * ||g||_F * N where the trigger fires, and where it did; no draw for a noise of 0."""
    b, m, n = matrix.shape
    if group["noise"] == "none":
        return matrix, [False] * b
    alphas = [
        alpha_at(step, group["alpha"], group["schedule"], group["anneal_steps"], group["noise_start"]) for step in steps
    ]
    if not any(alphas):
        return matrix, [False] * b
    level = torch.tensor(alphas, dtype=torch.float64, device=grad.device)[:, None, None] * frobenius(grad)
    fires = level[:, 0, 0] > 0
    if group["trigger"] == "rank":
        fires &= effective_rank(singular_values(momentum)) < group["rank_threshold"] * min(m, n)
    fired: list[bool] = fires.tolist()
    if any(fired):
        draws = [
            noise.gaussian(group["seed"], step, index, (m, n))
            for step, index, fire in zip(steps, indices, fired, strict=True)
            if fire
        ]
        unit = noise.SHAPES[group["noise"]](torch.stack(draws).to(grad.device))
        matrix = matrix.clone()  # it may be the momentum, which is never overwritten
        matrix[fires] += (level[fires] * unit).to(matrix.dtype)
    return matrix, fired


def frobenius(X: Tensor) -> Tensor:
    """||X||_F of each matrix, [b, 1, 1], summed in float64 so that 1e30 does not overflow."""
    norm: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    return norm
