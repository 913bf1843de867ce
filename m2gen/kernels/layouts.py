"""Layouts of explicit kernels: which thread holds which elements.

Products are 16 x 8 tiles of ``mma.sync``: lane l has rows l // 4 and l // 4 + 8, and columns 2 (l % 4) and the next
(PTX ISA, m16n8k16). Everything else is laid out so that it meets those tiles without moving between threads.
"""

from __future__ import annotations

from m2gen.kernels.linear import Linear, powers
from m2gen.schedule import ForwardTile, Part, WarpgroupForward
from m2gen.variant import MIN_TILE, Variant

LANE_COLS = ((0, 2), (0, 4))
LANE_ROWS = ((1, 0), (2, 0), (4, 0))


def warps_down(part: Part) -> int:
    """Return how many warps share the rows of a tile; the others share its columns."""
    return min(part.warps, part.rows // MIN_TILE)


def tile(part: Part) -> str:
    """Return the layout of a product of 16 x 8 tiles."""
    return f"gl.NVMMADistributedLayout([2, 0], [{warps_down(part)}, {part.warps // warps_down(part)}], [16, 8])"


def vector(part: Part) -> str:
    """Return the layout of a vector over a part's rows: a thread has neighbours, which one instruction loads.

    Rows never mix, so which of them a thread has does not matter to the products.
    """
    each = part.rows // (8 * warps_down(part))
    registers = tuple((row,) for row in powers(1, each))
    lanes = ((0,), (0,), (each,), (2 * each,), (4 * each,))
    across = ((0,),) * ((part.warps // warps_down(part)).bit_length() - 1)
    down = ((row,) for row in powers(8 * each, part.rows))
    return str(Linear((part.rows,), registers, lanes, (*across, *down)))


def keys(part: Part) -> str:
    """Return the layout of 16 steps' vectors over a part's rows, as the left operand of a product has them."""
    each = part.rows // (8 * warps_down(part))
    registers = (*((row, 0) for row in powers(1, each)), (0, 1), (0, 8))
    lanes = (*LANE_COLS, *((row * each, 0) for row, _ in LANE_ROWS))
    across = ((0, 0),) * ((part.warps // warps_down(part)).bit_length() - 1)
    down = ((row, 0) for row in powers(8 * each, part.rows))
    return str(Linear((part.rows, 16), registers, lanes, (*across, *down)))


def row_sums(variant: Variant, part: Part) -> str:
    """Return the layout of what is left of a tile whose threads have summed their rows: 8 rows of every column."""
    across = 8 * part.warps
    registers = ((0, 1), *((0, col) for col in powers(across, variant.padded_cols)))
    warps = tuple((0, col) for col in powers(8, across))
    return str(Linear((8, variant.padded_cols), registers, (*LANE_COLS, *LANE_ROWS), warps))


def sums_apart(variant: Variant, part: ForwardTile | WarpgroupForward) -> dict[str, str]:
    """Return the layouts of sums over rows of which every warp has its own, and which meet in shared memory.

    ``FORWARD_APART`` is what is left of an iteration's tiles, of every step 8 rows a warp, in the order in which a
    lane's columns are neighbours, so that it stores them at once. ``FORWARD_EVERY`` has the same with all rows of a
    pair of columns in a thread, and ``FORWARD_SUMS`` their sums, in the columns' own order.
    """
    cols, rows, steps = variant.padded_cols, 8 * part.warps, part.unroll
    mine = cols // 4  # a lane's columns of a row
    lanes = (*((0, col) for col in powers(mine, cols)), *LANE_ROWS)
    registers = (*((0, col) for col in powers(1, mine)), *((row, 0) for row in powers(rows, rows * steps)))
    apart = Linear((steps * rows, cols), registers, lanes, tuple((row, 0) for row in powers(8, rows)))
    shared = [*((0, col) for col in powers(2, cols)), *((step, 0) for step in powers(1, steps))]
    threads = 5 + (part.warps.bit_length() - 1)
    spread, rest = shared[:threads] + [(0, 0)] * (threads - len(shared)), shared[threads:]

    def placed(column: int) -> int:
        if column < 2:
            return column
        return column // 2 * 8 if column < mine else column // mine * 2

    summed = [(step, placed(col)) for step, col in spread]
    kept = ((0, 1), *((step, placed(col)) for step, col in rest))
    parts = [(step * rows, col) for step, col in spread]
    every = ((0, 1), *((row, 0) for row in powers(1, rows)), *((step * rows, col) for step, col in rest))
    return {
        "FORWARD_APART": str(apart),
        "FORWARD_EVERY": str(Linear((steps * rows, cols), every, tuple(parts[:5]), tuple(parts[5:]))),
        "FORWARD_SUMS": str(Linear((steps, cols), kept, tuple(summed[:5]), tuple(summed[5:]))),
        "PLAIN": "gl.SwizzledSharedLayout(1, 1, 1, [1, 0])",
    }


def col_sums(part: Part) -> dict[str, str]:
    """Return the layouts of what is left of a tile whose threads have summed their columns, and of its neighbours."""
    cols, each = ((0, 1), (0, 2)), part.rows // 8
    tile = Linear((part.rows, 4), tuple((row, 0) for row in powers(8, part.rows)), (*cols, *LANE_ROWS))
    lanes = (*cols, *((row * each, 0) for row, _ in LANE_ROWS))
    loaded = Linear((part.rows, 4), tuple((row, 0) for row in powers(1, each)), lanes)
    return {"COL_SUMS": str(tile), "COL_SUMS_LOADED": str(loaded)}


def all_sums() -> str:
    """Return the layout of what is left of a tile whose threads have summed all that they have, one sum a lane."""
    return str(Linear((8, 4), (), ((0, 1), (0, 2), *LANE_ROWS)))


def warpgroup(variant: Variant) -> dict[str, str]:
    """Return the layouts of kernels whose four warps have 16 rows each of all columns.

    Lanes with the same columns share what they have summed over rows for y, an eighth of the columns each. Sums over
    an interval's steps, 64 rows of 8 slots, are products.
    """
    cols = variant.padded_cols
    quads = (*((0, col) for col in (1, 2)), *LANE_ROWS)
    wide = ((0, 1), *((0, col) for col in powers(8, cols)))
    sums = ((8, 0), (16, 0))
    linear = {
        "ROW_SUMS": Linear((32, cols), wide, (*LANE_COLS, *LANE_ROWS), sums),
        "ROW_EIGHTHS": Linear((32, cols // 8), ((0, 1),), (*LANE_COLS, *LANE_ROWS), sums),
        "ALL_SUMS": Linear((32, 4), (), quads, sums),
    }
    return {
        **{name: str(layout) for name, layout in linear.items()},
        "LEFT": "gl.DotOperandLayout(0, FORWARD_TILE, 2)",
        "SLOT_TILE": "gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])",
        "SLOTS_LOADED": "gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])",
        "SUMS": "gl.BlockedLayout([1], [32], [4], [0])",
        "THREADS_SUMS": "gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])",
        "INTERVAL_LINE": "gl.SliceLayout(1, THREADS_SUMS)",
        "INTERVAL_LOADED": "gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])",
        "OPERANDS": "gl.NVMMASharedLayout(128, 16, 2)",
        "PLAIN": "gl.SwizzledSharedLayout(1, 1, 1, [1, 0])",
        "LINE": "gl.SwizzledSharedLayout(1, 1, 1, [0])",
    }


def scratch(variant: Variant) -> str:
    """Return the layout of a state in shared memory: groups of 8 columns change places by rows.

    A half warp moves 8 bytes a lane, of 8 columns in 4 rows: with those in 4 different groups of banks, at once.
    """
    cols = variant.padded_cols
    return f"gl.SwizzledSharedLayout(8, {max(1, 32 // cols)}, {min(4, cols // 8)}, [1, 0])"


def spread(warps: int) -> str:
    """Return the layout of a vector whose neighbours are in neighbouring threads."""
    return f"gl.BlockedLayout([1], [32], [{warps}], [0])"
