"""The command line: ``app`` has all commands, with a file for each group of them; ``show`` has their output."""

from m2gen.cli.app import main

__all__ = ["main"]
