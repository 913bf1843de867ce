"""Find, load and check specs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from m2gen.errors import SpecError
from m2gen.spec.model import Spec
from m2gen.spec.problems import json_path, printable, problems_of
from m2gen.spec.source import MAX_BYTES, read

_HASH_DIGITS = 12


def parse_spec(text: str | bytes, location: str) -> Spec:
    """Return the spec that ``text`` holds; raises ``SpecError`` with every problem, in the order of the file."""
    location = printable(location)
    source = read(text, location)
    spec = None
    problems = list(source.problems)
    try:
        spec = Spec.model_validate(source.value)
    except ValidationError as error:
        problems += problems_of(source.value, error)
    if spec is None or problems:
        problems.sort(key=lambda problem: problem.position or source.position(problem.path))
        raise SpecError(f"{location}: {json_path(problem.path)} {problem.message}" for problem in problems)
    return spec


def load_spec(path: Path) -> Spec:
    """Return the spec in the file at ``path``; raises ``SpecError``."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SpecError([f"{printable(str(path))}: $ must be a readable file ({printable(str(reason))})"]) from None
    return parse_spec(text, str(path))


def find_spec(name: str, *, roots: Sequence[Path]) -> Path:
    """Return the first file among ``name`` itself, ``specs/name``, and ``name`` in each of ``roots``.

    Raises SpecError if there is none. An absolute ``name`` is not looked for elsewhere.
    """
    given = Path(name)
    places = [given] if given.is_absolute() else [given, Path("specs") / given, *(root / given for root in roots)]
    for place in places:
        if os.path.exists(place) and not os.path.isdir(place):
            return place
    looked = ", ".join(printable(str(place)) for place in places)
    raise SpecError([f"{printable(name)}: $ must be a spec file, got none at {looked}"])


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a spec file, for editors.

    The schema does not express that head counts divide, nor which names are taken; m2gen checks both.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Spec.model_json_schema()}


def spec_hash(spec: Spec) -> str:
    """Return 12 hex digits of a hash of what ``spec`` means.

    Comments, formatting, the order of keys, defaults written out, grids of one and the unit of the budget do not
    matter; names and the order of layers and of grid entries do.
    """
    content = spec.model_dump(mode="json", by_alias=True, exclude={"layers"})
    content["tuning"]["budget"] = spec.tuning.budget_seconds
    content["layers"] = [
        [name, layer.model_dump(mode="json", exclude_none=True)] for name, layer in spec.layers.items()
    ]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:_HASH_DIGITS]
