"""A tensor that is watched: what hands its values to the host is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

READS = ("tolist", "item", "numpy", "cpu", "to", "__bool__", "__int__", "__index__", "__iter__", "nonzero", "equal")
"""Methods of a tensor that hand its values to the host, or to the host's memory."""
WAITS = frozenset({"tolist", "item", "numpy", "__bool__", "__int__", "__index__", "nonzero"})
"""Those of them that Triton's interpreter does not call on every tensor that it is given."""


class Watch:
    """Count of the methods among ``READS`` that were called on some tensor, or on a view of it."""

    def __init__(self, patch: pytest.MonkeyPatch, watched: Tensor) -> None:
        self.found: list[str] = []
        self.place = watched.untyped_storage().data_ptr()
        for name in READS:
            patch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(x: Tensor, *rest: Any, **named: Any) -> Any:
            if not x.is_meta and x.untyped_storage().data_ptr() == self.place:
                self.found.append(name)
            return call(x, *rest, **named)

        return counted
