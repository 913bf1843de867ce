"""Facts kept about calls that are alike, so that the next one takes less time on the host."""

from __future__ import annotations

from types import ModuleType

from .memory import Places
from .relaunch import Known


class KnownCall:
    """What calls found out that agree in the shapes, strides, dtypes, alignment and devices of their tensors."""

    __slots__ = ("kernels", "launches", "places")

    def __init__(self) -> None:
        self.kernels: ModuleType | None = None
        """Kernels that serve these calls."""
        self.launches: Known = {}
        """Launches to repeat, kept by the kernels' launchers."""
        self.places: Places | None = None
