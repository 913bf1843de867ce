"""What a kernel module defines beside its functions: numbers, and Gluon's layouts by name."""

from __future__ import annotations

from m2gen.kernels import layouts, slots
from m2gen.kernels.lowering import Lowering
from m2gen.kernels.reductions import Sums
from m2gen.schedule import Family


def constants(k: Lowering) -> dict[str, int]:
    """Return the numbers that kernels and launchers name."""
    variant, heads, forward, backward = k.variant, k.variant.heads, k.forward, k.backward
    found = {"K": variant.state_expansion, "V": variant.head_dim, "V_PAD": variant.padded_cols}
    found |= {"N": heads.total, "NQ": heads.q, "NK": heads.k, "NV": heads.v, "NF": heads.f, "NW": heads.w}
    found |= {"INTERVAL": k.schedule.interval}
    found |= {"FORWARD_ROWS": forward.rows, "FORWARD_PARTS": forward.parts(variant)}
    if not k.wgmma:
        found |= {"UNROLL": forward.unroll}
    if k.warps_have_slots:
        found |= {"WARPS": backward.warps, "ROWS": k.slot_rows}
    else:
        found |= {"BACKWARD_ROWS": backward.rows}
    if k.across or not k.warps_have_slots:
        found |= {"BACKWARD_PARTS": backward.parts(variant)}
    if not k.slots:
        found |= {"CHUNK": backward.chunk}
    if k.segmented:
        found |= {"SEGMENTS": k.schedule.segments, "SHORTEST": k.schedule.shortest_segment}
    return {**found, "SUM_BLOCK": k.launch.sum_block} if k.shares else found


def layouts_of(k: Lowering) -> dict[str, str]:
    """Return the layouts that kernels name; none where Triton's compiler decides which thread holds what."""
    if k.family is Family.PORTABLE:
        return {}
    found = _wgmma(k) if k.wgmma else _mma(k)
    if not k.slots and k.rebuilds:
        found["BACKWARD_SPREAD"] = layouts.spread(k.backward.warps)
    if k.scratch_in_shared:
        found["BACKWARD_SCRATCH"] = layouts.scratch(k.variant)
    if k.shares:
        found["SUM_LAYOUT"] = layouts.spread(k.forward.warps)
    return found


def _mma(k: Lowering) -> dict[str, str]:
    found = {"FORWARD_TILE": layouts.tile(k.forward), "FORWARD_VECTOR": layouts.vector(k.forward)}
    if k.slots:
        found |= slots.layouts(k.backward.warps, k.slot_rows)
        if k.across:
            found |= slots.across(k.backward.warps)
    else:
        found |= {"BACKWARD_TILE": layouts.tile(k.backward), "BACKWARD_VECTOR": layouts.vector(k.backward)}
    if k.outer_by_product:
        found |= {"FORWARD_KEYS": layouts.keys(k.forward), "FORWARD_VALUES": "gl.DotOperandLayout(1, FORWARD_TILE, 2)"}
    if k.sums.y is Sums.MEMORY:
        found |= layouts.sums_apart(k.variant, k.forward)
    elif k.sums.y is Sums.BUTTERFLY:
        found["FORWARD_SUMS"] = layouts.row_sums(k.variant, k.forward)
    if k.sums.together:
        found |= {"ROW_SUMS": layouts.row_sums(k.variant, k.backward), **layouts.col_sums(k.backward)}
    if k.sums.df_together:
        found["ALL_SUMS"] = layouts.all_sums()
    return found


def _wgmma(k: Lowering) -> dict[str, str]:
    tile = f"gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {k.variant.padded_cols}, 16])"
    return {
        "FORWARD_TILE": tile,
        "BACKWARD_TILE": tile,
        "FORWARD_VECTOR": layouts.vector(k.forward),
        **layouts.warpgroup(k.variant),
        "KEYS": layouts.keys(k.backward),
    }
