"""What the kernels of a step are for, by their names: one rule for every layer that is timed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from m2gen.bench.layers.kinds import Part

INDUCTOR = re.compile(r"triton_(poi|red|per|for|split_scan)_")
"""Names of torch.compile's fused elementwise kernels and reductions, which go on with the operators that they hold."""
RULES: tuple[tuple[Part, re.Pattern[str]], ...] = (
    (Part.REST, INDUCTOR),
    # m2gen's, and the published ones
    (Part.RECURRENCE, re.compile(r"^_?m2rnn_(forward|backward|step|decode|sum|segment)\w*", re.ASCII)),
    # of torch: FlashAttention, cuDNN's and the memory-efficient one; some have cutlass in their names
    (
        Part.RECURRENCE,
        re.compile(r"flash_(fwd|bwd|fprop|bprop)|_sdpa_|fmha|attention|_dot_do_o|convert_dq_", re.IGNORECASE),
    ),
    # of flash-linear-attention: the delta rule in chunks, and the token by token one
    (
        Part.RECURRENCE,
        re.compile(
            r"^(chunk_|fused_recurrent_|fused_chunk_|recompute_w_u|prepare_wy_repr|solve_tril|merge_16x16|wy_fast"
            r"|gdn_gate_\w*cumsum)"
        ),
    ),
    (Part.PROJECTIONS, re.compile(r"^triton_tem_|gemm|gemv|nvjet|xmma|cutlass|splitKreduce|cublas", re.IGNORECASE)),
)
"""Parts of kernels by what their names have; the first that fits counts, and what fits none is the rest."""


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel in a step."""

    name: str
    ms: float
    """Milliseconds of the step's launches together."""
    launches: float

    @property
    def part(self) -> Part:
        return part_of(self.name)


def part_of(kernel: str) -> Part:
    """Return what a kernel is for, by the name that a profiler gives it."""
    bare = kernel.removeprefix("void ")
    return next((part for part, pattern in RULES if pattern.search(bare)), Part.REST)


def parts_ms(kernels: Iterable[KernelTime]) -> dict[Part, float]:
    """Return the milliseconds of each part; empty if no kernel was seen."""
    found = list(kernels)
    return {part: sum(each.ms for each in found if each.part is part) for part in Part} if found else {}
