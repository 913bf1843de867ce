"""What the tuner asks of a GPU, and what it learns: tasks, samples, trials. Imports neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from m2gen.db import Failure, TensorError
from m2gen.errors import TuneError
from m2gen.schedule import Schedule
from m2gen.tune.space import Subject

KNOWN = "known"
"""Origin of what a record says that it fails: it is not tried."""


@dataclass(frozen=True)
class Samples:
    """Times of single calls in milliseconds, and the peak allocation beyond the inputs."""

    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    """Of the call in the same place of ``forward_ms``; empty for inference."""
    peak_bytes: int

    @property
    def call_ms(self) -> tuple[float, ...]:
        """Forward and backward together: what is optimised."""
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
    """What is done with a candidate on the GPU."""

    PREPARE = "prepare"
    """Work out the answers of the check, so that the first candidate need not wait for them."""
    SCREEN = "screen"
    """Check it; if it passes, time it for as long as it is not far slower than the best."""
    HELD_OUT = "held_out"
    """Check it on problems that no trial has seen."""
    TIME = "time"
    """Time it again; it has passed."""
    VERIFY = "verify"
    """Check it on all problems, without timing it."""


@dataclass(frozen=True)
class Task:
    """One step with one candidate, for a GPU worker."""

    subject: Subject
    schedule: Schedule
    step: Step
    best_ms: float | None = None
    """Median of the best candidate so far."""
    seed: int = 0


@dataclass(frozen=True)
class Measurement:
    """What a GPU worker found: the worst error of every tensor, samples if it passed, or why it must not be used."""

    errors: tuple[TensorError, ...] = ()
    samples: Samples | None = None
    failure: Failure | None = None
    seconds: float = 0.0
    details: str = field(default="", compare=False)
    """Traceback of what was raised."""
    stopped: str = ""
    """Why this machine cannot go on, a full disk say: of no candidate, so nothing that may be recorded of one."""


@dataclass(frozen=True)
class CompileTask:
    """One candidate to compile for all calls that the check and the clock will make of it."""

    subject: Subject
    schedule: Schedule


@dataclass(frozen=True)
class Compiled:
    """What a candidate's kernels take, the worst of them, and a name for what runs."""

    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    binary: str = ""
    """Candidates of one name have the same machine code and launch it the same way."""
    failure: Failure | None = None
    seconds: float = 0.0
    details: str = field(default="", compare=False)
    stopped: str = ""
    """As in ``Measurement``."""


def go_on(found: Compiled | Measurement) -> None:
    """Raise TuneError where a worker says that this machine cannot go on."""
    if found.stopped:
        raise TuneError(f"workers must be able to write their files: {found.stopped}")


@dataclass(frozen=True)
class Trial:
    """One candidate with everything that was found out about it: a line of the journal."""

    schedule: Schedule
    origin: str
    """Why it was tried: default, record, similar, elsewhere, tile, neighbour, combined, search, every; adopted from a
    worker that is gone, resumed after its machine went down. Or known: a record says that it fails."""
    compiled: Compiled | None = None
    errors: tuple[TensorError, ...] = ()
    samples: Samples | None = None
    failure: Failure | None = None
    gpu_seconds: float = 0.0
    worker: str = ""
    copy_of: str = ""
    """Slug of the candidate that has the same machine code, whose samples these are."""

    @property
    def median_ms(self) -> float | None:
        """What is optimised, of a candidate that passed."""
        return self.samples.median_ms if self.samples and not self.failure else None
