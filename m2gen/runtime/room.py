"""Rows of memory behind a projection's parameters, with which its products have a multiple of ``ROW`` columns.

A product of matrices whose result has 4484 columns takes about twice as long as one of 4496. What the room holds does
not matter, since nobody reads the columns that it gives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROW = 16
"""Elements whose multiples rows of a projection have, so that every product and every load of one is aligned."""


def leave_room(module: nn.Linear) -> None:
    """Have the module's parameters lie in memory with room behind them, unless there is some or they are no tensors.

    Shapes and values are the same. Memory of another size than a parameter's is what views have, too.
    """
    for parameter in module.parameters(recurse=False):
        x = parameter.data
        rest = -x.shape[0] % ROW if x.dim() else 0
        if type(parameter) is nn.Parameter and type(x) is Tensor and rest and widened(x) is None:
            wide = x.new_zeros(x.shape[0] + rest, *x.shape[1:])
            wide[: x.shape[0]] = x
            parameter.data = wide[: x.shape[0]]


def widened(x: Tensor) -> Tensor | None:
    """Return x (P, ...) with rows behind it up to a multiple of ``ROW``, whatever they hold; None without room."""
    rows = x.shape[0] + -x.shape[0] % ROW
    if not x.is_contiguous():
        return None
    end = x.storage_offset() + rows * x[:1].numel()
    if end * x.element_size() > x.untyped_storage().nbytes():
        return None
    return torch.as_strided(x, (rows, *x.shape[1:]), x.stride(), x.storage_offset())
