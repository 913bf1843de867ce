"""The command line. Exit status 0: done; 1: a check failed; 2: the command or a spec cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2gen import __version__
from m2gen.errors import M2genError, SpecError, UsageError

if TYPE_CHECKING:
    from m2gen.pipeline import Plan
    from m2gen.report import TerminalProgress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="YAML specs to tuned, verified Triton kernels for the M²RNN recurrence.\n\n"
    "Exit status: 0 done; 1 a check, verification or comparison failed; 2 the command or a spec cannot be used; "
    "130 interrupted.",
)
spec_app = typer.Typer(no_args_is_help=True, help="Look at specs: their schema, and the variants they expand to.")
app.add_typer(spec_app, name="spec")


SpecOption = Annotated[
    str, typer.Option("--spec", help="Spec file: as given, else in specs/, else among those shipped.")
]
OptionalSpecOption = Annotated[
    str | None, typer.Option("--spec", help="Spec file, as for every command; --check alone takes every package's own.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, and no tables but results.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder of generated packages; the package is OUT/<name>/.")]
TargetOption = Annotated[str | None, typer.Option("--target", help="Comma-separated arches instead of the spec's.")]


@contextmanager
def _reporting(debug: bool) -> Iterator[None]:
    """Turn errors into one line each on standard error and an exit status."""
    try:
        yield
    except typer.Exit:
        raise
    except M2genError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            print(f"m2gen: {line}" if not isinstance(error, SpecError) else line, file=sys.stderr)
        raise typer.Exit(error.exit_status) from None
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, OSError) else f"unexpected {type(error).__name__}, which --debug locates: "
        print(f"m2gen: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("m2gen: interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None


def _progress(quiet: bool) -> TerminalProgress:
    from m2gen.report import TerminalProgress

    return TerminalProgress(quiet=quiet)


def _plan(spec: str, target: str | None = None) -> Plan:
    from m2gen.pipeline import plan

    return plan(spec, target.split(",") if target else None)


@app.command()
def build(
    spec: OptionalSpecOption = None,
    out: OutOption = Path("generated"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 with a diff if a package is stale.")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Write the package without verifying it.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Take a spec to a verified package of kernels in OUT/<name>/."""
    from m2gen import pipeline
    from m2gen.cli_output import show_build, show_difference

    with _reporting(debug):
        if check:
            names = [spec] if spec else pipeline.committed_specs(out)
            stale = [
                show_difference(p, pipeline.difference(p, out), as_json=json, quiet=quiet) for p in map(_plan, names)
            ]
            raise typer.Exit(max(stale))
        if spec is None:
            raise UsageError("build must be given --spec, or --check alone for every package in --out")
        planned = _plan(spec)
        outcome = pipeline.build(planned, out, _progress(quiet), verified=not no_verify)
        show_build(planned, outcome, as_json=json, quiet=quiet, verbose=verbose)


@app.command()
def check(
    spec: SpecOption,
    target: TargetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Cross-compile every kernel, with no GPU, and show what it takes of each target."""
    from m2gen import pipeline
    from m2gen.cli_output import show_check

    with _reporting(debug):
        rows = pipeline.check(_plan(spec, target), _progress(quiet))
        raise typer.Exit(show_check(rows, as_json=json, quiet=quiet, verbose=verbose))


@app.command()
def verify(
    spec: Annotated[str | None, typer.Option("--spec", help="Spec file, as for every command.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The whole matrix of the shipped specs; needs a GPU and no --spec.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="The first case of every variant, and one of every feature.")
    ] = False,
    variant: Annotated[str | None, typer.Option("--variant", help="Only this variant, by its key.")] = None,
    case: Annotated[str | None, typer.Option("--case", help="Only this case.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random inputs.")] = 0,
    json: JsonOption = False,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write JUnit XML to this file.")] = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare every output and gradient with the float64 reference: on the GPU, else in Triton's interpreter."""
    from m2gen import pipeline
    from m2gen.cli_verify import show_verify, write_junit

    with _reporting(debug):
        if full == (spec is not None) or (full and quick):
            raise UsageError("verify must be given --spec, with or without --quick, or --full alone")
        request = pipeline.VerifyRequest(variant, case, seed, quick)
        progress = _progress(quiet)
        outcome = pipeline.verify(_plan(spec), request, progress) if spec else pipeline.verify_full(request, progress)
        if junit is not None:
            write_junit(junit, f"m2gen verify {spec or '--full'}", outcome)
        raise typer.Exit(show_verify(outcome, as_json=json, quiet=quiet, verbose=verbose))


@app.command()
def bench(
    spec: SpecOption,
    layer: Annotated[str | None, typer.Option("--layer", help="Only this layer of the spec.")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Time forward and training step of every layer on its workloads; needs a GPU."""
    from m2gen import pipeline
    from m2gen.cli_output import show_bench

    with _reporting(debug):
        show_bench(pipeline.bench(_plan(spec), layer, _progress(quiet)), as_json=json)


@app.command()
def tune(
    spec: SpecOption,
    layer: Annotated[list[str] | None, typer.Option("--layer", help="Only this layer; may be repeated.")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time for all searches, as 10m or 90s; the spec's if not given.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Most candidates of each search.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order of candidates and of resampling.")] = 0,
    sampler: Annotated[str, typer.Option("--sampler", help="tpe, or random as the baseline.")] = "tpe",
    objective: Annotated[
        str | None, typer.Option("--objective", help="train or infer; the spec's if not given.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Most memory beyond inputs and gradients, as 2GB.")
    ] = None,
    db: Annotated[Path | None, typer.Option("--db", help="Tuning database; the shipped one if not given.")] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", help="Database URL of a study that several machines share.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Start anew, or go on where the last run of a search ended.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show how large the spaces are, and why; needs no GPU.")
    ] = False,
    target: Annotated[str | None, typer.Option("--target", help="Arch whose spaces --dry-run shows.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Also write a page on the searches here.")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Search the fastest schedules on this GPU and put them into the tuning database."""
    from m2gen.cli_tune import TuneOptions, run_tune

    with _reporting(debug):
        limits = (budget, trials, seed, sampler, objective, max_memory)
        options = TuneOptions(tuple(layer or ()), *limits, db, storage, fresh, dry_run, target, report)
        raise typer.Exit(run_tune(_plan(spec), options, as_json=json, quiet=quiet, debug=debug))


@spec_app.command("show")
def spec_show(spec: SpecOption, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Print the variants that a spec expands to."""
    from m2gen.cli_output import show_spec

    with _reporting(debug):
        show_spec(_plan(spec), as_json=json)


@spec_app.command("schema")
def spec_schema() -> None:
    """Print the JSON schema of specs."""
    from m2gen.report import print_json
    from m2gen.spec import json_schema

    print_json(json_schema())


@app.command()
def info(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Print the device, versions, where files are looked for, and what is missing."""
    from m2gen.cli_output import show_info

    with _reporting(debug):
        show_info(as_json=json)


@app.command()
def version() -> None:
    """Print m2gen's version."""
    print(f"m2gen {__version__}")


def main() -> None:
    """Run the command line; what the parser refuses is one line, as every other error."""
    try:
        status = app(standalone_mode=False)
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if message():  # empty where the help was printed instead
            print(f"m2gen: {message()} (see `m2gen --help`)", file=sys.stderr)
        status = getattr(error, "exit_code", 2)
    sys.exit(status)
