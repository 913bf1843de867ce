"""Kernels of the ``mma`` family whose steps have slots of a product: tiles that they can have, and shared memory."""

from __future__ import annotations

from collections.abc import Iterator

from m2gen.device import Device
from m2gen.schedule.mma_tiles import MmaBackward
from m2gen.spec import Dtype, TanhMode
from m2gen.variant import MIN_TILE, Variant

SLOTS = 8
"""Steps of an interval whose sums one product makes: the columns of a product."""
MOST_SLOT_COLS = 128
"""Columns up to which a backward's steps can have slots: a warp for 16, and eight warps."""
SLOT_ROWS = (32, 16)
"""Rows of the state that a warp may have where steps have slots, the usual number first."""


def across(variant: Variant) -> bool:
    """Whether warps have the same rows, and 16 columns each, rather than rows of their own."""
    return variant.padded_cols > MIN_TILE


def slot_problems(variant: Variant, backward: MmaBackward, interval: int, device: Device) -> Iterator[str]:
    """Yield why a backward whose steps have slots cannot serve a variant on a device."""
    if variant.dtype is not Dtype.BF16 or variant.padded_cols > MOST_SLOT_COLS:
        serves = f"for bf16 and at most {MOST_SLOT_COLS} columns"
        yield f"backward.scratch must be slots only {serves}, got {variant.dtype} and {variant.head_dim}"
    if across(variant) and variant.computes_gate and variant.tanh is TanhMode.EXACT:  # ddt_bias is over its budget
        yield f"backward.scratch must not be slots for a computed gate and an exact tanh above {MIN_TILE} columns"
    rows = variant.padded_rows
    warps = tuple(rows // each for each in SLOT_ROWS if each <= rows)
    if across(variant):
        rows, warps = MIN_TILE, (variant.padded_cols // MIN_TILE,)
    wanted = {
        "backward.rows": (backward.rows, (rows,)),
        "backward.warps": (backward.warps, warps),
        "backward.chunk": (backward.chunk, (SLOTS,)),
        "interval": (interval, (SLOTS,)),
    }
    for name, (value, valid) in wanted.items():
        if value not in valid:
            yield f"{name} must be {' or '.join(map(str, valid))} where backward.scratch is slots, got {value}"
    taken = slots_bytes(variant, backward)
    if taken > device.shared_bytes:
        yield f"backward.scratch must take at most {device.shared_bytes} bytes of shared memory, got {taken}"


def checkpoint_bytes(variant: Variant) -> int:
    """Return the bytes of an element of a saved state: 4 across columns, since float16 loses states of 1e-6."""
    return 4 if across(variant) else 2


def gap_bytes(variant: Variant) -> int:
    """Return the bytes of a gap that a backward keeps: 4 for an exact tanh, and across columns a computed gate.

    A float32 gate's gradient is the sum of a state's gaps times its gradients. 11 bits of a gap are as good as those of
    the approximate tanh in it, and no more; and a computed gate's gradients are sums over all steps.
    """
    return 4 if variant.tanh is TanhMode.EXACT or (across(variant) and variant.computes_gate) else 2


def slots_bytes(variant: Variant, part: MmaBackward) -> int:
    """Return the shared memory of a backward whose steps have slots.

    Each row has a state, a slope and a gap of every step, the keys, queries and checkpoint of the next interval; each
    warp the values and dy of that, and its parts of dv and df. Warps that have columns of the same rows have keys and
    queries each, parts of dq and dk in place of dv's, and two gradients of a state between them.
    """
    rows, warps, kept = part.rows, part.warps, SLOTS * (2 + 2 + gap_bytes(variant))
    each = 2 * SLOTS * 16 * 2 + SLOTS * 16 * 4 + SLOTS * 32 * 4
    kept += checkpoint_bytes(variant)
    if not across(variant):
        return rows * 16 * (kept + 2) + warps * each
    return rows * variant.padded_cols * (kept + 4) + warps * (each + SLOTS * 16 * (2 * 2 + 4))
