"""Compare one call with float64: any memory layout, any subset of gradients, any dtypes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from m2gen.verify.case import Layout, TensorResult
from m2gen.verify.oracle import Arrange, call, differentiate, judge, named_operands
from m2gen.verify.subject import CaseContext, poisoned

AUTOCAST = ("q", "k", "v")


def _strided(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]


def _transposed(x: Tensor) -> Tensor:
    first = min(1, x.dim() - 2)
    return x.clone() if first < 0 else x.transpose(first, first + 1).contiguous().transpose(first, first + 1)


def _sliced(x: Tensor) -> Tensor:
    pad = x.new_full((*x.shape[:-1], 3), float("nan"))
    return torch.cat([pad, x, pad], -1)[..., 3:-3]


def _expanded(x: Tensor) -> Tensor:
    one = x[:1, :1].expand_as(x) if x.dim() > 2 else x
    return one if torch.equal(one, x) else x.clone()


LAYOUTS: dict[Layout, Arrange] = {
    Layout.PLAIN: torch.clone,
    Layout.STRIDED: _strided,
    Layout.TRANSPOSED: _transposed,
    Layout.SLICED: _sliced,
    Layout.EXPANDED: _expanded,
}


def gradients(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge results and all gradients, operands and incoming gradients laid out as the case says."""
    return judge(subject.differentiate(arrange=LAYOUTS[subject.case.layout]), subject.known)


def single(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge the gradient of every operand when it is wanted alone."""
    for name in named_operands(subject.inputs):
        given = subject.differentiate(wanted=(name,))
        yield from judge({f"d{name}": given[f"d{name}"]}, subject.known)


def inference(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge y and the state without gradients, and y of a call that wants no state."""
    operands = named_operands(subject.inputs)
    with poisoned(), torch.no_grad():
        y, state = call(subject.operator, operands, subject.inputs, subject.case)
    yield from judge({"y": y, "state": state}, subject.known)
    stateless = partial(subject.operator, output_final_state=False)
    with poisoned(), torch.inference_mode():
        y, state = call(stateless, operands, subject.inputs, subject.case)
    if state is not None:
        raise AssertionError("the state must be None with output_final_state=False")
    yield from (replace(result, tensor="y_alone") for result in judge({"y": y}, subject.known))


def autocast(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge a call on float32 operands under autocast to the variant's dtype."""
    inputs = subject.inputs
    narrow = inputs.q.dtype
    wide = replace(inputs, **{name: getattr(inputs, name).float() for name in AUTOCAST})
    with poisoned(), torch.autocast(subject.device.type, dtype=narrow):
        given = differentiate(subject.operator, wide, subject.case)
    casts = {f"d{name}": given[f"d{name}"].to(narrow) for name in AUTOCAST}  # no rounding: autocast's own cast did it
    return judge({**given, **casts}, subject.known)
