"""The kernels around recurrences in a package: modules with the usual tiles, and those with tiles of records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from m2gen.db.choice import Choice
from m2gen.kernels.layer import LayerLowering, layer_of, render_layer
from m2gen.kernels.literals import Code


def layer_files(header: Callable[..., str], choices: Iterable[Choice]) -> dict[str, str]:
    """Return the modules by path; ``header`` makes the head of one from facts about it."""
    choices = list(choices)
    files = {_path(k): render_layer(k, header()) for k, _ in _usual(choices)}
    users: dict[LayerLowering, list[str]] = {}
    for k, choice in _tuned(choices):
        users.setdefault(k, []).append(_tiled(choice))
    for k, served in users.items():
        files[_path(k)] = render_layer(k, header(f"Tiles serve {', '.join(dict.fromkeys(served))}."))
    return files


def layer_kernels(choices: Iterable[Choice]) -> dict[tuple[int, ...], str]:
    """Return the modules that serve wherever no others do, by K, V and the heads of q, k, v and f."""
    return {(k.state_expansion, k.head_dim, *k.heads.counts[:4]): k.name for k, _ in _usual(choices)}


def layer_tuned(choices: Iterable[Choice], dtypes: dict[Any, str]) -> dict[str, dict[tuple[object, ...], str]]:
    """Return by arch the modules with tiles of records, by K, V, heads and dtype, which ``dtypes`` gives as Python."""
    found: dict[str, dict[tuple[object, ...], str]] = {}
    for k, choice in _tuned(choices):
        key = (k.state_expansion, k.head_dim, tuple(k.heads.counts), Code(dtypes[choice.variant.dtype]))
        found.setdefault(choice.device.arch, {}).setdefault(key, k.name)
    return found


def tiles_facts(choices: Iterable[Choice]) -> list[dict[str, Any]]:
    """Return what the manifest says of tiles of records; kernels without one have the usual."""
    having = {(choice.variant.key, choice.device.arch): choice for choice in choices if choice.tile_records}
    return [
        {
            "variant": choice.variant.key,
            "arch": choice.device.arch,
            "tiles": record.schedule.slug,
            "module": k.name,
            "record": record.id,
            "device": record.environment.device,
        }
        for choice in having.values()
        for k in [layer_of(choice.variant, choice.tiles)]
        for record in choice.tile_records
        if k is not None
    ]


def _usual(choices: Iterable[Choice]) -> list[tuple[LayerLowering, Choice]]:
    found = [(layer_of(choice.variant), choice) for choice in choices]
    return [(k, choice) for k, choice in found if k is not None]


def _tuned(choices: Iterable[Choice]) -> list[tuple[LayerLowering, Choice]]:
    found = [(layer_of(choice.variant, choice.tiles), choice) for choice in choices]
    return [(k, choice) for k, choice in found if k is not None and not k.usual]


def _path(k: LayerLowering) -> str:
    return f"kernels/{k.name}.py"


def _tiled(choice: Choice) -> str:
    """Say what the tiles of a choice serve, and which records have them."""
    records = ", ".join(f"{record.schedule.slug} of {record.id}" for record in choice.tile_records)
    return f"{choice.variant.dtype} on {choice.device.arch} ({records})"
