"""The layer on sequences that lie over ranks: states go from each rank to the next, their gradients back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from ..forward import check_tokens
from ..mixer import Mixer, shapes_of, wants_gradients, wide_dtype
from .agreement import check_calls_agree, check_ranks_agree

Scan = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]]
"""The layer's scan of x after conv and state, None for zeros."""


class Scanning(Mixer, Protocol):
    """A layer that gives the states after its call: ``M2RNN``, or ``HeadParallelM2RNN`` with a rank's heads."""

    def scan(self, x: Tensor, conv: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Do what ``M2RNN.scan`` does."""


def scan_over_ranks(
    layer: Scanning, x: Tensor, group: distributed.ProcessGroup | None = None, micro_batches: int = 1
) -> Tensor:
    """Run sequences that lie over the ranks of a group: x (B, S_r, hidden_size) has this rank's tokens of each.

    States go from each rank to the next, and their gradients back; no rank ever holds a whole sequence. The batch is
    cut into ``micro_batches``, so that a rank works on one while the next works on the one before. B must be the same
    on every rank, S_r need not. Gradients need ``backward`` on every rank, in any order of ranks; ``autograd.grad``
    of some inputs would leave out the states, and the rank before this one would wait for ever.

    Raises ValueError for a batch of fewer sequences than ``micro_batches``, and RanksDifferError.
    """
    return pipelined(layer, layer.scan, x, group, micro_batches)


def pipelined(
    layer: Mixer, scan: Scan, x: Tensor, group: distributed.ProcessGroup | None, micro_batches: int
) -> Tensor:
    """Do what ``scan_over_ranks`` does, with ``scan`` for the layer's."""
    found = group or distributed.group.WORLD
    if found is None:
        raise RuntimeError("M2RNN: torch.distributed must be initialised before states go over ranks")
    if layer.backend == "kernels":
        check_ranks_agree(found)

    def check() -> None:
        check_tokens(layer, x, None, None)
        if not 1 <= micro_batches <= x.shape[0]:
            raise ValueError(f"M2RNN: micro_batches must be 1 to the batch's {x.shape[0]}, got {micro_batches}")

    def facts() -> dict[str, str]:
        check()
        gradients = str(wants_gradients(layer, x))
        return {"sequences": str(x.shape[0]), "micro_batches": str(micro_batches), "gradients": gradients}

    check_calls_agree(found, "states", (x.dtype, x.shape[:1], micro_batches), facts)
    check()
    ranks = distributed.get_process_group_ranks(found)
    place = ranks.index(distributed.get_rank())
    before = ranks[place - 1] if place > 0 else None
    after = ranks[place + 1] if place + 1 < len(ranks) else None
    link = _Link(group, before, after)
    parts = [_pass_on(layer, scan, part, link) for part in x.tensor_split(micro_batches)]
    link.flush()
    return _sent_all(torch.cat(parts))


def _pass_on(layer: Mixer, scan: Scan, x: Tensor, link: _Link) -> Tensor:
    """Scan one micro-batch between the rank before and the rank after."""
    conv: Tensor | None = None
    state: Tensor | None = None
    if link.before is not None:
        anchor = x.new_zeros((), dtype=wide_dtype(layer.state_weight), requires_grad=wants_gradients(layer, x))
        conv, state = _received(anchor, link, *shapes_of(layer, x.shape[0]))
    y, conv, state = scan(x, conv, state)
    return y if link.after is None else _sent(y, conv.to(state.dtype), state, link)


class _Link:
    """The ranks before and after this one, and what is on its way to them."""

    def __init__(self, group: distributed.ProcessGroup | None, before: int | None, after: int | None) -> None:
        self.group, self.before, self.after = group, before, after
        self.pending: list[tuple[distributed.Work | None, Tensor]] = []

    def send(self, tensors: Iterable[Tensor], rank: int | None) -> None:
        """Start sending; tensors are kept until they have arrived."""
        for x in tensors:
            x = x.contiguous()
            self.pending.append((distributed.isend(x, rank, self.group), x))

    def receive(self, tensors: Iterable[Tensor], rank: int | None) -> tuple[Tensor, ...]:
        """Fill tensors with what a rank sends, in the order of its sends."""
        received = tuple(tensors)
        for x in received:
            distributed.recv(x, rank, self.group)
        return received

    def flush(self) -> None:
        """Wait until everything has been sent."""
        for work, _ in self.pending:
            if work is not None:
                work.wait()
        self.pending.clear()


class _Receive(torch.autograd.Function):
    """The states that the rank before sends; it gets their gradients back."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, link: _Link, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.link = link
        return link.receive([anchor.new_empty(shape) for shape in shapes], link.before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.link.send(gradients, ctx.link.before)
        ctx.link.flush()
        return (None,) * 4


class _Send(torch.autograd.Function):
    """y as it is, while the states go to the rank after, whose gradients of them come back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, conv: Tensor, state: Tensor, link: _Link) -> Tensor:
        ctx.link, ctx.shapes = link, (conv.shape, state.shape)
        ctx.made = {"dtype": state.dtype, "device": state.device}
        link.send((conv, state), link.after)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        conv, state = ctx.link.receive([torch.empty(shape, **ctx.made) for shape in ctx.shapes], ctx.link.after)
        return dy, conv, state, None


class _SentAll(torch.autograd.Function):
    """y as it is; activations are recomputed to here, the end, before any rank waits for another's gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y.new_empty(0))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return dy


_sent_all: Callable[[Tensor], Tensor] = _SentAll.apply
_received: Callable[..., tuple[Tensor, Tensor]] = _Receive.apply
_sent: Callable[[Tensor, Tensor, Tensor, _Link], Tensor] = _Send.apply
