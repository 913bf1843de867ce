"""Which thread of explicit kernels holds what: layouts by name.

Products are 16 x 8 tiles of ``mma.sync``: lane l has rows l // 4 and l // 4 + 8, and columns 2 (l % 4) and the next
(PTX ISA, m16n8k16). Everything else is laid out so that it meets those tiles without moving between threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from m2gen.kernels.reductions import (
    EIGHTHS,
    backward_together,
    forward_apart,
    forward_together,
    group_outputs,
    joined,
    lane_sums,
    sums_by_product,
    warps_down,
)
from m2gen.schedule import ForwardSchedule, Layouts, Part, Schedule, Scratch
from m2gen.variant import MIN_TILE, Variant

TOO_NEW = (3, 9)
"""The first Triton that compiles no explicit layouts: 3.9.0 brings ptxas of CUDA 13.4, which never ends on a forward of
32 rows and four or more steps an iteration (CONTRIBUTING.md)."""
CHOSEN = ("forward", "backward", "load_weight", "products")
"""Templates of which warpgroups have their own."""
HOPPER_PRODUCTS = "hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait"
"""What kernels of warpgroups import of Gluon."""
LANE_COLS = ((0, 2), (0, 4))
LANE_ROWS = ((1, 0), (2, 0), (4, 0))


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


def _tile(part: Part) -> str:
    """Return the layout of a product of 16 x 8 tiles."""
    return f"tl.NVMMADistributedLayout([2, 0], [{warps_down(part)}, {part.warps // warps_down(part)}], [16, 8])"


def _vector(part: Part) -> str:
    """Return the layout of a vector over a part's rows: a thread has neighbours, which one instruction loads.

    Rows never mix, so which of them a thread has does not matter to the products.
    """
    each = part.rows // (8 * warps_down(part))
    registers = tuple((row,) for row in _powers(1, each))
    lanes = ((0,), (0,), (each,), (2 * each,), (4 * each,))
    across = ((0,),) * ((part.warps // warps_down(part)).bit_length() - 1)
    down = ((row,) for row in _powers(8 * each, part.rows))
    return str(_Linear((part.rows,), registers, lanes, (*across, *down)))


def _keys(part: Part) -> str:
    """Return the layout of 16 steps' vectors over a part's rows, as the left operand of a product has them."""
    each = part.rows // (8 * warps_down(part))
    registers = (*((row, 0) for row in _powers(1, each)), (0, 1), (0, 8))
    lanes = (*LANE_COLS, *((row * each, 0) for row, _ in LANE_ROWS))
    across = ((0, 0),) * ((part.warps // warps_down(part)).bit_length() - 1)
    down = ((row, 0) for row in _powers(8 * each, part.rows))
    return str(_Linear((part.rows, 16), registers, lanes, (*across, *down)))


def _row_sums(variant: Variant, part: Part) -> str:
    """Return the layout of what is left of a tile whose threads have summed their rows: 8 rows of every column."""
    across = 8 * part.warps
    registers = ((0, 1), *((0, col) for col in _powers(across, variant.padded_cols)))
    warps = tuple((0, col) for col in _powers(8, across))
    return str(_Linear((8, variant.padded_cols), registers, (*LANE_COLS, *LANE_ROWS), warps))


def _sums_apart(variant: Variant, part: ForwardSchedule) -> dict[str, str]:
    """Return the layouts of sums over rows of which every warp has its own, and which meet in shared memory.

    ``FORWARD_APART`` is what is left of an iteration's tiles, of every step 8 rows a warp, in the order in which a
    lane's columns are neighbours, so that it stores them at once. ``FORWARD_EVERY`` has the same with all rows of a
    pair of columns in a thread, and ``FORWARD_SUMS`` their sums, in the columns' own order.
    """
    cols, rows, steps = variant.padded_cols, 8 * part.warps, part.unroll
    mine = cols // 4  # a lane's columns of a row
    lanes = (*((0, col) for col in _powers(mine, cols)), *LANE_ROWS)
    registers = (*((0, col) for col in _powers(1, mine)), *((row, 0) for row in _powers(rows, rows * steps)))
    apart = _Linear((steps * rows, cols), registers, lanes, tuple((row, 0) for row in _powers(8, rows)))
    shared = [*((0, col) for col in _powers(2, cols)), *((step, 0) for step in _powers(1, steps))]
    threads = 5 + (part.warps.bit_length() - 1)
    spread, rest = shared[:threads] + [(0, 0)] * (threads - len(shared)), shared[threads:]

    def placed(column: int) -> int:
        if column < 2:
            return column
        return column // 2 * 8 if column < mine else column // mine * 2

    summed = [(step, placed(col)) for step, col in spread]
    kept = ((0, 1), *((step, placed(col)) for step, col in rest))
    parts = [(step * rows, col) for step, col in spread]
    every = ((0, 1), *((row, 0) for row in _powers(1, rows)), *((step * rows, col) for step, col in rest))
    return {
        "FORWARD_APART": str(apart),
        "FORWARD_EVERY": str(_Linear((steps * rows, cols), every, tuple(parts[:5]), tuple(parts[5:]))),
        "FORWARD_SUMS": str(_Linear((steps, cols), kept, tuple(summed[:5]), tuple(summed[5:]))),
        "PLAIN": "tl.SwizzledSharedLayout(1, 1, 1, [1, 0])",
    }


def _col_sums(part: Part) -> dict[str, str]:
    """Return the layouts of what is left of a tile whose threads have summed their columns, and of its neighbours."""
    cols, each = ((0, 1), (0, 2)), part.rows // 8
    tile = _Linear((part.rows, 4), tuple((row, 0) for row in _powers(8, part.rows)), (*cols, *LANE_ROWS))
    lanes = (*cols, *((row * each, 0) for row, _ in LANE_ROWS))
    loaded = _Linear((part.rows, 4), tuple((row, 0) for row in _powers(1, each)), lanes)
    every = _Linear((8, 4), (), (*cols, *LANE_ROWS))
    return {"COL_SUMS": str(tile), "COL_SUMS_LOADED": str(loaded), "ALL_SUMS": str(every)}


def _warpgroup(variant: Variant) -> dict[str, str]:
    """Return the layouts of kernels whose four warps have 16 rows each of all columns.

    Lanes with the same columns share what they have summed over rows, an eighth of the columns each.
    """
    cols = variant.padded_cols
    quads = (*((0, col) for col in (1, 2)), *LANE_ROWS)
    loaded = (*((0, col) for col in (1, 2)), *((2 * row, 0) for row, _ in LANE_ROWS))
    wide = ((0, 1), *((0, col) for col in _powers(8, cols)))
    rows, sums = ((16, 0), (32, 0)), ((8, 0), (16, 0))
    linear = {
        "ROW_SUMS": _Linear((32, cols), wide, (*LANE_COLS, *LANE_ROWS), sums),
        "ROW_EIGHTHS": _Linear((32, cols // 8), ((0, 1),), (*LANE_COLS, *LANE_ROWS), sums),
        "COL_SUMS": _Linear((64, 4), ((8, 0),), quads, rows),
        "COL_SUMS_LOADED": _Linear((64, 4), ((1, 0),), loaded, rows),
        "ALL_SUMS": _Linear((32, 4), (), quads, sums),
    }
    return {
        **{name: str(layout) for name, layout in linear.items()},
        "COLS": "tl.SliceLayout(0, FORWARD_TILE)",
        "SUMS": "tl.BlockedLayout([1], [32], [4], [0])",
        "THREADS_SUMS": "tl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])",
        "INTERVAL_LINE": "tl.SliceLayout(1, THREADS_SUMS)",
        "INTERVAL_LOADED": "tl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])",
        "OPERANDS": "tl.NVMMASharedLayout(128, 16, 2)",
        "PLAIN": "tl.SwizzledSharedLayout(1, 1, 1, [1, 0])",
        "LINE": "tl.SwizzledSharedLayout(1, 1, 1, [0])",
    }


def _scratch(variant: Variant) -> str:
    """Return the layout of a state in shared memory: groups of 8 columns change places by rows.

    A half warp moves 8 bytes a lane, of 8 columns in 4 rows: with those in 4 different groups of banks, at once.
    """
    cols = variant.padded_cols
    return f"tl.SwizzledSharedLayout(8, {max(1, 32 // cols)}, {min(4, cols // 8)}, [1, 0])"


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
    group = schedule.layouts is Layouts.WARPGROUP
    tile = f"tl.NVMMADistributedLayout([3, 0], [4, 1], [16, {variant.padded_cols}, 16])" if group else _tile(backward)
    found = {"FORWARD_TILE": tile if group else _tile(forward), "BACKWARD_TILE": tile}
    found |= {"FORWARD_VECTOR": _vector(forward), "BACKWARD_VECTOR": _vector(backward)}
    if outer_on_tensor_cores(schedule):
        found |= {"FORWARD_KEYS": _keys(forward), "FORWARD_VALUES": "tl.DotOperandLayout(1, FORWARD_TILE, 2)"}
    if schedule.two_level:
        found["BACKWARD_SPREAD"] = f"tl.BlockedLayout([1], [32], [{backward.warps}], [0])"
    if backward.scratch is Scratch.SHARED:
        found["BACKWARD_SCRATCH"] = _scratch(variant)
    found["SUM_LAYOUT"] = f"tl.BlockedLayout([1], [32], [{forward.warps}], [0])"
    if forward_apart(variant, schedule):
        found |= _sums_apart(variant, forward)
    elif forward_together(variant, schedule):
        found["FORWARD_SUMS"] = _row_sums(variant, forward)
    if group:
        found |= {**_warpgroup(variant), "KEYS": _keys(backward)}
    elif backward_together(variant, schedule):
        found |= {"ROW_SUMS": _row_sums(variant, backward), **_col_sums(backward)}
    return found


def _group_words(variant: Variant, schedule: Schedule) -> dict[str, object]:
    """Return the words in which kernels of warpgroups and others differ."""
    group = schedule.layouts is Layouts.WARPGROUP
    return {
        "warpgroup": group,
        **{f"{each}_template": f"_{each}{'_warpgroup' * group}.py.j2" for each in CHOSEN},
        "products_of": HOPPER_PRODUCTS if group else "ampere import mma_v2",
        "rows_as_loaded": schedule.layouts is Layouts.EXPLICIT,
        "lane_sums": lane_sums(),
        "group_outputs": group_outputs(variant, schedule),
        "eighths": lambda name: ", ".join(f"{name}_{i}" for i in range(EIGHTHS)),
    }


def words(variant: Variant, schedule: Schedule) -> dict[str, object]:
    """Return the words in which the two dialects of the templates differ: Gluon's tensors have layouts."""
    explicit, by_product = schedule.layouts.written, sums_by_product(variant, schedule)
    over_cols = "col_sums_of({}, {}, COL_SUMS)" if by_product else "col_sums({} * {}.to(tl.float32)[None, :], COL_SUMS)"

    def only(text: str) -> str:
        return f", {text}" if explicit else ""

    found: dict[str, object] = {
        "explicit_layouts": explicit,
        "layouts": list(named(variant, schedule).items()),
        "outer_on_tensor_cores": outer_on_tensor_cores(schedule),
        "forward_together": forward_together(variant, schedule),
        "backward_together": backward_together(variant, schedule),
        "forward_apart": forward_apart(variant, schedule),
        "joined": joined,
        "sums_by_product": by_product,
        "over_cols": over_cols.format,
        "jit": "gluon.jit" if explicit else "triton.jit",
        "language": "triton.language" if explicit else "tl",
        "prefetches": explicit and schedule.two_level,
        # Rebuilt states are stored and loaded in one layout, which gives no element to two threads
        # (``schedule.most_warps``), so a thread reads what it wrote. Where the compiler chooses, others may.
        "after_rebuilding": ["_backward_prefetch.py.j2" if explicit else "_backward_barrier.py.j2"],
        "after_chunks": [] if explicit else ["_backward_barrier.py.j2"],
        "right_operand": (lambda x: f"transposed({x}).permute((1, 0))") if explicit else str,
        "as_loaded": (lambda x: f"as_loaded({x}, BACKWARD_VECTOR)") if explicit else str,
        **_group_words(variant, schedule),
        "sum_layout": only("SUM_LAYOUT"),
        "tile_parameter": only("TILE: tl.constexpr"),
        "tile_rows": only("tl.SliceLayout(1, TILE)"),
        "tile_cols": only("tl.SliceLayout(0, TILE)"),
    }
    found["backward_weight_rows"] = only("tl.SliceLayout(1, BACKWARD_TILE)")
    for side in ("forward", "backward"):
        tile = f"{side.upper()}_TILE"
        found[f"{side}_tile"] = only(tile)
        found[f"{side}_rows"] = only(f"{side.upper()}_VECTOR")
        found[f"{side}_state_rows"] = f"in_tile(rows, {tile})" if explicit else "rows"
        found[f"{side}_cols"] = only(f"tl.SliceLayout(0, {tile})")
    return found
