"""Which thread of explicit kernels holds what: layouts by name, and sums that several steps share.

Products are 16 x 8 tiles of ``mma.sync``: lane l has rows l // 4 and l // 4 + 8, and columns 2 (l % 4) and the next
(PTX ISA, m16n8k16). Everything else is laid out so that it meets those tiles without moving between threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from m2gen.outputs import Output, backward_outputs, forward_output
from m2gen.schedule import BackwardSchedule, ForwardSchedule, Layouts, Schedule
from m2gen.variant import MIN_TILE, Variant

Part = ForwardSchedule | BackwardSchedule
TOO_NEW = (3, 9)
"""The first Triton that compiles no explicit layouts: 3.9.0 brings ptxas of CUDA 13.4, which never ends on a forward of
32 rows and four or more steps an iteration (CONTRIBUTING.md)."""
LANE_COLS = ((0, 2), (0, 4))
LANE_ROWS = ((1, 0), (2, 0), (4, 0))


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


def _bases(steps: Iterable[tuple[int, ...]]) -> str:
    return f"[{', '.join(str(list(step)) for step in steps)}]"


@dataclass(frozen=True)
class _Linear:
    """A layout by what each bit of a register's, a lane's and a warp's number adds to an element's index."""

    shape: tuple[int, ...]
    registers: tuple[tuple[int, ...], ...]
    lanes: tuple[tuple[int, ...], ...]
    warps: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        first = f"reg_bases={_bases(self.registers)}, lane_bases={_bases(self.lanes)},"
        rest = f"warp_bases={_bases(self.warps)}, block_bases=[], shape={list(self.shape)},"
        return f"tl.DistributedLinearLayout(\n    {first}\n    {rest}\n)"


def _powers(first: int, end: int) -> list[int]:
    """Return first, 2 first, 4 first, ... below end."""
    return [first << bit for bit in range((end // first).bit_length() - 1)]


def _down(part: Part) -> int:
    """Return how many warps share the rows of a tile; the others share its columns."""
    return min(part.warps, part.rows // MIN_TILE)


def _tile(part: Part) -> str:
    return f"tl.NVMMADistributedLayout([2, 0], [{_down(part)}, {part.warps // _down(part)}], [16, 8])"


def _vector(part: Part) -> str:
    """Return the layout of a vector over a part's rows: a thread has neighbours, which one instruction loads.

    Rows never mix, so which of them a thread has does not matter to the products.
    """
    each = part.rows // (8 * _down(part))
    registers = tuple((row,) for row in _powers(1, each))
    lanes = ((0,), (0,), (each,), (2 * each,), (4 * each,))
    across = ((0,),) * ((part.warps // _down(part)).bit_length() - 1)
    down = ((row,) for row in _powers(8 * each, part.rows))
    return str(_Linear((part.rows,), registers, lanes, (*across, *down)))


def _keys(part: Part) -> str:
    """Return the layout of 16 steps' vectors over a part's rows, as the left operand of a product has them."""
    each = part.rows // (8 * _down(part))
    registers = (*((row, 0) for row in _powers(1, each)), (0, 1), (0, 8))
    lanes = (*LANE_COLS, *((row * each, 0) for row, _ in LANE_ROWS))
    across = ((0, 0),) * ((part.warps // _down(part)).bit_length() - 1)
    down = ((row, 0) for row in _powers(8 * each, part.rows))
    return str(_Linear((part.rows, 16), registers, lanes, (*across, *down)))


def _row_sums(variant: Variant, part: Part) -> str:
    """Return the layout of what is left of a tile whose threads have summed their rows: 8 rows of every column."""
    across = 8 * part.warps
    registers = ((0, 1), *((0, col) for col in _powers(across, variant.padded_cols)))
    warps = tuple((0, col) for col in _powers(8, across))
    return str(_Linear((8, variant.padded_cols), registers, (*LANE_COLS, *LANE_ROWS), warps))


def _col_sums(part: Part) -> dict[str, str]:
    """Return the layouts of what is left of a tile whose threads have summed their columns, and of its neighbours."""
    cols, each = ((0, 1), (0, 2)), part.rows // 8
    tile = _Linear((part.rows, 4), tuple((row, 0) for row in _powers(8, part.rows)), (*cols, *LANE_ROWS))
    lanes = (*cols, *((row * each, 0) for row, _ in LANE_ROWS))
    loaded = _Linear((part.rows, 4), tuple((row, 0) for row in _powers(1, each)), lanes)
    every = _Linear((8, 4), (), (*cols, *LANE_ROWS))
    return {"COL_SUMS": str(tile), "COL_SUMS_LOADED": str(loaded), "ALL_SUMS": str(every)}


def outer_on_tensor_cores(schedule: Schedule) -> bool:
    """Whether the forward has k v^T from a product of its own, rather than as one multiplication an element.

    It saves instructions and takes longer: with 16 rows a warp, latency is all there is (docs/performance.md).
    """
    part = schedule.forward
    return schedule.layouts is Layouts.EXPLICIT and (part.rows, part.warps) != (MIN_TILE, 1)


def named(variant: Variant, schedule: Schedule) -> dict[str, str]:
    """Return the layouts that a kernel's text names; none where the compiler chooses."""
    if schedule.layouts is Layouts.AUTO:
        return {}
    forward, backward = schedule.forward, schedule.backward
    found = {"FORWARD_TILE": _tile(forward), "BACKWARD_TILE": _tile(backward)}
    found |= {"FORWARD_VECTOR": _vector(forward), "BACKWARD_VECTOR": _vector(backward)}
    if outer_on_tensor_cores(schedule):
        found |= {"FORWARD_KEYS": _keys(forward), "FORWARD_VALUES": "tl.DotOperandLayout(1, FORWARD_TILE, 2)"}
    if schedule.two_level:
        found["BACKWARD_SPREAD"] = f"tl.BlockedLayout([1], [32], [{backward.warps}], [0])"
    found["SUM_LAYOUT"] = f"tl.BlockedLayout([1], [32], [{forward.warps}], [0])"
    if forward_together(variant, schedule):
        found["FORWARD_SUMS"] = _row_sums(variant, forward)
    if backward_together(variant, schedule):
        found |= {"ROW_SUMS": _row_sums(variant, backward), **_col_sums(backward)}
    return found


def _halved(name: str, steps: int, exchanges: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Return the statements that sum over threads; an exchange is what tells its two sides apart, and a lane's bit."""
    lines = []
    for upper, lanes in exchanges:
        steps //= 2
        lines += [f"{name}_{i} = added({name}_{i}, {name}_{i + steps}, {upper}, {lanes})" for i in range(steps)]
        if not steps:
            lines.append(f"{name}_0 += exchanged({name}_0, {lanes})")
    return tuple(lines)


def _over_rows(index: str) -> list[tuple[str, int]]:
    return [(f"{index} & {row} != 0", 4 * row) for row in (4, 2, 1)]


def _over_cols(index: str) -> list[tuple[str, int]]:
    return [(f"{index} & {col} != 0", col) for col in (2, 1)]


def forward_together(variant: Variant, schedule: Schedule) -> Together | None:
    """Return how the steps of an iteration share the sums of y, if they do: where no two warps have rows."""
    part = schedule.forward
    if schedule.layouts is Layouts.AUTO or _down(part) > 1 or part.unroll not in (2, 4, 8):
        return None
    output = replace(forward_output(variant, schedule), offsets="", mask="sum_mask")
    return Together(_halved("y", part.unroll, _over_rows("sum_row")), "sum_step", "sum_offsets", output)


def backward_together(variant: Variant, schedule: Schedule) -> dict[str, Together]:
    """Return how the steps of a chunk share the sums of each gradient, by name; none where several warps have a tile.

    A gate that the kernel computes has slopes of its own at every step, by which each sum is multiplied.
    """
    part = schedule.backward
    if schedule.layouts is Layouts.AUTO or part.warps > 1 or part.chunk not in (2, 4):
        return {}
    outputs = {out.name: out for out in backward_outputs(variant, schedule)}
    found = {}
    for name in ("dq", "dk"):
        output = replace(outputs[name], offsets="", mask="col_sum_mask")
        lines = _halved(name, part.chunk, _over_cols("sum_lane"))
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


def words(variant: Variant, schedule: Schedule) -> dict[str, object]:
    """Return the words in which the two dialects of the templates differ: Gluon's tensors have layouts."""
    explicit = schedule.layouts is Layouts.EXPLICIT

    def only(text: str) -> str:
        return f", {text}" if explicit else ""

    found: dict[str, object] = {
        "explicit_layouts": explicit,
        "layouts": list(named(variant, schedule).items()),
        "outer_on_tensor_cores": outer_on_tensor_cores(schedule),
        "forward_together": forward_together(variant, schedule),
        "backward_together": backward_together(variant, schedule),
        "jit": "gluon.jit" if explicit else "triton.jit",
        "language": "triton.language" if explicit else "tl",
        "prefetches": explicit and schedule.two_level,
        # Rebuilt states are stored and loaded in one layout, which gives no element to two threads
        # (``schedule.most_warps``), so a thread reads what it wrote. Where the compiler chooses, others may.
        "after_rebuilding": ["_backward_prefetch.py.j2" if explicit else "_backward_barrier.py.j2"],
        "after_chunks": [] if explicit else ["_backward_barrier.py.j2"],
        "right_operand": (lambda x: f"transposed({x}).permute((1, 0))") if explicit else str,
        "as_loaded": (lambda x: f"as_loaded({x}, BACKWARD_VECTOR)") if explicit else str,
        "sum_layout": only("SUM_LAYOUT"),
        "tile_parameter": only("TILE: tl.constexpr"),
        "tile_rows": only("tl.SliceLayout(1, TILE)"),
        "tile_cols": only("tl.SliceLayout(0, TILE)"),
    }
    for side in ("forward", "backward"):
        tile = f"{side.upper()}_TILE"
        found[f"{side}_tile"] = only(tile)
        found[f"{side}_rows"] = only(f"{side.upper()}_VECTOR")
        found[f"{side}_state_rows"] = f"in_tile(rows, {tile})" if explicit else "rows"
        found[f"{side}_weight_rows"] = only(f"tl.SliceLayout(1, {tile})")
        found[f"{side}_cols"] = only(f"tl.SliceLayout(0, {tile})")
    return found
