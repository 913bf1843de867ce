"""What ``m2gen bench --layers`` does, and its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2gen.bench.layers.kinds import LayerKind
from m2gen.cli.options import terminal_progress

if TYPE_CHECKING:
    from m2gen.bench.layers.document import LayerDocument
    from m2gen.cli.show.report import Display
    from m2gen.db import Record
    from m2gen.pipeline import LayersRequest

WHOLE = "Whole layers"
LayersFlag = Annotated[
    bool,
    typer.Option("--layers", help="Time whole layers of the spec's layers that have hidden.", rich_help_panel=WHOLE),
]
LayerKindOption = Annotated[
    list[LayerKind] | None,
    typer.Option("--layer-kind", help="Only these layers; may be repeated. All if not given.", rich_help_panel=WHOLE),
]
PeerLayerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--peer-layer",
        help="Also another package's layer, by its adapter as module:function; may be repeated.",
        rich_help_panel=WHOLE,
    ),
]


def time_layers(
    spec: str, records: tuple[Record, ...], request: LayersRequest, display: Display, out: Path | None
) -> int:
    """Time on the GPU at hand, show the results, and return the exit status."""
    from m2gen import pipeline
    from m2gen.bench.layers.document import dump_layers
    from m2gen.bench.peers import LAYERS, peers
    from m2gen.cli.show.layers import run_layers
    from m2gen.cli.show.report import write_json

    def keep(document: LayerDocument) -> None:
        if out is not None:
            write_json(dump_layers(document), out)

    planned = pipeline.plan(spec, None, records)
    peers(request.operators)
    peers(request.peers, LAYERS)
    pipeline.layer_workloads(planned, request)  # raises errors of the request before a GPU is looked for
    progress = terminal_progress(display.quiet)
    with pipeline.this_layer_context("m2gen bench --layers") as context:
        return run_layers(
            pipeline.bench_layers(planned, request, context, progress), context.environment, display, keep
        )
