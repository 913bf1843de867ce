"""Replay random search against TPE on recorded trials: ``tools/compare_samplers.py JOURNAL... [--seeds N]``.

Each journal of ``m2gen tune`` (below ``~/.cache/m2gen/tune``; or one of m2gen 0.2.0 or before, compressed as ``.gz``)
is a table of candidates and their times. Both samplers search that table as ``m2gen tune`` would search the space,
from the default schedule on, and nothing runs: a proposal's result is looked up. The trials of a long random search are
the most even sample:

    m2gen tune --spec h200.yaml --layer m2rnn_7b --sampler random --budget 10m --fresh

Printed, over the seeds: how far the best found is above the best of the table after so many trials, the median and the
worst seed, and how many trials it takes to come within 1 %.
"""

from __future__ import annotations

import argparse
import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from m2gen.cli.show.table import Table, print_tables
from m2gen.errors import M2genError, UsageError, os_errors_as
from m2gen.schedule import AnySchedule
from m2gen.schedule.layer_knobs import Tiles
from m2gen.tune.sampler import Sampler
from m2gen.tune.search import Proposer, neighbours, tiles
from m2gen.tune.study import decode_trial, read_journal
from m2gen.tune.trial import Trial

AFTER = (5, 10, 20, 40, 80, 160)
CLOSE = 1.01


def recorded(path: Path) -> list[Trial]:
    """Return the trials of a journal in order, the last one of each candidate; raises UsageError if it is none."""
    with os_errors_as(UsageError, f"{path} must be readable"):
        content = path.read_bytes()  # Optuna makes a file that is not there
        try:
            if path.suffix == ".gz":
                values = map(json.loads, gzip.decompress(content).split(b"\n")[:-1])
                found = [decode_trial(value["trial"]) for value in values if "trial" in value]
            else:
                found = [trial for _, trials in read_journal(path) for trial in trials]
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, zlib.error) as error:
            raise UsageError(f"{path} must be a journal of searches, got {type(error).__name__}: {error}") from error
    return list({trial.schedule: trial for trial in found}.values())


def default_of(trials: Sequence[Trial]) -> AnySchedule:
    """Return the journal's default schedule; raises UsageError if it has none."""
    found = next((trial.schedule for trial in trials if trial.origin == "default"), None)
    if found is None:
        raise UsageError("a journal must have a trial of the default schedule, got none")
    return found


def replay(trials: Sequence[Trial], sampler: Sampler, seed: int) -> list[float]:
    """Return the best time after each proposal, infinity before one passes."""
    table = {trial.schedule: trial for trial in trials}
    points, start = list(table), default_of(trials)
    first = [(start, "default")]
    if sampler is Sampler.TPE:
        if not isinstance(start, Tiles):
            first += [(point, "tile") for point in tiles((start,), points)]
        first += [(point, "neighbour") for point in neighbours(start, points)]
    proposer = Proposer(points, first, sampler, seed)
    best, curve = float("inf"), []
    while (proposal := proposer.ask()) is not None:
        trial = table[proposal.schedule]
        proposer.tell(proposal, trial)
        best = min(best, trial.median_ms or best)
        curve.append(best)
    return curve


def rows(trials: Sequence[Trial], seeds: int) -> list[tuple[str, ...]]:
    """Return a line for each sampler."""
    least = min(trial.median_ms for trial in trials if trial.median_ms)
    found = []
    for sampler in Sampler:
        curves = [replay(trials, sampler, seed) for seed in range(seeds)]
        cells = []
        for count in AFTER:
            above = [curve[min(count, len(curve)) - 1] / least - 1 for curve in curves]
            cells.append(f"{median(above):.1%} / {max(above):.1%}" if count <= len(trials) else "")
        close = [next(i for i, best in enumerate(curve, 1) if best <= CLOSE * least) for curve in curves]
        found.append((str(sampler), *cells, f"{median(close):g} / {max(close)}"))
    return found


def main() -> None:
    """Print a table for each journal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("journals", nargs="+", type=Path, metavar="JOURNAL")
    parser.add_argument("--seeds", type=int, default=20, help="searches of each sampler")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {given.seeds}")
    columns = ("sampler", *(f"after {count}" for count in AFTER), "trials to 1 %")
    for path in given.journals:
        trials = recorded(path)
        if not any(trial.median_ms for trial in trials):
            parser.error(f"{path} must hold a trial that passed, got none of {len(trials)}")
        failed = sum(trial.failure is not None for trial in trials)
        title = f"{path.stem}: {len(trials)} trials, {failed} failed; above the best: median / worst of {given.seeds}"
        print_tables([Table(title, columns, rows(trials, given.seeds))])


if __name__ == "__main__":
    try:
        main()
    except M2genError as error:
        raise SystemExit(f"compare_samplers: {error}") from None
