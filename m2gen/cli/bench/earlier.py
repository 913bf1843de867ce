"""What ``m2gen bench --from`` does: it shows and draws the document of an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2gen.cli.bench.operators import Picture
from m2gen.errors import UsageError

if TYPE_CHECKING:
    from m2gen.cli.show.figure import Plot
    from m2gen.cli.show.report import Display


def show_earlier(path: Path, layers: tuple[str, ...], display: Display, picture: Picture) -> None:
    """Show and draw the document of an earlier run, for some layers or all."""
    from m2gen.bench.document import Document, of_layers, ranks_of, ranks_of_layers, read_json, run_of
    from m2gen.cli.show.bench import show_bench
    from m2gen.cli.show.ranks import show_ranks
    from m2gen.cli.show.sweep import show_sweeps

    content = read_json(path)  # once, since a pipe has it no second time
    if _shown_layers(content, path, layers, display, picture.plot):
        return
    over_ranks = ranks_of(content, path)
    if over_ranks is not None:
        if picture.plot is not None:
            raise UsageError(f"--plot must be of workloads or sweeps, got {path}, which is of layers over ranks")
        show_ranks(ranks_of_layers(over_ranks, layers), display)
        return
    found = of_layers(run_of(content, path), layers)
    if isinstance(found, Document):
        show_bench(found, display)
        picture.workloads(found)
    else:
        show_sweeps(found, display)
        picture.sweeps(found)


def _shown_layers(content: Any, path: Path, layers: tuple[str, ...], display: Display, plot: Plot | None) -> bool:
    """Show and draw an earlier run of layers, and return whether it is one."""
    from m2gen.bench.layers.document import layers_of, rows_of
    from m2gen.cli.show.layer_plot import draw_layers
    from m2gen.cli.show.layers import show_layers

    document = layers_of(content, path)
    if document is None:
        return False
    found = rows_of(document, layers)
    show_layers(found, display)
    if plot is not None:
        draw_layers(found, plot)
    return True
