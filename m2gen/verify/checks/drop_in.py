"""Compare the drop-in for the published implementation with the published equations, written out once more.

Nothing here is shared with ``m2gen.runtime.reference``: the backward is section 2 of docs/design.md by hand, not
autograd.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from m2gen.problem import Inputs
from m2gen.verify.case import TensorResult
from m2gen.verify.oracle import Oracle, differentiate, judge, oracle
from m2gen.verify.subject import CaseContext, poisoned


def _sequence(
    operands: tuple[Tensor, ...], weight: Tensor, state: Tensor, incoming: tuple[Tensor, Tensor], bound: float
) -> dict[str, Tensor]:
    """Run q, k (S, N, K), v (S, N, V), f (S, N), weight (N, V, V), state (N, K, V) forward and backward."""
    q, k, v, f = operands
    dy, carry = incoming
    states, writes = [state], []
    for t in range(q.shape[0]):
        writes.append(torch.tanh(states[-1] @ weight + k[t, :, :, None] * v[t, :, None, :]))
        forget = f[t, :, None, None]
        states.append(forget * states[-1] + (1 - forget) * writes[-1])
    y, dq, dk, dv, df, dweight = (torch.zeros_like(x) for x in (dy, *operands, weight))
    for t in reversed(range(q.shape[0])):
        y[t] = torch.einsum("nkv,nk->nv", states[t + 1], q[t])
        forget, before, z = f[t, :, None, None], states[t], writes[t]
        g = carry.clamp(-bound, bound) + q[t, :, :, None] * dy[t, :, None, :]
        d = (1 - forget) * g * (1 - z * z)
        dq[t] = torch.einsum("nkv,nv->nk", states[t + 1], dy[t])
        dk[t] = torch.einsum("nkv,nv->nk", d, v[t])
        dv[t] = torch.einsum("nkv,nk->nv", d, k[t])
        df[t] = (g * (before - z)).sum((1, 2))
        dweight += before.mT @ d
        carry = forget * g + d @ weight.mT
    gradients = {"dq": dq, "dk": dk, "dv": dv, "dforget": df, "dweight": dweight, "dinitial_state": carry}
    return {"y": y, "state": states[-1], **gradients}


def published(inputs: Inputs, clip: float | None) -> dict[str, Tensor]:
    """Return results and gradients of a batch or a packed batch in float64, by name."""
    total = max(inputs.q.shape[-2], inputs.k.shape[-2], inputs.v.shape[-2], inputs.forget.shape[-1], len(inputs.weight))
    packed = inputs.cu_seqlens is not None
    names = {"q": -2, "k": -2, "v": -2, "forget": -1, "weight": 0}
    wide = {name: _expanded(getattr(inputs, name).double(), total, dim) for name, dim in names.items()}
    if inputs.initial_state is None:
        raise ValueError("the problem must have an initial state")
    sizes = [inputs.q.shape[1]] * len(inputs.q) if inputs.cu_seqlens is None else inputs.cu_seqlens.diff().tolist()
    flat = [x if packed else x.flatten(0, 1) for x in (*(wide[n] for n in names if n != "weight"), inputs.dy.double())]
    pieces = zip(
        *(torch.split(x, sizes) for x in flat), inputs.initial_state.double(), inputs.dstate.double(), strict=True
    )
    bound = float("inf") if clip is None else abs(clip)
    runs = [_sequence((q, k, v, f), wide["weight"], h, (dy, dh), bound) for q, k, v, f, dy, h, dh in pieces]
    joined = {name: torch.cat([run[name] for run in runs]) for name in ("y", "dq", "dk", "dv", "dforget")}
    if not packed:
        joined = {name: torch.unflatten(x, 0, inputs.q.shape[:2]) for name, x in joined.items()}
    joined |= {name: torch.stack([run[name] for run in runs]) for name in ("state", "dinitial_state")}
    joined["dweight"] = torch.stack([run["dweight"] for run in runs]).sum(0)
    grouped = {f"d{n}": _grouped(joined[f"d{n}"], getattr(inputs, n).shape[dim], dim) for n, dim in names.items()}
    return joined | grouped


def _expanded(x: Tensor, total: int, dim: int) -> Tensor:
    return x.repeat_interleave(total // x.shape[dim], dim)


def _grouped(gradient: Tensor, groups: int, dim: int) -> Tensor:
    """Sum the gradient over the heads of each group."""
    dim = dim % gradient.dim()
    return torch.unflatten(gradient, dim, (groups, -1)).sum(dim + 1)


def drop_in(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge ``compat.m2rnn``: states in key's dtype, a negative bound by its size, offsets with ``max_seqlen``."""
    inputs, case = subject.inputs, subject.case
    narrow = inputs.k.dtype
    state = None if inputs.initial_state is None else inputs.initial_state.to(narrow)
    inputs = replace(inputs, initial_state=state, dstate=inputs.dstate.to(narrow))
    compat = subject.submodule("compat")

    def operator(q: Tensor, k: Tensor, v: Tensor, w: Tensor, f: Tensor, h: Any, offsets: Any, clip: Any) -> Any:
        longest = None if offsets is None else int(offsets.diff().max())
        return compat.m2rnn(q, k, v, w, f, h, None if clip is None else -clip, offsets, longest)

    known = oracle(subject.variant, case, inputs, subject.seed)
    rounded = known.budgets["state"] + torch.finfo(narrow).eps / 2
    known = Oracle(published(inputs, case.clip), {**known.budgets, "state": rounded}, {**known.dtypes, "state": narrow})
    with poisoned():
        return judge(differentiate(operator, inputs, case), known)
