"""What ``m2gen bench --gpus`` does, and its options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2gen.bench.ranks.kinds import Form
from m2gen.cli.options import terminal_progress
from m2gen.errors import UsageError

if TYPE_CHECKING:
    from m2gen.cli.show.report import Display
    from m2gen.db import Record
    from m2gen.pipeline import RanksRequest

RANKS = "Several GPUs"
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=2,
        help="Check and time whole layers over this many GPUs of this host, or CPUs where torch sees no GPU.",
        rich_help_panel=RANKS,
    ),
]
SizeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--size",
        help="Sequences x tokens for --gpus, as 8x4096; may be repeated.",
        rich_help_panel=RANKS,
    ),
]
LengthOption = Annotated[
    list[int] | None,
    typer.Option(
        "--tokens",
        min=1,
        help="One sequence of so many tokens for --gpus, exchanged for heads; may be repeated.",
        rich_help_panel=RANKS,
    ),
]
FormOption = Annotated[
    list[Form] | None,
    typer.Option(
        "--form",
        help="How layers lie over the ranks of --gpus, all ways if not given; may be repeated.",
        rich_help_panel=RANKS,
    ),
]


def check_ranks(gpus: int | None, of_ranks: Mapping[str, object], timed: list[str]) -> None:
    """Raise UsageError for options that say nothing about layers over ranks, or options of ranks without ranks."""
    given = [name for name, value in of_ranks.items() if value]
    if gpus is None and given:
        raise UsageError(f"{', '.join(given)} must be given with --gpus")
    if gpus is not None and timed:
        raise UsageError(f"--gpus must be given without {', '.join(timed)}: it times whole layers")


def sized(text: str) -> tuple[int, int]:
    """Return sequences and tokens of ``8x4096``; raises UsageError for another text."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise UsageError(f"--size must be sequences x tokens, as 8x4096, got {text!r}")
    return int(found[1]), int(found[2])


def time_over_ranks(
    spec: str, records: tuple[Record, ...], request: RanksRequest, display: Display, out: Path | None
) -> int:
    """Check and time layers over ranks, show the results, and return the exit status."""
    from m2gen import pipeline
    from m2gen.cli.show.ranks import run_ranks

    planned = pipeline.plan(spec, None, records)
    job = pipeline.ranks_job(planned, request, records, cuda=pipeline.has_gpus(request.ranks))
    return run_ranks(pipeline.over_ranks(job, terminal_progress(display.quiet)), display, out)
