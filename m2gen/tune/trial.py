"""Tasks for GPU workers and their results: samples, measurements, trials. Imports neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from m2gen.db import Failure, TensorError
from m2gen.errors import TuneError
from m2gen.schedule import AnySchedule
from m2gen.tune.subject import Subject

KNOWN = "known"
"""Origin of a candidate that is not tried, since a record says that it fails."""


@dataclass(frozen=True)
class Samples:
    """Times of single calls in milliseconds, and the peak allocation beyond the inputs."""

    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    """Times of the backward of the same calls; empty for inference."""
    peak_bytes: int

    @property
    def call_ms(self) -> tuple[float, ...]:
        """Forward and backward together, which is minimised."""
        if not self.backward_ms:
            return self.forward_ms
        return tuple(one + other for one, other in zip(self.forward_ms, self.backward_ms, strict=True))

    @property
    def median_ms(self) -> float:
        return median(self.call_ms)

    def __add__(self, other: Samples) -> Samples:
        peak = max(self.peak_bytes, other.peak_bytes)
        return Samples(self.forward_ms + other.forward_ms, self.backward_ms + other.backward_ms, peak)


class Step(StrEnum):
    """A step with a candidate on the GPU."""

    PREPARE = "prepare"
    """Compute the oracle's answers, so that the first candidate need not wait for them."""
    SCREEN = "screen"
    """Check the candidate, and if it passes, time it, with few samples if it is far slower than the best."""
    HELD_OUT = "held_out"
    """Check the candidate on held-out problems, which no trial has seen."""
    TIME = "time"
    """Time the candidate again, after it passed."""
    VERIFY = "verify"
    """Check the candidate on all problems, without timing it."""


@dataclass(frozen=True)
class Task:
    """One step with one candidate, for the GPU worker."""

    subject: Subject
    schedule: AnySchedule
    step: Step
    best_ms: float | None = None
    """Median of the best candidate so far, in milliseconds."""
    seed: int = 0


@dataclass(frozen=True)
class Measurement:
    """A GPU worker's result: the worst error of every tensor, and samples or a failure."""

    errors: tuple[TensorError, ...] = ()
    samples: Samples | None = None
    failure: Failure | None = None
    seconds: float = 0.0
    details: str = field(default="", compare=False)
    """Traceback of the exception."""
    stopped: str = ""
    """Why this machine cannot go on, as with a full disk; it says nothing about the candidate."""


@dataclass(frozen=True)
class CompileTask:
    """One candidate to compile, for all calls that the check and the clock will make."""

    subject: Subject
    schedule: AnySchedule


@dataclass(frozen=True)
class Compiled:
    """The resources of a candidate's kernels (the worst of them), and a name of the machine code."""

    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    binary: str = ""
    """Name of the machine code and its launch; candidates with the same name run the same."""
    failure: Failure | None = None
    seconds: float = 0.0
    details: str = field(default="", compare=False)
    stopped: str = ""
    """Why this machine cannot go on, as in ``Measurement``."""


def go_on(found: Compiled | Measurement) -> None:
    """Raise TuneError if a worker says that this machine cannot go on."""
    if found.stopped:
        raise TuneError(f"workers must be able to write their files: {found.stopped}")


@dataclass(frozen=True)
class Trial:
    """One candidate with all its results, as the ledger keeps it."""

    schedule: AnySchedule
    origin: str
    """Why the candidate was tried: default, record, similar, elsewhere, tile, neighbour, combined, search or every;
    adopted from a worker that is gone, or resumed after its machine went down. Or ``KNOWN``."""
    compiled: Compiled | None = None
    errors: tuple[TensorError, ...] = ()
    samples: Samples | None = None
    failure: Failure | None = None
    gpu_seconds: float = 0.0
    worker: str = ""
    copy_of: str = ""
    """Slug of the candidate with the same machine code whose samples these are."""

    @property
    def median_ms(self) -> float | None:
        """Median time of a candidate that passed, which is minimised."""
        return self.samples.median_ms if self.samples and not self.failure else None
