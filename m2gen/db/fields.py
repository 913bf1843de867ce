"""The parts of a record: its key, environment and provenance, sizes, timing, errors or failure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from m2gen.bucket import Bucket
from m2gen.spec import Objective

POLICY = "float64_draws4_x2"
"""The numerics policy that records must have passed (docs/design.md, section 6). If budgets are derived in another way,
the policy gets another name, and every record is measured again."""

ARCHES = r"^(sm_[0-9]{2,3}|gfx[0-9a-f]{3,4})$"
_Count = Annotated[int, Field(ge=1, lt=2**31)]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]
_Ms = Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]
_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Bytes = Annotated[int, Field(ge=0, lt=2**53)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
_Fact = Annotated[str, Field(pattern=r"^[ -~]{0,100}$")]
"""A version or a name: printable ASCII, empty if it is not known."""
LONGEST_MESSAGE = 500
_Message = Annotated[str, Field(pattern=rf"^[ -~]{{0,{LONGEST_MESSAGE}}}$")]


@dataclass(frozen=True)
class Key:
    """The calls that a record's schedule serves."""

    variant: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,120}$")]
    """``Tunable.key``: that of the variant, or of a kernel around its recurrence."""
    objective: Objective
    bucket: Bucket
    policy: Annotated[str, Field(pattern=r"^[a-z0-9_.]{1,60}$")]
    """``POLICY`` of the m2gen that verified the schedule."""


@dataclass(frozen=True)
class Environment:
    """The GPU and the toolchain of a measurement."""

    arch: Annotated[str, Field(pattern=ARCHES)]
    device: Annotated[str, Field(pattern=r"^[A-Za-z0-9][ -~]{0,79}$")]
    """Product name, as the driver gives it."""
    sm_count: _Count
    driver: _Fact
    torch: _Fact
    triton: _Fact
    ptxas: _Fact


@dataclass(frozen=True)
class Provenance:
    """The origin of a record."""

    kernel: _Hash
    """``kernels.identity.kernel_hash`` of the measured kernels; a record with another hash is stale."""
    space: _Hash
    """Hash of the declared search space."""
    m2gen: _Fact
    seed: _Seed
    trials: _Count
    """Number of candidates in this search."""
    worker: _Fact = ""
    """Name of the worker that measured, usually its host and GPU."""
    study: _Fact = ""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measured problem."""

    batch: _Count
    seq: _Count
    lengths: tuple[_Count, ...] = ()
    """Lengths of packed sequences, instead of batch and seq."""

    @property
    def sequences(self) -> int:
        return len(self.lengths) or self.batch


@dataclass(frozen=True)
class Estimate:
    """A median of times in milliseconds and the ends of its 95 % confidence interval."""

    median_ms: _Ms
    low_ms: _Ms
    high_ms: _Ms


@dataclass(frozen=True)
class Timing:
    """Time and memory of one call: forward and backward, or as ``Key.objective`` says forward alone.

    A kernel around a recurrence is one call, whose time is ``forward_ms``; only the gate's has a backward beside it.
    """

    tuned: Estimate
    default: Estimate
    """Time of the default schedule, measured alternately with the tuned one."""
    forward_ms: _Ms
    backward_ms: _Ms | None
    """None where nothing else is timed, as for ``Objective.INFER``."""
    peak_bytes: _Bytes
    """Peak allocation beyond the inputs."""

    @property
    def ratio(self) -> float:
        """The interval's upper end as a fraction of the default's median, by which merging and look-up compare."""
        return self.tuned.high_ms / self.default.median_ms


class ThrottleReason(StrEnum):
    """Why a GPU's clocks were below what was asked for."""

    POWER = "power"
    HEAT = "heat"
    HARDWARE = "hardware"
    """The hardware slowed itself down; where it says so, power or heat stand beside this."""
    OTHER_GPUS = "other_gpus"
    """GPUs whose clocks are kept together follow the slowest."""


@dataclass(frozen=True)
class Throttled:
    """A reason, and the part of a search's readings that had it."""

    reason: ThrottleReason
    part: Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Clocks:
    """A GPU's clocks while a search ran: medians over the readings at which it was at work."""

    sm_mhz: _Count
    sm_max_mhz: _Count
    """The highest that the GPU can have."""
    memory_mhz: _Count
    throttled: tuple[Throttled, ...] = ()

    @property
    def warning(self) -> str:
        """What a reader of times should know; empty if the GPU was not throttled."""
        parts = ", ".join(f"{each.part:.0%} of the time by {each.reason}" for each in self.throttled)
        usual = f"{self.sm_mhz} of {self.sm_max_mhz} MHz"
        return f"the GPU was throttled, {parts} ({usual}): times may not repeat" if parts else ""


@dataclass(frozen=True)
class TensorError:
    """The worst error of one tensor over the whole check, and its budget in that case."""

    tensor: Annotated[str, Field(pattern=r"^[A-Za-z_]{1,40}$")]
    error: _Error
    budget: _Error


class Reason(StrEnum):
    """Why a schedule must not be used."""

    HANG = "hang"
    CRASH = "crash"
    WRONG = "wrong"
    """A tensor was over its budget, or did not repeat its bits though the schedule claims determinism."""
    LAUNCH = "launch"
    """The kernels do not compile, or take more resources than the GPU has."""
    MEMORY = "memory"


LASTING = (Reason.HANG, Reason.CRASH, Reason.WRONG, Reason.LAUNCH)
"""Failures that a schedule has on every problem; running out of memory depends on the problem and the limit."""


@dataclass(frozen=True)
class Failure:
    """Why a schedule must not be used: the reason, and one line of detail."""

    reason: Reason
    message: _Message = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"

    @classmethod
    def of(cls, reason: Reason, text: str) -> Failure:
        """Return a failure whose message is ``text`` as one printable line of bounded length."""
        line = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
        return cls(reason, "".join(c if " " <= c <= "~" else "?" for c in line)[:LONGEST_MESSAGE])

    def noting(self, remark: str) -> Failure:
        """Return the failure with a remark at the end of its message, of which a long one loses as much."""
        return Failure(self.reason, f"{self.message[: LONGEST_MESSAGE - len(remark)]}{remark}")


class Status(StrEnum):
    """The purpose of a record."""

    WINNER = "winner"
    """The record serves builds."""
    FAILED = "failed"
    """The record keeps a schedule from being tried or served again."""
