"""The function of every ``Check``: it takes a ``CaseContext`` and returns judged results."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from m2gen.verify.case import Check, TensorResult
from m2gen.verify.checks.determinism import repeated
from m2gen.verify.checks.drift import drift
from m2gen.verify.checks.drop_in import drop_in
from m2gen.verify.checks.gradients import autocast, gradients, inference, single
from m2gen.verify.checks.layer import layer, layer_decoding
from m2gen.verify.checks.pools import layer_pool, pool, pool_kept, pool_prompts
from m2gen.verify.checks.pytorch import checkpoint, compiled, graph, opcheck, step_graph
from m2gen.verify.checks.states import chunked, decoding, isolated
from m2gen.verify.subject import CaseContext

CHECKS: dict[Check, Callable[[CaseContext], Iterable[TensorResult]]] = {
    Check.GRADIENTS: gradients,
    Check.SINGLE: single,
    Check.INFERENCE: inference,
    Check.AUTOCAST: autocast,
    Check.CHUNKED: chunked,
    Check.ISOLATED: isolated,
    Check.DECODING: decoding,
    Check.REPEATED: repeated,
    Check.OPCHECK: opcheck,
    Check.COMPILE: compiled,
    Check.GRAPH: graph,
    Check.STEP_GRAPH: step_graph,
    Check.CHECKPOINT: checkpoint,
    Check.DROP_IN: drop_in,
    Check.LAYER: layer,
    Check.LAYER_DECODING: layer_decoding,
    Check.POOL: pool,
    Check.POOL_PROMPTS: pool_prompts,
    Check.POOL_KEPT: pool_kept,
    Check.LAYER_POOL: layer_pool,
    Check.DRIFT: drift,
}
