"""Continuous batching: requests come and go, their prompts run in chunks, and one captured graph decodes all of them.

States of a request are in one slot of each layer's pool, whatever the length of its text. Slots, a batch's rows and
chunks are the engine's alone: a request's tokens do not depend on them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class Status(Enum):
    """Where a request is."""

    WAITING = auto()
    RUNNING = auto()
    EVICTED = auto()
    CANCELLED = auto()
    DONE = auto()


@dataclass(eq=False)
class Request:
    """A prompt, and the text that goes on from it: ``new`` tokens at most."""

    prompt: list[int]
    new: int
    text: list[int] = field(default_factory=list)
    seen: int = 0  # tokens of the prompt that its states have taken in
    status: Status = Status.WAITING
    slot: int | None = None
    kept: list[tuple[Tensor, ...]] | None = None  # of an evicted one: each layer's states, in the host's memory

    def __post_init__(self) -> None:
        if not self.prompt or self.new < 1:
            raise ValueError(f"a request must have a prompt and new tokens, got {len(self.prompt)} and {self.new}")


class PooledLayer:
    """What the model's cache has for a layer: it reads and writes slots of a pool, those of the call."""

    def __init__(self, pool: Any, cache: PooledCache) -> None:
        self.pool, self.cache = pool, cache

    def mix(self, layer: Any, x: Tensor, mask: Tensor | None, packed: Any) -> Tensor:
        """Return what the layer makes of a token of each request (B, 1, C), or of packed chunks (1, T, C)."""
        slots, begun = self.cache.slots, self.cache.begun
        y: Tensor
        if packed is None:
            y = self.pool.step(x[:, 0], slots)[:, None]
        else:
            offsets = packed.cu_seqlens, packed.cu_seqlens_cpu
            y = self.pool.prefill(x[0], slots, *offsets, has_initial_state=begun)[None]
        return y


class PooledCache:
    """The model's cache: pools, and of a call the slots of its requests and, in prefill, whether each has begun."""

    slots: Tensor
    begun: Tensor

    def __init__(self, pools: Sequence[Any]) -> None:
        self.layers = [PooledLayer(pool, self) for pool in pools]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: a model without attention has no use for positions."""
        return 0


class Decoder:
    """A token of each of ``size`` requests: tokens and states are read where they are, chosen and left there.

    On a GPU it is a captured graph, to which only slots are uploaded, where they are not the last call's.
    """

    def __init__(self, engine: Engine, size: int) -> None:
        self.engine, self.named = engine, [-1] * size
        self.slots = engine.upload(self.named)
        self.graph: torch.cuda.CUDAGraph | None = None
        if engine.device.type == "cuda":
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # compiles kernels, with rows of padding alone: no slot is written
                    self.run()
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=engine.memory):
                self.chosen = self.run()

    def run(self) -> Tensor:
        """Choose the token after the last one of each slot, and leave it where that was."""
        engine = self.engine
        engine.cache.slots = self.slots
        logits = engine.model(engine.last[self.slots][:, None], cache=engine.cache).logits[:, -1]
        chosen: Tensor = logits.argmax(-1)
        engine.last[self.slots] = chosen  # -1, which padding has, is an entry of no slot's
        return chosen

    def __call__(self, slots: list[int]) -> Tensor:
        """Return a token of each slot, in a tensor that the next call overwrites."""
        named = slots + [-1] * (len(self.named) - len(slots))
        if named != self.named:
            self.slots.copy_(self.engine.upload(named))
            self.named = named
        if self.graph is None:
            self.chosen = self.run()
        else:
            self.graph.replay()
        return self.chosen[: len(slots)]


class Engine:
    """Requests in slots of pools, which ``step`` advances; at most ``slots`` run, others wait for their turn.

    A step runs at most ``chunk`` tokens of prompts, packed, and a token of every request whose prompt is through. It
    waits for the device to fetch the tokens alone. Raises ValueError for a model with attention, which has no states.
    """

    def __init__(self, package: ModuleType, model: Any, slots: int, chunk: int = 512) -> None:
        if slots < 1 or chunk < 1:
            raise ValueError(f"slots and chunk must be at least 1, got {slots} and {chunk}")
        mixers = [block.sequence_mixer for block in model.transformer.h]
        if not all(isinstance(mixer, package.M2RNN) for mixer in mixers):
            raise ValueError(f"every mixer must be an M2RNN, got {', '.join(type(mixer).__name__ for mixer in mixers)}")
        self.model, self.device, self.chunk = model, model.device, chunk
        self.pools = [package.M2RNNPool.allocate(mixer, slots) for mixer in mixers]
        self.cache = PooledCache(self.pools)
        self.last = torch.zeros(slots + 1, dtype=torch.long, device=self.device)  # each slot's last token; padding's
        self.free = list(reversed(range(slots)))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.decoders: dict[int, Decoder] = {}
        self.memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        ends = model.generation_config.eos_token_id  # where ``generate`` has them from
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    @property
    def state_bytes(self) -> int:
        """Return the bytes of a request's states."""
        return sum(x[0].numel() * x.element_size() for pool in self.pools for x in (pool.conv, pool.state))

    def add(self, request: Request) -> None:
        """Have a new or an evicted request wait for a slot; a token that is none would fail everybody's step."""
        tokens = self.model.config.vocab_size
        if strange := [token for token in request.prompt if not 0 <= token < tokens]:
            raise ValueError(f"a prompt must have tokens from 0 to {tokens - 1}, got {strange[0]}")
        if request.status not in (Status.WAITING, Status.EVICTED) or request in self.waiting:
            raise ValueError(f"a request must be new or evicted to be added, got one that is {request.status.name}")
        request.status = Status.WAITING
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Drop a request, whose slot is free at once; one that is done stays done."""
        if request.status is not Status.DONE:
            self._leave(request, Status.CANCELLED)
            request.kept = None

    def evict(self, request: Request) -> None:
        """Copy a running request's states out to the host and free its slot; ``add`` has it go on from there."""
        if request.slot is None:
            raise ValueError(f"a request must be running to be evicted, got one that is {request.status.name}")
        slot = request.slot
        request.kept = [tuple(x[slot].to("cpu", copy=True) for x in (pool.conv, pool.state)) for pool in self.pools]
        self._leave(request, Status.EVICTED)

    def step(self) -> None:
        """Give free slots to those who wait, run a chunk of prompts and a token of everybody else."""
        for requests, tokens in self.launch():
            for request, token in zip(requests, tokens.tolist(), strict=True):  # where the host waits
                self._take(request, token)

    @torch.no_grad()
    def launch(self) -> list[tuple[list[Request], Tensor]]:
        """Do the same but wait for nothing: return requests and the tokens that are theirs to take."""
        while self.waiting and self.free:
            self._enter(self.waiting.popleft())
        decoding = [request for request in self.running if request.text]
        return [self._prefill(), (decoding, self._decode(decoding))]

    def upload(self, values: Sequence[Any], dtype: torch.dtype = torch.long) -> Tensor:
        """Return a tensor on the device, without waiting for it."""
        host = torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def _prefill(self) -> tuple[list[Request], Tensor]:
        """Run the next tokens of prompts in the order of arrival; return whose prompt is through, and first tokens."""
        chunks: list[tuple[Request, list[int]]] = []
        room = self.chunk
        for request in self.running:
            part = request.prompt[request.seen : request.seen + room]
            if part:
                chunks.append((request, part))
                room -= len(part)
        if not chunks:
            return [], self.last[:0]
        offsets_cpu = torch.tensor([0, *accumulate(len(part) for _, part in chunks)])
        offsets = self.upload(offsets_cpu.tolist())
        self.cache.slots = slots = self.upload([request.slot for request, _ in chunks])
        self.cache.begun = self.upload([request.seen > 0 for request, _ in chunks], torch.bool)
        tokens = self.upload([token for _, part in chunks for token in part])
        logits = self.model(
            tokens[None], cache=self.cache, cu_seq_lens_q=offsets, cu_seqlens_cpu=offsets_cpu,
            logits_to_keep=offsets[1:] - 1,
        ).logits[0]  # fmt: skip
        self.last[slots] = chosen = logits.argmax(-1)  # of a prompt that goes on, nobody reads it
        for request, part in chunks:
            request.seen += len(part)
        through = [i for i, (request, _) in enumerate(chunks) if request.seen == len(request.prompt)]
        return [chunks[i][0] for i in through], chosen[self.upload(through)]

    def _decode(self, requests: list[Request]) -> Tensor:
        """Return the next token of each request; batches are padded to powers of two, and each has its decoder."""
        if not requests:
            return self.last[:0]
        size = 1 << (len(requests) - 1).bit_length()
        if size not in self.decoders:
            self.decoders[size] = Decoder(self, size)
        return self.decoders[size]([request.slot for request in requests if request.slot is not None])

    def _take(self, request: Request, token: int) -> None:
        request.text.append(token)
        if token in self.ends or len(request.text) == request.new:
            self._leave(request, Status.DONE)

    def _enter(self, request: Request) -> None:
        """Give a request a slot, and its states where it had any."""
        slot = request.slot = self.free.pop()
        request.status = Status.RUNNING
        self.running.append(request)
        if request.kept is not None:
            for pool, (conv, state) in zip(self.pools, request.kept, strict=True):
                pool.conv[slot].copy_(conv, non_blocking=True)
                pool.state[slot].copy_(state, non_blocking=True)
            self.last[slot] = request.text[-1] if request.text else 0
            request.kept = None

    def _leave(self, request: Request, status: Status) -> None:
        """Take a request's slot, or its place among those who wait."""
        if request.slot is not None:
            self.running.remove(request)
            self.free.append(request.slot)
            request.slot = None
        elif request in self.waiting:
            self.waiting.remove(request)
        request.status = status
