"""Names in tables: variants by layers and dtype, buckets, implementations, and sources of schedules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from m2gen.bucket import BUCKETS, Bucket
from m2gen.db import Record, Tier
from m2gen.errors import SpecError
from m2gen.pipeline import Goal, open_spec, shipped_specs, state
from m2gen.pipeline.verify import MATRIX
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.schedule.tunable import Tunable, keys_of
from m2gen.variant import BuiltVariant, Variant, expand, layer_names

MARK = " (timing only)"
"""Follows the name of an implementation that is timed although its results fail the check."""


def counted(count: int, noun: str) -> str:
    """Return a count and its noun, in the plural but for one."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def known_names(keys: Iterable[str], spec: str | None = None) -> dict[str, str]:
    """Return the names of variants by their keys, from layers of ``spec``, local specs, or shipped ones.

    A variant that none of them has is named by its dims, and a kernel around a recurrence by its layers before it.
    """
    layers = _layers_of([*([] if spec is None else [spec]), *_specs()])
    asked = {key: Tunable.parse(key) for key in dict.fromkeys(keys)}
    built = [BuiltVariant(each.variant, layers.get(key, ())) for key, each in asked.items() if each.kernel is None]
    named = {variant.key: name for variant, name in layer_names(built).items()}
    around = {key: each for key, each in asked.items() if each.kernel is not None}
    same = {each.variant: layers.get(key, ()) for key, each in around.items()}
    plain = layer_names(BuiltVariant(variant, having) for variant, having in same.items())
    return named | {key: f"{plain[each.variant]} {kernel_name(each.kernel)}" for key, each in around.items()}


def kernel_name(kernel: LayerKernel | None) -> str:
    """Return the name of a kernel around a recurrence in tables; empty for the recurrence."""
    return "" if kernel is None else kernel.replace("_", " ")


def goal_name(goal: Goal, names: Mapping[Variant, str]) -> str:
    """Return the name of a search: the variant's, and the kernel around it."""
    return f"{names[goal.variant]} {kernel_name(goal.subject.kernel)}".strip()


def variants_of(spec: str) -> tuple[str, ...]:
    """Return the keys of a spec's variants and of the kernels around them; raises SpecError."""
    return tuple(key for built in expand(open_spec(spec)[0]) for key in keys_of(built.variant))


def _specs() -> list[str]:
    """Return the paths of local and shipped specs, last those whose layers are named after features."""
    paths = [path for folder in (Path("specs"), shipped_specs()) for path in sorted(folder.glob("*.yaml"))]
    return [str(path) for path in sorted(paths, key=lambda path: path.name in MATRIX)]


def _layers_of(specs: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the layers of each key in the first spec that has it; skip specs that cannot be read."""
    found: dict[str, tuple[str, ...]] = {}
    for name in specs:
        try:
            built = expand(open_spec(name)[0])
        except SpecError:
            continue
        for each in built:
            for key in keys_of(each.variant):
                found.setdefault(key, each.layers)
    return found


def calls(buckets: Iterable[Bucket]) -> str:
    """Return the buckets that a schedule serves, as programs per SM."""
    places = sorted(bucket.place for bucket in set(buckets))
    others = [place for place in range(len(BUCKETS)) if place not in places]
    if not others:
        return "all"
    if len(places) > 1:
        if others == list(range(others[0], len(BUCKETS))):
            return f"up to {BUCKETS[places[-1]].removeprefix('<=')}"
        if places == list(range(places[0], len(BUCKETS))):
            return f"over {BUCKETS[others[-1]].removeprefix('<=')}"
    few = places if len(others) > 2 else others
    listed = " ".join(BUCKETS[place].replace("<=", "≤") for place in few)
    return listed if few is places else f"all but {listed}"


def implementation_names(names: Iterable[str]) -> dict[str, str]:
    """Return short names of implementations: the function of an adapter ``module:function``, if that is unique."""
    whole = dict.fromkeys(names)
    counts = Counter(name.rpartition(":")[2] for name in whole)
    return {name: short if counts[short := name.rpartition(":")[2]] == 1 else name for name in whole}


def closest(source: str) -> str:
    """Return a kernel's source with each record once, at the closest of its tiers."""
    tiers: dict[str, str] = {}
    for part in source.split(", "):
        tier, _, record = part.partition(" ")
        tiers[record] = min(tier, tiers.get(record, tier), key=[*Tier].index)
    return ", ".join(f"{tier} {record}".strip() for record, tier in tiers.items())


def record_notes(records: Iterable[Record | None]) -> list[str]:
    """Return a line for each group of records: their GPU, and whether they are stale or flagged."""
    return _notes(records, lambda record: ", ".join(filter(None, (f"of {record.environment.device}", state(record)))))


def state_notes(records: Iterable[Record]) -> list[str]:
    """Return a line for each group of records that are stale or flagged, with the reason."""
    return _notes(records, state)


def _notes(records: Iterable[Record | None], say: Callable[[Record], str]) -> list[str]:
    """Return each note once with the ids of its records, or without ids if it is about all."""
    about: dict[str, list[str]] = {}
    for record in dict.fromkeys(record for record in records if record is not None):
        about.setdefault(say(record), []).append(record.id)
    if len(about) == 1:
        return [f"Records {text}" for text in about if text]
    return [f"{', '.join(ids)}: {text}" for text, ids in about.items() if text]
