"""How a field of the model states its contract: one sentence for every way of breaking it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    GetJsonSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

CONTRACT = "contract"
"""Type of the pydantic error that carries ``Breach``es; ``m2gen.spec.problems`` makes messages of them."""


@dataclass(frozen=True)
class Breach:
    """One value that breaks a contract, below the field that raised it."""

    path: tuple[str | int, ...]
    must: str
    given: object


def refuse(breaches: Iterable[Breach]) -> PydanticCustomError:
    """Return the error to raise from a validator for ``breaches``."""
    found = tuple(breaches)
    words = "; ".join(f"must {breach.must}" for breach in found)
    return PydanticCustomError(CONTRACT, "{words}", {"words": words, "breaches": found})


def must_be(contract: str) -> WrapValidator:
    """Return a validator that replaces the message of an inner one by ``must be <contract>``."""

    def check(value: object, inner: ValidatorFunctionWrapHandler) -> object:
        try:
            return inner(value)
        except ValidationError:
            raise refuse([Breach((), f"be {contract}", value)]) from None

    return WrapValidator(check)


def one_of(values: Iterable[str]) -> WrapValidator:
    """Return a validator whose message lists ``values``."""
    words = [str(value) for value in values]
    return must_be(words[0] if len(words) == 1 else f"one of {', '.join(words)}")


def choice(enum: type[StrEnum]) -> WrapValidator:
    """Return a validator whose message lists the members of ``enum``."""
    return one_of(member.value for member in enum)


def _as_tuple(value: object) -> tuple[object, ...]:
    """Return a scalar as a grid of one; refuse an empty grid."""
    if not isinstance(value, list | tuple):
        return (value,)
    if not value:
        raise refuse([Breach((), "have at least one entry", value)])
    return tuple(value)


def _distinct(values: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    """Refuse every entry that repeats an earlier one."""
    seen: set[Hashable] = set()
    repeats = []
    for index, value in enumerate(values):
        if value in seen:
            repeats.append(Breach((index,), "not repeat an earlier entry", value))
        seen.add(value)
    if repeats:
        raise refuse(repeats)
    return values


class _OneOrMany:
    """States what ``_as_tuple`` and ``_distinct`` accept in the JSON schema: an item, or a list of different items."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        many = handler(schema)
        return {"anyOf": [many["items"], {**many, "minItems": 1, "uniqueItems": True}]}


T = TypeVar("T")

Grid = Annotated[tuple[T, ...], AfterValidator(_distinct), BeforeValidator(_as_tuple), _OneOrMany()]
"""One value, or a list of different values, each of which is built."""
