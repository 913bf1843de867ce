"""The facts from which the sizes of a variant's cases follow."""

from __future__ import annotations

from dataclasses import dataclass

from m2gen.problem import Problem
from m2gen.spec import Dtype
from m2gen.variant import Variant

LONG_STATE = 1024
"""Largest state, in elements N K V, for cases with thousands of steps, which the eager reference runs as well."""
MANY_TOKENS = 65
"""Fewest tokens of a call in which programs that share a head's rows may add up y by atomics."""


@dataclass(frozen=True)
class Setting:
    """The facts from which the sizes of a variant's cases follow."""

    variant: Variant
    interval: int
    """C, the steps between checkpoints."""
    interpreted: bool

    @property
    def ragged(self) -> Problem:
        """Sequences of many tokens (one in the interpreter) from initial states that end just after a checkpoint."""
        steps = self.interval + 3
        return Problem(1 if self.interpreted else max(2, -(-MANY_TOKENS // steps)), steps, initial_state=True)

    @property
    def brief(self) -> Problem:
        """Two sequences within one interval, for cases that call the operator often."""
        return Problem(2, min(self.interval, 6), initial_state=True)

    @property
    def narrow(self) -> bool:
        return self.variant.dtype is not Dtype.FP32

    @property
    def large(self) -> float:
        """Scale of gradients far over the clip's bound; float16 must hold what many heads add up."""
        return 10.0 if self.variant.dtype is Dtype.FP16 else 100.0

    @property
    def long(self) -> bool:
        """Whether sequences of thousands of steps take reasonable time."""
        variant = self.variant
        state = variant.total_heads * variant.state_expansion * variant.head_dim
        return not self.interpreted and state <= LONG_STATE
