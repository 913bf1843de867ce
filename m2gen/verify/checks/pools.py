"""States of requests in slots of a pool: prompts, tokens and drafts, against the same tokens in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from m2gen.problem import STEPWISE, Inputs
from m2gen.spec import Dtype
from m2gen.verify.case import Case, TensorResult
from m2gen.verify.checks.layer import LayerCall, decoded, drawn, known
from m2gen.verify.oracle import judge, oracle, same
from m2gen.verify.subject import CaseContext, poisoned

CHECKPOINT_ROUNDING = torch.finfo(torch.float16).eps / 2
"""Forwards on 16-bit operands may save the states that ``states_every`` keeps in float16."""


@dataclass(frozen=True)
class _Pool:
    """A pool of NaN with more slots than requests have, in no order, and what was in it at first."""

    states: Tensor
    table: Tensor
    """Slots of each request, (B, C)."""
    before: Tensor

    @classmethod
    def of(cls, subject: CaseContext, first: Tensor | None, columns: int) -> _Pool:
        """Return one that has states ``first`` (B, N, K, V), if any, in the first column of its table."""
        variant, batch = subject.variant, subject.case.problem.sequences
        size = variant.total_heads, variant.state_expansion, variant.head_dim
        dtype = torch.bfloat16 if subject.case.narrow_state else torch.float32
        states = torch.full((batch * (columns + 1), *size), float("nan"), dtype=dtype, device=subject.device)
        order = torch.randperm(states.shape[0], generator=torch.Generator().manual_seed(subject.seed))
        table = order[: batch * columns].view(batch, columns).to(subject.device, torch.int32)
        if first is not None:
            states[table[:, 0].long()] = first.to(dtype)
        return cls(states, table, states.clone())

    def at(self, slots: Tensor) -> Tensor:
        """Return the states in slots."""
        return self.states[slots.long()]

    def untouched(self, written: Tensor) -> tuple[TensorResult, ...]:
        """Compare every slot but those ``written`` with what it held, bit by bit."""
        mask = torch.ones(self.states.shape[0], dtype=torch.bool, device=self.states.device)
        mask[written.flatten().long()] = False
        bits = torch.int16 if self.states.element_size() == 2 else torch.int32
        return same({"other_slots": self.states[mask].view(bits)}, {"other_slots": self.before[mask].view(bits)})


def pool(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge requests of a batch: half of the tokens as a prompt, one alone, one with a draft that is wrong, the rest.

    A state in bf16 is rounded at every token, so there no tokens are a prompt. Beside the requests there is one without
    a slot, of which every operand is NaN.
    """
    q, k, v, _weight, forget, first, _ = subject.arguments
    operands, half = (q, k, v, forget), 0 if subject.case.narrow_state else q.shape[1] // 2
    slots = _Pool.of(subject, first, 3)
    begin = 1 if half else 0
    here, table = slots.table[:, begin], slots.table[:, begin : begin + 2]
    package: Any = subject.package
    with poisoned(), torch.no_grad():
        outputs = [_prompt(subject, slots, half)] if half else []
        outputs.append(_tokens(subject, slots, package.m2rnn_step, half, half + 1, indices=here))
        draft = {"indices": table, "accepted": torch.ones_like(here)}
        wrong = [torch.cat((x[:, half + 1 : half + 2], -x[:, :1]), 1) for x in operands]
        outputs.append(_advance(subject, slots, package.m2rnn_steps, wrong, **draft)[:, :1])
        last = slots.table[:, 2]
        rest = _tokens(subject, slots, package.m2rnn_steps, half + 2, q.shape[1], **draft, out_indices=last)
    y = torch.cat((*outputs, rest), 1)
    yield from judge({"y": y[:-1], "state": slots.at(last)}, subject.known)
    yield from same({"skipped": y[-1, half:]}, {"skipped": torch.zeros_like(y[-1, half:])})
    yield from slots.untouched(torch.cat((here[:, None], table, last[:, None]), 1))


def _prompt(subject: CaseContext, slots: _Pool, end: int) -> Tensor:
    """Return y of the first tokens, whose states go from the table's first column to its second, and a row of zeros."""
    q, k, v, weight, forget, first, _ = subject.arguments
    operands = (q[:, :end], k[:, :end], v[:, :end], weight, forget[:, :end])
    has = torch.full((q.shape[0],), first is not None, device=q.device)
    where = {"indices": slots.table[:, 0], "out_indices": slots.table[:, 1], "has_initial_state": has}
    y, _ = subject.operator(*operands, **subject.gate, pool=slots.states, **where)
    return torch.cat((y, torch.zeros_like(y[:1])))


def _tokens(subject: CaseContext, slots: _Pool, call: Any, begin: int, end: int, **where: Tensor) -> Tensor:
    """Return y of some tokens of each request; ``m2rnn_step`` takes one, without a dim of tokens."""
    q, k, v, _, forget, _, _ = subject.arguments
    return _advance(subject, slots, call, [x[:, begin:end] for x in (q, k, v, forget)], **where)


def _advance(subject: CaseContext, slots: _Pool, call: Any, tokens: list[Tensor], **where: Tensor) -> Tensor:
    """Return y of requests and of one more, which has no slot, and check that the call returns the pool."""
    q, k, v, forget = (torch.cat((x, torch.full_like(x[:1], float("nan")))) for x in tokens)
    places = {name: torch.cat((x, torch.full_like(x[:1], -1))) for name, x in where.items()}
    if "accepted" not in where:
        q, k, v, forget = (x[:, 0] for x in (q, k, v, forget))
    y, after = call(q, k, v, subject.inputs.weight, forget, slots.states, **subject.gate, **places)
    if after is not slots.states:
        raise AssertionError(f"{call.__name__} must return the pool that it was given")
    found: Tensor = y if "accepted" in where else y[:, None]
    return found


def pool_prompts(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge a call on prompts, from slots or from zeros: its results, and that nothing else is written."""
    *operands, first, offsets = subject.arguments
    slots = _Pool.of(subject, first, 2)
    has = None if first is not None else torch.zeros(slots.table.shape[0], dtype=torch.bool, device=subject.device)
    where = {"indices": slots.table[:, 0], "out_indices": slots.table[:, 1], "has_initial_state": has}
    with poisoned(), torch.no_grad():
        y, _ = subject.operator(*operands, None, offsets, **subject.gate, pool=slots.states, **where)
    yield from judge({"y": y, "state": slots.at(slots.table[:, 1])}, subject.known)
    yield from slots.untouched(slots.table[:, 1])


def pool_kept(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge the states that a call on prompts leaves in slots after a half of its tokens, after all, and at its end."""
    *operands, first, _ = subject.arguments
    every = subject.case.problem.seq // 2
    slots = _Pool.of(subject, first, 4)
    pages = slots.table[:, 1:3]
    where = {"indices": slots.table[:, 0], "out_indices": slots.table[:, 3], "states_indices": pages.contiguous()}
    with poisoned(), torch.no_grad():
        y, _ = subject.operator(*operands, **subject.gate, pool=slots.states, states_every=every, **where)
    yield from judge({"y": y, "state": slots.at(slots.table[:, 3])}, subject.known)
    rounding = 0.0 if subject.variant.dtype is Dtype.FP32 else CHECKPOINT_ROUNDING
    for column, steps in enumerate((every, 2 * every)):
        answer = oracle(subject.variant, _until(subject, steps), _first_steps(subject.inputs, steps), subject.seed)
        budgets = {"state": answer.budgets["state"] + rounding}
        (found,) = judge({"state": slots.at(pages[:, column])}, replace(answer, budgets=budgets))
        yield replace(found, tensor=f"state_after_{'half' if column == 0 else 'all'}")
    yield from slots.untouched(slots.table[:, 1:])


def _until(subject: CaseContext, steps: int) -> Case:
    return replace(subject.case, problem=replace(subject.case.problem, seq=steps))


def _first_steps(inputs: Inputs, steps: int) -> Inputs:
    return replace(inputs, **{name: getattr(inputs, name)[:, :steps] for name in STEPWISE})


def layer_pool(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge a layer on slots of its pool: a prompt in two pieces, a token alone, and the rest with a wrong draft."""
    module, call = drawn(subject)
    pool_of = subject.submodule("layer_pool").M2RNNPool
    with poisoned(), torch.no_grad():
        found = _layer_on_slots(module, call, pool_of)
    yield from judge(found, known(subject, module, call, decoded))


def _layer_on_slots(module: nn.Module, call: LayerCall, pool_of: Any) -> dict[str, Tensor]:
    """Return what a layer makes of a batch of requests by their slots, and the states that are in them in the end."""
    x, (batch, steps) = call.x, call.x.shape[:2]
    held: Any = pool_of.allocate(module, 3 * batch, x.device, x.dtype)
    held.conv.fill_(float("nan"))
    held.state.fill_(float("nan"))
    table = torch.randperm(3 * batch, generator=torch.Generator().manual_seed(call.seed)).view(batch, 3)
    table = table.to(x.device, torch.int32)
    third, half = steps // 3, steps // 2
    none = torch.zeros(batch, dtype=torch.bool, device=x.device)
    pieces = [held.prefill(x[:, :third], table[:, 0], has_initial_state=none)]
    pieces.append(held.prefill(x[:, third:half], table[:, 0], out_indices=table[:, 1]))
    pieces.append(held.step(x[:, half], table[:, 1])[:, None])
    drafts = table[:, 1:].contiguous()
    for t in range(half + 1, steps):
        pair = torch.stack((x[:, t], -x[:, t]), 1)
        pieces.append(held.steps(pair, drafts, torch.ones_like(table[:, 0]))[:, :1])
    slots = table[:, 1].long()
    every = {"y": torch.cat(pieces, 1), "conv": held.conv[slots], "state": held.state[slots]}
    return {name: tensor for name, tensor in every.items() if tensor.numel()}
