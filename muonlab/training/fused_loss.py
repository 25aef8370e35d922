"""The mean loss of an output head on a CPU, with its gradients, a tile of the logits at a time.

    z = h W^T [T, V],   loss = (1 / T) sum over t of log(sum over v of exp(z_tv)) - z_t,y_t
    dz = (softmax(z) - onehot(y)) / T,   dh = dz W,   dW = dz^T h

Shape letters: T = tokens, V = vocabulary, E = width of the model. The logits are the largest tensor of a step. Whole,
they are written to memory and read again five times, forward and backward; a tile of them stays in a processor's cache
until its part of dh and dW is there. What goes backward is a scalar, so that both can be computed ahead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_LOGITS, FEWEST_TOKENS = 2**18, 64
"""Logits in a tile: 1 MiB of float32, of 2^16 to 2^20 the fastest with a vocabulary of 2048. And its tokens, at least:
every tile adds to all of dW."""


class HeadLoss(torch.autograd.Function):
    """h [T, E], W [V, E] and y [T] to the mean loss in nats/token. It has no second derivative."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        tokens, vocabulary = len(hidden), len(weight)
        rows = min(tokens, max(FEWEST_TOKENS, TILE_LOGITS // vocabulary))
        tile = hidden.new_empty(rows, vocabulary)
        losses, dhidden, dweight = hidden.new_empty(tokens), torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            h, y = hidden[part], targets[part, None]
            z = torch.mm(h, weight.t(), out=tile[: len(h)])
            z -= z.amax(1, keepdim=True)
            own = z.gather(1, y)
            total = z.exp_().sum(1, keepdim=True)
            losses[part] = (total.log() - own)[:, 0]
            z *= 1 / (total * tokens)
            z.scatter_add_(1, y, own.new_full(own.shape, -1 / tokens))
            torch.mm(z, weight, out=dhidden[part])
            dweight.addmm_(z.t(), h)
        ctx.save_for_backward(dhidden, dweight)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dloss, dweight * dloss, None
