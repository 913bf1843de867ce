"""What can be timed, and along what. Imports nothing, for the command line has these in its options."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """Where the operator of an implementation comes from."""

    DEFAULT = "default"
    """A package whose schedules are the defaults."""
    PORTABLE = "portable"
    """A package whose schedules are the defaults of the portable family, where others are preferred."""
    TUNED = "tuned"
    """A package whose schedules come from the tuning database."""
    EAGER = "eager"
    """The reference in eager PyTorch, in the dtypes that the kernels use."""
    COMPILED = "compiled"
    """The same under ``torch.compile``, its steps unrolled."""
    PEER = "peer"
    """Another implementation, through an adapter (``m2gen.bench.peers``)."""

    @property
    def generated(self) -> bool:
        return self in (Kind.DEFAULT, Kind.PORTABLE, Kind.TUNED)

    @property
    def most_steps(self) -> int | None:
        """Steps that are timed at most: a loop of PyTorch takes minutes for thousands, and every one
        that is unrolled takes seconds to compile."""
        return {Kind.EAGER: 128, Kind.COMPILED: 8}.get(self)


class Call(StrEnum):
    """What is called."""

    SEQUENCE = "sequence"
    """The operator on B sequences of S steps: forward, then forward and backward."""
    DECODE = "decode"
    """One step for B sequences, whose float32 states are updated in place."""
    DECODE_BF16 = "decode_bf16"
    """The same with states in bf16, which are half the traffic."""

    @property
    def decodes(self) -> bool:
        return self is not Call.SEQUENCE

    @property
    def narrow_state(self) -> bool:
        """Whether states are in bf16 between calls."""
        return self is Call.DECODE_BF16


class TimerStep(StrEnum):
    """What a timer is asked to do with an entry."""

    ADMIT = "admit"
    """Hold it against the oracle; if it passes, capture it and measure its memory and what it takes of the host."""
    SAMPLE = "sample"
    """Time it; it was admitted."""


class Axis(StrEnum):
    """What grows along a sweep."""

    SEQ = "seq"
    """S, at the batch of the layer's first workload."""
    BATCH = "batch"
    """B times N, by the batch; the line is through those that fill the GPU."""
    HEADS = "heads"
    """B times N, by the heads of a batch that fills the GPU."""
    ROWS = "rows"
    """K, on the layer's first workload with a batch that fills the GPU; up to 16 rows the cost is that of a tile."""
