"""Sums over the threads of a warp that the steps of an iteration share, in kernels whose layouts are explicit.

A lane of a tile has rows l // 4 and l // 4 + 8, and columns 2 (l % 4) and the next (``m2gen.kernels.layouts``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from m2gen.kernels.outputs import Output, backward_outputs, forward_output
from m2gen.schedule import Layouts, Part, Schedule
from m2gen.spec import Dtype
from m2gen.variant import MIN_TILE, Variant

EIGHTHS = 8
"""Into which a warpgroup cuts a step's sums over rows: as many as rows that lanes have, which exchange them."""


@dataclass(frozen=True)
class Together:
    """A sum over threads that all steps of an iteration share.

    Threads exchange what they have of a step for what others have of another one, so that every exchange halves the
    sums that a thread goes on with, where sums step by step would each take every exchange.
    """

    lines: tuple[str, ...]
    """Statements that leave every step's sum in <name>_0, with threads that have the same one."""
    step: str
    """Which step a thread ends up with."""
    offsets: str
    """Of its elements, from the first step's row."""
    output: Output
    """How they are written."""


def warps_down(part: Part) -> int:
    """Return how many warps share the rows of a tile; the others share its columns."""
    return min(part.warps, part.rows // MIN_TILE)


def _halved(name: str, steps: int, exchanges: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Return the statements that sum over threads; an exchange is what tells its two sides apart, and a lane's bit."""
    lines = []
    for upper, lanes in exchanges:
        steps //= 2
        lines += [f"{name}_{i} = added({name}_{i}, {name}_{i + steps}, {upper}, {lanes})" for i in range(steps)]
        if not steps:
            lines.append(f"{name}_0 += exchanged({name}_0, {lanes})")
    return tuple(lines)


def _chosen(name: str, steps: int, exchanges: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Return the statements that leave a thread one step's sum of those that it has all of."""
    lines = []
    for upper, _ in exchanges:
        steps //= 2
        lines += [f"{name}_{i} = tl.where({upper}, {name}_{i + steps}, {name}_{i})" for i in range(steps)]
    return tuple(lines)


def _over_rows(index: str) -> list[tuple[str, int]]:
    return [(f"{index} & {row} != 0", 4 * row) for row in (4, 2, 1)]


def _over_cols(index: str) -> list[tuple[str, int]]:
    return [(f"{index} & {col} != 0", col) for col in (2, 1)]


def forward_together(variant: Variant, schedule: Schedule) -> Together | None:
    """Return how the steps of an iteration share the sums of y, if they do: where no two warps have rows."""
    part = schedule.forward
    if schedule.layouts is not Layouts.EXPLICIT or warps_down(part) > 1 or part.unroll not in (2, 4, 8):
        return None
    output = replace(forward_output(variant, schedule), offsets="", mask="sum_mask")
    return Together(_halved("y", part.unroll, _over_rows("sum_row")), "sum_step", "sum_offsets", output)


def forward_apart(variant: Variant, schedule: Schedule) -> Output | None:
    """Return how y is written, if warps with rows of their own add it up in shared memory, once an iteration."""
    part = schedule.forward
    if schedule.layouts is not Layouts.EXPLICIT or not 1 < part.warps == warps_down(part) or part.unroll < 2:
        return None
    if part.unroll & (part.unroll - 1):
        return None
    return replace(forward_output(variant, schedule), offsets="", mask="sum_mask")


def joined(name: str, steps: Sequence[int]) -> str:
    """Return the expression for the tensors of all steps as one, the step's bits as its last dims."""
    if len(steps) == 1:
        return f"{name}_{steps[0]}"
    return f"tl.join({joined(name, steps[::2])}, {joined(name, steps[1::2])})"


def _shared_sums(schedule: Schedule) -> bool:
    """Whether the steps of a chunk share sums."""
    part = schedule.backward
    return schedule.layouts is Layouts.EXPLICIT and part.warps == 1 and part.chunk in (2, 4)


def backward_together(variant: Variant, schedule: Schedule) -> dict[str, Together]:
    """Return how the steps of a chunk share the sums of each gradient, by name; none where several warps have a tile.

    A gate that the kernel computes has slopes of its own at every step, by which each sum is multiplied.
    """
    part = schedule.backward
    if not _shared_sums(schedule):
        return {}
    outputs = {out.name: out for out in backward_outputs(variant, schedule)}
    found = {}
    for name in ("dq", "dk"):
        output = replace(outputs[name], offsets="", mask="col_sum_mask")
        choose = _chosen if sums_by_product(variant, schedule) else _halved
        lines = choose(name, part.chunk, _over_cols("sum_lane"))
        lines += (f"{name}_0 = columns_as_loaded({name}_0, COL_SUMS_LOADED)",)
        found[name] = Together(lines, "col_step", f"col_step * {name}_step + col_rows", output)
    output = replace(outputs["dv"], offsets="", mask="row_sum_mask")
    lines = _halved("dv", part.chunk, _over_rows("sum_row"))
    found["dv"] = Together(lines, "row_step", "row_step * dv_step + sum_col", output)
    if not variant.computes_gate:
        output = replace(outputs["df"], offsets="", mask="all_sum_mask")
        lines = _halved("df", part.chunk, [*_over_rows("all_row"), *_over_cols("all_lane")])
        found["df"] = Together(lines, "all_step", "all_step * df_step + 0 * all_lane", output)
    return found


def group_outputs(variant: Variant, schedule: Schedule) -> dict[str, Output]:
    """Return how warpgroups write their sums, by name; ``y_last`` is y of the last step, which comes alone."""
    masks = {"dq": "col_sum_mask", "dk": "col_sum_mask", "dv": "(sum_cols < V)", "df": None}
    found = {out.name: replace(out, offsets="", mask=masks[out.name]) for out in backward_outputs(variant, schedule)}
    y = replace(forward_output(variant, schedule), offsets="")
    return {**found, "y": replace(y, mask="(loaded_col < V)"), "y_last": replace(y, mask="(sum_cols < V)")}


def lane_sums() -> tuple[str, ...]:
    """Return the statements with which a warpgroup's lanes sum x_0, ... x_7 over rows, an eighth for each."""
    return _halved("x", EIGHTHS, _over_rows("row"))


def sums_by_product(variant: Variant, schedule: Schedule) -> bool:
    """Whether dq and dk are sums over columns that tensor cores make, of 11 bits of H and D.

    What that loses is a tenth of what bfloat16 results lose when they are rounded, and much of what float16 results do.
    """
    return variant.dtype is Dtype.BF16 and _shared_sums(schedule)
