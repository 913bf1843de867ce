"""Layouts of a backward whose steps have slots: every warp holds 32 rows of 16 columns of its own.

Tensors have the warp as their first dim, so that products of warps share nothing. A lane has rows l // 4 and l // 4 + 8
of each 16 of a tile; in memory's order they are four neighbours, which ``tile_rows`` renames.
"""

from __future__ import annotations

from m2gen.kernels.linear import Linear, powers

PLAIN = "tl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])"
COLS = ((0, 0, 2), (0, 0, 4))
"""Pairs of columns that a lane holds of a tile."""
ROWS = ((0, 1, 0), (0, 2, 0), (0, 4, 0))


def layouts(warps: int) -> dict[str, str]:
    """Return the layouts that the backward names: those of products, then of memory, then of sums over warps."""
    across = tuple((warp, 0, 0) for warp in powers(1, warps))
    tile = f"tl.NVMMADistributedLayout([2, 0], [{warps}, 1, 1], [1, 16, 8])"
    quads = ((0, 4, 0), (0, 8, 0), (0, 16, 0))
    linear = {
        "SLOT_KEYS": Linear((warps, 32, 8), ((0, 1, 0), (0, 2, 0), (0, 0, 1)), (*COLS, *quads), across),
        "SLOT_VALUES": Linear((warps, 8, 16), ((0, 0, 1), (0, 0, 8)), (*COLS, *ROWS), across),
        "CHECKPOINT": Linear((warps, 32, 16), ((0, 0, 1), (0, 1, 0), (0, 0, 8), (0, 2, 0)), (*COLS, *quads), across),
        "KEPT": Linear((warps, 64, 8), ((0, 0, 1), *COLS, (0, 32, 0)), (*ROWS, (0, 8, 0), (0, 16, 0)), across),
        "COPIED_KEYS": Linear((warps, 8, 32), ((0, 0, 1), *COLS), ((0, 0, 8), (0, 0, 16), *ROWS), across),
        "COPIED_VALUES": Linear((warps, 8, 16), ((0, 0, 1), (0, 0, 2)), ((0, 0, 4), (0, 0, 8), *ROWS), across),
        "COPIED_STATE": Linear((warps, 32, 16), ((0, 0, 1), *COLS, (0, 16, 0)), ((0, 0, 8), *ROWS, (0, 8, 0)), across),
        "THREADS": Linear((warps, 8, 4), (), ((0, 0, 1), (0, 0, 2), *ROWS), across),
        **_over_warps(warps),
    }
    return {
        "BACKWARD_TILE": tile,
        "LEFT": "tl.DotOperandLayout(0, BACKWARD_TILE, 2)",
        "RIGHT": "tl.DotOperandLayout(1, BACKWARD_TILE, 2)",
        **{name: str(layout) for name, layout in linear.items()},
        "PLACE_OF_KEYS": "tl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0])",
        "PLACE_OF_STATES": "tl.SwizzledSharedLayout(8, 4, 2, [2, 1, 0])",
        "PLACE": PLAIN,
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
