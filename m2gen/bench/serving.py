"""The calls of an engine: a token, prompts, and a token with drafts, on contiguous states and in slots of a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m2gen.bench.entries import BenchWorkload, Implementation
from m2gen.bench.kinds import Call
from m2gen.bench.operators import Stepper, sequence_operator, stepper, stepper_of_several
from m2gen.problem import Inputs
from m2gen.variant import Variant
from m2gen.verify import Operator
from m2gen.verify.oracle import OPERANDS, gate_of


def pooled(state: Tensor, each: int = 1) -> tuple[Tensor, Tensor]:
    """Return a pool of twice as many slots as are handed out, and the slots (B, each), shuffled.

    The states (B, N, K, V) are in the first slots of their requests; all others hold NaN.
    """
    count = state.shape[0] * each
    shuffled = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0))[:count]
    table = shuffled.view(-1, each).to(state.device, torch.int32)
    pool = state.new_full((2 * count, *state.shape[1:]), torch.nan)
    pool[table[:, 0].long()] = state
    return pool, table


def in_order(state: Tensor) -> tuple[Tensor, Tensor]:
    """Return states (B, N, K, V) as a pool, and the slots (B, 1) of their requests, in order and without gaps."""
    return state, torch.arange(state.shape[0], device=state.device, dtype=torch.int32)[:, None]


@dataclass(frozen=True)
class DraftSlots:
    """The slots of requests that decode several tokens a call."""

    pool: Tensor
    table: Tensor
    """Slots (B, T) that the states after each token are left in."""
    accepted: Tensor
    """How many tokens (B,) of the call before count, so that requests start from ``table[b, accepted[b] - 1]``; where
    it is 0, the request is skipped."""

    @property
    def path(self) -> Sequence[Tensor]:
        """The slots (B,) that requests start from, then those after each token; -1 for a request that is skipped."""
        starts = self.table.gather(1, (self.accepted - 1).clamp(min=0).long()[:, None])
        every = torch.cat((starts, self.table), 1).masked_fill((self.accepted < 1)[:, None], -1)
        return every.T.contiguous().unbind()


Drafting = Callable[[], Sequence[Tensor]]
"""Advances requests by T tokens and returns y (B, N, V) of each."""


def at_once(steps: Stepper, tokens: Inputs, slots: DraftSlots) -> Drafting:
    """Return one call for all tokens (B, T, ...)."""
    operands = (tokens.q, tokens.k, tokens.v, tokens.weight, tokens.forget, slots.pool)
    call = partial(steps, *operands, indices=slots.table, accepted=slots.accepted, **gate_of(tokens))
    return lambda: call()[0].unbind(1)


def one_by_one(step: Stepper, tokens: Inputs, slots: DraftSlots) -> Drafting:
    """Return a call for each token, which starts from where the one before left its state."""
    gate, path = gate_of(tokens), slots.path
    calls = [
        partial(
            step, *(x[:, t] for x in (tokens.q, tokens.k, tokens.v)), tokens.weight, tokens.forget[:, t], slots.pool,
            indices=path[t], out_indices=path[t + 1], **gate,
        )
        for t in range(tokens.q.shape[1])
    ]  # fmt: skip
    return lambda: [call()[0] for call in calls]


def drafting(implementation: Implementation, variant: Variant, call: Call) -> Callable[[Inputs, DraftSlots], Drafting]:
    """Return what makes calls of several tokens; raises whatever a package raises."""
    if call is Call.STEPS:
        return partial(at_once, stepper_of_several(implementation))
    return partial(one_by_one, stepper(implementation, variant))


def prompts(operator: Operator, inputs: Inputs, call: Call) -> tuple[Callable[[], tuple[Tensor, Tensor]], Tensor]:
    """Return a call on packed prompts, and where the final states (B, ...) are in the second of its results.

    In a pool, they are left in other slots than those they start from, so that every call is the same.
    """
    assert inputs.cu_seqlens is not None
    options: dict[str, Any] = {**gate_of(inputs), "cu_seqlens_cpu": inputs.cu_seqlens.cpu()}
    operands = {name: getattr(inputs, name) for name in OPERANDS}
    batch = inputs.dstate.shape[0]
    where = torch.arange(batch, device=inputs.dstate.device)
    if call.pooled:
        first = operands.pop("initial_state")
        absent = torch.full_like(inputs.dstate, torch.nan)
        options["pool"], table = pooled(absent if first is None else first, 2)
        options["indices"], options["out_indices"] = table.T.contiguous().unbind()
        options["has_initial_state"] = torch.full((batch,), first is not None, device=where.device)
        where = options["out_indices"].long()
    return partial(operator, **operands, cu_seqlens=inputs.cu_seqlens, **options), where


def served(implementation: Implementation, workload: BenchWorkload, inputs: Inputs) -> Callable[[], Any]:
    """Return a call of an engine on the inputs of a workload, which advances states in place."""
    call = workload.call
    if call.prefills:
        return prompts(sequence_operator(implementation, workload.variant), inputs, call)[0]
    state = inputs.initial_state
    assert state is not None
    if call.drafts:
        pool, table = pooled(state, inputs.q.shape[1])
        after_a_prompt = torch.ones_like(table[:, 0])
        return drafting(implementation, workload.variant, call)(inputs, DraftSlots(pool, table, after_a_prompt))
    token = [x[:, 0] for x in (inputs.q, inputs.k, inputs.v)]
    options: dict[str, Tensor] = dict(gate_of(inputs))
    if call.pooled:
        state, table = in_order(state) if call is Call.DECODE_ORDERED else pooled(state)
        options["indices"] = table[:, 0]
    step = stepper(implementation, workload.variant)
    return partial(step, *token, inputs.weight, inputs.forget[:, 0], state, **options)
