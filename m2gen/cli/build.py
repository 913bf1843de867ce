"""The commands ``m2gen build`` and ``m2gen check`` and their options."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    database_options,
    examples,
    plan_options,
    planned,
    records_of,
    reporting,
    terminal_progress,
)
from m2gen.errors import UsageError
from m2gen.package.directory import Format

if TYPE_CHECKING:
    from m2gen.cli.show.build import Compared
    from m2gen.db import Record

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
    from m2gen.cli.show.build import show_build, show_differences

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
            compared = _compared(spec, out, database_options(db, no_db), records)
            raise typer.Exit(show_differences(compared, every=spec is None, as_json=json, quiet=quiet))
        if spec is None:
            raise UsageError("build must be given --spec, or --check alone for every package in --out")
        plan = planned(spec, records=records)
        again = plan_options(spec, db, no_db)
        outcome = pipeline.build(
            plan, out, terminal_progress(quiet), verified=not no_verify, form=form, compiled=compiled, options=again
        )
        show_build(plan, outcome, as_json=json, quiet=quiet, verbose=verbose)


def _compared(spec: str | None, out: Path, more: Sequence[str], records: Iterable[Record]) -> list[Compared]:
    """Compare the package of a spec, or every package in ``out``, with what the sources render."""
    from m2gen import pipeline
    from m2gen.cli.show.build import Compared

    packages = pipeline.committed_packages(out) if spec is None else ()
    names = [package.spec_file for package in packages] if spec is None else [spec]
    plans = {name: planned(name, records=records) for name in names}
    for package in packages:
        package.check(plans[package.spec_file])
    place = [] if out == Format.PACKAGE.folder else ["--out", str(out)]
    return [
        Compared(plan, pipeline.difference(plan, out), shlex.join(["m2gen", "build", "--spec", name, *more, *place]))
        for name, plan in plans.items()
    ]


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
