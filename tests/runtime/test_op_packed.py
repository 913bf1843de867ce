"""Packed batches: no sequence sees another, empty ones are nothing, and offsets that lie are refused."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from calls import (
    PER_SEQUENCE,
    STEPWISE,
    Spy,
    alone,
    arguments,
    assert_same,
    changed,
    differentiate,
    distance,
    of_sequence,
    offsets_of,
    packed,
    spans,
)
from support import make_variant
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs

VARIANT = make_variant()
SHARED = ("dweight",)
"""Gradients that all sequences contribute to."""


@pytest.fixture
def package(modules) -> ModuleType:
    """Return a package whose sums do not depend on the order of programs."""
    return modules("two_level_partial", "carry")


def draw(lengths: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32, seed: int = 0) -> Inputs:
    """Return a packed batch of sequences of these lengths, each with a state of its own."""
    problem = Problem(0, 0, lengths=tuple(lengths), initial_state=True)
    inputs = make_inputs(VARIANT, problem, seed).to(device)
    return changed(inputs, ("cu_seqlens",), lambda x: x.to(dtype))


LENGTHS = {
    "empty_anywhere": (0, 2, 0, 0, 3, 1, 0),
    "single": (3,),
    "single_empty": (0,),
    "only_empty": (0, 0, 0),
    "long_and_short": (7, 1),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_sequence_is_as_if_it_were_alone(package, device, lengths) -> None:
    """Results and gradients of each sequence have the bits of a call on it alone; the weight's gradient is the sum."""
    inputs = draw(lengths, device)
    together = differentiate(package.m2rnn, inputs)
    each = [differentiate(package.m2rnn, alone(inputs, i)) for i in range(len(lengths))]
    for i, one in enumerate(each):
        assert_same(of_sequence(together, inputs, i), {name: x for name, x in one.items() if name not in SHARED})
    total = sum((one["dweight"].double() for one in each), torch.zeros((), dtype=torch.float64))
    assert distance(together["dweight"], total) < len(lengths) * torch.finfo(torch.float32).eps


def test_offsets_are_int32_or_int64(package, device) -> None:
    """Offsets of either dtype give the same bits."""
    narrow, wide = (draw((2, 0, 1), device, dtype) for dtype in (torch.int32, torch.int64))
    assert_same(differentiate(package.m2rnn, narrow), differentiate(package.m2rnn, wide))


def test_without_initial_states(package, device) -> None:
    """Packed sequences start from zeros when no state is given."""
    inputs = draw((2, 0, 1), device)
    zeros = changed(inputs, ("initial_state",), torch.zeros_like)
    absent = changed(inputs, ("initial_state",), lambda x: None)  # type: ignore[arg-type,return-value]
    expected = differentiate(package.m2rnn, zeros)
    del expected["dinitial_state"]
    assert_same(differentiate(package.m2rnn, absent), expected)


def _in_sequence(x: Tensor, start: int, end: int, value: Tensor | float) -> Tensor:
    other = x.clone()
    other[start:end] = value
    return other


@pytest.mark.parametrize(("index", "value"), [(0, float("nan")), (2, float("nan")), (4, float("inf")), (2, 3.0)])
def test_no_sequence_sees_its_neighbour(package, device, index, value) -> None:
    """Whatever one sequence's operands, state and gradients hold, no bit of the others changes."""
    inputs = draw((1, 0, 2, 0, 2), device)
    start, end = spans(inputs)[index]
    other = changed(inputs, STEPWISE, lambda x: _in_sequence(x, start, end, value))
    other = changed(other, PER_SEQUENCE, lambda x: _in_sequence(x, index, index + 1, value))
    before, after = (differentiate(package.m2rnn, x) for x in (inputs, other))
    assert not torch.equal(before["y"], after["y"])
    for i in (i for i in range(5) if i != index):
        assert_same(of_sequence(after, inputs, i), of_sequence(before, inputs, i))


def test_a_packed_batch_equals_the_padded_one(package, device) -> None:
    """Sequences of one length give the same bits packed and as (B, S), the weight's gradient included."""
    inputs = make_inputs(VARIANT, Problem(2, 3, initial_state=True), seed=1).to(device)
    flat = differentiate(package.m2rnn, packed(inputs))
    whole = differentiate(package.m2rnn, inputs)
    assert_same(flat, {name: x.reshape(flat[name].shape) for name, x in whole.items()})


def test_offsets_of_any_stride(package, device) -> None:
    """Offsets that are a column of a wider tensor are read as that column."""
    inputs = draw((2, 3), device)
    column = torch.stack([inputs.cu_seqlens, torch.full_like(inputs.cu_seqlens, 99)], 1)[:, 0]
    strided = changed(inputs, ("cu_seqlens",), lambda x: column)
    assert strided.cu_seqlens.stride() == (2,)
    assert_same(differentiate(package.m2rnn, strided), differentiate(package.m2rnn, inputs))


WRONG = {
    "decrease": ([0, 3, 2, 5], "must not decrease, got 2 at index 2 after 3"),
    "decreases_from_above_t": ([0, 9, 5], "must not decrease, got 5 at index 2 after 9"),
    "first": ([1, 2, 5], "must start at 0, got 1"),
    "negative": ([-1, 2, 5], "must start at 0, got -1"),
    "below_t": ([0, 2, 4], "must end at the 5 tokens of q, got 4"),
    "above_t": ([0, 2, 6], "must end at the 5 tokens of q, got 6"),
    "far_above_t": ([0, 2, 2**31 - 1], "must end at the 5 tokens of q, got 2147483647"),
    "alone": ([0], "must end at the 5 tokens of q, got 0"),
    "none": ([], "must be (B + 1,), got (0,)"),
    "rank": ([[0, 5]], "must be (B + 1,), got (1, 2)"),
}
"""Offsets of a batch of five tokens, and what the error must name."""


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", WRONG)
def test_offsets_that_do_not_fit_are_refused(package, device, monkeypatch, wrong, dtype) -> None:
    """One line says what offsets must be and what came; nothing runs."""
    values, message = WRONG[wrong]
    operands = arguments(draw((2, 3), device))
    del operands["initial_state"]
    operands["cu_seqlens"] = torch.tensor(values, dtype=dtype, device=device)
    spy = Spy(package, monkeypatch)
    with pytest.raises(ValueError, match=rf"^{re.escape(f'm2rnn: cu_seqlens {message}')}$"):
        package.m2rnn(**operands)
    assert spy.launched == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
def test_offsets_of_another_dtype_are_refused(package, device, dtype) -> None:
    """Offsets are int32 or int64, and the error says so."""
    operands = arguments(draw((2, 3), device))
    operands["cu_seqlens"] = operands["cu_seqlens"].to(dtype)
    with pytest.raises(TypeError, match=rf"^m2rnn: cu_seqlens must be torch.int32 or torch.int64, got {dtype}$"):
        package.m2rnn(**operands)


def test_offsets_are_checked_whenever_they_are_new(package, device) -> None:
    """Neither an offsets tensor changed in place nor another one in its memory passes on the word of the first."""
    operands = arguments(draw((2, 3), device))
    offsets = operands.pop("cu_seqlens")
    package.m2rnn(**operands, cu_seqlens=offsets)
    offsets[1] = 9
    with pytest.raises(ValueError, match="not decrease"):
        package.m2rnn(**operands, cu_seqlens=offsets)
    for middle in (1, 9, 2, 7):
        again = torch.tensor([0, middle, 5], dtype=torch.int32, device=device)
        if middle > 5:
            with pytest.raises(ValueError, match="not decrease"):
                package.m2rnn(**operands, cu_seqlens=again)
        else:
            package.m2rnn(**operands, cu_seqlens=again)
        del again


def test_offsets_without_a_version_are_read_in_every_call(package, device) -> None:
    """A tensor of inference mode does not say that it has changed."""
    operands = arguments(draw((2, 3), device))
    with torch.inference_mode():
        offsets = operands.pop("cu_seqlens").clone()
        package.m2rnn(**operands, cu_seqlens=offsets)
        package.m2rnn(**operands, cu_seqlens=offsets)
        offsets[1] = 9
        with pytest.raises(ValueError, match="not decrease"):
            package.m2rnn(**operands, cu_seqlens=offsets)


def test_offsets_that_are_gone_are_forgotten(package, device) -> None:
    """Nothing is kept of a tensor that nobody has, in whose memory another may be."""
    known = importlib.import_module(f"{package.__name__}.offsets")._OFFSETS
    operands = arguments(draw((2, 3), device))
    offsets = operands.pop("cu_seqlens").clone()
    before = len(known)
    package.m2rnn(**operands, cu_seqlens=offsets)
    assert len(known) == before + 1
    del offsets
    assert len(known) == before


def test_valid_offsets_for_another_number_of_tokens_are_refused(package, device) -> None:
    """Offsets that were right for one batch are checked against the next batch's tokens."""
    operands = arguments(draw((2, 3), device))
    package.m2rnn(**operands)
    shorter = {name: x[:4] if name in STEPWISE else x for name, x in operands.items()}
    with pytest.raises(ValueError, match=r"^m2rnn: cu_seqlens must end at the 4 tokens of q, got 5$"):
        package.m2rnn(**shorter)


def test_offsets_give_the_number_of_states(package, device) -> None:
    """A state for each sequence, no more and no fewer."""
    operands = arguments(draw((2, 3), device))
    operands["initial_state"] = operands["initial_state"][:1]
    with pytest.raises(ValueError, match=re.escape("initial_state must be (2, 2, 16, 16), got (1, 2, 16, 16)")):
        package.m2rnn(**operands)


def test_offsets_helper_counts_tokens() -> None:
    """The helper that tests build offsets with is right."""
    assert offsets_of((2, 0, 3)).tolist() == [0, 2, 2, 5]
