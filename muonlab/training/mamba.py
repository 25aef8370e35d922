"""Mamba2 on a CPU: the chunked scan and the convolution of transformers, with fewer and smaller tensors.

Shape letters: B = batch, S = sequence, C = chunks of length L, G = groups, R = heads a group, H = G * R heads,
P = head size, N = state size, W = width of the convolution, K = its channels. For head h of group g, a_t = dt_t A_h:

    state_t = exp(a_t) state_t-1 + dt_t x_t B_t^T        [P, N]
    y_t     = state_t C_t + D_h x_t                       [P]

    in a chunk:      y_t += sum over s <= t of (C_t . B_s) exp(a_s+1 + .. + a_t) dt_s x_s
    between chunks:  y_t += exp(a_1 + .. + a_t) state C_t

    convolution:     y_t = f(bias + sum over w of weight_w x_t-W+1+w), each channel by itself

The stock scan repeats B and C for every head of a group before it multiplies them; here the scores C_t . B_s are
computed once a group, of which Granite has one. The length of the chunks is chosen for a CPU's caches: it changes
rounding and nothing else. The convolution is W products of whole tensors, which a CPU does faster than the general one.

Both replace functions of transformers on tensors of a CPU, as training calls them; any other call goes to the stock
function, and so does every one under a version of transformers that these were not compared with
(tests/property/test_training_mamba.py compares outputs and gradients).
Source: Dao and Gu (2024), arXiv:2405.21060, section 6.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.granitemoehybrid import modeling_granitemoehybrid

COMPARED_WITH = (5, 23)
"""The version of transformers, major and minor, whose functions these were compared with."""

_SCAN, _CONVOLUTION = "mamba2_chunk_scan", "causal_conv1d_fn"
stock_scan: Any = getattr(modeling_granitemoehybrid, _SCAN, None)
stock_convolution: Any = getattr(modeling_granitemoehybrid, _CONVOLUTION, None)
"""The functions of transformers; None where this version has none of the name."""


def install() -> bool:
    """Let the models of transformers call the functions below; return whether they do. Again does no harm."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version != COMPARED_WITH or stock_scan is None or stock_convolution is None:
        return False
    setattr(modeling_granitemoehybrid, _SCAN, chunk_scan)
    setattr(modeling_granitemoehybrid, _CONVOLUTION, causal_convolution)
    return True


def uninstall() -> None:
    """Give transformers its own functions back."""
    setattr(modeling_granitemoehybrid, _SCAN, stock_scan)
    setattr(modeling_granitemoehybrid, _CONVOLUTION, stock_convolution)


def causal_convolution(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
) -> Tensor:
    """As the stock function: hidden_states [B, K, S], weight [K, W], bias [K] to [B, K, S]."""
    if hidden_states.device.type != "cpu" or any(value is not None for value in kwargs.values()):
        stock: Tensor = stock_convolution(hidden_states, weight, bias, activation=activation, **kwargs)
        return stock
    # [B, S, K], as the tensors lie in memory before and behind.
    length, width = hidden_states.shape[-1], weight.shape[-1]
    padded = functional.pad(hidden_states.transpose(1, 2).to(weight.dtype), (0, 0, width - 1, 0))
    y = padded[:, :length] * weight[:, 0]
    if bias is not None:
        y = y + bias
    for w in range(1, width):
        y = torch.addcmul(y, padded[:, w : w + length], weight[:, w])
    if activation is not None:
        y = ACT2FN[activation](y)
    return y.to(hidden_states.dtype).transpose(1, 2)


def chunk_length(state_size: int) -> int:
    """Length of the chunks: of 16, 32, 64 and 128 the fastest with states of 16 and of 128, at 128 and 512 tokens."""
    return 16 if state_size <= 32 else 32


def chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    """As the stock function: hidden_states [B, S, H, P], dt [B, S, H], A [H], B and C [B, S, G, N] to [B, S, H, P]."""
    other = initial_states is not None or return_final_states or any(value is not None for value in kwargs.values())
    if other or hidden_states.device.type != "cpu":
        return stock_scan(
            hidden_states,
            dt,
            A,
            B,
            C,
            chunk_size,
            D=D,
            dt_bias=dt_bias,
            initial_states=initial_states,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            return_final_states=return_final_states,
            **kwargs,
        )
    batch, length, heads, size = hidden_states.shape
    groups, state = B.shape[2:]
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = functional.softplus(dt)
    if dt_limit != (0.0, float("inf")):
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    x, dt, B, C = hidden_states.float(), dt.float(), B.float(), C.float()

    chunk = chunk_length(state)
    pad = -length % chunk
    chunks, rank = (length + pad) // chunk, heads // groups
    weighted, decay, B, C = (_in_chunks(tensor, chunk, pad) for tensor in (x * dt[..., None], A.float() * dt, B, C))
    B, C = B.transpose(2, 3), C.transpose(2, 3)  # [B, C, G, L, N]
    # In float64, and as sums: exp wants their differences, which are smaller than they are.
    summed = decay.transpose(2, 3).double().cumsum(-1)  # [B, C, H, L]

    # What a chunk's own tokens give: [B, C, H, L, P].
    scores = C @ B.transpose(-1, -2)
    within = _exp_of_differences(summed, summed, diagonal=0)
    mixing = scores[:, :, :, None] * within.view(batch, chunks, groups, rank, chunk, chunk)
    y = (mixing.flatten(2, 3) @ weighted.transpose(2, 3)).transpose(2, 3)

    if chunks > 1:
        # What each chunk adds to the state, and the state before each: [B, C, G, R * P, N].
        left = torch.exp((summed[..., -1:] - summed).float()).transpose(2, 3)[..., None]
        added = _by_group(weighted * left, groups).transpose(-1, -2) @ B
        through = summed[..., -1].transpose(1, 2).cumsum(-1)  # [B, H, C]
        carried = _exp_of_differences(functional.pad(through, (1, 0))[..., :-1], through, diagonal=-1)
        flat = added.view(batch, chunks, heads, size * state).transpose(1, 2)
        before = (carried @ flat).transpose(1, 2).reshape(batch, chunks, groups, rank * size, state)
        carried_on = (C @ before.transpose(-1, -2)).transpose(2, 3).reshape(batch, chunks, chunk, heads, size)
        y = y + carried_on * torch.exp(summed.float()).transpose(2, 3)[..., None]

    y = y.reshape(batch, chunks * chunk, heads, size)[:, :length]
    return y if D is None else y + D[:, None] * x


def _in_chunks(tensor: Tensor, chunk: int, pad: int) -> Tensor:
    """[B, S, ...] with zeros behind, as [B, C, L, ...]."""
    if pad:
        tensor = functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, pad))
    return tensor.reshape(len(tensor), -1, chunk, *tensor.shape[2:])


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """[B, C, L, H, P] as [B, C, G, L, R * P]."""
    return tensor.flatten(3).view(*tensor.shape[:3], groups, -1).transpose(2, 3)


def _exp_of_differences(to: Tensor, since: Tensor, *, diagonal: int) -> Tensor:
    """exp(to_i - since_j) on and below a diagonal, 0 above: [..., n] and [..., n] to [..., n, n], in float32."""
    n = to.shape[-1]
    above = torch.ones(n, n, dtype=torch.bool).triu(diagonal + 1)
    return torch.exp((to[..., :, None] - since[..., None, :]).masked_fill(above, -torch.inf).float())
