"""States of many requests in one pool: tokens of decoding, and states out of their slots and into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, library, pool_checks
from .casts import autocast, float32
from .offsets import check_host_offsets
from .pool_launches import Slots, dims_of

__all__ = ["m2rnn_steps"]

_OF_POOLS = ("indices", "out_indices", "has_initial_state", "states_indices", "rounding_seed")


def m2rnn_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    pool: Tensor,
    *,
    indices: Tensor,
    out_indices: Tensor | None = None,
    accepted: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    rounding_seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance requests by T tokens each, such as one and its drafts, and keep the state after every token.

    q (B, T, Nq, K), k (B, T, Nk, K), v (B, T, Nv, V), weight (Nw, V, V), forget (B, T, Nf), A_log and dt_bias as
    ``m2rnn`` takes them; pool (slots, N, K, V) in float32, bfloat16 or float16, of any strides with which its elements
    are apart. Returns y (B, T, N, V) in v's dtype, and the pool, which is written in place.

    ``indices`` (B,) are the slots that requests start from, in int32 or int64; or ``indices`` (B, C), of which
    ``accepted`` (B,) says how many tokens of the call before count: request b starts from ``indices[b, accepted[b] -
    1]``. ``out_indices`` (B, T) are the slots that states after each token are left in, or (B,) that after the last one
    alone; without them, they are ``indices``. All are read on the device alone.

    A request whose slot to start from is negative, or whose ``accepted`` is not from 1 to C, is skipped: its rows of y
    are zero, and nothing of it is read or written. A state whose slot is negative is not written. Two requests must not
    write one slot, nor one write what another starts from, which M2GEN_DEBUG=1 checks on the host.

    Computes bit for bit what T calls of one token each do: in float32, rounded to the pool's dtype after each token.
    ``rounding_seed``, an int or int64 tensor () or (B,), rounds up or down at random rather than to nearest, so that
    what is new is taken in on average; token t takes the t-th seed after it, and the same seed gives the same bits.

    Raises what ``m2rnn_step`` raises.
    """
    q, k, v, weight, forget = autocast(q, k, v, weight, forget)
    tensors = {
        "q": q, "k": k, "v": v, "weight": weight, "forget": forget, "A_log": A_log, "dt_bias": dt_bias,
        "indices": indices, "out_indices": out_indices, "accepted": accepted,
        "rounding_seed": seed_of(rounding_seed, pool), "pool": pool,
    }  # fmt: skip
    return _advance("m2rnn_steps", ("B", "T"), tensors)


def step(tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Do what ``m2rnn_step`` does with its arguments, by name, of which ``state`` is a pool."""
    state, seed = tensors.pop("state"), tensors.pop("rounding_seed")
    return _advance("m2rnn_step", ("B",), {**tensors, "rounding_seed": seed_of(seed, state), "state": state})


def _advance(caller: str, lead: tuple[str, ...], tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Check a call and launch it; the last of its tensors is the pool."""
    call = checks.check(caller, lead, tensors, look=pool_checks.check_pooled, writes=True)
    refuse_gradients(caller, tensors)
    q, k, v, weight, forget, A_log, dt_bias, indices, out_indices, *accepted, seed, pool = tensors.values()
    slots = Slots(indices, indices if out_indices is None else out_indices, accepted[0] if accepted else None, seed)
    if pool_checks.DEBUG:
        pool_checks.check_slots(caller, pool.shape[0], slots.indices, slots.out_indices, slots.accepted)
    operands = (q, k, v, weight, forget, float32(A_log), float32(dt_bias))
    if call is None:
        y = library.OPERATORS.POOL_STEPS(*operands, *slots, pool)
    else:
        y = library.OPERATORS.pool_library.pool_launches.steps(operands, pool, slots, call)
    written(pool)
    return y, pool


class Prefill:
    """A checked call of ``m2rnn`` on a pool: states out of their slots before it, and into them after it."""

    def __init__(self, lead: tuple[str, ...], backend: str, every: int | None, tensors: dict[str, Any]) -> None:
        _check_prefill(backend, every, tensors)
        given = {name: x for name, x in tensors.items() if name != "initial_state"}
        given["rounding_seed"] = seed_of(given["rounding_seed"], given["pool"])
        self._call = checks.check("m2rnn", lead, given, look=pool_checks.check_pooled, writes=True)
        refuse_gradients("m2rnn", given)
        self._given, self._every = given, every
        self._pool: Tensor = given["pool"]
        self._indices: Tensor = given["indices"]
        self._out: Tensor = self._indices if given["out_indices"] is None else given["out_indices"]
        self._has, self._seed = given["has_initial_state"], given["rounding_seed"]
        self._dims = dims_of(*(given[name] for name in ("q", "k", "v", "weight", "forget")))
        if pool_checks.DEBUG:
            every_slot = self._out if every is None else torch.cat((self._out[:, None], given["states_indices"]), 1)
            pool_checks.check_slots("m2rnn", self._pool.shape[0], self._indices, every_slot)

    def first(self) -> Tensor:
        """Return the states that sequences start from, (B, N, K, V) in float32."""
        if self._call is None:
            return library.OPERATORS.POOL_GATHER(self._pool, self._indices, self._has, list(self._dims))
        launches = library.OPERATORS.pool_library.pool_launches
        return launches.gather(self._pool, self._indices, self._has, self._dims, self._call)

    def scan(self, cu_seqlens_cpu: Tensor | None, deterministic: bool | None) -> tuple[Tensor, Tensor]:
        """Run the sequences, leave states after every so many of their tokens in slots, and return y and the last."""
        given = self._given
        check_host_offsets(given["cu_seqlens"], cu_seqlens_cpu)
        operands = (*(given[name] for name in ("q", "k", "v", "weight", "forget")), float32(given["A_log"]))
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        return library.OPERATORS.POOL_SCAN(
            *operands, float32(given["dt_bias"]), self.first(), given["cu_seqlens"], cu_seqlens_cpu,
            given["states_indices"], self._seed, self._every, deterministic, self._pool,
        )  # fmt: skip

    def keep(self, last: Tensor) -> Tensor:
        """Leave the final states in their slots, and return the pool."""
        if self._call is None:
            library.OPERATORS.POOL_SCATTER(last, self._out, self._seed, list(self._dims), self._pool)
        else:
            launches = library.OPERATORS.pool_library.pool_launches
            launches.scatter(last, self._pool, self._out, self._seed, self._dims, self._call)
        written(self._pool)
        return self._pool


def _check_prefill(backend: str, every: int | None, tensors: dict[str, Any]) -> None:
    """Raise ValueError or TypeError for what a call of ``m2rnn`` on a pool must not be given, or must be with it."""
    if tensors["pool"] is None:
        given = next((name for name in _OF_POOLS if tensors[name] is not None), "states_every")
        raise ValueError(f"m2rnn: {given} must come with a pool, got none")
    if tensors["initial_state"] is not None:
        raise ValueError("m2rnn: initial_state must not come with a pool, which has the states to start from")
    if backend != "kernels":
        raise ValueError(f"m2rnn: backend must be kernels with a pool, got {backend!r}")
    if (every is None) != (tensors["states_indices"] is None):
        alone = "states_indices" if every is None else "states_every"
        raise ValueError(f"m2rnn: states_every and states_indices must be given together, got only {alone}")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"m2rnn: states_every must be a number of tokens, got {every!r}")


def seed_of(seed: Tensor | int | None, pool: Tensor) -> Tensor | None:
    """Return a seed as a tensor beside the pool."""
    if isinstance(seed, int) and not isinstance(seed, bool) and isinstance(pool, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=pool.device)
    return seed  # type: ignore[return-value]  # whatever else it is, checks say so


def refuse_gradients(caller: str, tensors: dict[str, Any]) -> None:
    """Raise RuntimeError if a tensor of a call that computes no gradients wants one."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x is not None and x.requires_grad:
                raise RuntimeError(f"{caller}: {name} must not require a gradient; call under torch.no_grad()")


def written(x: Tensor) -> None:
    """Have autograd notice that kernels wrote a tensor in place."""
    torch.autograd.graph.increment_version(x)
