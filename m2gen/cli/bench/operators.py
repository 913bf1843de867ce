"""What ``m2gen bench`` does with operators: it times workloads and sweeps, draws them, and keeps them in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m2gen.bench.kinds import Axis, Kind
from m2gen.cli.options import terminal_progress, warn_of_faults
from m2gen.cli.show.figure import Plot
from m2gen.errors import UsageError

if TYPE_CHECKING:
    from m2gen.bench.document import Document, SweepDocument
    from m2gen.cli.show.report import Display
    from m2gen.db import Record
    from m2gen.pipeline import BenchRequest


@dataclass(frozen=True)
class Picture:
    """The figure of ``--plot`` and the file of ``--out``, each of which may be none."""

    plot: Plot | None
    out: Path | None = None

    def workloads(self, document: Document) -> None:
        """Write and draw a run's workloads; raises UsageError if there is nothing to compare."""
        if self.out is not None:
            from m2gen.bench.document import dump
            from m2gen.cli.show.report import write_json

            write_json(dump(document), self.out)
        if self.plot is not None:
            from m2gen.cli.show.speed import draw_speed

            draw_speed(document, self.plot)

    def sweeps(self, document: SweepDocument) -> None:
        """Write and draw a run's sweeps."""
        if self.out is not None:
            from m2gen.cli.show.report import write_json
            from m2gen.cli.show.sweep import sweeps_document

            write_json(sweeps_document(document), self.out)
        if self.plot is not None:
            from m2gen.cli.show.plot import draw_sweeps

            draw_sweeps(document, self.plot)


def time_operators(
    spec: str,
    records: tuple[Record, ...],
    request: BenchRequest,
    axes: tuple[Axis, ...],
    against: Path | None,
    display: Display,
    picture: Picture,
) -> int:
    """Time on the GPU at hand, show the results, and return the exit status."""
    from m2gen import pipeline
    from m2gen.bench.peers import check_chosen, peers
    from m2gen.cli.show.bench import run_against, run_bench
    from m2gen.cli.show.speed import check_comparable
    from m2gen.cli.show.sweep import run_sweeps
    from m2gen.db import Database

    planned = pipeline.plan(spec, None, records)
    found = peers(request.peers)
    if request.kinds != tuple(Kind):  # of which all are timed that there are
        check_chosen("--only peer", Kind.PEER in request.kinds, request.peers)
    if axes and len(set(request.layers)) > 1:
        raise UsageError(f"--sweep must be of one --layer, got {', '.join(request.layers)}")
    if picture.plot is not None and not axes:
        check_comparable(request.kinds, found)
    pipeline.workloads(planned, request)  # raises errors of the request before a GPU is looked for
    progress = terminal_progress(display.quiet)
    with pipeline.this_bench_context("m2gen bench") as context:
        if axes:
            swept = (pipeline.sweep(planned, axis, request, context, records, progress) for axis in axes)
            return run_sweeps(swept, context.environment, display, picture.sweeps)
        if against is not None:
            if against.is_dir():
                warn_of_faults(Database(against).contents())
            before = pipeline.baseline(against, context.environment)
            compared = pipeline.regressions(planned, request, context, before, progress)
            return run_against(compared, before, context.environment, as_json=display.as_json)
        results = pipeline.bench(planned, request, context, progress)
        return run_bench(results, context.environment, display, picture.workloads)
