"""Scenes of a warm-up: calls that reach one kernel of a module, and the kernels that were compiled of them."""

from __future__ import annotations

from typing import NamedTuple


class Scene(NamedTuple):
    """Calls that reach one kernel of a module: how models make them, and what their tensors are like."""

    module: str
    variant: str
    use: str
    """``train``, ``train_states``, ``infer`` or ``decode``."""
    operands: str
    """``layer``: what ``M2RNN`` in the variant's dtype passes; ``autocast``: the same with parameters in float32;
    ``operator``: contiguous tensors, all in that dtype."""
    offsets: str
    """dtype of the offsets of a packed batch; empty for a dense one."""
    side: str
    """``forward``, ``backward`` or ``around``: which kernels to compile of those that are launched, the last being the
    layer's own around the recurrence."""
    lengths: tuple[int, ...]
    """Steps of a sequence; none for those that differ for the kernels."""
    deterministic: bool


class Kernel(NamedTuple):
    """A compiled kernel of a module, by name and Triton's hash, and whether it lay in Triton's cache."""

    module: str
    name: str
    digest: str
    found: bool
