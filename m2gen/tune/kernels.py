"""The kernels that a search is about; this module imports nothing, for the command line."""

from enum import StrEnum


class SearchedKernels(StrEnum):
    """The kernels that a command searches."""

    RECURRENCE = "recurrence"
    """Schedules of recurrences, which take most of a layer's time."""
    LAYER = "layer"
    """Tiles of the kernels around them."""
    ALL = "all"
