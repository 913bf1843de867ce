"""The command line with all its commands. Exit status 0: done; 1: a check failed; 2: a command or spec is wrong."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from m2gen import __version__
from m2gen.cache import provide_for_triton
from m2gen.cli.bench.command import EXAMPLES as BENCH_EXAMPLES
from m2gen.cli.bench.command import bench
from m2gen.cli.build import BUILD_EXAMPLES, CHECK_EXAMPLES, build, check
from m2gen.cli.db import db_app
from m2gen.cli.options import DebugOption, JsonOption, reporting
from m2gen.cli.parsing import said
from m2gen.cli.spec import spec_app
from m2gen.cli.streams import exit_status, open_streams
from m2gen.cli.tune import EXAMPLES as TUNE_EXAMPLES
from m2gen.cli.tune import tune
from m2gen.cli.verify import EXAMPLES as VERIFY_EXAMPLES
from m2gen.cli.verify import verify

ORDER = ("info", "spec", "build", "check", "verify", "tune", "bench", "db", "version")
"""Commands in the order of use."""


class Commands(TyperGroup):
    """The commands and subgroups, which help lists in the order of use."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; report an interrupt that comes before the command would, as while modules load."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("m2gen: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn YAML specs into tuned, verified Triton kernels for the M²RNN recurrence.",
    epilog="Exit status: 0 done; 1 a check, verification or comparison failed; 2 the command or a spec cannot be used; "
    "130 interrupted; 141 the reader of what is printed is gone.",
)
app.add_typer(spec_app, name="spec")
app.add_typer(db_app, name="db")
app.command(epilog=BUILD_EXAMPLES)(build)
app.command(epilog=CHECK_EXAMPLES)(check)
app.command(epilog=VERIFY_EXAMPLES)(verify)
app.command(epilog=TUNE_EXAMPLES)(tune)
app.command(epilog=BENCH_EXAMPLES)(bench)


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", help="Print m2gen's version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Handle the options before a command."""


@app.command()
def info(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show the device, versions, where files are looked for, and what is missing; --json for reports of faults."""
    from m2gen.cli.show.info import show_info

    with reporting(debug):
        show_info(as_json=json)


@app.command()
def version() -> None:
    """Print m2gen's version."""
    print(f"m2gen {__version__}")


def main() -> None:
    """Run the command line."""
    open_streams()
    provide_for_triton()
    sys.exit(exit_status(_run))


def _run() -> int | None:
    """Run the app and return the exit status; errors of the parser are one line, like all others."""
    try:
        status: int | None = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        if message := said(error):
            print(f"m2gen: {message}", file=sys.stderr)
        status = getattr(error, "exit_code", 2)
    return status
