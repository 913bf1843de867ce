"""Start one rank of a job, as ``python -m m2gen.bench.ranks FOLDER RANK LAUNCHER`` in a process of the launcher's."""

from __future__ import annotations

import sys
from pathlib import Path

from m2gen.measure.workers import end_with_parent


def main(folder: str, rank: str, launcher: str) -> None:
    """Be a rank for as long as the launcher lives, also while torch is imported, which takes seconds."""
    end_with_parent(int(launcher))
    from m2gen.bench.ranks import worker

    worker.main(Path(folder), int(rank))


if __name__ == "__main__":
    main(*sys.argv[1:])
