"""The layer with flash-linear-attention's signature, and states in its caches; this imports nothing of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..cache import States
from ..layer import M2RNN
from ..mixer import wants_gradients

__all__ = ["M2RNNLayer"]


class M2RNNLayer(nn.Module):
    """An ``M2RNN``, ``mixer``, that is called and cached as a layer of flash-linear-attention.

    ``layer_idx`` is the layer's place in caches; ``hidden_size`` and ``options`` are ``M2RNN``'s arguments.
    """

    def __init__(self, hidden_size: int, *, layer_idx: int | None = None, **options: Any) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.mixer = M2RNN(hidden_size, **options)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """Return what the layer makes of hidden_states (B, S, hidden_size), None, and the cache that it was given.

        attention_mask (B, past + S) is true, or not 0, at tokens; results elsewhere are 0. Of ``kwargs`` it reads
        ``cu_seqlens`` (sequences + 1,), or (1, sequences + 1), with which B is 1 and the mask is not looked at, and
        ``cu_seqlens_cpu``, a copy of that on the CPU, with which nothing waits for the device.

        past_key_values has the states that the call goes on from, and gets those after it where ``use_cache`` is true:
        ``recurrent_state`` (B, N, K, V) and ``conv_state`` (B, conv_width - 1, C), None for a layer without a
        convolution. They are new tensors, which have gradients where the call has any.

        Raises ValueError for masks and offsets of another shape, and for a cache where ``layer_idx`` is None.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"M2RNN: attention_mask must be (B, past + S), got {tuple(attention_mask.shape)}")
        steps = hidden_states.shape[1]
        cu_seqlens, cu_seqlens_cpu = (_flat(name, kwargs.get(name)) for name in ("cu_seqlens", "cu_seqlens_cpu"))
        mask = None if attention_mask is None or cu_seqlens is not None else attention_mask[:, -steps:]
        x = hidden_states if cu_seqlens is None else _packed(hidden_states)
        if past_key_values is None:
            y = self.mixer(x, None, mask, cu_seqlens, cu_seqlens_cpu)
            return y.view_as(hidden_states), None, None
        before = self._states(past_key_values)
        if cu_seqlens is None and steps == 1 and not wants_gradients(self.mixer, x, before.conv, before.state):
            y, conv, state = self._step(x, before, mask)
        else:
            y, conv, state = self.mixer(x, before, mask, cu_seqlens, cu_seqlens_cpu)
        if use_cache:
            kept = None if self.mixer.conv1d is None else conv
            past_key_values.update(recurrent_state=state, conv_state=kept, layer_idx=self.layer_idx, offset=steps)
        return y.view_as(hidden_states), None, past_key_values

    def _states(self, past_key_values: Any) -> States:
        """Return what a cache holds for this layer, which is nothing before its first call."""
        if self.layer_idx is None:
            raise ValueError("M2RNN: layer_idx must be a number where past_key_values is given, got None")
        held = past_key_values[self.layer_idx] if len(past_key_values) > self.layer_idx else None
        return States(None, None) if held is None else States(held["conv_state"], held["recurrent_state"])

    def _step(self, x: Tensor, before: States, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Advance copies of the states by one token of each sequence, x (B, 1, hidden_size)."""
        moved = self.mixer.allocate_cache(x.shape[0], device=x.device, dtype=x.dtype)
        if before.conv is not None:
            moved.conv = before.conv.detach().to(moved.conv.dtype, copy=True)
        if before.state is not None:
            moved.state = before.state.detach().to(moved.state.dtype, copy=True)
        return self.mixer(x, moved, mask), moved.conv, moved.state


def _flat(name: str, offsets: Tensor | None) -> Tensor | None:
    """Return offsets (sequences + 1,), which some collators give as a batch of one."""
    if offsets is None or offsets.dim() == 1:
        return offsets
    if offsets.dim() != 2 or offsets.shape[0] != 1:
        raise ValueError(f"M2RNN: {name} must be (sequences + 1,), got {tuple(offsets.shape)}")
    return offsets[0]


def _packed(hidden_states: Tensor) -> Tensor:
    """Return the tokens (T, hidden_size) of a batch of one."""
    if hidden_states.shape[0] != 1:
        raise ValueError(
            f"M2RNN: hidden_states must be (1, T, hidden_size) with cu_seqlens, got {tuple(hidden_states.shape)}"
        )
    return hidden_states[0]
