"""What a mask of tokens means for attention and for M2RNN blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function

from .configuration import FULL_ATTENTION, M2RNN_LAYER, M2RNNConfig


def masks_of(
    config: M2RNNConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor | None,
    numbers: Tensor | None = None,
) -> dict[str, Any]:
    """Return the mask of each type of layer: that of scores, and where inputs_embeds (B, S, ...) has tokens.

    attention_mask (B, past + S) is true, or not 0, at tokens. Raises ValueError for one of another shape. ``numbers``
    (B, S) are of the sequences that tokens are of; with them positions are not asked, which would wait for the device.
    """
    if attention_mask is not None:
        _check_shape(attention_mask, inputs_embeds.shape[0], inputs_embeds.shape[1], cache)
    masks: dict[str, Any] = {M2RNN_LAYER: _tokens(attention_mask, inputs_embeds.shape[1], cache)}
    if FULL_ATTENTION in config.layer_types:
        packed: dict[str, Any] = (
            {"position_ids": position_ids} if numbers is None
            else {"and_mask_function": packed_sequence_mask_function(numbers)}
        )  # fmt: skip
        masks[FULL_ATTENTION] = create_causal_mask(
            config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, cache=cache, **packed
        )
    return masks


def _check_shape(attention_mask: Tensor, batch: int, steps: int, cache: Cache | None) -> None:
    """Raise ValueError unless there is a row of each sequence, with its past and these tokens.

    With a cache there may be more, as a cache of a fixed length has them; one that counts on the device is not asked.
    """
    past = 0 if cache is None else cache.get_seq_length()
    least = steps + (past if isinstance(past, int) else 0)
    rows, columns = attention_mask.shape if attention_mask.dim() == 2 else (-1, -1)
    if rows != batch or columns < least or (cache is None and columns > least):
        raise ValueError(f"M2RNN: attention_mask must be ({batch}, past + {steps}), got {tuple(attention_mask.shape)}")


def _tokens(attention_mask: Tensor | None, steps: int, cache: Cache | None) -> Tensor | None:
    """Return where the ``steps`` positions after a cache's have tokens, (B, S), or None where all of them do.

    Asking waits for the device, once a call; what is compiled does not ask.
    """
    if attention_mask is None:
        return None
    here = _after(attention_mask, steps, cache).bool()
    if not torch.compiler.is_compiling() and not here.is_meta and bool(here.all()):
        return None
    return here.contiguous()


def _after(attention_mask: Tensor, steps: int, cache: Cache | None) -> Tensor:
    """Return the columns of a mask that are of these tokens: those after the past, behind which there may be more."""
    past, last = 0 if cache is None else cache.get_seq_length(), attention_mask.shape[1] - steps
    if isinstance(past, int):
        return attention_mask[:, past : past + steps]
    first = past.to(attention_mask.device).clamp(max=last)  # counted on the device, where it stays
    return attention_mask.index_select(1, first + torch.arange(steps, device=attention_mask.device))
