"""Calls of kernels around a recurrence, and their drawn operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from m2gen.problem import TORCH_DTYPE, Problem, gate_parameters
from m2gen.runtime.layer_launches import rounded
from m2gen.runtime.room import ROW
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.variant import Variant

Operands = Mapping[str, Tensor]
"""Operands by name; what a call has not is not there."""

EPS = 1e-5
"""The epsilon of the norm, as layers have it by default."""
STEPS = 144
"""Steps of the plain problems: more than programs of most tiles have."""
TOKENS = 5
"""Sequences of which a token each is decoded."""
CONVOLVES = (LayerKernel.CONVOLVE, LayerKernel.CONVOLVE_BACKWARD, LayerKernel.DECODE)
FINISHES = (LayerKernel.FINISH, LayerKernel.FINISH_BACKWARD)


@dataclass(frozen=True)
class LayerCase:
    """One call of a kernel: its problem, the options of its layer, and the seed of its operands."""

    name: str
    problem: Problem
    seed: int
    width: int = 4
    """Inputs that the convolution adds up; 0 without one."""
    bias: bool = False
    silu: bool = True
    epilogue: bool = True
    """Whether the layer has D and a norm."""
    rounds: bool = False
    """Whether the gate is rounded to the operands' dtype."""
    approximate: bool = False
    """Whether decoding may use a GPU's own tanh."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each sequence begins and ends among all tokens."""
        lengths = self.problem.lengths or (self.problem.seq,) * self.problem.batch
        ends = torch.tensor((0, *lengths)).cumsum(0).tolist()
        return list(pairwise(ends))


def timed_case(batch: int, seq: int, *, approximate: bool, seed: int = 0) -> LayerCase:
    """Return the call of a published layer that is timed."""
    return LayerCase("timed", Problem(batch, seq), seed, approximate=approximate)


def checked_cases(kernel: LayerKernel, *, approximate: bool, held_out: bool = False) -> tuple[LayerCase, ...]:
    """Return the calls of every trial, or with ``held_out`` those that only finalists get.

    The first is as it is timed. The second is of packed sequences of ragged lengths that go on from inputs before them,
    or of slots of which some are left out, in a layer with biases. The last has neither norm nor D nor activation.
    """
    shift = 100 if held_out else 0
    plain, packed = Problem(2, STEPS), Problem(0, 0, lengths=(0, 5, STEPS - 1, 1), initial_state=True)
    bare = Problem(1, 50)
    if held_out:
        plain, bare = Problem(1, 2 * STEPS), Problem(3, 17)
        packed = Problem(0, 0, lengths=(17, STEPS + 5, 0, 1, 2), initial_state=True)
    if kernel is LayerKernel.DECODE:
        plain = bare = Problem(2 * TOKENS if held_out else TOKENS, 1)
        packed = Problem(TOKENS, 1, initial_state=True)
    return (
        LayerCase("plain", plain, shift, approximate=approximate),
        LayerCase("packed", packed, shift + 1, width=4 if held_out else 3, bias=True),
        LayerCase("bare", bare, shift + 2, width=2 if held_out else 0, silu=False, epilogue=False, rounds=True),
    )


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a layer's tensors."""

    variant: Variant

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels of q, of k and of v."""
        heads, rows = self.variant.heads, self.variant.state_expansion
        return heads.q * rows, heads.k * rows, self.inner

    @property
    def channels(self) -> int:
        return sum(self.sizes)

    @property
    def inner(self) -> int:
        return self.variant.total_heads * self.variant.head_dim

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPE[self.variant.dtype]


class _Drawer:
    """Draws on the CPU, so that a seed means the same numbers everywhere; on the meta device nothing."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._dtype, self._device = dtype, device

    def __call__(
        self, *shape: int, scale: float = 1.0, around: float = 0.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or self._dtype
        if self._device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self._device)
        return (torch.randn(shape, generator=self.generator) * scale + around).to(self._device, dtype)


def draw(kernel: LayerKernel, variant: Variant, case: LayerCase, device: torch.device) -> Operands:
    """Draw what a kernel reads: rows of the input projection, parameters, states and incoming gradients."""
    shape, normal = LayerSizes(variant), _Drawer(case.seed, TORCH_DTYPE[variant.dtype], device)
    tokens = case.spans[-1][1] if case.spans else 0
    found = {"rows": normal(tokens, rounded(shape.channels + shape.inner + variant.heads.f, ROW))}
    if kernel is LayerKernel.DECAY or kernel is LayerKernel.DECODE:
        gate = gate_parameters(variant.heads.f, normal.generator)
        found |= {name: x.to(device) for name, x in gate.items()}
    if kernel in CONVOLVES:
        found |= _convolution(shape, case, normal)
    if case.epilogue and kernel not in (LayerKernel.CONVOLVE, LayerKernel.DECAY):
        found["skip"] = normal(variant.total_heads, variant.head_dim, scale=0.5, around=1.0)
    if case.epilogue and kernel in (*FINISHES, LayerKernel.DECODE):
        found["norm"] = normal(shape.inner, scale=0.5, around=1.0)
    if kernel in FINISHES:
        found["qkv"] = normal(tokens, rounded(shape.channels, ROW))
        found["y"] = normal(tokens, shape.inner)
    match kernel:
        case LayerKernel.CONVOLVE_BACKWARD:
            found |= {f"d{x}": normal(tokens, size) for x, size in zip("qkv", shape.sizes, strict=True)}
            found |= {"du": normal(tokens, shape.inner)} if case.epilogue else {}
        case LayerKernel.DECAY:
            found["df"] = normal(tokens, variant.heads.f, dtype=None if case.rounds else torch.float32)
        case LayerKernel.FINISH_BACKWARD:
            found["do"] = normal(tokens, shape.inner)
        case LayerKernel.DECODE:
            found |= _states(shape, case, normal, device)
    return found


def _convolution(shape: LayerSizes, case: LayerCase, normal: _Drawer) -> dict[str, Tensor]:
    found = {}
    if case.width:
        found["conv_weight"] = normal(shape.channels, 1, case.width, scale=0.5)
    if case.bias:
        found["conv_bias"] = normal(shape.channels, scale=0.5)
    if case.problem.lengths is not None:
        offsets = torch.tensor([start for start, _ in case.spans] + [case.spans[-1][1]], dtype=torch.int32)
        found["cu_seqlens"] = offsets.to(found["conv_weight"].device)
        if case.problem.initial_state:
            found["before"] = normal(len(case.spans), case.width - 1, shape.channels)
    return found


def _states(shape: LayerSizes, case: LayerCase, normal: _Drawer, device: torch.device) -> dict[str, Tensor]:
    """Draw a state weight whose eigenvalues are within 1, and states, in slots that sequences do not have in order."""
    variant, batch = shape.variant, case.problem.batch
    rows, cols = variant.state_expansion, variant.head_dim
    slots = batch + 2 if case.problem.initial_state else batch
    noise = normal(variant.heads.w, cols, cols, scale=0.3 / cols**0.5, dtype=torch.float32)
    found = {
        "state_weight": (noise + 0.7 * torch.eye(cols, device=device)).to(shape.dtype),
        "conv": normal(slots, max(case.width - 1, 0), shape.channels),
        "state": normal(slots, variant.total_heads, rows, cols, dtype=torch.float32),
    }
    if case.problem.initial_state:
        indices = torch.arange(batch, 0, -1, dtype=torch.int32)
        indices[1] = -1  # a sequence that is left out
        found["indices"] = indices.to(device)
    return found
