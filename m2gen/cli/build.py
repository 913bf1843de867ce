"""The commands ``m2gen build`` and ``m2gen check`` and their options."""

from __future__ import annotations

from typing import Annotated

import typer

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
    examples,
    planned,
    records_of,
    reporting,
    terminal_progress,
)
from m2gen.errors import UsageError
from m2gen.package.directory import Format

BUILD_EXAMPLES = examples(
    "m2gen build --spec h100.yaml", "m2gen build --spec h100.yaml --format wheel", "m2gen build --check"
)
CHECK_EXAMPLES = examples("m2gen check --spec h100.yaml", "m2gen check --spec tiny.yaml --target sm_80,gfx942")

FormOption = Annotated[
    Format,
    typer.Option("--format", help="A package to import, a wheel to install, or a repository of the kernels Hub."),
]
WheelOption = Annotated[bool, typer.Option("--wheel", help="The same as --format wheel.")]
CheckOption = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Write nothing; exit 1 with a diff if a package is stale: that of --spec, or any in --out without it.",
    ),
]
CompiledOption = Annotated[
    bool,
    typer.Option(
        "--compiled",
        help="Bring along compiled kernels, for the installed Triton, so that first calls compile nothing.",
    ),
]
NoVerifyOption = Annotated[bool, typer.Option("--no-verify", help="Write the package without verifying it.")]


def build(
    spec: OptionalSpecOption = None,
    out: OutOption = None,
    form: FormOption = Format.PACKAGE,
    wheel: WheelOption = False,
    check: CheckOption = False,
    compiled: CompiledOption = False,
    no_verify: NoVerifyOption = False,
    db: DbOption = None,
    no_db: NoDbOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Turn a spec into a verified package of kernels, a wheel, or a repository of the kernels Hub."""
    from m2gen import pipeline
    from m2gen.cli.show.build import show_build, show_difference

    with reporting(debug):
        records = records_of(db, no_db)
        if wheel and form is Format.HF_KERNEL:
            raise UsageError("build must be given --wheel or --format hf-kernel, not both")
        form = Format.WHEEL if wheel else form
        if check and form is not Format.PACKAGE:
            raise UsageError("build --check compares packages, and takes neither --wheel nor --format")
        if check and compiled:
            raise UsageError("build --check compares sources, and takes no --compiled")
        out = form.folder if out is None else out
        if check:
            names = [spec] if spec else pipeline.committed_specs(out)
            plans = [planned(name, records=records) for name in names]
            stale = [show_difference(p, pipeline.difference(p, out), as_json=json, quiet=quiet) for p in plans]
            raise typer.Exit(max(stale))
        if spec is None:
            raise UsageError("build must be given --spec, or --check alone for every package in --out")
        plan = planned(spec, records=records)
        outcome = pipeline.build(
            plan, out, terminal_progress(quiet), verified=not no_verify, form=form, compiled=compiled
        )
        show_build(plan, outcome, as_json=json, quiet=quiet, verbose=verbose)


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
    """Cross-compile every kernel for every target, without a GPU, and show the resources."""
    from m2gen import pipeline
    from m2gen.cli.show.build import show_check

    with reporting(debug):
        rows = pipeline.check(planned(spec, target, records=records_of(db, no_db)), terminal_progress(quiet))
        raise typer.Exit(show_check(rows, as_json=json, quiet=quiet, verbose=verbose))
