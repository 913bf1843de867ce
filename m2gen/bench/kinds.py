"""Kinds of implementations, calls and axes. Imports nothing, since the command line has these in its options."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """The origin of an implementation's operator."""

    DEFAULT = "default"
    """A package whose schedules are the defaults."""
    PORTABLE = "portable"
    """A package whose schedules are the defaults of the portable family, where others are preferred."""
    TUNED = "tuned"
    """A package whose schedules come from the tuning database."""
    EAGER = "eager"
    """The reference in eager PyTorch, in the dtypes that the kernels use."""
    COMPILED = "compiled"
    """The same under ``torch.compile``, with its steps unrolled."""
    PEER = "peer"
    """Another implementation, through an adapter (``m2gen.bench.peers``)."""

    @property
    def generated(self) -> bool:
        return self in (Kind.DEFAULT, Kind.PORTABLE, Kind.TUNED)

    @property
    def most_steps(self) -> int | None:
        """Maximum number of timed steps: thousands in a PyTorch loop take minutes, and an unrolled step takes seconds
        to compile."""
        return {Kind.EAGER: 128, Kind.COMPILED: 8}.get(self)


class Call(StrEnum):
    """The call that is timed."""

    SEQUENCE = "sequence"
    """Run the operator on B sequences of S steps: forward, then forward and backward."""
    DECODE = "decode"
    """Decode one token for each of B sequences, with float32 states updated in place."""
    DECODE_BF16 = "decode_bf16"
    """Decode with states in bf16, which are half the traffic."""
    DECODE_POOL = "decode_pool"
    """Decode with float32 states in slots of a pool, in another order than their sequences and with gaps."""
    DECODE_ORDERED = "decode_ordered"
    """Decode with float32 states in slots in order and without gaps, so that memory is as that of contiguous ones."""
    PREFILL = "prefill"
    """Run B packed prompts from initial states to final states, without gradients."""
    PREFILL_POOL = "prefill_pool"
    """Run the same prompts from slots of a pool into others of its slots."""
    SINGLES = "singles"
    """Decode a token and its drafts one step after the other, each of which leaves its state in a slot."""
    STEPS = "steps"
    """Decode the same tokens in one call, which leaves the same states in the same slots."""

    @property
    def decodes(self) -> bool:
        return self is not Call.SEQUENCE and not self.prefills

    @property
    def prefills(self) -> bool:
        """Whether prompts are run, packed and without gradients."""
        return self in (Call.PREFILL, Call.PREFILL_POOL)

    @property
    def drafts(self) -> bool:
        """Whether each sequence has several tokens, of which the next call may take back all but the first."""
        return self in (Call.SINGLES, Call.STEPS)

    @property
    def narrow_state(self) -> bool:
        """Whether states are kept in bf16 between calls."""
        return self is Call.DECODE_BF16

    @property
    def pooled(self) -> bool:
        """Whether states are found by slots, which generated operators alone do."""
        return self in (Call.DECODE_POOL, Call.DECODE_ORDERED, Call.PREFILL_POOL) or self.drafts

    @property
    def beside(self) -> tuple[Call, ...]:
        """The calls beside whose times this one's says something."""
        partners: dict[Call, tuple[Call, ...]] = {
            Call.DECODE_POOL: (Call.DECODE, Call.DECODE_ORDERED),
            Call.DECODE_ORDERED: (Call.DECODE,),
            Call.PREFILL_POOL: (Call.PREFILL,),
            Call.STEPS: (Call.SINGLES, Call.DECODE_POOL),
        }
        return partners.get(self, ())


class TimerStep(StrEnum):
    """A step that a timer is asked to do with an entry."""

    ADMIT = "admit"
    """Check the entry; if it passes, capture it and measure its memory and host time."""
    SAMPLE = "sample"
    """Time an entry that was admitted."""


class Axis(StrEnum):
    """The size that grows along a sweep."""

    SEQ = "seq"
    """Sequence length S, at the batch of the layer's first workload."""
    BATCH = "batch"
    """B times N, by the batch; the line goes through those that fill the GPU."""
    HEADS = "heads"
    """B times N, by the heads of a batch that fills the GPU."""
    ROWS = "rows"
    """Rows K, on the layer's first workload with a batch that fills the GPU; up to 16 rows cost as much as one tile."""
