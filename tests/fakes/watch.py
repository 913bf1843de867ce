"""A tensor that is watched: what hands its values to the host is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
            if _place(x) == self.place:
                self.found.append(name)
            return call(x, *rest, **named)

        return counted


def _place(x: Tensor) -> int | None:
    """Return where a tensor's memory is, None for one that only stands for memory."""
    try:
        return None if x.is_meta else x.untyped_storage().data_ptr()
    except NotImplementedError:
        return None


class Reads(TorchDispatchMode):
    """Names of the operators, called under this mode, that a device would have to be waited for."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "unique", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in self.WAITING and not (name == "repeat_interleave" and func._overloadname == "self_int"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
