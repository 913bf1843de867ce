"""The frozen values of a spec, with every rule that relates several fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    StrictBool,
    model_serializer,
    model_validator,
)

from m2gen.spec.contract import Breach, Grid, must_be, refuse
from m2gen.spec.fields import (
    MAX_VARIANTS,
    Clip,
    ClipMode,
    Dtype,
    Duration,
    ElementType,
    Fp32Products,
    Gate,
    GateKind,
    Goal,
    HeadCount,
    HeadDim,
    LayerName,
    Objective,
    Products,
    Size,
    SpecName,
    StateDtype,
    StateElementType,
    StateExpansion,
    Tanh,
    TanhMode,
    Target,
)


class _Frozen(BaseModel):
    """A model that is immutable, hashable, and refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Heads(_Frozen):
    """Head counts of the operands; head n of N reads group ``n // (N // count)``."""

    q: HeadCount
    k: HeadCount
    v: HeadCount
    f: HeadCount
    w: HeadCount

    @property
    def total(self) -> int:
        """N, the heads of the state and of y."""
        return max(self.counts)

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """The heads of q, k, v, f and w."""
        return self.q, self.k, self.v, self.f, self.w

    @model_validator(mode="after")
    def _divides(self) -> Self:
        breaches = [
            Breach((role,), f"divide {self.total}", count)
            for role, count in zip(Heads.model_fields, self.counts, strict=True)
            if self.total % count
        ]
        if breaches:
            raise refuse(breaches)
        return self


class HeadGrid(_Frozen):
    """Every combination of head counts that a layer asks for."""

    q: Grid[HeadCount]
    k: Grid[HeadCount]
    v: Grid[HeadCount]
    f: Grid[HeadCount]
    w: Grid[HeadCount]

    @property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """The counts given for q, k, v, f and w."""
        return self.q, self.k, self.v, self.f, self.w

    @property
    def size(self) -> int:
        """Number of combinations, computed without expanding them."""
        return prod(len(axis) for axis in self.axes)

    def points(self) -> Iterator[Heads]:
        """Yield the combinations, w varying fastest."""
        for q, k, v, f, w in product(*self.axes):
            yield Heads(q=q, k=k, v=v, f=f, w=w)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        """Check every combination without expanding any.

        Some combination has a count together with a larger total from another axis exactly when that total is at
        least the smallest entry of every axis. A grid over ``MAX_VARIANTS`` is left to the check of the spec's size.
        """
        if self.size > MAX_VARIANTS:
            return self
        least = max(min(axis) for axis in self.axes)
        breaches = []
        for role, axis in zip(HeadGrid.model_fields, self.axes, strict=True):
            totals = sorted({total for other in self.axes if other is not axis for total in other if total >= least})
            for index, count in enumerate(axis):
                total = next((total for total in totals if total > count and total % count), None)
                if total is not None:
                    breaches.append(Breach((role, index), f"divide {total}", count))
        if breaches:
            raise refuse(breaches)
        return self


class Workload(_Frozen):
    """One problem size that tuning and benchmarks run."""

    batch: Size
    seq: Size
    packed: StrictBool = False
    """Whether sequences are packed into one call, with seeded lengths from 1 to ``seq``; benchmarks alone run it."""

    @model_serializer(mode="wrap")
    def _short(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what most workloads are not, so that their specs' hashes stay as they were."""
        written: dict[str, Any] = values(self)
        return written if self.packed else {name: written[name] for name in written if name != "packed"}


@dataclass(frozen=True)
class Point:
    """One element of a layer's grid."""

    head_dim: int
    state_expansion: int
    heads: Heads
    dtype: Dtype
    gate: GateKind = GateKind.GIVEN


class Layer(_Frozen):
    """A grid of dims, head counts, dtypes and gates under one name."""

    head_dim: Grid[HeadDim]
    """V."""
    state_expansion: Grid[StateExpansion]
    """K."""
    heads: HeadGrid
    dtypes: Grid[ElementType]
    gate: Grid[Gate] = (GateKind.GIVEN,)
    workloads: Grid[Workload] = Field(default_factory=tuple)
    hidden: Size | None = None
    """Width of the model that the layer is in, which benchmarks of layers need and kernels do not depend on."""

    @property
    def size(self) -> int:
        """Number of points, computed without expanding them."""
        shapes = len(self.head_dim) * len(self.state_expansion) * self.heads.size
        return shapes * len(self.dtypes) * len(self.gate)

    def points(self) -> tuple[Point, ...]:
        """Return the grid in file order: head_dim varies slowest, then state_expansion, heads, dtype and gate."""
        axes = product(self.head_dim, self.state_expansion, self.heads.points(), self.dtypes, self.gate)
        return tuple(Point(*axis) for axis in axes)


class Layers(Mapping[str, Layer]):
    """The layers of a spec by name, in file order: an immutable, hashable, picklable mapping."""

    def __init__(self, items: Mapping[str, Layer]) -> None:
        self._items = dict(items)

    def __getitem__(self, name: str) -> Layer:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return f"Layers({self._items!r})"


def _bounded(layers: Mapping[str, Layer]) -> Layers:
    total = sum(layer.size for layer in layers.values())
    if total > MAX_VARIANTS:
        raise refuse([Breach((), f"ask for at most {MAX_VARIANTS} variants", total)])
    return Layers(layers)


class Numerics(_Frozen):
    """Choices between speed and accuracy, for all layers."""

    state: StateElementType = StateDtype.FP32
    clip: Clip = ClipMode.CARRY
    tanh: Tanh = TanhMode.APPROX
    fp32_products: Products = Fp32Products.IEEE


class Tuning(_Frozen):
    """The time budget and the objective of searches."""

    budget: Duration = "10m"
    objective: Goal = Objective.TRAIN

    @property
    def budget_seconds(self) -> int:
        """The budget in seconds."""
        return int(self.budget[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.budget[-1]]


class Spec(_Frozen):
    """A whole spec file."""

    schema_version: Annotated[int, Field(strict=True, ge=1, le=1), must_be("1")] = Field(alias="schema")
    name: SpecName
    """Name of the generated package."""
    targets: Grid[Target]
    layers: Annotated[
        Mapping[LayerName, Layer],
        Field(min_length=1, json_schema_extra={"additionalProperties": False}),
        AfterValidator(_bounded),
        PlainSerializer(dict),
    ]
    numerics: Numerics = Numerics()
    tuning: Tuning = Tuning()
