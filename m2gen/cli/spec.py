"""``m2gen spec``: look at specs, and write that of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m2gen.cli.complete import complete_target
from m2gen.cli.options import DebugOption, JsonOption, SpecOption, VerboseOption, examples, planned, reporting
from m2gen.errors import UsageError

spec_app = typer.Typer(
    no_args_is_help=True, help="Look at specs: the variants that they ask for, their schema, that of a checkpoint."
)
FROM_CONFIG_EXAMPLES = examples(
    "m2gen spec from-config m2rnn-410m --out m2rnn_410m.yaml",
    "m2gen spec from-config m2rnn-410m --dtype bf16 --dtype fp32 --target sm_80,sm_90",
)
FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint's folder, with its config.json.")]
TargetsOption = Annotated[
    str | None,
    typer.Option(
        "--target", help="Comma-separated architectures, in place of this GPU's.", autocompletion=complete_target
    ),
]
NameOption = Annotated[str | None, typer.Option("--name", help="Name of the spec, in place of the folder's.")]
DtypesOption = Annotated[
    list[str] | None,
    typer.Option("--dtype", help="Dtype of the operands, in place of the checkpoint's; may be repeated."),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="File to write, in place of standard output.")]


@spec_app.command("show")
def spec_show(
    spec: SpecOption, json: JsonOption = False, verbose: VerboseOption = False, debug: DebugOption = False
) -> None:
    """Show the variants that a spec asks for."""
    from m2gen.cli.show.build import show_spec

    with reporting(debug):
        show_spec(planned(spec), as_json=json, verbose=verbose)


@spec_app.command("schema")
def spec_schema() -> None:
    """Print the JSON schema of specs."""
    from m2gen.cli.show.report import print_json
    from m2gen.spec import json_schema

    print_json(json_schema())


@spec_app.command("from-config", epilog=FROM_CONFIG_EXAMPLES)
def spec_from_config(
    folder: FolderArgument,
    name: NameOption = None,
    target: TargetsOption = None,
    dtype: DtypesOption = None,
    out: OutOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the spec of the kernels that a published checkpoint needs."""
    from m2gen.pipeline import CheckpointRequest, spec_of_checkpoint, write_spec

    with reporting(debug):
        if name == "":
            raise UsageError("--name must be a Python identifier, got ''")
        targets = () if target is None else tuple(target.split(","))
        text = spec_of_checkpoint(CheckpointRequest(folder, name, targets, tuple(dtype or ())))
        if out is None:
            print(text, end="")
        else:
            write_spec(out, text)
