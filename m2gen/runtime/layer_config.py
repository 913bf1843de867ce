"""What a layer is made of: dims, heads and options, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from .activations import ACTIVATIONS
from .checks import checked_bound
from .facts import HeadCounts
from .init import Initialisation

Norm: TypeAlias = Literal["rmsnorm", "layernorm"]
NORMS = ("rmsnorm", "layernorm")


@dataclass(frozen=True)
class LayerConfig:
    """Dims, heads and options of an ``M2RNN``, whose constructor says what they mean.

    Raises ValueError for heads that do not divide N, and for other values that no layer can have.
    """

    hidden_size: int
    state_expansion: int
    head_dim: int
    heads: HeadCounts
    gate_heads: int
    forget_inputs: int
    conv_width: int | None = 4
    activation: str | None = "silu"
    norm: Norm | None = "rmsnorm"
    norm_eps: float = 1e-5
    residual: bool = True
    bias: bool = False
    clip: float | None = 1.0
    round_gate: bool = False
    init: Initialisation = field(default_factory=Initialisation)

    @property
    def total_heads(self) -> int:
        """Heads of the state."""
        return max(self.heads)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "state_expansion", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"M2RNN: {name} must be at least 1, got {getattr(self, name)}")
        if not self.norm_eps >= 0:
            raise ValueError(f"M2RNN: norm_eps must be at least 0, got {self.norm_eps}")
        checked_bound(self.clip)
        for name, count in (*self.heads._asdict().items(), ("g", self.gate_heads)):
            if count < 1 or self.total_heads % count:
                raise ValueError(f"M2RNN: heads of {name} must divide {self.total_heads}, got {count}")
        if self.forget_inputs < 1 or self.heads.f % self.forget_inputs:
            raise ValueError(
                f"M2RNN: forget_inputs must divide the {self.heads.f} heads of f, got {self.forget_inputs}"
            )
        if self.conv_width is not None and self.conv_width < 1:
            raise ValueError(f"M2RNN: conv_width must be at least 1 or None, got {self.conv_width}")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"M2RNN: activation must be None or one of {names}, got {self.activation!r}")
        if self.norm is not None and self.norm not in NORMS:
            raise ValueError(f"M2RNN: norm must be None, rmsnorm or layernorm, got {self.norm!r}")


def heads_of(heads: Mapping[str, int]) -> tuple[HeadCounts, int]:
    """Return the heads of q, k, v, f and w, and those of g, of a mapping as specs have it; without "g", N of g."""
    groups = dict(heads)
    gate_heads = groups.pop("g", None)
    if set(groups) != set(HeadCounts._fields):
        raise ValueError(f"M2RNN: heads must be of q, k, v, f, w and optionally g, got {', '.join(heads)}")
    counts = HeadCounts(**groups)
    return counts, max(counts) if gate_heads is None else gate_heads
