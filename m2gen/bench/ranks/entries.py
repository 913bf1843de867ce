"""The values of a run over ranks: a job with its cases, and rows. Imports neither torch nor triton."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter

from m2gen.bench.ranks.kinds import Form, Mixing
from m2gen.bench.values import DtypeName, HeadsByRole
from m2gen.db import Environment

SCHEMA = 1
MICRO_BATCHES = 2
"""Parts of a batch that states are handed on for: more would leave a GPU with too few sequences each."""
PAIR = 2
"""Ranks that share heads where tokens lie over ranks, too."""
HYBRID = (Mixing.M2RNN, Mixing.M2RNN, Mixing.M2RNN, Mixing.ATTENTION)
"""Blocks of the hybrid model."""
WIDER = 4
"""Columns of an MLP of a hybrid for each of the model's."""
QUIET_SECONDS = 300.0
"""Longest that ranks may take between two results; the first call of a kernel compiles it."""


@dataclass(frozen=True)
class Shape:
    """Dims, heads and dtype of a layer."""

    name: str
    hidden_size: int
    state_expansion: int
    head_dim: int
    heads: HeadsByRole
    """Heads of q, k, v, f, w and g by role."""
    dtype: DtypeName
    blocks: tuple[Mixing, ...] = ()
    """Mixers of the blocks of a hybrid model with such layers; none for a layer by itself."""

    @property
    def total_heads(self) -> int:
        """N, the heads of the state."""
        return max(self.heads.values())

    def share(self, ranks: int) -> Shape:
        """Return what one of ``ranks`` has of the heads."""
        return replace(self, heads={name: max(count // ranks, 1) for name, count in self.heads.items()})


@dataclass(frozen=True)
class RankCase:
    """One form of a layer or a hybrid model, with the size that is timed."""

    shape: Shape
    form: Form
    batch: int
    """Sequences on all ranks."""
    seq: int

    @property
    def packs(self) -> bool:
        """Whether sequences may be packed."""
        return self.form is not Form.PIPELINE and not self.shape.blocks

    def recurrence(self, ranks: int) -> tuple[Shape, int, int]:
        """Return the heads, the sequences and their tokens of one recurrence on one of ``ranks``."""
        if self.form is Form.ONE:
            return self.shape, self.batch, self.seq
        if self.form is Form.PIPELINE:
            return self.shape, max(self.batch // MICRO_BATCHES, 1), self.seq // ranks
        if self.form is Form.FSDP:
            return self.shape, self.batch // ranks, self.seq
        return self.shape.share(ranks), self.batch, self.seq


@dataclass(frozen=True)
class RankJob:
    """What ranks are to do."""

    package: str
    """Folder of the package with the kernels of the layers and of their shares."""
    cases: tuple[RankCase, ...]
    ranks: int
    cuda: bool
    """Whether ranks are GPUs over NCCL, or CPUs over gloo with the reference backend."""
    repeats: int
    """How often each measurement is repeated; 0 to check results and count collectives alone."""
    seed: int = 0
    quiet_seconds: float = QUIET_SECONDS
    """Longest that ranks may take between two results, and a collective may wait for a rank."""


@dataclass(frozen=True)
class Link:
    """What the ranks' connection was measured to do."""

    gb_per_s: Annotated[float, Field(gt=0)]
    """10^9 bytes that each rank sends in a second of a large exchange."""
    latency_ms: Annotated[float, Field(ge=0)]
    """Milliseconds of a collective of one element."""


@dataclass(frozen=True)
class RankRow:
    """The results of one case, over all ranks: of times the slowest rank's, medians over repeats."""

    layer: str
    form: Form
    batch: int
    seq: int
    ranks: int
    unfit: str = ""
    """Why this form cannot have this layer or size; empty if it can."""
    failure: str = ""
    """The output or gradient that is beyond its budget, so that nothing was timed."""
    worst: float | None = None
    """Largest error of an output or gradient, as a fraction of its budget."""
    worst_tensor: str = ""
    forward_ms: float | None = None
    """Milliseconds of a forward without gradients."""
    step_ms: float | None = None
    """Milliseconds of forward and backward, with the sums of gradients of parameters that ranks share."""
    captured_ms: float | None = None
    """Milliseconds of the same step as a CUDA graph, which waits for no host; None where it was not captured."""
    uncaptured: str = ""
    """Why a step that was to be captured could not be."""
    recurrence_ms: float | None = None
    """Milliseconds of forward and backward of one recurrence with a rank's heads, sequences and tokens, alone."""
    communication_ms: float | None = None
    """Milliseconds of a step's collectives by themselves; None for states that are handed on."""
    collectives: int = 0
    """Number of a step's collectives."""
    sent_bytes: int = 0
    """Bytes that a rank sends in a step."""
    peak_bytes: int = 0
    """The most memory that a step had allocated on any rank; 0 on CPUs."""

    @property
    def device_ms(self) -> float | None:
        """Milliseconds of a step without its host, where that is known."""
        return self.step_ms if self.captured_ms is None else self.captured_ms


@dataclass(frozen=True)
class RankDocument:
    """All results of one run over ranks."""

    environment: Environment | None
    """The GPUs and their toolchain; None of CPUs."""
    backend: str
    """Either nccl or gloo."""
    link: Link
    cases: tuple[RankCase, ...]
    """What was asked for."""
    rows: tuple[RankRow, ...] = ()
    """Results of the first of these cases, or of all."""
    schema: Annotated[int, Field(ge=SCHEMA, le=SCHEMA)] = SCHEMA


def one_of(row: RankRow, rows: Sequence[RankRow]) -> RankRow | None:
    """Return the row of one rank beside which a row is; of FSDP one rank has fewer sequences. None without one."""
    found = [r for r in rows if r.form is Form.ONE and (r.layer, r.seq) == (row.layer, row.seq)]
    return next((r for r in found if r.batch == (row.batch // row.ranks if row.form is Form.FSDP else row.batch)), None)


Value = TypeVar("Value")


@dataclass(frozen=True)
class RankFailure:
    """What a rank failed with, in one line, and when by the host's steady clock: dates of files may tie."""

    at: int
    error: str


def write(path: Path, value: Any) -> None:
    """Write a value of this module as JSON, whole or not at all."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(asdict(value)), encoding="utf-8")
    beside.replace(path)


def read(path: Path, kind: type[Value]) -> Value:
    """Read a value that ``write`` wrote."""
    return TypeAdapter(kind).validate_json(path.read_text(encoding="utf-8"))
