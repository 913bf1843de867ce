"""The times of layers as a document, which ``m2gen bench --layers --json`` prints and ``--from`` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from m2gen import __version__
from m2gen.bench.document import asked_of, read_json, valid
from m2gen.bench.kinds import Call
from m2gen.bench.layers.breakdown import KernelTime, parts_ms
from m2gen.bench.layers.kinds import LayerKind, Part
from m2gen.bench.layers.side_by_side import LayerTimes
from m2gen.bench.values import VariantName, check_times
from m2gen.db import Environment, Estimate

SCHEMA = 1
_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class LayerRow:
    """The times of one layer on one workload."""

    layer: str
    variant: VariantName
    hidden: _Count
    call: Call
    batch: _Count
    seq: _Count
    kind: LayerKind
    name: str
    source: str
    versions: dict[str, str]
    """The packages that the layer runs on; empty version where one is not installed."""
    forward: Estimate | None
    """Time of a forward without gradients, or of a token."""
    step: Estimate | None
    """Time of forward and backward together; None for decoding."""
    extra_bytes: int
    floor_ms: float | None
    """Milliseconds for reading a token's weights and states once and writing the states; None of sequences."""
    kernels: tuple[KernelTime, ...]
    """The kernels of a step, or of a token."""
    failure: str
    unverified: str
    """Why the times are times only."""
    captured: Estimate | None = None
    """Time of the step as a CUDA graph; None where there is none, as of decoding, whose token always is one."""
    uncaptured: str = ""
    """Why it cannot be captured."""

    @property
    def parts(self) -> dict[Part, float]:
        """Milliseconds of the kernels of each part; empty if no kernel was seen."""
        return parts_ms(self.kernels)

    @property
    def workload(self) -> tuple[str, str, int, Call, int, int]:
        """The fields that rows timed side by side have in common."""
        return (self.layer, self.variant, self.hidden, self.call, self.batch, self.seq)


@dataclass(frozen=True)
class LayerDocument:
    """All layers of one run."""

    environment: Environment
    layer_rows: tuple[LayerRow, ...]
    schema: Annotated[int, Field(ge=SCHEMA, le=SCHEMA)] = SCHEMA
    m2gen: str = __version__


_DOCUMENT = TypeAdapter(LayerDocument)


def layer_row(result: LayerTimes) -> LayerRow:
    """Return a result as a row."""
    workload, layer, found = result.entry.workload, result.entry.layer, result.found
    return LayerRow(
        workload.layer,
        workload.variant.key,
        workload.hidden,
        workload.call,
        workload.batch,
        workload.seq,
        layer.kind,
        layer.name,
        layer.source,
        dict(found.versions),
        result.forward,
        result.step,
        found.extra_bytes,
        result.floor_ms,
        found.kernels,
        str(found.failure or ""),
        found.unverified,
        result.captured,
        found.uncaptured,
    )


def dump_layers(document: LayerDocument) -> dict[str, Any]:
    """Return the document as JSON values; each row also has its parts, and each kernel the one that it counts to."""
    rows = []
    for row in document.layer_rows:
        kernels = [{**asdict(kernel), "part": kernel.part} for kernel in row.kernels]
        rows.append({**asdict(row), "kernels": kernels, "parts_ms": row.parts})
    return {**asdict(document), "layer_rows": rows}


def load_layers(path: Path) -> LayerDocument | None:
    """Read a document of layers, or None if it is another one; raises UsageError with what is wrong, and where."""
    return layers_of(read_json(path), path)


def layers_of(content: Any, path: Path) -> LayerDocument | None:
    """Return the document of layers that a file's JSON is, None for another; raises as ``load_layers`` does."""
    if not isinstance(content, dict) or "layer_rows" not in content:
        return None
    found = valid(_DOCUMENT, content, path)
    check_times(found.layer_rows, "layer_rows", path)
    return found


def rows_of(document: LayerDocument, layers: Sequence[str]) -> LayerDocument:
    """Return the part of a run that is about ``layers``, or all of it if none is given.

    Raises UsageError for a layer that the run does not have.
    """
    asked = asked_of((row.layer for row in document.layer_rows), layers)
    return replace(document, layer_rows=tuple(row for row in document.layer_rows if row.layer in asked))
