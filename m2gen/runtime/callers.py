"""Calls of the operator and of the layer as models make them, on tensors without memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .facts import HeadCounts, VariantKey
from .layer import M2RNN
from .op import m2rnn, m2rnn_step
from .scenes import Scene

HIDDEN = 64
"""Width of the layers, on which no kernel depends."""
BATCH = 2


class Caller(ABC):
    """Calls of one kind of a scene's variant."""

    def __init__(self, key: VariantKey, scene: Scene) -> None:
        self.rows, self.cols, counts, self.dtype, self.computes_gate = key
        self.heads = HeadCounts(*counts)
        self.total = max(counts)
        self.scene = scene

    def of(self, steps: int) -> Iterator[Callable[[], None]]:
        """Yield the calls of the scene on sequences of that many steps."""
        if self.scene.use == "train":
            yield lambda: self.train(steps)
        elif self.scene.use == "train_states":
            for begins, ends in ((True, True), (True, False), (False, True)):
                yield lambda begins=begins, ends=ends: self.train(steps, begins, ends)  # type: ignore[misc]
            yield lambda: self.train(steps, given=True)
        elif self.scene.use == "infer":
            yield lambda: self.infer(steps, False)
            yield lambda: self.infer(steps, True)
        else:
            yield self.decode

    @abstractmethod
    def train(self, steps: int, begins: bool = False, ends: bool = False, given: bool = False) -> None:
        """Run forward and backward.

        ``begins`` with an initial state that has a gradient, ``ends`` with a gradient of the final state; ``given``
        with an initial state that has none.
        """

    @abstractmethod
    def infer(self, steps: int, begins: bool) -> None:
        """Run the forward, from an initial state or not."""

    @abstractmethod
    def decode(self) -> None:
        """Run a step."""

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, gradient: bool = False) -> Tensor:
        """Return a contiguous tensor without memory."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta", requires_grad=gradient)

    def lead(self, steps: int) -> tuple[int, ...]:
        """Return the dims of tokens."""
        return (BATCH * steps,) if self.scene.offsets else (BATCH, steps)

    def offsets(self) -> Tensor | None:
        """Return the offsets of a packed batch."""
        dtype = self.scene.offsets
        return torch.empty(BATCH + 1, dtype=getattr(torch, dtype), device="meta") if dtype else None

    def state(self, gradient: bool = False) -> Tensor:
        """Return a state."""
        return self.tensor(BATCH, self.total, self.rows, self.cols, dtype=torch.float32, gradient=gradient)


class OperatorCaller(Caller):
    """Calls of ``m2rnn`` and ``m2rnn_step``."""

    def operands(self, *lead: int, gradient: bool = False) -> dict[str, Any]:
        """Return the operands for some dims of tokens."""
        heads, rows, cols = self.heads, self.rows, self.cols
        shapes = {
            "q": (*lead, heads.q, rows), "k": (*lead, heads.k, rows), "v": (*lead, heads.v, cols),
            "weight": (heads.w, cols, cols), "forget": (*lead, heads.f),
        }  # fmt: skip
        found = {name: self.tensor(*shape, gradient=gradient) for name, shape in shapes.items()}
        if self.computes_gate:
            for name in ("A_log", "dt_bias"):
                found[name] = self.tensor(heads.f, dtype=torch.float32, gradient=gradient)
        return found

    def train(self, steps: int, begins: bool = False, ends: bool = False, given: bool = False) -> None:
        state = self.state(begins) if begins or given else None
        operands = self.operands(*self.lead(steps), gradient=True)
        y, last = m2rnn(**operands, initial_state=state, cu_seqlens=self.offsets())
        torch.autograd.backward([y, last] if ends else [y], [torch.empty_like(x) for x in ([y, last] if ends else [y])])

    def infer(self, steps: int, begins: bool) -> None:
        with torch.no_grad():
            m2rnn(
                **self.operands(*self.lead(steps)),
                initial_state=self.state() if begins else None, cu_seqlens=self.offsets(),
            )  # fmt: skip

    def decode(self) -> None:
        with torch.no_grad():
            m2rnn_step(**self.operands(BATCH), state=self.state())


class LayerCaller(Caller):
    """Calls of ``M2RNN``, whose operands are views of what it projects and convolves."""

    def __init__(self, key: VariantKey, scene: Scene) -> None:
        super().__init__(key, scene)
        heads = self.heads._asdict()
        self.layer = M2RNN(HIDDEN, self.rows, self.cols, heads, device="meta", dtype=self.dtype)
        if scene.operands == "autocast":
            self.layer.float()
            for projection in (self.layer.input_projection, self.layer.output_projection):
                projection.to(self.dtype)  # in which autocast makes their products, but not without memory

    def train(self, steps: int, begins: bool = False, ends: bool = False, given: bool = False) -> None:
        conv = state = None
        if begins or given:
            cache = self.layer.allocate_cache(BATCH)
            conv, state = cache.conv, cache.state.requires_grad_(begins)
        x = self.tensor(*self.lead(steps), HIDDEN, gradient=True)
        y, _, last = self.layer.scan(x, conv, state, self.offsets())
        torch.autograd.backward([y, last] if ends else [y], [torch.empty_like(x) for x in ([y, last] if ends else [y])])

    def infer(self, steps: int, begins: bool) -> None:
        cache = self.layer.allocate_cache(BATCH) if begins else None
        with torch.no_grad():
            self.layer(self.tensor(*self.lead(steps), HIDDEN), cache, None, self.offsets())

    def decode(self) -> None:
        for _ in range(2):
            with torch.no_grad():
                self.layer(self.tensor(BATCH, 1, HIDDEN), self.layer.allocate_cache(BATCH))
            for parameter in self.layer.input_projection.parameters():
                parameter.data = parameter.data.clone()  # as casts leave it, with no room behind its rows
