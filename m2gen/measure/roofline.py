"""The least work of a call, and the time that each limit of a GPU makes it take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from m2gen.schedule import Schedule
from m2gen.spec import Dtype, Fp32Products
from m2gen.variant import Variant

FORWARD_FLOPS = 7
"""Float32 operations per element of the state and step, without the product with W: k v^T (2), f H + (1 - f) Z (3),
H^T q (2)."""
REBUILD_FLOPS = 5
"""The same without H^T q, when the backward rebuilds states."""
BACKWARD_FLOPS = 17
"""The same for the backward: C + q dy^T (2), D (4), dq, dk and dv (2 each), df (3), f G (2)."""
BYTES = {Dtype.BF16: 2, Dtype.FP16: 2, Dtype.FP32: 4}


@dataclass(frozen=True)
class Work:
    """The least that one call computes and moves."""

    tanh: float
    """Evaluations of tanh."""
    flops: float
    """Float32 operations outside matrix products."""
    product_flops: float
    """Operations of matrix products."""
    traffic: float
    """Bytes of operands, results and checkpoints, each moved once."""


@dataclass(frozen=True)
class Peaks:
    """Peak rates of a GPU."""

    clock_ghz: float
    tanh: float
    """Evaluations of tanh per clock and SM."""
    flops: float
    """Float32 operations per clock and SM."""
    product_flops: float
    """Operations of dense bf16 or fp16 products with float32 sums, per clock and SM; tf32 has half as many."""
    bytes_per_second: float


# NVIDIA's data sheets of the SXM products of most memory, boost clock; special functions: CUDA C++ Programming Guide,
# arithmetic instructions' throughput.
PEAKS = {
    "H200": Peaks(1.98, 16, 256, 4096, 4.8e12),
    "H100": Peaks(1.98, 16, 256, 4096, 3.35e12),
    "A100": Peaks(1.41, 16, 128, 2048, 2.04e12),
    "B200": Peaks(1.97, 16, 256, 8192, 8.0e12),
}
OTHERS = {"PCIe", "PCIE", "NVL", "40GB", "64GB", "MIG"}
"""Words in the names of products with other clocks and memory, and of slices of a GPU."""


def peaks_of(product: str) -> Peaks | None:
    """Return the peak rates of a GPU by its product name, or None if they are not known, as of slower products."""
    words = product.replace("-", " ").split()
    return None if OTHERS & {*words} else next((peaks for name, peaks in PEAKS.items() if name in words), None)


def work_of(variant: Variant, schedule: Schedule, sizes: tuple[int, int], *, training: bool) -> Work:
    """Return the least work of a call on (batch, seq), counted from the equations of docs/design.md, section 2.

    The backward repeats the forward once, or twice if it rebuilds states into a scratch first.
    """
    batch, seq = sizes
    tokens, heads = batch * seq, variant.heads
    rows, cols = variant.state_expansion, variant.head_dim
    elements = tokens * variant.total_heads * rows * cols
    element = BYTES[variant.dtype]
    operands = tokens * (heads.q * rows + heads.k * rows + heads.v * cols + heads.f) * element
    y = tokens * variant.total_heads * cols * element
    if not training:
        return Work(elements, FORWARD_FLOPS * elements, 2 * cols * elements, operands + y)
    passes = 2 if schedule.two_level else 1
    states = batch * -(-seq // schedule.interval) * variant.total_heads * rows * cols
    flops = FORWARD_FLOPS + passes * REBUILD_FLOPS + BACKWARD_FLOPS
    products = 1 + passes + 2
    traffic = 3 * operands + 2 * y + 2 * states * schedule.checkpoint_bytes(variant)
    return Work((1 + passes) * elements, flops * elements, products * 2 * cols * elements, traffic)


def with_states(work: Work, variant: Variant, batch: int) -> Work:
    """Return the work of a forward that also reads and writes a float32 state of each of ``batch`` sequences."""
    elements = batch * variant.total_heads * variant.state_expansion * variant.head_dim
    return replace(work, traffic=work.traffic + 2 * BYTES[Dtype.FP32] * elements)


def decoding_work(variant: Variant, batch: int, state_bytes: int, tokens: int = 1) -> Work:
    """Return the least work of decoding ``tokens`` for each of ``batch`` sequences.

    It is a forward that reads states of ``state_bytes`` per element, and writes them after each token.
    """
    rows, cols, heads = variant.state_expansion, variant.head_dim, variant.heads
    elements = batch * variant.total_heads * rows * cols
    element = BYTES[variant.dtype]
    operands = batch * (heads.q * rows + heads.k * rows + heads.v * cols + heads.f + variant.total_heads * cols)
    weight = heads.w * cols * cols
    traffic = (1 + tokens) * state_bytes * elements + (tokens * operands + weight) * element
    steps = tokens * elements
    return Work(steps, FORWARD_FLOPS * steps, 2 * cols * steps, traffic)


def _product_flops(variant: Variant, peaks: Peaks) -> float:
    """Return the peak rate of the variant's products; IEEE float32 has no tensor cores."""
    if variant.dtype is not Dtype.FP32:
        return peaks.product_flops
    return peaks.product_flops / 2 if variant.products is Fp32Products.TF32 else peaks.flops


def floors_ms(work: Work, peaks: Peaks, sm_count: int, variant: Variant) -> dict[str, float]:
    """Return the milliseconds that each limit alone makes a call take, by the limit's name."""
    per_second = peaks.clock_ghz * 1e9 * sm_count
    products = _product_flops(variant, peaks)
    return {
        "tanh": 1e3 * work.tanh / (peaks.tanh * per_second),
        "float32 arithmetic": 1e3 * work.flops / (peaks.flops * per_second),
        "products": 1e3 * work.product_flops / (products * per_second),
        "memory traffic": 1e3 * work.traffic / peaks.bytes_per_second,
    }
