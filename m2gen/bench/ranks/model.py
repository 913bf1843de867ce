"""A cost model of a layer over ranks: times of kernels, a link's bandwidth and latency, and what a form sends."""

from __future__ import annotations

from dataclasses import dataclass

from m2gen.bench.ranks.entries import MICRO_BATCHES, Link, RankCase, RankRow, Shape
from m2gen.bench.ranks.kinds import Form

CONV_WIDTH, WIDE = 4, 4
ROW = 16
"""Columns whose multiples rows of a projection are that kernels read."""
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in a step, in bytes, and in how many collectives."""

    sent: float
    collectives: int


def traffic(case: RankCase, ranks: int, *, fused: bool) -> Traffic:
    """Return what a step sends, of layers that are ``fused`` or whose modules do the work."""
    shape = case.shape
    tokens, width = case.batch * case.seq, BYTES[shape.dtype]
    part = (ranks - 1) / ranks
    hidden, squares = tokens * shape.hidden_size * width, tokens * 4
    norm = 2 * part * squares  # their sum, which is as much as to scatter it and to gather its gradient
    if case.form in (Form.HEADS, Form.HEADS_TOKENS):  # a sum is as much as to scatter and to gather
        shared = _shared(shape, ranks)
        calls = 3 if case.form is Form.HEADS else 6
        return Traffic(2 * 2 * part * hidden + norm + 2 * part * sum(shared), calls + len(shared))
    if case.form is Form.EXCHANGE:
        sums = 1 if width == WIDE else 2  # A_log and dt_bias are float32
        return Traffic(_exchanged(shape, tokens, ranks, fused) + 2 * part * parameter_bytes(shape), 4 + sums)
    if case.form is Form.PIPELINE:
        states = case.batch * shape.total_heads * shape.state_expansion * shape.head_dim * 4
        return Traffic(2 * states + 2 * part * parameter_bytes(shape), 4)
    return Traffic(0.0, 0)


def _exchanged(shape: Shape, tokens: int, ranks: int, fused: bool) -> float:
    """Return the bytes of q, k, v and f there, with g in full rows if ``fused``, y back, and their gradients."""
    own = shape.share(ranks).heads
    rows, cols = shape.state_expansion, shape.head_dim
    there = (own["q"] + own["k"]) * rows + own["v"] * cols + own["f"]
    if fused:
        there += own["g"] * cols
        there += -there % ROW
    back = shape.total_heads // ranks * cols
    return 2 * (there + back) * tokens * BYTES[shape.dtype] * (ranks - 1) / ranks


def _shared(shape: Shape, ranks: int) -> list[int]:
    """Return the bytes of the gradients of rows that several ranks read, by the collectives that sum them."""
    width = BYTES[shape.dtype]
    rows = {"q": shape.state_expansion, "k": shape.state_expansion, "v": shape.head_dim, "f": 1, "g": shape.head_dim}
    shared = {name: shape.heads[name] * size for name, size in rows.items() if shape.heads[name] % ranks}
    convolved = sum(shared.get(name, 0) for name in "qkv")
    found = [sum(shared.values()) * shape.hidden_size * width, convolved * CONV_WIDTH * width]
    found += [4 * shape.heads["f"]] * 2 if "f" in shared else []
    found += [shape.heads["w"] * shape.head_dim**2 * width] if shape.heads["w"] % ranks else []
    return [size for size in found if size]


def parameter_bytes(shape: Shape) -> int:
    """Return the bytes of the gradients of a layer without biases."""
    heads, rows, cols, width = shape.heads, shape.state_expansion, shape.head_dim, BYTES[shape.dtype]
    mixed = (heads["q"] + heads["k"]) * rows + heads["v"] * cols
    inner = shape.total_heads * cols
    projected = mixed + heads["f"] + heads["g"] * cols
    matrices = shape.hidden_size * (projected + inner) + CONV_WIDTH * mixed + heads["w"] * cols * cols
    return width * (matrices + 2 * inner) + 4 * 2 * heads["f"]


def predicted_ms(case: RankCase, row: RankRow, one: RankRow, link: Link, *, fused: bool) -> float | None:
    """Return the milliseconds that a step should take, from ``one`` rank's step and both rows' recurrences alone.

    What is not the recurrence is shared out evenly. None for forms that the model does not know, and without times.
    """
    if case.form in (Form.ONE, Form.BOTH) or None in (row.recurrence_ms, one.recurrence_ms, one.step_ms):
        return None
    rest = (one.step_ms or 0.0) - (one.recurrence_ms or 0.0)
    sent = traffic(case, row.ranks, fused=fused)
    communication = sent.sent / link.gb_per_s / 1e6 + sent.collectives * link.latency_ms
    if case.form is not Form.PIPELINE:
        return rest / row.ranks + (row.recurrence_ms or 0.0) + communication
    parts = min(MICRO_BATCHES, case.batch)
    return (parts + row.ranks - 1) * (rest / row.ranks / parts + (row.recurrence_ms or 0.0)) + communication
