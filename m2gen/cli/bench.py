"""The command ``m2gen bench`` and its options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from m2gen.bench.kinds import Axis, Kind
from m2gen.bench.layers.kinds import LayerKind
from m2gen.bench.ranks.kinds import Form
from m2gen.cli.bench_layers import (
    LayerKindOption,
    LayersFlag,
    PeerLayerOption,
    ResultOption,
    show_earlier_layers,
    time_layers,
)
from m2gen.cli.bench_options import (
    TOKENS_OF,
    AgainstOption,
    DecodeOption,
    EarlierOption,
    FormOption,
    GpusOption,
    LengthOption,
    OnlyOption,
    PeerOption,
    PlotOption,
    QuantityOption,
    SeedOption,
    SizeOption,
    StyleOption,
    SweepOption,
    TimingOnlyOption,
)
from m2gen.cli.options import (
    DbOption,
    DebugOption,
    JsonOption,
    LayersOption,
    NoDbOption,
    OptionalSpecOption,
    QuietOption,
    VerboseOption,
    examples,
    records_of,
    reporting,
    terminal_progress,
)
from m2gen.cli.show.figure import Plot, Quantity, Style, check_figure
from m2gen.errors import UsageError

if TYPE_CHECKING:
    from m2gen.bench.document import Document, SweepDocument
    from m2gen.cli.show.report import Display
    from m2gen.db import Record
    from m2gen.pipeline import BenchRequest, RanksRequest

EXAMPLES = examples(
    "m2gen bench --spec h200.yaml   # needs a GPU",
    "m2gen bench --spec h200.yaml --only default --only tuned --json > run.json   # needs a GPU",
    "m2gen bench --spec h200.yaml --against run.json   # needs a GPU",
    "m2gen bench --spec h200.yaml --sweep seq --plot cost.svg   # needs a GPU",
    "m2gen bench --spec h200.yaml --layers --out layers.json   # needs a GPU",
    "m2gen bench --from run.json --plot speed.svg",
    "m2gen bench --spec h200.yaml --gpus 2 --out two.json   # needs 2 GPUs",
    "m2gen bench --spec h200.yaml --gpus 4 --form exchange --form mesh --tokens 65536   # needs 4 GPUs",
)


def bench(
    spec: OptionalSpecOption = None,
    layer: LayersOption = None,
    only: OnlyOption = None,
    peer: PeerOption = None,
    timing_only: TimingOnlyOption = False,
    decode: DecodeOption = None,
    sweep: SweepOption = None,
    earlier: EarlierOption = None,
    against: AgainstOption = None,
    plot: PlotOption = None,
    style: StyleOption = Style.LIGHT,
    quantity: QuantityOption = Quantity.TIME,
    gpus: GpusOption = None,
    size: SizeOption = None,
    tokens: LengthOption = None,
    form: FormOption = None,
    seed: SeedOption = 0,
    layers: LayersFlag = False,
    layer_kind: LayerKindOption = None,
    peer_layer: PeerLayerOption = None,
    out: ResultOption = None,
    db: DbOption = None,
    no_db: NoDbOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Time kernels on a spec's workloads, beside PyTorch and other implementations; needs a GPU."""
    from m2gen.cli.show.report import Display
    from m2gen.pipeline import BenchRequest, LayersRequest, RanksRequest

    with reporting(debug):
        axes = tuple(dict.fromkeys(sweep or ()))
        timed = {
            "--sweep": axes,
            "--against": against,
            "--only": only,
            "--peer": peer,
            "--timing-only": timing_only,
            "--decode": decode,
            "--layers": layers,
            "--layer-kind": layer_kind,
            "--peer-layer": peer_layer,
            "--out": out,
        }
        _check(spec, earlier, plot, [name for name, given in timed.items() if given])
        _check_ranks(
            gpus,
            {"--size": size, "--tokens": tokens, "--form": form},
            [*(name for name, given in timed.items() if given and name != "--out"), *(["--plot"] if plot else [])],
        )
        display = Display(json, quiet, verbose, debug)
        picture = Picture(Plot(plot, style, quantity, (earlier,) if earlier else ()) if plot else None, out)
        batches = tuple(batch for batch in ([TOKENS_OF] if decode is None else decode) if batch)
        if layers and spec is not None:
            asked = LayersRequest(
                tuple(layer or ()),
                tuple(layer_kind or LayerKind),
                tuple(peer or ()),
                tuple(peer_layer or ()),
                timing_only=timing_only,
                decode=batches,
                seed=seed,
            )
            raise typer.Exit(time_layers(spec, records_of(db, no_db), asked, display, out))
        request = BenchRequest(
            tuple(layer or ()),
            tuple(only or Kind),
            tuple(peer or ()),
            timing_only=timing_only,
            decode=batches,
            seed=seed,
        )
        if earlier is not None:
            if show_earlier_layers(earlier, request.layers, display, picture.plot):
                return
            _show_earlier(earlier, request.layers, display, picture)
        elif spec is not None and gpus is not None:
            sizes = tuple(map(_sized, size or ()))
            ranked = RanksRequest(gpus, request.layers, sizes, tuple(tokens or ()), seed, tuple(form or Form))
            raise typer.Exit(_over_ranks(spec, records_of(db, no_db), ranked, display, out))
        elif spec is not None:
            raise typer.Exit(_time(spec, records_of(db, no_db), request, axes, against, display, picture))


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

            write_json(asdict(document), self.out)
        if self.plot is not None:
            from m2gen.cli.show.plot import draw_sweeps

            draw_sweeps(document, self.plot)


def _check(spec: str | None, earlier: Path | None, plot: Path | None, timed: list[str]) -> None:
    """Raise UsageError for options that contradict each other; ``timed`` are those that ask for timing."""
    if (spec is None) == (earlier is None):
        raise UsageError("bench must be given either --spec, to time its workloads, or --from, to show an earlier run")
    if earlier is not None and timed:
        raise UsageError(f"--from must be given without {', '.join(timed)}: nothing is timed")
    if "--against" in timed and "--sweep" in timed:
        raise UsageError("--against must be given without --sweep: it compares the spec's workloads")
    alone = sorted({"--sweep", "--against", "--only"} & set(timed))
    if "--layers" in timed and (alone or plot is not None):
        raise UsageError(
            f"--layers must be given without {', '.join(alone) or '--plot'}: it times layers, not operators"
        )
    if "--layers" not in timed and (extra := sorted({"--layer-kind", "--peer-layer"} & set(timed))):
        raise UsageError(f"{', '.join(extra)} must be given with --layers")
    if "--against" in timed and "--out" in timed:
        raise UsageError("--out must be given without --against, which compares with times and keeps none")
    if "--against" in timed and plot is not None:
        raise UsageError("--plot must be given without --against, which compares with times that are not drawn")
    if plot is not None:
        check_figure(plot)


def _check_ranks(gpus: int | None, of_ranks: Mapping[str, object], timed: list[str]) -> None:
    """Raise UsageError for options that say nothing about layers over ranks, or options of ranks without ranks."""
    given = [name for name, value in of_ranks.items() if value]
    if gpus is None and given:
        raise UsageError(f"{', '.join(given)} must be given with --gpus")
    if gpus is not None and timed:
        raise UsageError(f"--gpus must be given without {', '.join(timed)}: it times whole layers")


def _sized(text: str) -> tuple[int, int]:
    """Return sequences and tokens of ``8x4096``; raises UsageError for another text."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise UsageError(f"--size must be sequences x tokens, as 8x4096, got {text!r}")
    return int(found[1]), int(found[2])


def _over_ranks(
    spec: str, records: tuple[Record, ...], request: RanksRequest, display: Display, out: Path | None
) -> int:
    """Check and time layers over ranks, show the results, and return the exit status."""
    from m2gen import pipeline
    from m2gen.cli.show.ranks import run_ranks

    planned = pipeline.plan(spec, None, records)
    job = pipeline.ranks_job(planned, request, records, cuda=pipeline.has_gpus(request.ranks))
    return run_ranks(pipeline.over_ranks(job, terminal_progress(display.quiet)), display, out)


def _show_earlier(path: Path, layers: tuple[str, ...], display: Display, picture: Picture) -> None:
    """Show and draw the document of an earlier run, for some layers or all."""
    from m2gen.bench.document import Document, load_run, of_layers, ranks_of
    from m2gen.cli.show.bench import show_bench
    from m2gen.cli.show.ranks import show_ranks
    from m2gen.cli.show.sweep import show_sweeps

    over_ranks = ranks_of(path)
    if over_ranks is not None:
        if picture.plot is not None:
            raise UsageError(f"--plot must be of workloads or sweeps, got {path}, which is of layers over ranks")
        show_ranks(over_ranks, display)
        return
    found = of_layers(load_run(path), layers)
    if isinstance(found, Document):
        show_bench(found, display)
        picture.workloads(found)
    else:
        show_sweeps(found, display)
        picture.sweeps(found)


def _time(
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
    from m2gen.bench.peers import peers
    from m2gen.cli.show.bench import run_against, run_bench
    from m2gen.cli.show.speed import check_comparable
    from m2gen.cli.show.sweep import run_sweeps

    planned = pipeline.plan(spec, None, records)
    found = peers(request.peers)
    if picture.plot is not None and not axes:
        check_comparable(request.kinds, found)
    pipeline.workloads(planned, request)  # raises errors of the request before a GPU is looked for
    progress = terminal_progress(display.quiet)
    with pipeline.this_bench_context("m2gen bench") as context:
        if axes:
            swept = (pipeline.sweep(planned, axis, request, context, records, progress) for axis in axes)
            return run_sweeps(swept, context.environment, display, picture.sweeps)
        if against is not None:
            before = pipeline.baseline(against, context.environment)
            compared = pipeline.regressions(planned, request, context, before, progress)
            return run_against(compared, before, context.environment, as_json=display.as_json)
        results = pipeline.bench(planned, request, context, progress)
        return run_bench(results, context.environment, display, picture.workloads)
