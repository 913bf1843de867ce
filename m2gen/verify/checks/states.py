"""Sequences in pieces: chunk by chunk, packed beside others, token by token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from m2gen.problem import STEPWISE, Inputs
from m2gen.verify.case import TensorResult
from m2gen.verify.oracle import Operator, differentiate, judge, same
from m2gen.verify.subject import CaseContext, poisoned

CHUNKS = 5
SPLITS = 3
"""Different ways to cut a sequence into CHUNKS; one in the interpreter."""
PER_STEP = ("y", "dq", "dk", "dv", "dforget")
"""Results whose first dim is the tokens of a packed batch."""
PER_SEQUENCE = ("state", "dinitial_state")


def _in_chunks(operator: Operator, cuts: list[int]) -> Operator:
    """Return an operator that calls ``operator`` on one piece of the steps after the other."""

    def run(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor, *rest: Any, **facts: Any) -> Any:
        state, outputs = rest[0], []
        for q_, k_, v_, f_ in zip(*(x.tensor_split(cuts, 1) for x in (q, k, v, forget)), strict=True):
            y, state = operator(q_, k_, v_, weight, f_, state, None, **facts)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    return run


def chunked(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge calls on random pieces, some of them empty, that pass the state on, forward and backward."""
    generator = torch.Generator().manual_seed(subject.seed)
    for _ in range(SPLITS if subject.device.type == "cuda" else 1):
        cuts = torch.randint(subject.inputs.q.shape[1] + 1, (CHUNKS - 1,), generator=generator).sort().values
        operator = _in_chunks(subject.operator, cuts.tolist())
        yield from judge(subject.differentiate(operator), subject.known)


def _alone(inputs: Inputs, index: int, start: int, end: int) -> Inputs:
    """Return one sequence of a packed batch as a batch of one."""
    steps = {name: getattr(inputs, name)[start:end].unsqueeze(0) for name in STEPWISE}
    state = inputs.initial_state
    return replace(
        inputs,
        **steps,
        cu_seqlens=None,
        initial_state=None if state is None else state[index : index + 1],
        dstate=inputs.dstate[index : index + 1],
    )


def isolated(subject: CaseContext) -> Iterable[TensorResult]:
    """Compare every packed sequence with itself alone, bit by bit."""
    inputs, given = subject.inputs, subject.differentiate()
    if inputs.cu_seqlens is None:
        raise ValueError("the problem must be a packed batch")
    for index, (start, end) in enumerate(pairwise(inputs.cu_seqlens.tolist())):
        with poisoned():
            alone = differentiate(subject.operator, _alone(inputs, index, start, end), subject.case)
        part = {name: given[name][start:end].unsqueeze(0) for name in PER_STEP}
        part |= {name: given[name][index : index + 1] for name in PER_SEQUENCE if name in given}
        yield from same(part, alone)


def decoding(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge a call on half of the steps and one ``m2rnn_step`` for each of the rest, on the same state.

    A state in bf16 is rounded at every step, so there every step is one of decoding.
    """
    q, k, v, weight, forget, state, _ = subject.arguments
    half = 0 if subject.case.narrow_state else q.shape[1] // 2
    with poisoned(), torch.no_grad():
        first = (q[:, :half], k[:, :half], v[:, :half], weight, forget[:, :half], state)
        y, state = subject.operator(*first, **subject.gate)
        outputs = [y]
        state = state.bfloat16() if subject.case.narrow_state else state
        for t in range(half, q.shape[1]):
            token = (q[:, t], k[:, t], v[:, t], weight, forget[:, t])
            y, after = subject.package.m2rnn_step(*token, state, **subject.gate)
            if after.data_ptr() != state.data_ptr():
                raise AssertionError("m2rnn_step must update the state in place")
            outputs.append(y.unsqueeze(1))
    return judge({"y": torch.cat(outputs, 1), "state": state}, subject.known)
