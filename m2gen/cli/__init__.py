"""The command line: ``app`` has all commands, each group of them in a file or a folder; ``show`` has their output."""

import signal
import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line also while it is being imported.

    SIGTERM does what Ctrl-C does: batch systems send it before they end a job, whose results so far are to be kept.
    """
    unhandled = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if unhandled:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from m2gen.cli.app import main as run

        run()
    except KeyboardInterrupt:
        print("m2gen: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if unhandled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


__all__ = ["main"]
