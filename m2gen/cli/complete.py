"""Shell completion of options whose values m2gen knows. Imports neither torch nor triton."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

from m2gen.device import TARGETS
from m2gen.errors import M2genError
from m2gen.shipped import shipped
from m2gen.spec import Spec, find_spec, load_spec
from m2gen.variant import expand

_ID = re.compile(r'"id": "([0-9a-f]{12})"')


def complete_spec(incomplete: str) -> list[str]:
    """Offer spec files: paths, and names in ``specs/`` and among the shipped ones."""
    folder = incomplete.rpartition("/")[0]
    given = [path for path in Path(folder or ".").glob("*") if path.suffix == ".yaml"]
    paths = [f"{folder}/{path.name}" if "/" in incomplete else path.name for path in given]
    names = [path.name for place in (Path("specs"), shipped("specs")) for path in place.glob("*.yaml")]
    return _beginning(incomplete, sorted({*paths, *names}))


def complete_layer(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the layers of the spec earlier on the line."""
    spec = _spec(ctx)
    return _beginning(incomplete, spec.layers if spec else ())


def complete_variant(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the variant keys of the spec earlier on the line."""
    spec = _spec(ctx)
    return _beginning(incomplete, [built.variant.key for built in expand(spec)] if spec else ())


def complete_target(incomplete: str) -> list[str]:
    """Offer architectures for the last item of a comma-separated list."""
    before, comma, last = incomplete.rpartition(",")
    chosen = before.split(",")
    return [before + comma + arch for arch in TARGETS if arch.startswith(last) and arch not in chosen]


def complete_record(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Offer the ids of records, each with its GPU and variant."""
    offered = ((found, f"{path.parent.name} {path.stem}") for path in _record_files(ctx) for found in _ids(path))
    return [each for each in offered if each[0].startswith(incomplete)]


def complete_asked(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the names that ``db why`` takes: layers of the spec, or variants with records."""
    known = dict.fromkeys(path.stem for path in _record_files(ctx))
    return [*complete_layer(ctx, incomplete), *_beginning(incomplete, known)]


def complete_device(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the GPUs with records, by the names of their folders."""
    return _beginning(incomplete, dict.fromkeys(path.parent.name for path in _record_files(ctx)))


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _spec(ctx: typer.Context) -> Spec | None:
    name = ctx.params.get("spec")
    try:
        return load_spec(find_spec(name, roots=[shipped("specs")])) if name else None
    except M2genError:
        return None


def _record_files(ctx: typer.Context) -> list[Path]:
    return sorted(Path(ctx.params.get("db") or shipped("tuning_db")).glob("*/*/*.jsonl"))


def _ids(path: Path) -> Iterator[str]:
    try:
        yield from _ID.findall(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return
