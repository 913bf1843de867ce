"""The command line: ``app`` has the commands, a file a group of them, and ``show`` what they print."""

from m2gen.cli.app import main

__all__ = ["main"]
