"""Predict a run over several GPUs from what one GPU was measured to do, before there is any measurement of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from m2gen.bench.ranks.entries import PAIR, WIDER, Link, RankCase, RankRow, Shape
from m2gen.bench.ranks.kinds import Form, Mixing
from m2gen.bench.ranks.model import BYTES, model_bytes, parameter_bytes, predicted_ms, traffic


@dataclass(frozen=True)
class MeasuredLayer:
    """What one GPU was measured to take for a layer: times of a call, and of a step by its parts."""

    heads: int
    """N of the layer of M2RNN; 0 for attention."""
    hidden: int
    batch: int
    seq: int
    forward_ms: float
    step_ms: float
    recurrence_ms: float
    projections_ms: float
    extra_bytes: int
    """Memory of a step beyond what was there before."""

    @property
    def tokens(self) -> int:
        return self.batch * self.seq


@dataclass(frozen=True)
class OneGpu:
    """The measurements that predictions are made of."""

    layers: Mapping[str, MeasuredLayer]
    """Layers of M2RNN by their names in the spec."""
    attention: Mapping[str, MeasuredLayer]
    """Attention of the same width, by the name of that layer."""
    points: Sequence[tuple[float, float]]
    """Heads of all sequences for each SM, rising, and the microseconds of a token of a step's recurrence."""
    sm_count: int


@dataclass(frozen=True)
class Forecast:
    """What a case is predicted to take; memory and communication are of one rank."""

    case: RankCase
    ranks: int
    one_ms: float
    """A step of one rank doing the same work; of a hybrid, a rank's part of it."""
    step_ms: float
    efficiency: float
    communication_ms: float
    """A step's collectives by themselves."""
    memory: float
    """Bytes: the parameters, their gradients, x and y with theirs, and what a step keeps for its backward."""


def token_us(programs: float, points: Sequence[tuple[float, float]]) -> float:
    """Return the microseconds of a token of a recurrence with so many heads of sequences for each SM.

    Fewer than were measured take as long as the fewest, which wait for latency alone; more than were measured take
    longer in proportion; between two points time is linear.
    """
    if programs <= points[0][0]:
        return points[0][1]
    for (few, less), (many, more) in pairwise(points):
        if programs <= many:
            return less + (more - less) * (programs - few) / (many - few)
    return points[-1][1] * programs / points[-1][0]


def recurrence_ms(shape: Shape, batch: int, seq: int, known: OneGpu) -> float:
    """Return the milliseconds of forward and backward of a recurrence."""
    return seq * token_us(batch * shape.total_heads / known.sm_count, known.points) / 1e3


def one_rank(case: RankCase, ranks: int, known: OneGpu) -> RankRow:
    """Return the times of one rank with the work of a case, or with a rank's part of a hybrid's sequences."""
    shape, layer = case.shape, known.layers[_layer_of(case.shape, known)]
    batch = case.batch // ranks if case.form is Form.FSDP else case.batch
    tokens = batch * case.seq
    wider = shape.total_heads / layer.heads  # columns of the projections and of the epilogue are those of heads
    recurrence = recurrence_ms(shape, batch, case.seq, known)
    step = recurrence + (layer.step_ms - layer.recurrence_ms) / layer.tokens * tokens * wider
    forward = step * layer.forward_ms / layer.step_ms
    if shape.blocks:
        forward, step = _hybrid_ms(shape, tokens, (forward, step), known)
    return RankRow(shape.name, Form.ONE, batch, case.seq, 1, forward_ms=forward, step_ms=step, recurrence_ms=recurrence)


def _hybrid_ms(shape: Shape, tokens: int, layer: tuple[float, float], known: OneGpu) -> tuple[float, float]:
    """Return the forward and the step of a hybrid: its mixers, and its MLPs at the rate of the layer's projections."""
    name = _layer_of(shape, known)
    attention, of = known.attention[name], known.layers[name]
    heads = {name: of.heads if count == shape.total_heads else count for name, count in shape.heads.items()}
    rate = _projection_flops(replace(shape, heads=heads), of.tokens) / of.projections_ms
    mlp = 2 * 3 * 2 * tokens * WIDER * shape.hidden_size**2 / rate  # two products, each with two more backwards
    part = tokens / attention.tokens
    parts = {
        Mixing.M2RNN: layer,
        Mixing.ATTENTION: (attention.forward_ms * part, attention.step_ms * part),
    }
    forward, step = (sum(parts[mixing][i] for mixing in shape.blocks) for i in range(2))
    return forward + len(shape.blocks) * mlp / 3, step + len(shape.blocks) * mlp


def _projection_flops(shape: Shape, tokens: int) -> float:
    """Return the operations of a layer's projections in a step."""
    heads, rows, cols = shape.heads, shape.state_expansion, shape.head_dim
    columns = (heads["q"] + heads["k"]) * rows + (heads["v"] + heads["g"] + shape.total_heads) * cols + heads["f"]
    return 3.0 * 2 * tokens * shape.hidden_size * columns


def _layer_of(shape: Shape, known: OneGpu) -> str:
    """Return the measured layer that a shape's name begins with."""
    return next(name for name in known.layers if shape.name.startswith(name))


def forecast(case: RankCase, ranks: int, known: OneGpu, link: Link) -> Forecast:
    """Predict one case that lies over ranks."""
    one = one_rank(case, ranks, known)
    alone = recurrence_ms(*case.recurrence(ranks), known)
    row = RankRow(case.shape.name, case.form, case.batch, case.seq, ranks, recurrence_ms=alone)
    step = predicted_ms(case, row, one, link, fused=True)
    assert step is not None
    assert one.step_ms is not None
    sent = traffic(case, ranks, fused=True)
    communication = sent.sent / link.gb_per_s / 1e6 + sent.collectives * link.latency_ms
    work = ranks if case.form is Form.FSDP else 1  # what one rank's step is a part of
    efficiency = one.step_ms * work / (ranks * step)
    return Forecast(case, ranks, one.step_ms, step, efficiency, communication, memory_bytes(case, ranks, known))


def memory_bytes(case: RankCase, ranks: int, known: OneGpu) -> float:
    """Return the bytes of one rank: what a step was measured to need a token, and what is there before it."""
    shape, width = case.shape, BYTES[case.shape.dtype]
    name = _layer_of(shape, known)
    layer, attention = known.layers[name], known.attention[name]
    tokens = case.batch * case.seq / ranks
    outside = tokens
    if case.form is Form.HEADS:
        outside = case.batch * case.seq
    elif case.form is Form.MESH:
        outside = tokens * PAIR
    kept = layer.extra_bytes / layer.tokens * tokens * shape.total_heads / layer.heads
    held = {Form.HEADS: ranks, Form.HEADS_TOKENS: ranks, Form.MESH: PAIR}.get(case.form, 1)
    parameters = float(parameter_bytes(shape.share(held)))
    if shape.blocks:
        mlp = 2 * WIDER * shape.hidden_size * width * tokens  # before and after its activation
        mixers = {Mixing.M2RNN: kept, Mixing.ATTENTION: attention.extra_bytes / attention.tokens * tokens}
        kept = sum(mixers[mixing] + mlp for mixing in shape.blocks)
        parameters = model_bytes(shape) / ranks
    return kept + 2 * parameters + 4 * outside * shape.hidden_size * width
