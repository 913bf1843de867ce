"""Types of values in documents, of which a plain string or mapping would let too much pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from m2gen.errors import UsageError, among
from m2gen.spec import Dtype
from m2gen.variant import parse_variant

ROLES = ("q", "k", "v", "f", "w", "g")
"""Roles of a layer's heads; g are those of the output gate."""


def _variant(key: str) -> str:
    try:
        parse_variant(key)
    except ValueError:
        raise PydanticCustomError("variant", "must be the key of a variant") from None
    return key


def _dtype(name: str) -> str:
    if name not in set(Dtype):
        raise PydanticCustomError("dtype", f"must be {among(Dtype)}")
    return name


def _heads(counts: dict[str, int]) -> dict[str, int]:
    if set(counts) != set(ROLES) or min(counts.values()) < 1:
        raise PydanticCustomError("heads", f"must have a count of {', '.join(ROLES)}")
    return counts


VariantName = Annotated[str, AfterValidator(_variant)]
DtypeName = Annotated[str, AfterValidator(_dtype)]
HeadsByRole = Annotated[dict[str, int], AfterValidator(_heads)]


class TimedRow(Protocol):
    """A row of a document."""

    @property
    def failure(self) -> str:
        """Why there are no times, or an empty string."""

    @property
    def forward(self) -> object | None:
        """The times of a forward, if there are any."""


def check_times(rows: Sequence[TimedRow], name: str, path: Path) -> None:
    """Raise UsageError for a row that neither failed nor has times."""
    for i, row in enumerate(rows):
        if not row.failure and row.forward is None:
            raise UsageError(f"{path}: $.{name}[{i}].forward must have times where failure is empty, got null")
