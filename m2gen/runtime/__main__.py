"""The command line of a package: ``python -m <package> warm-up``, and what ``m2gen build --compiled`` brings along."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from . import built, compiled, warming
from .warming import OPERANDS, USES, Calls


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 where kernels cannot be compiled, 2 for what is no use."""
    parser = _parser()
    options = parser.parse_args(arguments)
    usual = Calls()
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    calls = Calls(options.uses or usual.uses, options.operands or usual.operands, options.lengths)
    try:
        arch = warming.arch_of(options.device)
        kernels = warming.compile_calls(arch, options.layers, (), calls, options.processes, options.entries)
    except (ValueError, RuntimeError) as error:
        print(f"{built.NAME}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print(f"{built.NAME}: interrupted", file=sys.stderr)
        return 130
    if options.entries:
        entries = {compiled.place_of(arch, x.module, x.name, x.digest): x for x in kernels}
        print(json.dumps({path: compiled.entry_of(x.name, x.digest) for path, x in entries.items()}))
        return 0
    found = sum(kernel.found for kernel in kernels)
    print(f"{built.NAME}: {len(kernels) - found} kernels compiled for {arch}, {found} found in Triton's cache")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__ or built.NAME}", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "compile the kernels that calls will launch into Triton's cache, in parallel, with or without a GPU"
    command = commands.add_parser("warm-up", help=text, description=text.capitalize() + ".")
    usual = Calls()
    command.add_argument("--device", help="a GPU, or an arch such as sm_90 that need not be there; the current GPU")
    command.add_argument("--layer", dest="layers", action="append", default=[], help="only this layer; may be repeated")
    command.add_argument(
        "--use", dest="uses", action="append", choices=USES,
        help=f"what will be called; may be repeated; {', '.join(usual.uses)} if not given",
    )  # fmt: skip
    command.add_argument(
        "--operands", action="append", choices=OPERANDS,
        help=f"how kernels are called; may be repeated; {', '.join(usual.operands)} if not given",
    )  # fmt: skip
    command.add_argument(
        "--length", dest="lengths", action="append", type=int, default=[],
        help="steps of the sequences of a dense batch; may be repeated; any if not given",
    )  # fmt: skip
    command.add_argument("--processes", type=int, help="how many compile at once; as many as there are CPUs")
    command.add_argument("--entries", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
