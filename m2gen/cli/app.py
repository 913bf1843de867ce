"""The command line. Exit status 0: done; 1: a check failed; 2: the command or a spec cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2gen import __version__
from m2gen.cli.bench import bench
from m2gen.cli.db import db_app
from m2gen.cli.options import (
    DbOption,
    DebugOption,
    JsonOption,
    NoDbOption,
    OptionalSpecOption,
    OutOption,
    QuietOption,
    SpecOption,
    TargetOption,
    VerboseOption,
    records_of,
    reporting,
    terminal_progress,
)
from m2gen.cli.tune import tune
from m2gen.errors import UsageError
from m2gen.package.directory import Format

if TYPE_CHECKING:
    from m2gen.db import Record
    from m2gen.pipeline import Plan

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
app.add_typer(db_app, name="db")
app.command()(bench)
app.command()(tune)


def _plan(spec: str, target: str | None = None, *, records: Iterable[Record] = ()) -> Plan:
    from m2gen.pipeline import plan

    return plan(spec, target.split(",") if target else None, records)


@app.command()
def build(
    spec: OptionalSpecOption = None,
    out: OutOption = None,
    form: Annotated[
        Format,
        typer.Option("--format", help="A package to import, a wheel to install, or a repository of the kernels Hub."),
    ] = Format.PACKAGE,
    wheel: Annotated[bool, typer.Option("--wheel", help="The same as --format wheel.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 with a diff if a package is stale.")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Write the package without verifying it.")] = False,
    db: DbOption = None,
    no_db: NoDbOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Take a spec to a verified package of kernels in OUT/<name>/, to a wheel in OUT, or to a Hub repository there."""
    from m2gen import pipeline
    from m2gen.cli.show.build import show_build, show_difference

    with reporting(debug):
        records = records_of(db, no_db)
        if wheel and form is Format.HF_KERNEL:
            raise UsageError("build must be given --wheel or --format hf-kernel, not both")
        form = Format.WHEEL if wheel else form
        if check and form is not Format.PACKAGE:
            raise UsageError("build --check compares packages, and takes neither --wheel nor --format")
        out = form.folder if out is None else out
        if check:
            names = [spec] if spec else pipeline.committed_specs(out)
            plans = [_plan(name, records=records) for name in names]
            stale = [show_difference(p, pipeline.difference(p, out), as_json=json, quiet=quiet) for p in plans]
            raise typer.Exit(max(stale))
        if spec is None:
            raise UsageError("build must be given --spec, or --check alone for every package in --out")
        planned = _plan(spec, records=records)
        outcome = pipeline.build(planned, out, terminal_progress(quiet), verified=not no_verify, form=form)
        show_build(planned, outcome, as_json=json, quiet=quiet, verbose=verbose)


@app.command()
def check(
    spec: SpecOption,
    target: TargetOption = None,
    db: DbOption = None,
    no_db: NoDbOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Cross-compile every kernel, with no GPU, and show what it takes of each target."""
    from m2gen import pipeline
    from m2gen.cli.show.build import show_check

    with reporting(debug):
        rows = pipeline.check(_plan(spec, target, records=records_of(db, no_db)), terminal_progress(quiet))
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
    db: DbOption = None,
    no_db: NoDbOption = False,
    json: JsonOption = False,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write JUnit XML to this file.")] = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare every output and gradient with the float64 reference: on the GPU, else in Triton's interpreter."""
    from m2gen import pipeline
    from m2gen.cli.show.verify import show_verify, write_junit

    with reporting(debug):
        if full == (spec is not None) or (full and quick):
            raise UsageError("verify must be given --spec, with or without --quick, or --full alone")
        request = pipeline.VerifyRequest(variant, case, seed, quick)
        progress = terminal_progress(quiet)
        if spec:
            outcome = pipeline.verify(_plan(spec, records=records_of(db, no_db)), request, progress)
        else:
            outcome = pipeline.verify_full(request, progress)
        if junit is not None:
            write_junit(junit, f"m2gen verify {spec or '--full'}", outcome)
        raise typer.Exit(show_verify(outcome, as_json=json, quiet=quiet, verbose=verbose))


@spec_app.command("show")
def spec_show(
    spec: SpecOption, json: JsonOption = False, verbose: VerboseOption = False, debug: DebugOption = False
) -> None:
    """Print the variants that a spec expands to."""
    from m2gen.cli.show.build import show_spec

    with reporting(debug):
        show_spec(_plan(spec), as_json=json, verbose=verbose)


@spec_app.command("schema")
def spec_schema() -> None:
    """Print the JSON schema of specs."""
    from m2gen.cli.show.report import print_json
    from m2gen.spec import json_schema

    print_json(json_schema())


@app.command()
def info(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Print the device, versions, where files are looked for, and what is missing."""
    from m2gen.cli.show.build import show_info

    with reporting(debug):
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
