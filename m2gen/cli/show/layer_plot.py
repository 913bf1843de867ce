"""Draw a run of whole layers: times of sequences and of a token, and memory, beside other layers."""

from __future__ import annotations

from dataclasses import replace

from m2gen.bench.layers.document import LayerDocument, LayerRow
from m2gen.bench.layers.kinds import LayerKind
from m2gen.cli.show.bars import FORWARD, MEMORY, STEP, Group, Panel, as_fast, bars_figure, names_of
from m2gen.cli.show.figure import Plot, Quantity, write_figure
from m2gen.cli.show.names import MARK
from m2gen.errors import UsageError

OURS = "m2gen"
NAMES = {"gated_deltanet": "Gated DeltaNet"}
"""Names of layers, by those of their adapters' functions, where these are not what one writes."""


def draw_layers(document: LayerDocument, plot: Plot) -> None:
    """Draw the workloads of m2gen's layer beside those of others into a file; raises UsageError if there are none."""
    if plot.quantity is not Quantity.TIME:
        raise UsageError("--quantity must be time for a run of layers, whose picture has both, got memory")
    groups = layer_groups(document)
    tokens = {row.batch for row in document.layer_rows if row.call.decodes}
    panels = [FORWARD, STEP, replace(MEMORY, label="gigabytes beyond what was resident")]
    panels += [_token_panel(min(tokens))] if tokens else []
    groups = [replace(g, values={k: v[: len(panels)] for k, v in g.values.items()}) for g in groups]
    _, *others = names_of(groups)
    beside = others[0].removesuffix(MARK) if len(others) == 1 else "others of the same width"
    title = f"A whole layer on an {document.environment.device}: m2gen's beside {beside}"
    write_figure(plot, title, lambda theme: bars_figure(groups, panels, title, theme))


def _token_panel(batch: int) -> Panel:
    return Panel(f"One token of {batch} sequences", "microseconds; shorter is faster", "µs", "#.3g", as_fast, "as fast")


def layer_groups(document: LayerDocument) -> list[Group]:
    """Return a group for every workload of sequences with m2gen's layer and another.

    m2gen's is the layer as a program calls it, or under ``torch.compile`` where a run has no other. The time of a token
    is of the least batch that a run has, with the layer's first workload. Raises UsageError if nothing can be compared.
    """
    passed = [row for row in document.layer_rows if not row.failure and row.forward is not None]
    marked = {row.name for row in passed if row.unverified}
    batch = min((row.batch for row in passed if row.call.decodes), default=0)
    tokens = {(*_layer(row), row.name): row for row in passed if row.call.decodes and row.batch == batch}
    groups = []
    for workload in dict.fromkeys(row.workload for row in passed if not row.call.decodes):
        rows = [row for row in passed if row.workload == workload]
        ours = next((r for kind in (LayerKind.EAGER, LayerKind.COMPILED) for r in rows if r.kind is kind), None)
        others = [row for row in rows if not row.kind.generated]
        if ours is None or not others:
            continue
        named = {OURS: ours, **{_label(row, marked): row for row in others}}
        values = {label: _values(row, tokens.pop((*_layer(row), row.name), None)) for label, row in named.items()}
        groups.append(Group(f"{ours.layer}, hidden {ours.hidden}", f"{ours.batch} × {ours.seq} tokens", values))
    if not groups:
        raise UsageError("--plot must have times of m2gen's layer beside those of another, got none")
    return groups


def _layer(row: LayerRow) -> tuple[str, str, int]:
    return (row.layer, row.variant, row.hidden)


def _label(row: LayerRow, marked: set[str]) -> str:
    """Return a layer's name: of an adapter, its function's; marked if times of it are times only."""
    adapter, _, rest = row.name.partition(" in ")
    function = adapter.rpartition(":")[2]
    short = NAMES.get(function, function.replace("_", " "))
    short = f"{short} kernel in {rest}" if rest else short
    return f"{short}{MARK}" if row.name in marked else short


def _values(row: LayerRow, token: LayerRow | None) -> tuple[float | None, ...]:
    step = row.step.median_ms if row.step else None
    a_token = 1e3 * token.forward.median_ms if token is not None and token.forward else None
    return (row.forward.median_ms if row.forward else None, step, row.extra_bytes / 1e9, a_token)
