"""Rows of memory behind a projection's parameters, with which its products have a multiple of ``ROW`` columns.

A product of matrices whose result has 4484 columns takes about twice as long as one of 4496. What the room holds does
not matter, since nobody reads the columns that it gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

ROW = 16
"""Elements whose multiples rows of a projection have, so that every product and every load of one is aligned."""


def leave_room(module: nn.Linear, moved: bool = True) -> None:
    """Have the module's parameters lie in memory with room behind them, unless there is some or they are no tensors.

    Shapes and values are the same. Memory of another size than a parameter's is what views have, too; ``without_room``
    gives state dicts without it. Unless the module ``moved`` its parameters, those that once had room stay where they
    are: somebody else put them there, as optimisers do that have the parameters of a rank in one piece of memory.
    """
    for parameter in module.parameters(recurse=False):
        if not moved and getattr(parameter, "_had_room", False):
            continue
        parameter._had_room = True  # type: ignore[attr-defined]
        x = parameter.data
        rest = -x.shape[0] % ROW if x.dim() else 0
        if type(parameter) is nn.Parameter and type(x) is Tensor and rest and widened(x) is None:
            wide = x.new_zeros(x.shape[0] + rest, *x.shape[1:])
            wide[: x.shape[0]] = x
            parameter.data = wide[: x.shape[0]]


def without_room(_: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: object) -> None:
    """Have a projection's entries of a state dict say that their memory ends where they do, as their readers expect.

    safetensors refuses tensors with memory behind them. The elements are the parameters' as before.
    """
    for name in (f"{prefix}input_projection.weight", f"{prefix}input_projection.bias"):
        x = state_dict.get(name)
        if type(x) is Tensor and not x.requires_grad and x.device.type in ("cpu", "cuda") and widened(x) is not None:
            state_dict[name] = from_dlpack(x)  # the same memory as a storage of that size


def widened(x: Tensor) -> Tensor | None:
    """Return x (P, ...) with rows behind it up to a multiple of ``ROW``, whatever they hold; None without room."""
    rows = x.shape[0] + -x.shape[0] % ROW
    if not x.is_contiguous():
        return None
    end = x.storage_offset() + rows * x[:1].numel()
    if end * x.element_size() > x.untyped_storage().nbytes():
        return None
    return torch.as_strided(x, (rows, *x.shape[1:]), x.stride(), x.storage_offset())
