"""One object that says how the kernels of a variant are made by a schedule: what templates and compilers ask."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from m2gen.kernels.launch import Launch
from m2gen.kernels.loads import BACKWARD_VECTORS, FORWARD_VECTORS, Vector
from m2gen.kernels.outputs import Gradients, Output, gradients_of, y_of
from m2gen.kernels.reductions import Reductions
from m2gen.schedule import (
    Family,
    MmaBackward,
    MmaForward,
    PortableBackward,
    PortableForward,
    Reduction,
    Schedule,
    Scratch,
    Tanh,
    WarpgroupBackward,
    WarpgroupForward,
)
from m2gen.schedule.slots import across, gap_bytes
from m2gen.spec import ClipMode, Dtype, Fp32Products
from m2gen.variant import MIN_TILE, Variant, padded

TRITON_DTYPE = {Dtype.BF16: "tl.bfloat16", Dtype.FP16: "tl.float16", Dtype.FP32: "tl.float32"}


class Direction(StrEnum):
    """A kernel of a variant: forward, backward, or one step of decoding."""

    FORWARD = "forward"
    BACKWARD = "backward"
    STEP = "step"


@dataclass(frozen=True)
class Lowering:
    """How the kernels of one variant run by one schedule are made; templates see it as ``k``."""

    variant: Variant
    schedule: Schedule

    # What the variant asks for.

    @property
    def computes_gate(self) -> bool:
        return self.variant.computes_gate

    @property
    def clip_carry(self) -> bool:
        return self.variant.clip is ClipMode.CARRY

    @property
    def single(self) -> bool:
        """Whether operands are float32."""
        return self.variant.dtype is Dtype.FP32

    @property
    def tf32(self) -> bool:
        return self.variant.products is Fp32Products.TF32

    @property
    def gate_parameters(self) -> str:
        """Further arguments of ``gate``, after a step's x."""
        return ", rate, dt_bias" if self.computes_gate else ""

    # What the schedule asks for.

    @property
    def family(self) -> Family:
        return self.schedule.family

    @property
    def gluon(self) -> bool:
        """Whether kernels are in Gluon, with explicit layouts."""
        return self.family is not Family.PORTABLE

    @property
    def wgmma(self) -> bool:
        return self.family is Family.WGMMA

    @property
    def jit(self) -> str:
        return "gluon.jit" if self.gluon else "triton.jit"

    @property
    def interpretable(self) -> bool:
        """Whether Triton's interpreter runs the kernels, which rounds and multiplies bfloat16 unlike a GPU."""
        return not self.gluon

    @property
    def forward(self) -> PortableForward | MmaForward | WarpgroupForward:
        return self.schedule.forward

    @property
    def backward(self) -> PortableBackward | MmaBackward | WarpgroupBackward:
        return self.schedule.backward

    @property
    def unrolled(self) -> range:
        """Steps of an iteration of the forward."""
        return range(self.forward.unroll)

    @property
    def chunk(self) -> range:
        """Steps whose states the backward holds at once."""
        return range(self.backward.chunk)

    @property
    def chunk_pairs(self) -> tuple[tuple[int, int], ...]:
        """Steps of a chunk, each with the one after it, whose state it ends with."""
        return tuple((i, i + 1) for i in self.chunk)

    @property
    def tanh_ptx(self) -> bool:
        return self.schedule.tanh is Tanh.PTX

    @property
    def segmented(self) -> bool:
        return self.schedule.segments > 1

    @property
    def rebuilds(self) -> bool:
        """Whether the backward rebuilds an interval's states into a scratch."""
        return self.schedule.two_level

    @property
    def xorsign(self) -> bool:
        """Whether one instruction clamps what is carried."""
        return self.backward.xorsign

    @property
    def scratch_in_shared(self) -> bool:
        return self.backward.scratch is Scratch.SHARED

    @property
    def slots(self) -> bool:
        return self.schedule.slots

    @property
    def warps_have_slots(self) -> bool:
        return self.schedule.warps_have_slots

    @property
    def forward_slots(self) -> bool:
        return self.forward.slots

    @property
    def forward_registers(self) -> int:
        """Most registers a thread of a forward with slots, if the schedule says so."""
        return self.forward.registers

    @property
    def wide_slopes(self) -> bool:
        """Whether a state's gradient is multiplied by its slope in float32, as float16 may hold the product alone."""
        return self.variant.dtype is Dtype.FP16

    @property
    def gates_by_lane(self) -> bool:
        """Whether gates are loaded as if their address differed by lane: where a warp has registers for all of them.

        Those that the kernel computes are used at once anyway.
        """
        return self.warps_have_slots and self.slot_rows == MIN_TILE and not self.computes_gate

    @property
    def across(self) -> bool:
        """Whether the warps of such a backward have the same rows, and 16 columns each."""
        return self.warps_have_slots and across(self.variant)

    @property
    def slot_rows(self) -> int:
        """Rows of a warp of such a backward."""
        return self.backward.rows if self.across else self.backward.rows // self.backward.warps

    @property
    def gap_dtype(self) -> str:
        """Dtype of the gaps that such a backward keeps."""
        return "float16" if gap_bytes(self.variant) == 2 else "float32"

    @property
    def slot_neighbours(self) -> int:
        """Rows of a lane of such a backward, which are neighbours in memory."""
        return self.slot_rows // 8

    @property
    def whole(self) -> bool:
        """Whether the state's dims need no padding."""
        variant = self.variant
        return (variant.padded_rows, variant.padded_cols) == (variant.state_expansion, variant.head_dim)

    @property
    def checkpoint_dtype(self) -> str:
        """Dtype of the states that the forward saves."""
        return "float16" if self.schedule.checkpoint_bytes(self.variant) == 2 else "float32"

    # Products.

    @property
    def rounds_to_bfloat16(self) -> bool:
        """Whether operands of products are bfloat16, in kernels that the interpreter runs, too."""
        return self.variant.dtype is Dtype.BF16 and self.interpretable

    @property
    def as_operand(self) -> str:
        """x as an operand of a product."""
        return "to_bfloat16(x)" if self.rounds_to_bfloat16 else f"x.to({TRITON_DTYPE[self.variant.dtype]})"

    @cached_property
    def sums(self) -> Reductions:
        """How sums within a program are made."""
        return Reductions(self.variant, self.schedule)

    @cached_property
    def launch(self) -> Launch:
        return Launch(self.variant, self.schedule)

    @property
    def outer_by_product(self) -> bool:
        """Whether the forward has k v^T from a product of 16 slots, rather than as one multiplication an element.

        It saves instructions and takes longer with 16 rows a warp, where latency is all there is (docs/performance.md).
        """
        tile = self.forward.rows, self.forward.warps
        return self.family is Family.MMA and not self.forward_slots and tile != (MIN_TILE, 1)

    @property
    def carries_zeros(self) -> bool:
        """Whether iterations of the forward carry elements that are always zero, in slots or padding."""
        padded = self.variant.masks_rows or self.variant.masks_cols
        return self.outer_by_product or (padded and not self.wgmma)

    # Sums of several programs.

    @cached_property
    def y(self) -> Output:
        return y_of(self.variant, self.forward)

    @cached_property
    def gradients(self) -> Gradients:
        return gradients_of(self.variant, self.backward)

    @cached_property
    def shares(self) -> bool:
        """Whether any tensor has several contributors."""
        return any(out.shared for out in (self.y, *self.gradients))

    @property
    def forward_adds(self) -> bool:
        """Whether programs of the forward add to y by atomics, unless a call asks for determinism."""
        return self.y.shared and self.forward.reduction is Reduction.ATOMIC

    @property
    def backward_adds(self) -> bool:
        return any(out.shared for out in self.gradients) and self.backward.reduction is Reduction.ATOMIC

    @property
    def varying(self) -> tuple[str, ...]:
        """Names of results whose last bits depend on the order of atomics; ``df`` is the gradient of the gate."""
        y = ("y",) if self.forward_adds else ()
        return y + tuple(out.name for out in self.gradients if out.shared and self.backward_adds)

    # What the kernels of a warpgroup load together.

    @property
    def forward_vectors(self) -> tuple[Vector, ...]:
        return FORWARD_VECTORS

    @property
    def backward_vectors(self) -> tuple[Vector, ...]:
        return BACKWARD_VECTORS

    @property
    def interval_padded(self) -> int:
        return padded(self.schedule.interval)
