"""Rules of an operator for torch's transforms: gradients, tangents, mapped dims."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

Operator = Callable[..., Any]
"""An operator of torch: tensors and numbers to a tensor, or a tuple or list of some."""
_unpacked: Callable[[Tensor], forward_ad.UnpackedDualTensor] = forward_ad.unpack_dual


class Rules(NamedTuple):
    """What torch may ask of an operator."""

    kernel: Callable[..., Any]
    gradient: Callable[..., Any]
    mapped: Callable[..., Any]
    fake: Callable[..., Any]
    flops: Callable[..., int]


class MapInfo(Protocol):
    """Facts that torch.vmap gives about the dim that it maps."""

    @property
    def batch_size(self) -> int:
        """How long it is."""


def differentiable(
    operator: torch._ops.OpOverload,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    saves: int | None = None,
) -> Operator:
    """Return what ``operator`` does at torch's Autograd key; if a gradient is wanted, its argument ``saves`` is true.

    torch calls it once for each level of torch.func's transforms, with that level's tensors, as it does for operators
    of its own. (What torch.library.register_autograd makes refuses to run at a level.)
    """
    lists = isinstance(operator._schema.returns[0].type, torch.ListType)

    class M2RNNOperator(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            with below(recording=torch._C._are_functorch_transforms_active()):
                return tuple(operator(*(x if i != saves else True for i, x in enumerate(arguments))))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            return backward(ctx, *gradients)

    apply: Operator = super(torch.autograd.Function, M2RNNOperator).apply  # what torch.autograd.Function hands on to

    def autograd(*arguments: Any) -> Any:
        refuse_tangents("m2rnn", arguments)
        if wants_gradient(arguments):
            with enable_single_level_autograd_function():
                results = apply(*arguments)
            return list(results) if lists else results
        with below():
            return operator(*arguments)

    return autograd


def below(recording: bool = False) -> ExitStack:
    """Return a context below the Autograd key; with ``recording``, transforms further out still do what is theirs."""
    stack = ExitStack()
    if recording:  # an autograd.Function turns both off for its forward
        stack.enter_context(torch.enable_grad())
        stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
    stack.enter_context(torch._C._AutoDispatchBelowAutograd())
    return stack


def wants_gradient(arguments: Iterable[Any]) -> bool:
    """Whether a call with these arguments is to be differentiated, at the current level."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments)


def refuse_tangents(caller: str, arguments: Iterable[Any]) -> None:
    """Raise NotImplementedError if an argument has a tangent at the current level: dropping it would be a wrong 0."""
    if not tangents_possible() or not torch._C._is_fwd_grad_enabled():
        return
    if any(isinstance(x, torch.Tensor) and _unpacked(x).tangent is not None for x in arguments):
        raise NotImplementedError(
            f"{caller}: forward-mode derivatives (torch.func.jvp, jacfwd, hessian, dual tensors) are not built; use "
            'reverse mode (torch.func.vjp, grad, jacrev), or m2rnn with backend="reference"'
        )


def tangents_possible() -> bool:
    """Whether any tensor may have a tangent now."""
    return forward_ad._current_level >= 0


def one_by_one(operator: Operator) -> Callable[..., tuple[Any, Any]]:
    """Return a rule for torch.vmap that calls ``operator`` for each place of the mapped dim, one after the other."""

    def rule(info: MapInfo, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        mapped, count = list(zip(arguments, in_dims, strict=True)), info.batch_size
        calls = [
            operator(*(_place(x, dim, i) if isinstance(dim, int) else x for x, dim in mapped))
            for i in range(max(count, 1))
        ]
        if isinstance(calls[0], torch.Tensor):
            return torch.stack(calls)[:count], 0
        results = [torch.stack(parts)[:count] for parts in zip(*calls, strict=True)]
        return type(calls[0])(results), type(calls[0])([0] * len(results))

    return rule


def _place(x: torch.Tensor, dim: int, i: int) -> torch.Tensor:
    """Return place ``i`` of a mapped dim; zeros where it has none, whose results say only what shape those are."""
    return x.select(dim, i) if x.shape[dim] else x.new_zeros((*x.shape[:dim], *x.shape[dim + 1 :]))
