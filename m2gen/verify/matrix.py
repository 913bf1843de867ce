"""The matrix of cases: for each feature, those that apply to a variant on the GPU or in the interpreter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from m2gen.problem import Gates, Problem, Weights
from m2gen.spec import ClipMode, Dtype
from m2gen.variant import MIN_TILE, Variant
from m2gen.verify.case import Case, Check, Feature, LayerForm, Layout, Loss
from m2gen.verify.setting import MANY_TOKENS, Setting

LONG = 4096
DRIFT = 16384
SEGMENT = 128
"""Steps of a segment at most, but for what makes its intervals whole."""
INTERPRETED_TILES = 64
"""Largest state, in 16x16 tiles, that the interpreter scans in reasonable time."""
CHAOTIC_STEPS = 5
"""Steps under standard normal weights; more let errors of the last bit grow to the size of the state."""
REQUEST = 6
"""Tokens of a request: half of them a prompt, one alone, one with a draft, and one more."""
WAVES_OF_PROGRAMS = 4096
"""Several waves on any GPU: 31 programs for each of 132 SMs."""


def cases(variant: Variant, interval: int, *, interpreted: bool) -> tuple[Case, ...]:
    """Return every case that applies to a variant whose checkpoints are ``interval`` steps apart.

    The interpreter gets shorter sequences, and a single case if the state has too many tiles for it.
    """
    setting = Setting(variant, interval, interpreted)
    if interpreted and _work(variant) > INTERPRETED_TILES * MIN_TILE**2:
        return (Case("ragged", Problem(1, 3, initial_state=True)),)
    found = (replace(case, feature=feature) for feature, make in FEATURES.items() for case in make(setting))
    return tuple(case for case in found if not (interpreted and case.check.needs_gpu))


def quick(variants: Mapping[Variant, int], *, interpreted: bool) -> list[tuple[Variant, Case]]:
    """Return the first case of every variant, and the first of every feature on the smallest variant that has one."""
    every = [(v, cases(v, interval, interpreted=interpreted)) for v, interval in variants.items()]
    chosen = [(variant, found[0]) for variant, found in every]
    smallest_first = sorted(every, key=lambda pair: _work(pair[0]))
    for feature in Feature:
        having = ((v, case) for v, found in smallest_first for case in found if case.feature is feature)
        first = next(having, None)
        if first is not None and not any(case.feature is feature for _, case in chosen):
            chosen.append(first)
    return chosen


def _work(variant: Variant) -> int:
    """Return the number of elements of a padded state."""
    return variant.total_heads * variant.padded_rows * variant.padded_cols


def _recurrence(s: Setting) -> Iterator[Case]:
    yield Case("ragged", s.ragged)
    c = s.interval
    for seq in dict.fromkeys((0, 1, 2, c - 1, c, c + 1, 63, 64, 65)):
        if not (s.interpreted and seq > c + 1):
            yield Case(f"steps_{seq}", Problem(1, seq, initial_state=seq % 2 == 0))
    if s.interpreted and s.variant.padded_rows > MIN_TILE:  # no other case there is of as many tokens
        yield Case("many_tokens", Problem(5, -(-MANY_TOKENS // 5), initial_state=True), check=Check.INFERENCE)
    if s.long:
        yield Case(f"steps_{LONG}", Problem(1, LONG, initial_state=True))
    if not s.variant.computes_gate:
        yield Case("gates_zero", s.ragged, gates=Gates.ZERO)
        yield Case("gates_one", s.ragged, gates=Gates.ONE)
        yield Case("gates_slow", s.ragged, gates=Gates.SLOW)
    yield Case("weight_identity", s.ragged, weights=Weights.IDENTITY)
    yield Case("weight_orthogonal", s.ragged, weights=Weights.ORTHOGONAL)
    yield Case("weight_normal", replace(s.ragged, seq=CHAOTIC_STEPS), weights=Weights.NORMAL)
    yield Case("saturated", s.ragged, value_scale=8.0)
    yield Case("dy_small", s.ragged, dy_scale=0.01)
    yield Case("dy_large", s.ragged, dy_scale=s.large)
    yield Case("clip_none", s.ragged, dy_scale=3.0, clip=None)
    yield Case("clip_zero", s.ragged, clip=0.0)


def _packed(s: Setting) -> Iterator[Case]:
    c = s.interval
    lengths = {
        "empty_anywhere": (0, 2, 0, 0, 3 if s.interpreted else c + 1, 1, 0),
        "one_sequence": (c + 2,),
        "only_empty": (0, 0),
        "around_interval": (c - 1, c, 1),
    }
    for name, each in lengths.items():
        for state in (True, False):
            problem = Problem(0, 0, lengths=each, initial_state=state, long_offsets=state)
            yield Case(f"{name}{'_from_states' if state else ''}", problem, dy_scale=3.0)
    if not s.interpreted:  # a batch is cut where the mean sequence is longer than a segment, and the schedule has some
        longest = SEGMENT + c
        several = Problem(0, 0, lengths=(2 * longest, 1), initial_state=True)
        yield Case("segments_from_states", several, dy_scale=3.0)
    isolated = Problem(0, 0, lengths=(3, 0, c + 1, 1, 2), initial_state=True)
    yield Case("isolated", isolated, deterministic=True, check=Check.ISOLATED)


def _states(s: Setting) -> Iterator[Case]:
    several = replace(s.ragged, batch=2, seq=s.interval + 1)
    yield Case("chunks", s.ragged if not s.interpreted else s.brief, wide=s.narrow, dy_scale=3.0, check=Check.CHUNKED)
    for loss in Loss:
        yield Case(f"loss_{loss}", several, loss=loss)
        yield Case(f"loss_{loss}_from_zero", replace(several, initial_state=False), loss=loss)
    yield Case("inference", s.ragged, check=Check.INFERENCE)


def _decoding(s: Setting) -> Iterator[Case]:
    seq = s.brief.seq if s.interpreted else 2 * s.interval
    yield Case("prefill_and_steps", Problem(2, seq, initial_state=True), check=Check.DECODING)
    yield Case("steps_from_zero", Problem(1, 1), check=Check.DECODING)
    narrow = Problem(2, s.brief.seq, initial_state=True)
    yield Case("steps_on_bf16_state", narrow, narrow_state=True, check=Check.DECODING)
    yield Case("steps_replayed", Problem(2, 1), check=Check.STEP_GRAPH)


def _dtypes(s: Setting) -> Iterator[Case]:
    if s.narrow:
        yield Case("float32_gate_and_weight", s.ragged, wide=True)
        yield Case("autocast", s.ragged, wide=True, check=Check.AUTOCAST)
    else:
        yield Case("float32", s.brief, dy_scale=3.0)


def _gate(s: Setting) -> Iterator[Case]:
    if not s.variant.computes_gate:
        return
    yield Case("softplus", s.ragged)
    yield Case("softplus_slow", s.ragged, gates=Gates.SLOW)
    yield Case("softplus_vanishing", replace(s.ragged, initial_state=False), gates=Gates.VANISHING)
    yield Case("softplus_dy_large", s.ragged, dy_scale=s.large)
    yield Case("softplus_packed", Problem(0, 0, lengths=(2, 0, s.interval + 1), initial_state=True))


def _layouts(s: Setting) -> Iterator[Case]:
    for layout in (Layout.STRIDED, Layout.TRANSPOSED, Layout.SLICED):
        yield Case(f"{layout}", s.brief, layout=layout)
    yield Case("sliced_packed", Problem(0, 0, lengths=(2, 3), initial_state=True), layout=Layout.SLICED)
    yield Case("expanded", s.brief, layout=Layout.EXPANDED)
    yield Case("single_gradients", s.brief, check=Check.SINGLE)


def _determinism(s: Setting) -> Iterator[Case]:
    batch = 2 if s.interpreted else -(-WAVES_OF_PROGRAMS // s.variant.total_heads)
    seq = 3 if s.interpreted else s.interval + 3
    yield Case("repeated", Problem(batch, seq, initial_state=True), deterministic=True, check=Check.REPEATED)
    yield Case("deterministic", s.ragged, deterministic=True)


def _heads(s: Setting) -> Iterator[Case]:
    if len(set(s.variant.heads.counts)) > 1:
        yield Case("groups", Problem(2, min(s.interval, 5), initial_state=True), dy_scale=3.0)


def _dims(s: Setting) -> Iterator[Case]:
    if s.variant.masks_rows or s.variant.masks_cols or not s.interpreted:
        yield Case("tiles", Problem(2, s.interval + 1 if not s.interpreted else 4, initial_state=True))


def _pytorch(s: Setting) -> Iterator[Case]:
    short = Problem(2, 3, initial_state=True)
    packed = Problem(0, 0, lengths=(2, 3), initial_state=True)
    yield Case("opcheck", short, deterministic=True, check=Check.OPCHECK)
    yield Case("compile", short, deterministic=True, check=Check.COMPILE)
    yield Case("compile_packed", packed, deterministic=True, check=Check.COMPILE)
    yield Case("checkpoint", short, deterministic=True, check=Check.CHECKPOINT)
    yield Case("graph", s.ragged, deterministic=True, check=Check.GRAPH)
    yield Case("graph_packed", packed, deterministic=True, check=Check.GRAPH)


def _drop_in(s: Setting) -> Iterator[Case]:
    if s.variant.clip is not ClipMode.CARRY or s.variant.computes_gate:
        return
    yield Case("published", s.brief, dy_scale=3.0, check=Check.DROP_IN)
    packed = Problem(0, 0, lengths=(3, 0, s.interval + 1), initial_state=True)
    yield Case("published_packed", packed, clip=None, check=Check.DROP_IN)


def _layer(s: Setting) -> Iterator[Case]:
    """Yield calls of the layer: its forms, packed, padded, from states, and token by token; a few if interpreted."""
    steps = s.brief.seq if s.interpreted else 60
    dense, packed = Problem(2, steps), Problem(0, 0, lengths=(3, 0, steps, 1))
    yield Case("layer_published", dense, check=Check.LAYER)
    for form in (LayerForm.THREE_WIDE,) if s.interpreted else (LayerForm.PUBLISHED, LayerForm.THREE_WIDE):
        began = replace(packed, initial_state=True)
        yield Case(f"layer_{form}_packed_states", began, layer=form, check=Check.LAYER)
    yield Case("layer_padded", dense, padded=True, check=Check.LAYER)
    yield Case("layer_decoding", Problem(2, min(steps, 12)), check=Check.LAYER_DECODING)
    if s.interpreted:
        return
    for form in LayerForm:
        if form is not LayerForm.PUBLISHED:
            yield Case(f"layer_{form}", dense, layer=form, check=Check.LAYER)
    for form in (LayerForm.PUBLISHED, LayerForm.THREE_WIDE):
        yield Case(f"layer_{form}_states", replace(dense, initial_state=True), layer=form, check=Check.LAYER)
        yield Case(f"layer_{form}_packed", packed, layer=form, check=Check.LAYER)
    for form in (LayerForm.TWO_WIDE, LayerForm.NO_CONVOLUTION):
        yield Case(f"layer_{form}_decoding", Problem(2, min(steps, 12)), layer=form, check=Check.LAYER_DECODING)
    yield Case("layer_many_tokens", Problem(10, 60), check=Check.LAYER)  # enough for aligned projections


def _pools(s: Setting) -> Iterator[Case]:
    """Yield calls on slots of a pool, of the operator and of the layer."""
    requests = Problem(3, REQUEST, initial_state=True)
    yield Case("pool", requests, check=Check.POOL)
    yield Case("pool_of_bf16", requests, narrow_state=True, check=Check.POOL)
    packed = Problem(0, 0, lengths=(2, 0, s.interval + 1), initial_state=True)
    yield Case("pool_prompts", packed, check=Check.POOL_PROMPTS)
    yield Case("pool_prompts_from_zeros", replace(packed, initial_state=False), check=Check.POOL_PROMPTS)
    yield Case("pool_keeps_states", Problem(2, 2 * s.interval, initial_state=True), check=Check.POOL_KEPT)
    yield Case("pool_of_layer", Problem(2, REQUEST), check=Check.LAYER_POOL)


def _drift(s: Setting) -> Iterator[Case]:
    if s.long and s.variant.dtype is Dtype.BF16:
        yield Case(f"steps_{DRIFT}", Problem(1, DRIFT), gates=Gates.SLOW, check=Check.DRIFT)


FEATURES = {
    Feature.RECURRENCE: _recurrence,
    Feature.PACKED: _packed,
    Feature.STATES: _states,
    Feature.DECODING: _decoding,
    Feature.DTYPES: _dtypes,
    Feature.GATE: _gate,
    Feature.LAYOUTS: _layouts,
    Feature.DETERMINISM: _determinism,
    Feature.HEADS: _heads,
    Feature.DIMS: _dims,
    Feature.PYTORCH: _pytorch,
    Feature.DROP_IN: _drop_in,
    Feature.LAYER: _layer,
    Feature.POOLS: _pools,
    Feature.DRIFT: _drift,
}


def only(features: Iterable[Feature], found: Iterable[Case]) -> tuple[Case, ...]:
    """Return the cases of ``features``."""
    wanted = set(features)
    return tuple(case for case in found if case.feature in wanted)
