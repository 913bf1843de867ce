"""Layouts of a backward whose steps have slots: a warp has 16 or 32 rows of 16 columns of its own.

Tensors have the warp as their first dim, so that products of warps share nothing. A lane has rows l // 4 and l // 4 + 8
of each 16 of a tile; in memory's order they are neighbours, which ``tile_rows`` renames.
"""

from __future__ import annotations

from m2gen.kernels.linear import Linear, powers

PLAIN = "gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])"
COLS = ((0, 0, 2), (0, 0, 4))
"""Pairs of columns that a lane holds of a tile."""
ROWS = ((0, 1, 0), (0, 2, 0), (0, 4, 0))
EXTRA = {16: (), 32: ((0, 32, 0),)}
"""What a thread keeps beyond 16 bytes of a tile, by rows of a warp."""


def layouts(warps: int, rows: int) -> dict[str, str]:
    """Return the layouts that the backward names: those of products, then of memory, then of sums over warps.

    ``rows`` of a warp are 16 or 32.
    """
    across = tuple((warp, 0, 0) for warp in powers(1, warps))
    tile = f"gl.NVMMADistributedLayout([2, 0], [{warps}, 1, 1], [1, 16, 8])"
    mine = tuple((0, row, 0) for row in powers(1, rows // 8))  # a lane's neighbours
    lanes = (*COLS, *((0, row, 0) for row in powers(rows // 8, rows)))
    below = tuple((0, row, 0) for row in powers(1, rows))
    place = (*COLS, (0, 0, 8), (0, 0, 16))[: 3 if rows == 16 else 4]  # bits of a row
    linear = {
        "SLOT_KEYS": Linear((warps, rows, 8), (*mine, (0, 0, 1)), lanes, across),
        "SLOT_VALUES": Linear((warps, 8, 16), ((0, 0, 1), (0, 0, 8)), (*COLS, *ROWS), across),
        "CHECKPOINT": Linear((warps, rows, 16), ((0, 0, 1), mine[0], (0, 0, 8), *mine[1:]), lanes, across),
        "KEPT": Linear((warps, 2 * rows, 8), ((0, 0, 1), *COLS, *EXTRA[rows]), (*ROWS, (0, 8, 0), (0, 16, 0)), across),
        "COPIED_KEYS": Linear((warps, 8, rows), ((0, 0, 1), *place[:-2]), (*place[-2:], *ROWS), across),
        "COPIED_VALUES": Linear((warps, 8, 16), ((0, 0, 1), (0, 0, 2)), ((0, 0, 4), (0, 0, 8), *ROWS), across),
        "COPIED_STATE": Linear((warps, rows, 16), ((0, 0, 1), *COLS, *below[4:]), ((0, 0, 8), *below[:4]), across),
        "THREADS": Linear((warps, 8, 4), (), ((0, 0, 1), (0, 0, 2), *ROWS), across),
        **_over_warps(warps),
    }
    return {
        "BACKWARD_TILE": tile,
        "LEFT": "gl.DotOperandLayout(0, BACKWARD_TILE, 2)",
        "RIGHT": "gl.DotOperandLayout(1, BACKWARD_TILE, 2)",
        **{name: str(layout) for name, layout in linear.items()},
        "PLACE_OF_KEYS": f"gl.SwizzledSharedLayout(8, {64 // rows}, {rows // 8}, [2, 1, 0])",
        "PLACE_OF_CHECKPOINT": "gl.SwizzledSharedLayout(8, 4, 2, [2, 1, 0])",
        "PLACE_OF_STATES": "gl.SwizzledSharedLayout(8, 4, 2, [2, 1, 0])",
        "PLACE": PLAIN,
    }


def across(warps: int) -> dict[str, str]:
    """Return what else a backward names whose warps have 16 columns each of the same 16 rows.

    That is the tile of all warps, and that of dW, whose rows are the columns of each warp in turn.
    """
    phase = max(1, 4 // warps)  # rows of a place of 128 bytes
    return {
        "WIDE_TILE": f"gl.NVMMADistributedLayout([2, 0], [1, {warps}], [16, 8])",
        "WIDE_LEFT": "gl.DotOperandLayout(0, WIDE_TILE, 2)",
        "WIDE_RIGHT": "gl.DotOperandLayout(1, WIDE_TILE, 2)",
        "WEIGHT_TILE": f"gl.NVMMADistributedLayout([2, 0], [{warps}, 1], [16, 8])",
        "WEIGHT_LEFT": "gl.DotOperandLayout(0, WEIGHT_TILE, 2)",
        "WEIGHT_RIGHT": "gl.DotOperandLayout(1, WEIGHT_TILE, 2)",
        "PLACE_OF_STATES": f"gl.SwizzledSharedLayout(8, {phase}, {8 // phase}, [1, 0])",
    }


def _over_warps(warps: int) -> dict[str, Linear]:
    """Return the layouts of what all warps have summed, with every warp's part in one thread."""
    parts = tuple((warp, 0, 0) for warp in powers(1, warps))
    steps = [(0, 0, 2), (0, 0, 4)]
    bits = warps.bit_length() - 1
    spread = [*steps[:bits], *[(0, 0, 0)] * (bits - 2)]
    lanes = (*((0, col, 0) for col in powers(1, 16)), (0, 0, 1))
    every = [(part, 0) for part in powers(1, 32 * warps)]
    down = [*((0, step) for step in powers(1, 8)), *every[:2]]
    return {
        "OVER_WARPS": Linear((warps, 16, 8), (*parts, *steps[bits:]), lanes, tuple(spread)),
        "OVER_THREADS": Linear((32 * warps, 8), tuple(every[2:]), tuple(down), ((0, 0),) * bits),
    }
