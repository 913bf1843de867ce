"""The command ``m2gen bench``: what it takes, and which options contradict each other."""

from __future__ import annotations

from pathlib import Path

import typer

from m2gen.bench.kinds import Kind
from m2gen.bench.layers.kinds import LayerKind
from m2gen.bench.ranks.kinds import Form
from m2gen.cli.bench.earlier import show_earlier
from m2gen.cli.bench.layers import LayerKindOption, LayersFlag, PeerLayerOption, time_layers
from m2gen.cli.bench.operators import Picture, time_operators
from m2gen.cli.bench.options import (
    TOKENS_OF,
    AgainstOption,
    DecodeOption,
    EarlierOption,
    OnlyOption,
    PeerOption,
    PlotOption,
    QuantityOption,
    ResultOption,
    SeedOption,
    StyleOption,
    SweepOption,
    TimingOnlyOption,
)
from m2gen.cli.bench.ranks import FormOption, GpusOption, LengthOption, SizeOption, check_ranks, sized, time_over_ranks
from m2gen.cli.files import check_output
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
)
from m2gen.cli.show.figure import Plot, Quantity, Style, check_figure
from m2gen.errors import UsageError

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
        asking = {**timed, "--gpus": gpus}
        _check(spec, earlier, plot, [name for name, given in asking.items() if given])
        check_ranks(
            gpus,
            {"--size": size, "--tokens": tokens, "--form": form},
            [*(name for name, given in timed.items() if given and name != "--out"), *(["--plot"] if plot else [])],
        )
        check_output("--out", out)
        check_output("--plot", plot)
        display = Display(json, quiet, verbose, debug)
        sources = (earlier,) if earlier and earlier.is_file() else ()  # of a pipe there is nothing to say
        picture = Picture(Plot(plot, style, quantity, sources) if plot else None, out)
        batches = tuple(batch for batch in dict.fromkeys([TOKENS_OF] if decode is None else decode) if batch)
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
            show_earlier(earlier, request.layers, display, picture)
        elif spec is not None and gpus is not None:
            sizes = tuple(map(sized, size or ()))
            ranked = RanksRequest(gpus, request.layers, sizes, tuple(tokens or ()), seed, tuple(form or Form))
            raise typer.Exit(time_over_ranks(spec, records_of(db, no_db), ranked, display, out))
        elif spec is not None:
            raise typer.Exit(time_operators(spec, records_of(db, no_db), request, axes, against, display, picture))


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
    if "--against" in timed and (other := [each for each in ("--peer", "--timing-only") if each in timed]):
        raise UsageError(f"--against must be given without {', '.join(other)}: it times default and tuned kernels")
    if "--against" in timed and "--out" in timed:
        raise UsageError("--out must be given without --against, which compares with times and keeps none")
    if "--against" in timed and plot is not None:
        raise UsageError("--plot must be given without --against, which compares with times that are not drawn")
    if plot is not None:
        check_figure(plot)
