"""Records of the tuning database as tests need them: valid, and different in what a test is about."""

from __future__ import annotations

from dataclasses import replace

from support import make_schedule, make_variant

from m2gen.bucket import Bucket, bucket_of
from m2gen.db import (
    POLICY,
    Environment,
    Estimate,
    Failure,
    Key,
    Provenance,
    Reason,
    Record,
    Sizes,
    TensorError,
    Timing,
)
from m2gen.kernels.identity import kernel_hash
from m2gen.kernels.lowering import Lowering
from m2gen.schedule import Schedule
from m2gen.spec import Objective
from m2gen.variant import Variant

H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
VARIANT = make_variant()
TUNED = make_schedule(interval=8, unroll=4, chunk=4)
"""No default of any variant."""
SMS = 132


def environment(device: str = H200, arch: str = "sm_90", triton: str = "3.6.0", driver: str = "570.1") -> Environment:
    """Return an environment of 132 SMs."""
    return Environment(arch, device, SMS, driver, "2.11.0", triton, "12.8")


def provenance(variant: Variant, schedule: Schedule, seed: int = 0) -> Provenance:
    """Return a provenance whose kernels are those that are rendered now."""
    return Provenance(kernel_hash(Lowering(variant, schedule)), "0" * 12, "0.1.0", seed, 40, "host:0", "study")


def timing(high: float = 0.9, default: float = 1.0) -> Timing:
    """Return a timing whose upper end is ``high`` milliseconds."""
    estimates = (Estimate(high * 0.98, high * 0.95, high), Estimate(default, default, default))
    return Timing(*estimates, forward_ms=high / 4, backward_ms=high / 2, peak_bytes=1000)


def sequences_in(bucket: Bucket, heads: int, sms: int = SMS) -> int:
    """Return the fewest sequences in a bucket."""
    return next(n for n in range(1, 20 * sms) if bucket_of(n, heads, sms) is bucket)


def winner(
    bucket: Bucket = Bucket.FOUR,
    *,
    variant: Variant = VARIANT,
    schedule: Schedule = TUNED,
    where: Environment | None = None,
    high: float = 0.9,
    seed: int = 0,
    seq: int = 64,
) -> Record:
    """Return a record that serves builds."""
    sizes = Sizes(sequences_in(bucket, variant.total_heads), seq)
    errors = (TensorError("dq", 1e-4, 2e-4), TensorError("y", 1e-5, 2e-5))
    key = Key(variant.key, Objective.TRAIN, bucket, POLICY)
    where = where or environment()
    return Record(key, where, provenance(variant, schedule, seed), sizes, schedule, timing(high), errors)


def failed(reason: Reason = Reason.HANG, **facts: object) -> Record:
    """Return a record of a failure, of what ``winner`` would be of."""
    record = winner(**facts)  # type: ignore[arg-type]
    return replace(record, timing=None, errors=(), failure=Failure.of(reason, "took longer than 10 s"))
