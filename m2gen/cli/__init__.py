"""The command line: ``app`` has all commands, each group of them in a file or a folder; ``show`` has their output."""

import signal
import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line also while it is being imported.

    SIGTERM does what Ctrl-C does: batch systems send it before they end a job, whose results so far are to be kept.
    """
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from m2gen.cli.app import main as run

        run()
    except KeyboardInterrupt:
        print("m2gen: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["main"]
