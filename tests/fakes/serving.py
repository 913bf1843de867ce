"""An engine in small: requests in the slots of a pool, each beside a contiguous state that the operator advances."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from calls import offsets_of, same_bits
from pooled import PER_TOKEN, poisoned, tokens, untouched
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs
from m2gen.variant import Variant

DRAFTS = 3
"""Tokens of a speculative call, and slots of a request."""


@dataclass(eq=False)
class Request:
    """A request that has slots, or is evicted and has its state in ``aside``."""

    operands: dict[str, Tensor]
    state: Tensor
    """What a contiguous run has now, (1, N, K, V)."""
    table: list[int] = field(default_factory=list)
    at: int = 1
    """The slot of ``table`` that has the state, counted from 1."""
    done: int = 0
    """Tokens that count."""
    aside: Tensor | None = None

    def next(self, count: int) -> dict[str, Tensor]:
        """Return its next tokens, (1, count, ...)."""
        return tokens(self.operands, slice(self.done, self.done + count))

    def left(self) -> int:
        """Return how many tokens are left."""
        return self.operands["q"].shape[1] - self.done

    @property
    def slot(self) -> int:
        """The slot of its state."""
        return self.table[self.at - 1]


class Engine:
    """Requests over one pool; every call compares what comes of it with contiguous runs, request by request."""

    def __init__(self, package: ModuleType, variant: Variant, slots: int, dtype: torch.dtype, seed: int) -> None:
        self.package, self.variant, self.dtype = package, variant, dtype
        self._drawn = seed
        self.weights = self._draw(1)
        self.pool = poisoned(slots, self.weights, dtype)
        self.device, self._poison = self.pool.device, self.pool[0].clone()
        self.free = list(range(slots))
        self.requests: dict[int, Request] = {}

    def _draw(self, steps: int) -> Inputs:
        self._drawn += 1
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return make_inputs(self.variant, Problem(1, steps), seed=self._drawn).to(device)

    def _indices(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    # What happens to requests.

    def arrive(self, key: int, length: int) -> None:
        """Give a new request slots, if there are any."""
        if key in self.requests or len(self.free) < DRAFTS:
            return
        drawn = self._draw(length)
        operands = {name: getattr(drawn, name) for name in PER_TOKEN} | {"weight": self.weights.weight}
        state = poisoned(1, self.weights).zero_()
        self.requests[key] = Request(operands, state, [self.free.pop(0) for _ in range(DRAFTS)])

    def cancel(self, key: int) -> None:
        """Forget a request, and poison its slots."""
        request = self.requests.pop(key, None)
        if request is not None:
            self._release(request)

    def evict(self, key: int) -> None:
        """Put a request's state aside, and poison its slots."""
        request = self.requests.get(key)
        if request is not None and request.aside is None and request.done:
            request.aside = self.pool[request.slot].clone()
            self._release(request)

    def resume(self, key: int) -> None:
        """Bring an evicted request's state back, to other slots."""
        request = self.requests.get(key)
        if request is None or request.aside is None or len(self.free) < DRAFTS:
            return
        request.table, request.at = [self.free.pop() for _ in range(DRAFTS)], 1
        self.pool[request.slot] = request.aside
        request.aside = None

    def _release(self, request: Request) -> None:
        self.pool[request.table] = self._poison
        self.free += request.table
        request.table = []

    # Calls, each of several requests.

    def _running(self, keys: Iterable[int], begun: bool = True) -> dict[int, Request]:
        """Return those of some requests that have slots, tokens left, and, if they must have ``begun``, a state."""
        found = {key: self.requests[key] for key in keys if key in self.requests}
        there = {key: request for key, request in found.items() if request.aside is None and request.left()}
        return {key: request for key, request in there.items() if request.done or not begun}

    def prefill(self, chunks: dict[int, int]) -> None:
        """Run chunks of prompts as one packed batch, with an empty sequence that has no slot."""
        running = self._running(chunks, begun=False)
        if not running:
            return
        requests = list(running.values())
        parts = [request.next(min(chunks[key], request.left())) for key, request in running.items()]
        lengths = [part["q"].shape[1] for part in parts]
        operands = {name: x[0] if name in PER_TOKEN else x for name, x in _joined(parts, 1).items()}
        y, _ = self.package.m2rnn(
            **operands, cu_seqlens=offsets_of([*lengths, 0]).to(self.device), pool=self.pool,
            indices=self._indices([*(r.slot for r in requests), -1]),
            out_indices=self._indices([*(r.table[0] for r in requests), -1]),
            has_initial_state=torch.tensor([*(r.done > 0 for r in requests), False], device=self.device),
        )  # fmt: skip
        for request, part, rows in zip(requests, parts, y.split(lengths), strict=True):
            expected, state = self.package.m2rnn(**part, initial_state=request.state)
            assert same_bits(rows, expected[0])
            request.state, request.at = state.to(self.dtype).float(), 1
            request.done += len(rows)

    def decode(self, keys: Sequence[int], padding: int) -> None:
        """Advance requests by a token each, with rows of padding after them."""
        running = list(self._running(keys).values())
        if not running:
            return
        fill = [self._draw(1)] * padding
        parts = [r.next(1) for r in running] + [{name: getattr(x, name) for name in running[0].operands} for x in fill]
        token = tokens(_joined(parts, 0), 0)
        y, _ = self.package.m2rnn_step(
            **token, state=self.pool, indices=self._indices([*(r.slot for r in running), *[-1] * padding]),
            out_indices=self._indices([*(r.table[0] for r in running), *[-1] * padding]),
        )  # fmt: skip
        assert bool((y[len(running) :] == 0).all())
        for request, rows in zip(running, y, strict=False):
            self._advance(request, rows[None])
            request.at = 1

    def draft(self, accepted: dict[int, int]) -> None:
        """Advance requests by a token and its drafts, of which some count; the others are of another text.

        Odd requests keep no states of those.
        """
        running = self._running(accepted)
        if not running:
            return
        requests = list(running.values())
        counts = [min(accepted[key], request.left()) for key, request in running.items()]
        parts = []
        for request, count in zip(requests, counts, strict=True):
            wrong = self._draw(DRAFTS)
            right = request.next(count)
            parts.append(
                {n: torch.cat([x, getattr(wrong, n)[:, count:]], 1) if n in PER_TOKEN else x for n, x in right.items()}
            )
        rest = [DRAFTS - count if key % 2 else 0 for key, count in zip(running, counts, strict=True)]
        kept = [r.table[: DRAFTS - none] + [-1] * none for r, none in zip(requests, rest, strict=True)]
        y, _ = self.package.m2rnn_steps(
            **_joined(parts, 0), pool=self.pool, indices=self._indices([r.table for r in requests]),
            out_indices=self._indices(kept), accepted=self._indices([r.at for r in requests]),
        )  # fmt: skip
        for request, count, rows in zip(requests, counts, y, strict=True):
            self._advance(request, rows[:count])
            request.at = count

    def _advance(self, request: Request, y: Tensor) -> None:
        """Take the tokens of y one by one on the contiguous state, in the pool's dtype."""
        state = request.state.to(self.dtype)
        for row in y:
            expected, _ = self.package.m2rnn_step(**tokens(request.next(1), 0), state=state)
            assert same_bits(row, expected[0])
            request.done += 1
        request.state = state.float()

    def check(self) -> None:
        """Fail unless every request has its contiguous state in its slot, and slots of nobody are as they were."""
        for request in self.requests.values():
            kept = self.pool[request.slot] if request.aside is None else request.aside
            if request.done:
                assert same_bits(kept.float(), request.state[0])
        assert untouched(self.pool[self.free])


def _joined(parts: Sequence[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    """Return the operands of several requests as those of one call."""
    first = parts[0].items()
    return {name: torch.cat([part[name] for part in parts], dim) if name in PER_TOKEN else x for name, x in first}
