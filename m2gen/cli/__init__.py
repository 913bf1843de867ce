"""The command line: ``app`` has all commands, each group of them in a file or a folder; ``show`` has their output."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line also while it is being imported."""
    try:
        from m2gen.cli.app import main as run

        run()
    except KeyboardInterrupt:
        print("m2gen: interrupted", file=sys.stderr)
        sys.exit(130)


__all__ = ["main"]
