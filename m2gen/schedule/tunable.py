"""What schedules are searched for and recorded: a variant's recurrence, or one of the kernels around it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from m2gen.bucket import BUCKETS, Bucket, bucket_of
from m2gen.device import Device
from m2gen.schedule import AnySchedule, Family, default, problems
from m2gen.schedule.layer import DEFAULTS
from m2gen.schedule.layer_knobs import LayerKernel, Tiles
from m2gen.spec import ClipMode, Fp32Products, GateKind, Objective, TanhMode
from m2gen.variant import Variant, parse_variant

NUMERICS = f"_{ClipMode.CARRY}_{TanhMode.APPROX}"
"""End of the keys of variants that stand for all numerics."""
INFERENCE = (LayerKernel.CONVOLVE, LayerKernel.DECAY, LayerKernel.FINISH, LayerKernel.DECODE)
"""Kernels of calls without gradients."""


@dataclass(frozen=True)
class Tunable:
    """The recurrence of a variant, or a kernel around it."""

    variant: Variant
    kernel: LayerKernel | None = None
    """None for the recurrence."""

    @classmethod
    def around(cls, variant: Variant, kernel: LayerKernel) -> Self:
        """Return a kernel of a variant's layer, which depends on dims, heads and dtype alone."""
        plain = replace(variant, clip=ClipMode.CARRY, tanh=TanhMode.APPROX)
        return cls(replace(plain, gate=GateKind.GIVEN, products=Fp32Products.IEEE), kernel)

    @classmethod
    def parse(cls, key: str) -> Self:
        """Return what has this key; raises ValueError as ``must ..., got ...``."""
        kernel = next((kernel for kernel in LayerKernel if key.startswith(f"{kernel}_k")), None)
        if kernel is None:
            if not key.startswith("k"):
                raise ValueError(f"must be the key of a variant, or begin with {', '.join(LayerKernel)}, got {key!r}")
            return cls(parse_variant(key))
        found = cls(parse_variant(key.removeprefix(f"{kernel}_") + NUMERICS), kernel)
        if found != cls.around(found.variant, kernel):
            raise ValueError(f"must have no numerics, got {key!r}")
        return found

    @property
    def key(self) -> str:
        """The name in files, tables and records: the variant's, of a kernel without numerics and behind its own."""
        key = self.variant.key
        return key if self.kernel is None else f"{self.kernel}_{key.removesuffix(NUMERICS)}"

    @property
    def kin(self) -> str:
        """Beginning of the keys of others whose schedules are worth a try: the same dims."""
        prefix = "" if self.kernel is None else f"{self.kernel}_"
        return f"{prefix}k{self.variant.state_expansion}_v{self.variant.head_dim}_"

    def bucket(self, sequences: int, sm_count: int) -> Bucket:
        """Return the calls that a problem stands for: all that fill the GPU, for a kernel that has no few programs."""
        if self.kernel is not None:
            return BUCKETS[-1]
        return bucket_of(sequences, self.variant.total_heads, sm_count)

    def default(self, device: Device, bucket: Bucket | None = None) -> AnySchedule:
        """Return what serves until a search has found better."""
        return default(self.variant, device, bucket) if self.kernel is None else DEFAULTS[self.kernel]

    def problems(self, schedule: AnySchedule, device: Device) -> tuple[str, ...]:
        """Return why a schedule cannot serve on a device; empty when it can."""
        if isinstance(schedule, Tiles):
            if schedule.family is self.kernel:
                return tuple(schedule.problems(self.variant, device))
        elif self.kernel is None:
            return problems(self.variant, schedule, device)
        return (f"family must be {self.kernel or ', '.join(Family)}, got {schedule.family}",)

    def times_backward(self, objective: Objective) -> bool:
        """Whether a call is a forward and a backward, which are timed apart."""
        return objective is Objective.TRAIN and self.kernel in (None, LayerKernel.DECAY)


def keys_of(variant: Variant) -> tuple[str, ...]:
    """Return the keys of a variant's recurrence and of the kernels around it."""
    return (variant.key, *(Tunable.around(variant, kernel).key for kernel in LayerKernel))


def kernels_of(objective: Objective, variant: Variant) -> tuple[LayerKernel, ...]:
    """Return the kernels around a recurrence that matter for an objective; none where they serve no such heads."""
    if variant.heads.v != variant.total_heads:
        return ()
    return tuple(kernel for kernel in LayerKernel if objective is Objective.TRAIN or kernel in INFERENCE)
