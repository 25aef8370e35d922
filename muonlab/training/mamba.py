"""Mamba2 on a CPU: the chunked scan and the convolution of transformers, with fewer and smaller tensors.

Shape letters: B = batch, S = sequence, C = chunks of length L, G = groups, R = heads a group, H = G * R heads,
P = head size, N = state size, W = width of the convolution, K = its channels. For head h of group g, a_t = dt_t A_h
and u_t = dt_t x_t:

    state_t = exp(a_t) state_t-1 + B_t u_t^T              [N, P]
    y_t     = C_t state_t + D_h x_t                       [P]

With s_t = a_1 + .. + a_t from the beginning of t's chunk, and the state before the chunk, all y of a chunk are one
product, [L, L + N] @ [L + N, P], whose left factor holds the decays:

    y - D x = [ (C_t . B_s) exp(s_t - s_s), 0 for s > t  |  exp(s_t) C_t ] @ [ u_s ; state ]  =  mixing @ mixed
    state after the chunk = exp(s_L) state + kept^T u,    kept_s = exp(s_L - s_s) B_s           [L, N]

and backwards d mixed = mixing^T dy and so on. Where f = exp(s_t - s_s) is a factor of a number z, that number's part in
the gradient of s_t is z dz, and in that of s_s -z dz.

    convolution:     y_t = bias + sum over w of weight_w x_t-W+1+w, each channel by itself

The stock scan repeats B and C for every head of a group before it multiplies them; here the scores C_t . B_s are
computed once a group, of which Granite has one. The length of the chunks is chosen for a CPU's caches: it changes
rounding and nothing else. The convolution is W products of whole tensors, which a CPU does faster than the general one.

Both replace functions of transformers on tensors of a CPU, as training calls them; any other call goes to the stock
function, and so does every one under a version of transformers that these were not compared with
(tests/property/test_training_mamba.py compares outputs and gradients). Second derivatives, which a Hessian takes, are
those of the stock functions.
Source: Dao and Gu (2024), arXiv:2405.21060, section 6.
"""

from __future__ import annotations

from collections.abc import Callable
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


def _gradients_of(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
    """The gradients of function(*inputs), such that they can be differentiated again."""
    with torch.enable_grad():
        # Views of the inputs: what a model does twice with one tensor is two inputs here.
        inputs = tuple(value.view_as(value) for value in inputs)
        return torch.autograd.grad(function(*inputs), inputs, gradient, create_graph=True)


# ------------------------------------------------------------------------------------------------- convolution


def causal_convolution(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
) -> Tensor:
    """As the stock function: hidden_states [B, K, S], weight [K, W], bias [K] to [B, K, S]."""
    other = bias is None or any(value is not None for value in kwargs.values())
    if hidden_states.device.type != "cpu" or other:
        stock: Tensor = stock_convolution(hidden_states, weight, bias, activation=activation, **kwargs)
        return stock
    # [B, S, K], as the tensors lie in memory before and behind.
    y: Tensor = Convolution.apply(hidden_states.transpose(1, 2).to(weight.dtype), weight, bias)  # type: ignore[no-untyped-call]
    if activation is not None:
        y = ACT2FN[activation](y)
    return y.to(hidden_states.dtype).transpose(1, 2)


class Convolution(torch.autograd.Function):
    """x [B, S, K], weight [K, W] and bias [K] to [B, S, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        length, width = x.shape[1], weight.shape[1]
        ctx.save_for_backward(x, weight, bias)
        before = functional.pad(x, (0, 0, width - 1, 0))
        y = torch.addcmul(bias, before[:, :length], weight[:, 0])
        for w in range(1, width):
            y.addcmul_(before[:, w : w + length], weight[:, w])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradients_of(_stock_convolution, (x, weight, bias), dy)
        length, width = x.shape[1], weight.shape[1]
        dx, dweight = dy * weight[:, -1], torch.empty_like(weight)
        dweight[:, -1] = (dy * x).sum((0, 1))
        for back in range(1, min(width, length)):
            w = width - 1 - back
            dx[:, :-back].addcmul_(dy[:, back:], weight[:, w])
            dweight[:, w] = (dy[:, back:] * x[:, :-back]).sum((0, 1))
        dweight[:, : max(0, width - length)] = 0
        return dx, dweight, dy.sum((0, 1))


def _stock_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = stock_convolution(x.transpose(1, 2), weight, bias)
    return y.transpose(1, 2)


# -------------------------------------------------------------------------------------------------------- scan


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
    if D is None or other or hidden_states.device.type != "cpu":
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
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = functional.softplus(dt)
    if dt_limit != (0.0, float("inf")):
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    with torch.autocast("cpu", enabled=False):
        return Scan.apply(*(value.float() for value in (hidden_states, dt, A, B, C, D)))  # type: ignore[no-untyped-call]


class Scan(torch.autograd.Function):
    """x [B, S, H, P], dt [B, S, H], A [H], B and C [B, S, G, N], D [H] to y [B, S, H, P], in their dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        batch, length, heads, size = x.shape
        groups, state = B.shape[2:]
        chunk = chunk_length(state)
        chunks = -(-length // chunk)
        by_head, by_group = (batch, chunks, heads), (batch, chunks, groups, heads // groups)
        x_, dt_, B_, C_ = (_in_chunks(value, chunk) for value in (x, dt, B, C))

        # In float64, and as sums: exp wants their differences, which are smaller than they are.
        summed = (A[:, None] * dt_).double().cumsum(-1)  # [B, C, H, L]
        decay = (summed[..., :, None] - summed[..., None, :]).to(x.dtype)
        decay += torch.full((chunk, chunk), -torch.inf, dtype=x.dtype).triu_(1)
        decay.exp_()
        since, until = summed.to(x.dtype).exp(), (summed[..., -1:] - summed).to(x.dtype).exp()
        kept = (B_[:, :, :, None] * until.view(*by_group, chunk, 1)).view(*by_head, chunk, state)

        mixing, mixed = x.new_empty(*by_head, chunk, chunk + state), x.new_empty(*by_head, chunk + state, size)
        scores = C_ @ B_.transpose(-1, -2)  # [B, C, G, L, L]
        left = mixing.view(*by_group, chunk, chunk + state)
        torch.mul(scores[:, :, :, None], decay.view(*by_group, chunk, chunk), out=left[..., :chunk])
        torch.mul(C_[:, :, :, None], since.view(*by_group, chunk, 1), out=left[..., chunk:])
        u, states = mixed[..., :chunk, :], mixed[..., chunk:, :]
        torch.mul(x_, dt_[..., None], out=u)
        states[:, 0] = 0
        added, through, state_ = (
            part.unbind(1) for part in (kept.transpose(-1, -2) @ u, since[..., -1:, None], states)
        )
        for c in range(chunks - 1):
            torch.addcmul(added[c], state_[c], through[c], out=state_[c + 1])

        ctx.save_for_backward(x, dt, A, B, C, D, decay, since, until, kept, mixing, mixed)
        y = x.new_empty(batch, chunks, chunk, heads, size)
        torch.addcmul((mixing @ mixed).transpose(2, 3), x_.transpose(2, 3), D[:, None], out=y)
        return y.view(batch, -1, heads, size)[:, :length]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, D, decay, since, until, kept, mixing, mixed = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradients_of(_stock_scan, (x, dt, A, B, C, D), dy)
        batch, length, heads, size = x.shape
        groups, state = B.shape[2:]
        chunks, _, chunk = kept.shape[1:4]
        by_group = (batch, chunks, groups, heads // groups)
        x_, dt_, B_, C_, dy_ = (_in_chunks(value, chunk) for value in (x, dt, B, C, dy))
        dy_ = dy_.contiguous()

        dmixing, dmixed = dy_ @ mixed.transpose(-1, -2), mixing.transpose(-1, -2) @ dy_
        du, dstates = dmixed[..., :chunk, :], dmixed[..., chunk:, :]
        # Of the state behind each chunk; nobody reads the last.
        behind, through = torch.zeros_like(dstates), since[..., -1:, None]
        before_, through_, behind_ = (part.unbind(1) for part in (dstates, through, behind))
        for c in reversed(range(chunks - 1)):
            torch.addcmul(before_[c + 1], behind_[c + 1], through_[c + 1], out=behind_[c])
        du += kept @ behind
        u, states = mixed[..., :chunk, :], mixed[..., chunk:, :]
        dkept = u @ behind.transpose(-1, -2)

        ddt = (du * x_).sum(-1)  # [B, C, H, L]
        # In float64: what one s_t gains another loses, and they are added up again along the chunk.
        parts = dmixing * mixing
        within, ends = parts[..., :chunk].double(), (dkept * kept).sum(-1).double()
        dsummed = within.sum(-1) - within.sum(-2) + parts[..., chunk:].sum(-1) - ends
        dsummed[..., -1] += ends.sum(-1) + (behind * states).sum((-1, -2)) * through[..., 0, 0]
        ddecays = dsummed.flip(-1).cumsum(-1).flip(-1).to(x.dtype)  # of a_t
        ddt.addcmul_(ddecays, A[:, None])
        dx = x.new_empty(batch, chunks, chunk, heads, size)
        torch.mul(du.transpose(2, 3), dt_.transpose(2, 3)[..., None], out=dx)
        dx.addcmul_(dy_.transpose(2, 3), D[:, None])

        left = dmixing.view(*by_group, chunk, chunk + state)
        dscores = (left[..., :chunk] * decay.view(*by_group, chunk, chunk)).sum(3)
        dC = dscores @ B_ + (left[..., chunk:] * since.view(*by_group, chunk, 1)).sum(3)
        dB = dscores.transpose(-1, -2) @ C_
        dB += (dkept.view(*by_group, chunk, state) * until.view(*by_group, chunk, 1)).sum(3)
        return (
            dx.view(batch, -1, heads, size)[:, :length],
            _in_sequence(ddt, length),
            (ddecays * dt_).sum((0, 1, 3)),
            _in_sequence(dB, length),
            _in_sequence(dC, length),
            (dy_ * x_).sum((0, 1, 3, 4)),
        )


def _stock_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    y: Tensor = stock_scan(x, dt, A, B, C, chunk_length(B.shape[-1]), D=D)
    return y


def _in_chunks(values: Tensor, chunk: int) -> Tensor:
    """[B, S, H, ...] with zeros behind, as [B, C, H, L, ...]."""
    if pad := -values.shape[1] % chunk:
        values = functional.pad(values, (0, 0) * (values.ndim - 2) + (0, pad))
    return values.reshape(len(values), -1, chunk, *values.shape[2:]).transpose(2, 3)


def _in_sequence(values: Tensor, length: int) -> Tensor:
    """The inverse of `_in_chunks`."""
    return values.transpose(2, 3).flatten(1, 2)[:, :length]
