"""The gated delta rule of arXiv 2412.06464 in chunks, in plain PyTorch, and the layer around it.

With a_t = exp(log_decay_t), the state of a head is S_t = a_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T, and
y_t = S_t^T q_t. Within a chunk, with g the running sum of log_decay, S_t is e^(g_t) S_0 plus the sum of
e^(g_t - g_s) k_s u_s^T over s <= t, where (I + A) U = beta (V - e^g K S_0) and A holds
beta_t e^(g_t - g_s) k_t . k_s below its diagonal. All of that is products of matrices for every chunk at once; only
the states at the chunks' beginnings come one after the other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 64
"""Tokens of a chunk."""


class UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 of matrices A (..., C, C) that are 0 on and above the diagonal; C is a power of 2.

    Blocks twice the size come from their two halves, whose inverses are entries of products of Householder-like
    contractions and so stay small; a series in powers of A would not.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        """Return the inverses."""
        rows = torch.arange(a.shape[-1], device=a.device)
        inverse = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        size = 1
        while size < a.shape[-1]:
            lower = (rows[:, None] // size == rows // size + 1) & (rows // size % 2 == 0)
            part = a * lower
            inverse = inverse - (part if size == 1 else inverse @ part @ inverse)
            size *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        """Return the gradient of A; what is on and above its diagonal is the caller's to drop."""
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ given @ inverse.mT)


class ChunkScan(torch.autograd.Function):
    """The walk over chunks: what each writes, and the state that each begins with.

    For each chunk, first U = U0 - W S, then S = decay S + K^T U. u0 is (n, B, C, V), w and k are (n, B, C, K) and decay
    (n, B) for n chunks; S begins as 0 and is kept in decay's dtype, while products have those of their operands.
    """

    @staticmethod
    def forward(ctx: Any, u0: Tensor, w: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        """Return every chunk's U (n, B, C, V) and S before it (n, B, K, V), both in u0's dtype."""
        u, states = torch.empty_like(u0), u0.new_empty(*w.shape[:2], w.shape[-1], u0.shape[-1])
        state = decay.new_zeros(states.shape[1:])
        for i, factor in enumerate(decay[..., None, None].unbind()):
            states[i].copy_(state)
            torch.baddbmm(u0[i], w[i], states[i], alpha=-1, out=u[i])
            state = torch.addcmul(torch.bmm(k[i].mT, u[i]), state, factor)  # in decay's dtype
        ctx.save_for_backward(u, states, w, k, decay)
        return u, states

    @staticmethod
    def backward(ctx: Any, du: Tensor, dstates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of the arguments."""
        u, states, w, k, decay = ctx.saved_tensors
        dwrites, dafter = torch.empty_like(u), torch.empty_like(states)
        carried = decay.new_zeros(states.shape[1:])
        for i, factor in reversed(list(enumerate(decay[..., None, None].unbind()))):
            dafter[i].copy_(carried)
            torch.baddbmm(du[i], k[i], dafter[i], out=dwrites[i])
            from_u = torch.baddbmm(dstates[i], w[i].mT, dwrites[i], alpha=-1)
            carried = torch.addcmul(from_u, carried, factor)
        ddecay = (dafter * states).sum((-2, -1), dtype=decay.dtype)
        return dwrites, -(dwrites @ states.mT), u @ dafter.mT, ddecay


class ShortConvolution(torch.autograd.Function):
    """The causal convolution of each channel of x (B, S, C) with its taps (C, width), summed in the taps' dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        """Return y (B, S, C) in x's dtype."""
        ctx.save_for_backward(x, taps)
        return _weighted(F.pad(x, (0, 0, taps.shape[-1] - 1, 0)), taps).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and of the taps."""
        x, taps = ctx.saved_tensors
        width, length = taps.shape[-1], x.shape[1]
        dx = _weighted(F.pad(dy, (0, 0, 0, width - 1)), taps.flip(-1)).to(x.dtype)
        padded = F.pad(x, (0, 0, width - 1, 0))
        dtaps = [(padded[:, i : i + length] * dy).sum((0, 1), dtype=taps.dtype) for i in range(width)]
        return dx, torch.stack(dtaps, -1)


def _weighted(padded: Tensor, taps: Tensor) -> Tensor:
    """Return the sum of what is i tokens later, times tap i."""
    width = taps.shape[-1]
    length = padded.shape[1] - width + 1
    total = padded[:, :length] * taps[:, 0]
    for i in range(1, width):
        total = torch.addcmul(total, padded[:, i : i + length], taps[:, i])
    return total


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return y (B, S, N, V) of q and k (B, S, N, K), v (B, S, N, V), log_decay <= 0 and beta (B, S, N).

    Products have the dtype of v. Decays, their sums and the carried state have log_decay's, which is float32 or
    float64; the inverse of a chunk is computed in that, too. ``chunk`` is a power of 2, and S is any number.
    """
    batch, length, heads = beta.shape
    narrow, wide = v.dtype, log_decay.dtype
    end = -length % chunk

    def chunks(x: Tensor) -> Tensor:  # (n, B N, C, ...)
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, end)) if end else x
        return x.unflatten(1, (-1, chunk)).movedim(3, 1).movedim(2, 0).flatten(1, 2)

    with torch.autocast(v.device.type, enabled=False):
        q, k, v = chunks(q.to(narrow)), chunks(k.to(narrow)), chunks(v)
        g, beta = chunks(log_decay).cumsum(-1), chunks(beta.to(wide))
        lower = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).tril()
        between = (g[..., :, None] - g[..., None, :]).masked_fill(~lower, float("-inf")).exp()
        from_start, to_end = g.exp()[..., None], (g[..., -1:] - g).exp()[..., None]
        a = (beta[..., None] * between * (k.to(wide) @ k.to(wide).mT)).tril(-1)
        inverse = UnitLowerInverse.apply(a) * beta[..., None, :]  # tokens' factors on its columns, which are fewer
        u0 = inverse.to(narrow) @ v
        w = (inverse * from_start.mT).to(narrow) @ k
        u, states = ChunkScan.apply(u0, w, (to_end * k).to(narrow), g[..., -1].exp())
        scores = ((q @ k.mT).to(wide) * between).to(narrow)
        y = scores @ u + (from_start * q).to(narrow) @ states
    y = y.unflatten(1, (batch, heads)).movedim(0, 2).movedim(1, 3).flatten(1, 2)
    return y[:, :length]


class GatedDelta(nn.Module):
    """The layer of flash-linear-attention's GatedDeltaNet, with its parameters' names and their initial values.

    Projections give q, k (``heads`` times ``rows``), v and the output gate (``heads`` times ``columns``). q, k and v
    pass a short depthwise convolution and SiLU; q and k are normalised, q is divided by sqrt(rows). The decay of a head
    is exp(-exp(A_log) softplus(a + dt_bias)), beta a sigmoid. The result is RMSNorm(y) silu(gate), projected.
    """

    def __init__(self, width: int, heads: int, rows: int, columns: int, taps: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads, self.rows, self.columns, self.eps = heads, rows, columns, eps
        self.sizes = (heads * rows, heads * rows, heads * columns)
        for name, size in zip("qkv", self.sizes, strict=True):
            self.add_module(f"{name}_proj", nn.Linear(width, size, bias=False))
            self.add_module(f"{name}_conv1d", nn.Conv1d(size, size, taps, groups=size, bias=False))
        self.a_proj, self.b_proj = nn.Linear(width, heads, bias=False), nn.Linear(width, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(0, 16).log())
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(step + (-(-step).expm1()).log())  # softplus takes it back to the step
        self.g_proj, self.o_proj = (
            nn.Linear(width, self.sizes[2], bias=False), nn.Linear(self.sizes[2], width, bias=False),
        )  # fmt: skip
        self.o_norm = nn.RMSNorm(columns, eps=eps)

    @property
    def state_size(self) -> int:
        """Elements of the state of a sequence."""
        return self.heads * self.rows * self.columns

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, S, width) to the same shape."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self._convolved(x))
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            q, k = self._unit(q, self.rows**-0.5), self._unit(k)
        log_decay = -self.A_log.to(wide).exp() * F.softplus(self.a_proj(x).to(wide) + self.dt_bias.to(wide))
        y = gated_delta_rule(q, k, v, log_decay, self.b_proj(x).to(wide).sigmoid())
        with torch.autocast(x.device.type, enabled=False):
            y = F.rms_norm(y.to(wide), (self.columns,), self.o_norm.weight.to(wide), self.eps)
        gate = F.silu(self.g_proj(x)).unflatten(-1, (self.heads, -1))
        return self.o_proj((y.to(gate.dtype) * gate).flatten(-2))

    def _unit(self, x: Tensor, size: float = 1.0) -> Tensor:
        """Return x (B, S, N, K) over its length, times ``size``; it is that of RMSNorm, but for a factor sqrt(K)."""
        weight = x.new_full((self.rows,), size * self.rows**-0.5)
        return F.rms_norm(x, (self.rows,), weight, 1e-6 / self.rows)

    def _convolved(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return q, k and v after their convolutions, which are one."""
        projected = F.linear(x, torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]))
        taps = torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight]).squeeze(1)
        return F.silu(ShortConvolution.apply(projected, taps)).split(self.sizes, -1)
