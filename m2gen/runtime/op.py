"""The M2RNN operator as models call it: a whole sequence, or one step of decoding."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, overload

import torch
from torch import Tensor

from . import built, checks, library, pools, reference
from .casts import autocast, autocasts, float32
from .facts import Backend
from .offsets import check_host_offsets, check_offsets

__all__ = ["m2rnn", "m2rnn_step"]


@overload
def m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip: float | None = 1.0,
    output_final_state: Literal[True] = True,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    deterministic: bool | None = None,
    backend: Backend = "kernels",
    pool: Tensor | None = None,
    indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    states_every: int | None = None,
    states_indices: Tensor | None = None,
    rounding_seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip: float | None = 1.0,
    output_final_state: bool = True,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    deterministic: bool | None = None,
    backend: Backend = "kernels",
    pool: Tensor | None = None,
    indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    states_every: int | None = None,
    states_indices: Tensor | None = None,
    rounding_seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor | None]: ...


def m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip: float | None = 1.0,
    output_final_state: bool = True,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    deterministic: bool | None = None,
    backend: Backend = "kernels",
    pool: Tensor | None = None,
    indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    states_every: int | None = None,
    states_indices: Tensor | None = None,
    rounding_seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run H_t = f_t H_(t-1) + (1 - f_t) tanh(H_(t-1) W + k_t v_t^T), y_t = H_t^T q_t (arXiv 2603.14360).

    q (B, S, Nq, K), k (B, S, Nk, K), v (B, S, Nv, V), all of one dtype; weight (Nw, V, V) and forget (B, S, Nf) in
    that dtype or float32; initial_state (B, N, K, V), zeros if None. N is the largest head count, and head n reads
    group n // (N // Nx) of operand x. Any strides will do. Under autocast, q, k and v are cast, and a weight or gate
    in float32 stays as it is.

    A packed batch is (T, ...) in place of (B, S, ...), with cu_seqlens (B + 1,), int32 or int64: offsets that start at
    0, never decrease and end at T. They are read once on the host for as long as their content stays the same, which
    waits for a GPU; with cu_seqlens_cpu, a copy of them on the CPU, that is checked in their place, and nothing waits.
    That the two are equal is the caller's word: kernels stay inside the tensors whatever cu_seqlens holds.

    forget is f_t itself; or, with A_log and dt_bias (Nf,), the x of f = exp(-exp(A_log) softplus(x + dt_bias)).

    Returns y (B, S, N, V) in v's dtype and the final state (B, N, K, V) in float32, or None in its place without
    output_final_state. The state is carried, and gradients are summed, in float32.

    clip bounds the state's gradient, as the package's docstring says; None for no bound.

    Sums over heads that share an operand, and over rows split between programs, may use atomics: between runs, the
    last bits may vary of the results that the package's docstring names. deterministic=True sums in a fixed order, at
    the price of memory for each contribution; None does what torch.use_deterministic_algorithms says.

    backend="reference" runs the recurrence in eager PyTorch instead: slow, but for any dims, dtype and device, with
    tangents (torch.func.jvp) and second derivatives, for which the kernels raise.

    With pool (slots, N, K, V), in float32, bfloat16 or float16, and indices (B,), int32 or int64, a sequence starts
    from the state in its slot, or from zeros where has_initial_state (B,) is False or the slot is negative, and its
    final state is left in that slot, or in that of out_indices (B,), unless it is negative: in place, rounded once, as
    ``m2rnn_steps`` says of rounding_seed. The pool is what is returned beside y. No gradients are computed.
    With states_every = C and states_indices (B, M), the state after each multiple (m + 1) C of a sequence's tokens is
    left in its slot, too; C must be a multiple of the steps between states that kernels save, as 384 always is.

    Raises VariantNotBuiltError for dims, heads, a dtype or a gate that were not built; ValueError or TypeError for
    operands that do not fit together.
    """
    bound = checks.checked_bound(clip)
    if backend not in ("kernels", "reference"):
        raise ValueError(f"m2rnn: backend must be kernels or reference, got {backend!r}")
    q, k, v, weight, forget = autocast(q, k, v, weight, forget)
    lead = ("B", "S") if cu_seqlens is None else ("T",)
    tensors = {
        "q": q, "k": k, "v": v, "weight": weight, "forget": forget, "A_log": A_log, "dt_bias": dt_bias,
        "initial_state": initial_state, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    slots = {
        "indices": indices, "out_indices": out_indices, "has_initial_state": has_initial_state,
        "states_indices": states_indices, "rounding_seed": rounding_seed,
    }  # fmt: skip
    if pool is not None or states_every is not None or any(x is not None for x in slots.values()):
        prefill = pools.Prefill(lead, backend, states_every, {**tensors, **slots, "pool": pool})
        if states_every is None:
            y, last = m2rnn(
                q, k, v, weight, forget, prefill.first(), cu_seqlens, clip,
                A_log=A_log, dt_bias=dt_bias, cu_seqlens_cpu=cu_seqlens_cpu, deterministic=deterministic,
            )  # fmt: skip
        else:
            y, last = prefill.scan(cu_seqlens_cpu, deterministic)
        kept = prefill.keep(last)
        return y, kept if output_final_state else None
    call = checks.check("m2rnn", lead, tensors, backend == "kernels")
    check_host_offsets(cu_seqlens, cu_seqlens_cpu)
    if backend == "reference":
        host = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
        y, state = _reference(q, k, v, weight, forget, initial_state, host, A_log, dt_bias, clip)
        return y, state if output_final_state else None
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors.values())
    operands = (q, k, v, weight, forget, float32(A_log), float32(dt_bias))
    first, offsets = float32(initial_state), cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous()
    if save or call is None:
        y, state, _ = library.OPERATORS.FORWARD(*operands, first, offsets, cu_seqlens_cpu, bound, save, deterministic)
    else:  # nothing to differentiate and nobody to tell: the dispatcher takes longer on the host
        y, state, _ = library.OPERATORS.launches.forward(
            operands, first, offsets, save, deterministic, call, cu_seqlens_cpu
        )
    return y, state if output_final_state else None


def m2rnn_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    state: Tensor,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    rounding_seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance ``state`` by one step of the recurrence in place, and return y and that state.

    q (B, Nq, K), k (B, Nk, K), v (B, Nv, V), weight (Nw, V, V), forget (B, Nf) as ``m2rnn`` takes them for one step;
    state (B, N, K, V) in float32 or bfloat16, of any strides with which its elements are apart; y (B, N, V) in v's
    dtype. After ``m2rnn`` on a prompt, a step for each further token gives what ``m2rnn`` on the whole sequence would.

    A bfloat16 state halves memory and traffic: a step computes in float32 and rounds it once, at its end. A head whose
    f is above about 0.998 then hardly takes in what is new, which is less than half of such a state's last place.

    With indices (B,), int32 or int64, the state is a pool (slots, N, K, V), also in float16: request b starts from slot
    indices[b] and leaves its state there, or in slot out_indices[b], unless that is negative. A request whose slot to
    start from is negative is skipped: its rows of y are zero, and nothing of it is read or written. ``m2rnn_steps``
    says the rest of indices and rounding_seed.

    Raises what ``m2rnn`` raises, and RuntimeError where an operand requires a gradient, of which a step computes none,
    or where the state shares memory with itself or with an operand.
    """
    q, k, v, weight, forget = autocast(q, k, v, weight, forget)
    tensors = {
        "q": q, "k": k, "v": v, "weight": weight, "forget": forget, "A_log": A_log, "dt_bias": dt_bias
    }  # fmt: skip
    slots = {"indices": indices, "out_indices": out_indices}
    if rounding_seed is not None or any(x is not None for x in slots.values()):
        return pools.step({**tensors, **slots, "rounding_seed": rounding_seed, "state": state})
    tensors["state"] = state
    call = checks.check("m2rnn_step", ("B",), tensors, writes=True)
    pools.refuse_gradients("m2rnn_step", tensors)
    operands = (q, k, v, weight, forget, float32(A_log), float32(dt_bias))
    if call is None:
        y = library.OPERATORS.STEP(*operands, state)
    else:
        y = library.OPERATORS.launches.step(operands, state, call)
    pools.written(state)
    return y, state


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    clip: float | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, q.shape[0])
    arithmetic = reference.Arithmetic(torch.promote_types(q.dtype, torch.float32), q.dtype)
    kind = q.device.type
    with torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext():  # it would round all products
        return reference.m2rnn(
            q, k, v, weight, forget, initial_state, cu_seqlens,
            A_log=A_log, dt_bias=dt_bias, clip=clip, clamp_total=built.CLAMP_TOTAL, arithmetic=arithmetic,
        )  # fmt: skip
