"""The command line: ``app`` has all commands, each group of them in a file or a folder; ``show`` has their output."""

from m2gen.cli.app import main

__all__ = ["main"]
