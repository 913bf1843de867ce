"""Options of the command ``m2gen bench``, but those of layers and of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m2gen.bench.kinds import Axis, Kind
from m2gen.cli.show.figure import Quantity, Style

TOKENS_OF = 64
"""The default of ``--decode``."""
SIZES, PICTURE = "Sizes", "Results of earlier runs, and pictures"

OnlyOption = Annotated[
    list[Kind] | None, typer.Option("--only", help="Only these kernels; may be repeated. All if not given.")
]
PeerOption = Annotated[
    list[str] | None,
    typer.Option("--peer", help="Also another implementation, by its adapter as module:function; may be repeated."),
]
DecodeOption = Annotated[
    list[int] | None,
    typer.Option(
        "--decode",
        min=0,
        help="Requests of which tokens, drafts and prompts are timed; may be repeated; 64 if not given, 0 for none.",
        rich_help_panel=SIZES,
    ),
]
TimingOnlyOption = Annotated[
    bool,
    typer.Option(
        "--timing-only",
        help="Also time peers whose results fail the check, and mark them.",
    ),
]
SweepOption = Annotated[
    list[Axis] | None,
    typer.Option(
        "--sweep",
        help="Sizes along this axis, in place of the spec's workloads; may be repeated.",
        rich_help_panel=SIZES,
    ),
]
EarlierOption = Annotated[
    Path | None,
    typer.Option("--from", help="Show this --json of an earlier run; needs no GPU.", rich_help_panel=PICTURE),
]
AgainstOption = Annotated[
    Path | None,
    typer.Option(
        "--against",
        help="Exit 1 if slower than this --json of an earlier run, or than this tuning database.",
        rich_help_panel=PICTURE,
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot", help="Draw workloads, sweeps or, with --from, layers into this .svg or .png.", rich_help_panel=PICTURE
    ),
]
StyleOption = Annotated[
    Style, typer.Option("--style", help="What --plot's picture is to be seen on.", rich_help_panel=PICTURE)
]
QuantityOption = Annotated[
    Quantity, typer.Option("--quantity", help="What of workloads --plot draws.", rich_help_panel=PICTURE)
]
SeedOption = Annotated[
    int,
    typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the order of measurements and of intervals."),
]
ResultOption = Annotated[Path | None, typer.Option("--out", help="Also write the --json into this file.")]
