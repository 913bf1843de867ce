"""Kinds of layers. Imports nothing, since the command line has these in its options."""

from __future__ import annotations

from enum import StrEnum


class LayerKind(StrEnum):
    """The origin of a layer."""

    EAGER = "eager"
    """m2gen's layer as a program calls it."""
    COMPILED = "compiled"
    """The same under ``torch.compile(fullgraph=True)``."""
    OPERATOR = "operator"
    """m2gen's layer with a peer's operator in it (``--peer``), and plain PyTorch around that."""
    ATTENTION = "attention"
    """torch's causal attention of the same width."""
    PEER = "peer"
    """A layer of another package (``--peer-layer``)."""

    @property
    def generated(self) -> bool:
        return self in (LayerKind.EAGER, LayerKind.COMPILED)


class Part(StrEnum):
    """What a kernel of a step is for."""

    RECURRENCE = "recurrence"
    """What mixes tokens: the recurrence, or attention."""
    PROJECTIONS = "projections"
    """Matrix products with the layer's weights."""
    REST = "rest"
    """Convolution, gates, norms, casts and copies."""
