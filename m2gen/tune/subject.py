"""What a search is about, and the points that it may try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from m2gen.bucket import Bucket
from m2gen.device import Device
from m2gen.schedule import AnySchedule
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.schedule.tunable import Tunable
from m2gen.spec import Objective
from m2gen.tune.memory import USUAL, MemoryBound
from m2gen.variant import Variant


@dataclass(frozen=True)
class Subject:
    """Subject of a search: a variant on a device, on one problem, for one objective; or a kernel around it."""

    variant: Variant
    device: Device
    objective: Objective
    batch: int
    seq: int
    memory: MemoryBound = USUAL
    kernel: LayerKernel | None = None
    """The kernel that is searched; the recurrence if None. Its variant has no numerics (``Tunable.around``)."""

    @property
    def tunable(self) -> Tunable:
        """What is searched."""
        return Tunable(self.variant, self.kernel)

    @property
    def size(self) -> str:
        """The problem, for tables."""
        return f"B{self.batch} S{self.seq}"

    @property
    def times(self) -> float | None:
        """How many times the default's memory a call may take; no bound for inference, which keeps nothing after it."""
        return self.memory.times if self.objective is Objective.TRAIN else None

    @property
    def bucket(self) -> Bucket:
        """The calls that the problem stands for."""
        return self.tunable.bucket(self.batch, self.device.sm_count)


@dataclass(frozen=True)
class Space:
    """The points of a subject's space in a fixed order, and how many were excluded for which reason."""

    products: Mapping[str, int]
    """Points of the product of the axes of each family that serves the variant, or of the kernel."""
    points: tuple[AnySchedule, ...]
    pruned: dict[str, int]
    """How many points each reason excludes; a point counts for the first that does."""

    @property
    def size(self) -> int:
        return sum(self.products.values())
