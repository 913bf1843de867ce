"""What transformers' caches hold for an M2RNN layer: two states that every token changes."""

# mypy: allow-untyped-calls
# since functions of transformers have no types

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin

from ..cache import States
from ..layer import M2RNN, M2RNNCache
from ..mixer import wants_gradients
from .configuration import M2RNN_LAYER
from .packing import Packed


class M2RNNCacheLayer(CacheLayerMixin):
    """The states of one layer: conv (B, width - 1, C) and state (B, N, K, V), and how many positions they have seen.

    Tokens change both states in place. What came before cannot be had from them, so ``crop`` takes back nothing or
    everything.
    """

    is_compileable = True
    is_croppable = False
    is_sliding = False
    supports_early_init = False  # shapes are the layer's to say, with its first call

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.conv: Tensor | None = None
        self.state: Tensor | None = None
        self.cumulative_length: Any = 0

    def mix(self, layer: M2RNN, x: Tensor, mask: Tensor | None, packed: Packed | None) -> Tensor:
        """Return what the layer makes of x (B, S, hidden_size) after what came before, and move on.

        A cache whose entries have another ``mix`` keeps states elsewhere, as an engine's does in slots of its pool.
        """
        if packed is not None:
            raise ValueError("M2RNN: a cache and packed sequences must not be given together")
        conv, state = self.begin(layer, x)
        y: Tensor
        if wants_gradients(layer, x, conv, state):
            y, self.conv, self.state = layer(x, States(conv, state), mask)  # in place there are no gradients
        else:
            if conv.requires_grad or state.requires_grad:  # of a call with gradients, whose states stay as they are
                conv, state = self.conv, self.state = conv.detach().clone(), state.detach().clone()
            y = layer(x, M2RNNCache(conv, state), mask)
        self.move(x.shape[1])
        return y

    def begin(self, layer: M2RNN, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states, which are those of sequences that have not begun where no call came before."""
        if self.conv is None or self.state is None:
            made = layer.allocate_cache(x.shape[0], device=x.device)
            self.conv, self.state, self.is_initialized = made.conv, made.state, True
            self._mark()
        return self.conv, self.state

    def _mark(self) -> None:
        """Do nothing: dynamic caches may be anywhere."""

    def move(self, tokens: int) -> None:
        """Count the positions of a call."""
        self.cumulative_length += tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there are neither keys nor values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise TypeError: there are neither keys nor values."""
        raise TypeError("M2RNN: a layer's cache holds states, no keys and values")

    def get_seq_length(self) -> Any:
        """Return how many positions were seen."""
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        """Return the length and offset of a mask for attention beside this layer."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: states are as large after any number of tokens."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` positions, which can be none or all of them.

        Raises RuntimeError for any other number: a state does not say what it was before.
        """
        seen, removed = int(self.get_seq_length()), -int(tokens_to_remove)
        if removed == 0:
            return
        if removed != seen:
            raise RuntimeError(
                f"M2RNN: crop must remove 0 or all {seen} positions, got {tokens_to_remove}: a recurrent state does "
                "not say what it was before; keep a copy of the cache, or run the tokens that stay again"
            )
        self.reset()

    def reset(self) -> None:
        """Go back to the beginning of every sequence."""
        if self.conv is not None and self.state is not None:
            self._write(torch.zeros_like(self.conv), torch.zeros_like(self.state))
            self.cumulative_length *= 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take sequence ``beam_idx[i]`` for the i-th, in place unless the states have gradients."""
        if self.conv is not None and self.state is not None:
            index = beam_idx.to(self.conv.device)
            self._write(self.conv.index_select(0, index), self.state.index_select(0, index))

    def _write(self, conv: Tensor, state: Tensor) -> None:
        """Have these states, where the others were unless those are of a graph: its backward may still need them."""
        assert self.conv is not None  # mypy
        assert self.state is not None
        if self.conv.requires_grad or self.state.requires_grad:
            self.conv, self.state = conv, state
            self._mark()
        else:
            self.conv.copy_(conv)
            self.state.copy_(state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence ``repeats`` times, one after the other."""
        if self.conv is not None and self.state is not None:
            self.conv, self.state = (x.repeat_interleave(repeats, dim=0) for x in (self.conv, self.state))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these numbers."""
        if self.conv is not None and self.state is not None:
            self.conv, self.state = self.conv[indices, ...], self.state[indices, ...]

    def offload(self) -> None:
        """Do nothing: states are small and every token needs them."""

    def prefetch(self) -> None:
        """Do nothing, as ``offload``."""


class StaticM2RNNCacheLayer(M2RNNCacheLayer):
    """The same beside keys and values of a fixed length: compiled calls find everything where it was."""

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.tensor(0)  # a number would be a constant of what is compiled

    def _mark(self) -> None:
        assert self.conv is not None  # mypy
        self.cumulative_length = self.cumulative_length.to(self.conv.device)
        if not torch.compiler.is_compiling():
            for x in (self.conv, self.state, self.cumulative_length):
                torch._dynamo.mark_static_address(x)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of a mask for attention beside this layer."""
        return self.max_cache_len, 0


DYNAMIC_LAYER_TYPE_MAPPING[M2RNN_LAYER] = M2RNNCacheLayer
STATIC_LAYER_TYPE_MAPPING[M2RNN_LAYER] = StaticM2RNNCacheLayer


def entry_of(cache: Cache, number: int) -> M2RNNCacheLayer:
    """Return what a cache holds for a layer; raises ValueError for a cache that has no states for it."""
    entry = cache.layers[number] if number < len(cache.layers) else None
    if not hasattr(entry, "mix"):
        raise ValueError(
            f"M2RNN: cache must be made from the model's config, as DynamicCache(config=model.config) is, "
            f"got {'nothing' if entry is None else type(entry).__name__} for layer {number}"
        )
    return cast(M2RNNCacheLayer, entry)


def mix(layer: M2RNN, x: Tensor, entry: M2RNNCacheLayer | None, mask: Tensor | None, packed: Packed | None) -> Tensor:
    """Return what a layer makes of x (B, S, hidden_size), after what its cache has seen.

    mask (B, S) is true at tokens; sequences of ``packed`` are apart.
    """
    y: Tensor
    if entry is None:
        if packed is not None:
            y = layer(x.flatten(0, 1), None, None, packed.cu_seqlens, packed.cu_seqlens_cpu).view_as(x)
        else:
            y = layer(x, attention_mask=mask)
        return y
    return entry.mix(layer, x, mask, packed)
