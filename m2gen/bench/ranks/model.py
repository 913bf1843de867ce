"""A cost model of a layer over ranks: times of kernels, a link's bandwidth and latency, and what a form sends."""

from __future__ import annotations

from dataclasses import dataclass

from m2gen.bench.ranks.entries import MICRO_BATCHES, PAIR, WIDER, Link, RankCase, RankRow, Shape
from m2gen.bench.ranks.kinds import Form, Mixing

CONV_WIDTH, WIDE = 4, 4
ROW = 16
"""Columns whose multiples rows of a projection are that kernels read."""
MESSAGES, HALVES = 16, 2
"""Messages that a rank sends at most by sequence, and the parts in which it sends these while it computes."""
PRODUCTS = 2 / 3
"""Part of projections in what is not the recurrence of one rank's step: 0.69 at 7B, 0.60 at 410M."""
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
        sent = sum(_exchanged(shape, tokens, ranks, fused)) + 2 * part * parameter_bytes(shape)
        return Traffic(sent, sum(_batches(case.batch, ranks, fused)) + sums)
    if case.form is Form.MESH:
        return _meshed(shape, tokens, ranks // PAIR, fused)
    if case.form is Form.FSDP:
        return _gathered(shape, ranks)
    if case.form is Form.PIPELINE:
        states = case.batch * shape.total_heads * shape.state_expansion * shape.head_dim * 4
        return Traffic(2 * states + 2 * part * parameter_bytes(shape), 4)
    return Traffic(0.0, 0)


def _meshed(shape: Shape, tokens: int, parts: int, fused: bool) -> Traffic:
    """Return what pairs send that share heads, of their part of the tokens, and what they exchange with others."""
    width, part = BYTES[shape.dtype], (PAIR - 1) / PAIR
    own, here = shape.share(PAIR), tokens / parts
    shared = _shared(shape, PAIR)
    sums = 2 * part * (here * (2 * shape.hidden_size * width + WIDE) + sum(shared))  # of y, of dx and of squares
    gradients = 2 * (parts - 1) / parts * parameter_bytes(own)
    dtypes = 1 if width == WIDE else 2  # A_log and dt_bias are float32
    sent = sum(_exchanged(own, tokens, parts, fused)) + sums + gradients
    return Traffic(sent, 4 + 3 + len(shared) + dtypes)


def _gathered(shape: Shape, ranks: int) -> Traffic:
    """Return what FSDP sends: blocks gathered twice and their gradients scattered, decay parameters gathered once."""
    part = (ranks - 1) / ranks
    decay = shape.blocks.count(Mixing.M2RNN)
    of_decay = decay * 4 * 2 * shape.heads["f"]
    others = model_bytes(shape) - of_decay
    return Traffic(part * (3 * others + 2 * of_decay), 3 * len(shape.blocks) + 2 * decay)


def model_bytes(shape: Shape) -> int:
    """Return the bytes of the parameters of a hybrid model."""
    hidden, width = shape.hidden_size, BYTES[shape.dtype]
    mixers = {Mixing.M2RNN: parameter_bytes(shape), Mixing.ATTENTION: 4 * hidden * hidden * width}
    return sum(mixers[mixing] + (2 * WIDER * hidden + 2) * hidden * width for mixing in shape.blocks)


def _exchanged(shape: Shape, tokens: int, ranks: int, fused: bool) -> tuple[float, ...]:
    """Return the bytes of q, k, v and f there, with g in full rows if ``fused``, y back, and their gradients."""
    each = tokens * BYTES[shape.dtype] * (ranks - 1) / ranks
    there, back = (columns * each for columns in _columns(shape, ranks, fused))
    return there, back, back, there


def _columns(shape: Shape, ranks: int, fused: bool) -> tuple[int, int]:
    """Return the columns of a rank's heads there, and back."""
    own = shape.share(ranks).heads
    rows, cols = shape.state_expansion, shape.head_dim
    there = (own["q"] + own["k"]) * rows + own["v"] * cols + own["f"]
    if fused:
        there += own["g"] * cols
        there += -there % ROW
    return there, shape.total_heads // ranks * cols


def _batches(batch: int, ranks: int, fused: bool) -> tuple[int, ...]:
    """Return in how many collectives, or batches of messages if ``fused``, each exchange of a step is done."""
    if not fused:
        return 1, 1, 1, 1
    back = ranks - 1
    there = back * (HALVES if 1 < batch <= MESSAGES // back else 1)
    return there, back, there, back


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

    What is not the recurrence is shared out evenly. None for one rank, and without times.
    """
    if case.form is Form.ONE or one.step_ms is None:
        return None
    if case.form is Form.FSDP:
        return _sharded_ms(case.shape, row.ranks, one, link)
    if row.recurrence_ms is None or one.recurrence_ms is None:
        return None
    rest = one.step_ms - one.recurrence_ms
    sent = traffic(case, row.ranks, fused=fused)
    communication = _ms(sent.sent, sent.collectives, link)
    if case.form is Form.EXCHANGE and fused:
        communication -= _behind_products(case, row.ranks, PRODUCTS * rest / row.ranks, link)
    if case.form is not Form.PIPELINE:
        return rest / row.ranks + row.recurrence_ms + communication
    parts = min(MICRO_BATCHES, case.batch)
    return (parts + row.ranks - 1) * (rest / row.ranks / parts + row.recurrence_ms) + communication


def _ms(sent: float, collectives: int, link: Link) -> float:
    return sent / link.gb_per_s / 1e6 + collectives * link.latency_ms


def _behind_products(case: RankCase, ranks: int, products: float, link: Link) -> float:
    """Return the milliseconds of exchanges that pass while a rank's ``products``, of so many, are computed.

    Nothing is under way before the first piece is there; what arrives last is multiplied when nothing is.
    """
    there, back = _columns(case.shape, ranks, fused=True)
    forward, backward = (products / 3 * columns / (there + back) for columns in (there, back))
    sent = _exchanged(case.shape, case.batch * case.seq, ranks, fused=True)
    batches = _batches(case.batch, ranks, fused=True)
    before, after = (ranks - 1) / ranks / batches[0], 1 - 1 / ranks
    beside = forward * (1 - before), backward * after, backward * (2 - before), 2 * forward * after
    times = (_ms(*each, link) for each in zip(sent, batches, strict=True))
    return sum(map(min, times, beside))


def _sharded_ms(shape: Shape, ranks: int, one: RankRow, link: Link) -> float | None:
    """Return the milliseconds of one rank's step and of what FSDP sends beyond what it hides behind blocks.

    The first block is gathered, and the last one's gradients are scattered, while nothing runs. Between these a block
    is gathered, and in the backward another one's gradients are scattered as well, while one runs.
    """
    if one.step_ms is None or one.forward_ms is None:
        return None
    blocks = len(shape.blocks)
    each = (ranks - 1) / ranks * model_bytes(shape) / blocks / link.gb_per_s / 1e6 + link.latency_ms
    forward, backward = (ms / blocks for ms in (one.forward_ms, one.step_ms - one.forward_ms))
    beyond = max(0.0, each - forward) + max(0.0, 2 * each - backward)
    return one.step_ms + 2 * each + (blocks - 1) * beyond
