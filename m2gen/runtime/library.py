"""The operators' registration with torch.library: schemas, kernels, fake tensors, autograd, vmap, counts of flops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import built, checks, fakes, flops, launches, layer_library, memory, pool_library, transforms
from .snapshot import snapshot

SPACE = built.SPACE
NAMESPACE: str = SPACE.name
DIFFERENTIABLE = 8
"""Operands that may have a gradient come first: q, k, v, weight, forget, A_log, dt_bias, initial_state."""
SAVE = 11
"""The forward's argument that asks for checkpoints, counted from 0."""


Library: Any = torch.library.Library
"""Its methods have no types."""


class Operators(Protocol):
    """The module that serves a content's operators: this one, as it was when they were defined."""

    FORWARD: Callable[..., tuple[Tensor, Tensor, Tensor]]
    STEP: Callable[..., Tensor]
    LAYER: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    LAYER_STEP: Callable[..., Tensor]
    POOL_STEPS: Callable[..., Tensor]
    POOL_GATHER: Callable[..., Tensor]
    POOL_SCAN: Callable[..., tuple[Tensor, Tensor]]
    POOL_SCATTER: Callable[..., None]

    @property
    def launches(self) -> Launches:
        """The same calls without torch's dispatcher."""

    @property
    def pool_library(self) -> PoolLibrary:
        """The module of the operators on pools of states."""


class Launches(Protocol):
    """Functions of ``launches`` that ``op`` calls."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    step: Callable[..., Tensor]


class PoolLibrary(Protocol):
    """Modules of ``pool_library`` that ``pools`` uses."""

    @property
    def pool_launches(self) -> PoolLaunches:
        """Calls on pools without torch's dispatcher."""


class PoolLaunches(Protocol):
    """Functions of ``pool_launches`` that ``pools`` calls."""

    steps: Callable[..., Tensor]
    gather: Callable[..., Tensor]
    scatter: Callable[..., None]


def _dense(x: Tensor | None) -> Tensor | None:
    """Return a tensor whose strides kernels take for granted; compilers and transforms may have changed them."""
    return x if x is None else x.contiguous()


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, weight, forget, A_log, dt_bias, initial_state, cu_seqlens, host, _, save, deterministic = arguments
    operands = (q, k, v, weight, forget, _dense(A_log), _dense(dt_bias))
    y, state, checkpoints = launches.forward(
        operands, _dense(initial_state), _dense(cu_seqlens), save, deterministic, None, host
    )  # fmt: skip
    return y, state, state.new_empty(0, *state.shape[1:]) if checkpoints is None else checkpoints


def _forward_mapped(
    info: transforms.MapInfo, in_dims: Sequence[int | None], *arguments: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int | None, ...]]:
    """Make the mapped dim a part of B, for vmap, where every sequence of B is still computed alike."""
    per_sequence = (0, 1, 2, 4, 7)  # q, k, v, forget, initial_state
    *operands, cu_seqlens, host, bound, save, deterministic = arguments
    shared = [dim for i, dim in enumerate(in_dims) if i not in per_sequence]
    if save or cu_seqlens is not None or any(dim is not None for dim in shared):
        return transforms.one_by_one(FORWARD)(info, in_dims, *arguments)
    for i in per_sequence:
        x, dim = operands[i], in_dims[i]
        if x is not None:
            mapped = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            sizes = mapped.shape[:2]
            operands[i] = mapped.flatten(0, 1)
    y, state, checkpoints = FORWARD(*operands, cu_seqlens, host, bound, save, deterministic)
    y, state = (x.unflatten(0, sizes) for x in (y, state))
    return (y, state, checkpoints), (0, 0, None)


def _backward(dy: Tensor, dstate: Tensor | None, *arguments: Any) -> list[Tensor]:
    q, k, v, weight, forget, A_log, dt_bias, checkpoints, cu_seqlens, bound, wanted, deterministic = arguments
    operands = (q, k, v, weight, forget, _dense(A_log), _dense(dt_bias))
    saved = (checkpoints.contiguous(), _dense(cu_seqlens))
    return launches.backward(dy, _dense(dstate), operands, *saved, bound, wanted, deterministic)


_READ = ("q", "k", "v", "weight", "forget", "A_log", "dt_bias")


def _step(*arguments: Any) -> Tensor:
    *operands, state = arguments
    memory.check_written("m2rnn_step", "state", state, dict(zip(_READ, operands, strict=True)))
    return _stepped(*arguments)


def _stepped(*arguments: Any) -> Tensor:
    q, k, v, weight, forget, A_log, dt_bias, state = arguments
    return launches.step((q, k, v, weight, forget, _dense(A_log), _dense(dt_bias)), state)


def _step_autograd(*arguments: Any) -> Any:
    transforms.refuse_tangents("m2rnn_step", arguments)
    if transforms.wants_gradient(arguments):
        raise RuntimeError("m2rnn_step: operands must not require a gradient; call under torch.no_grad()")
    with transforms.below():
        return STEP(*arguments)


def _step_mapped(info: transforms.MapInfo, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
    if in_dims[-1] is None:
        raise RuntimeError("m2rnn_step: state must be mapped by vmap where another operand is, since it is written")
    return transforms.one_by_one(STEP)(info, in_dims, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, weight, forget, A_log, dt_bias, _, cu_seqlens, _, ctx.bound, _, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, weight, forget, A_log, dt_bias, output[2], cu_seqlens)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a recomputed forward may be unpacked no more often
    q, k, v, weight, forget = saved[:5]
    wanted = list(ctx.needs_input_grad[:DIFFERENTIABLE])
    if dy is None:
        dy = q.new_zeros(()).expand(*q.shape[:-2], fakes.total_heads(q, k, v, weight, forget), v.shape[-1])
    found = iter(BACKWARD(dy, dstate, *saved, ctx.bound, wanted, ctx.deterministic))
    return (*(next(found) if want else None for want in wanted), None, None, None, None, None)


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save nothing for a backward that is refused."""


def _refuse_second_derivative(ctx: Any, *_: Any) -> tuple[None, ...]:
    raise RuntimeError("m2rnn: gradients cannot be differentiated again; no second derivative is built")


_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor weight, Tensor forget, Tensor? A_log, Tensor? dt_bias"
_SCHEMAS = {
    "forward": f"({_OPERANDS}, Tensor? initial_state, Tensor? cu_seqlens, Tensor? cu_seqlens_cpu, float bound,"
    " bool save, bool deterministic) -> (Tensor, Tensor, Tensor)",
    "backward": f"(Tensor dy, Tensor? dstate, {_OPERANDS}, Tensor checkpoints, Tensor? cu_seqlens, float bound,"
    " bool[] wanted, bool deterministic) -> Tensor[]",
    "step": f"({_OPERANDS}, Tensor(a!) state) -> Tensor",
}
_IN_PLACE = ("step", "layer_step", *pool_library.SCHEMAS)
"""Operators whose arguments must come as they are; compilers may lay out those of others."""


def implement(library: Any) -> None:
    """Give the operators, which ``library`` defined, everything that torch may ask of them."""
    kernels: dict[str, Callable[..., Any]] = {"forward": _forward, "backward": _backward, "step": _step}
    gradients: dict[str, Callable[..., Any]] = {
        "forward": transforms.differentiable(FORWARD, _setup_context, _autograd, saves=SAVE),
        "backward": transforms.differentiable(BACKWARD, _setup_nothing, _refuse_second_derivative),
        "step": _step_autograd,
    }
    mapped = {"forward": _forward_mapped, "backward": transforms.one_by_one(BACKWARD), "step": _step_mapped}
    rules = {
        name: transforms.Rules(kernel, gradients[name], mapped[name], getattr(fakes, name), getattr(flops, name))
        for name, kernel in kernels.items()
    }
    rules |= layer_library.rules(LAYER, LAYER_BACKWARD, LAYER_STEP)
    rules |= pool_library.rules({name: getattr(SPACE, name).default for name in pool_library.SCHEMAS})
    for name, rule in rules.items():
        for key in ("CPU", "CUDA"):
            library.impl(name, rule.kernel, key)
        library.impl(name, rule.gradient, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", rule.fake, lib=library)
        torch.library.register_vmap(f"{NAMESPACE}::{name}", rule.mapped, lib=library)
        register_flop_formula(getattr(SPACE, name), get_raw=True)(rule.flops)


def launched() -> Mapping[Any, Callable[..., Any]]:
    """Return what each operator calls to launch its kernels, also on tensors without memory, which share none."""
    around = layer_library.rules(LAYER, LAYER_BACKWARD, LAYER_STEP)
    of_layer = {getattr(SPACE, name).default: rule.kernel for name, rule in around.items()}
    return {FORWARD: _forward, BACKWARD: _backward, STEP: _stepped, **of_layer}


def _defined() -> Any:
    """Define the operators, which torch forgets when what this returns is gone."""
    library: Any = Library(NAMESPACE, "DEF")
    for name, schema in (_SCHEMAS | layer_library.SCHEMAS | pool_library.SCHEMAS).items():
        layout = () if name in _IN_PLACE else (torch.Tag.flexible_layout,)
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *layout))
    return library


def _served() -> Operators:
    """Have a snapshot of this module serve the operators for as long as the process runs, and return it.

    Whatever else has this content, a reload or a second copy of the package, finds it there.
    """
    served: Any = snapshot(globals())
    served.implement(LIBRARY)
    SPACE.served = served
    operators: Operators = served
    return operators


checks.forget_calls()
LIBRARY = None if hasattr(SPACE, "served") else _defined()
FORWARD = SPACE.forward.default
BACKWARD = SPACE.backward.default
STEP = SPACE.step.default
LAYER, LAYER_BACKWARD = SPACE.layer.default, SPACE.layer_backward.default
LAYER_STEP = SPACE.layer_step.default
POOL_STEPS, POOL_GATHER, POOL_SCAN, POOL_SCATTER = (getattr(SPACE, name).default for name in pool_library.SCHEMAS)
OPERATORS: Operators = SPACE.served if LIBRARY is None else _served()
