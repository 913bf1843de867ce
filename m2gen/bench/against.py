"""Compare the times of this m2gen with recorded ones, within the noise of this session."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from m2gen.bench.document import Document, read_json, run_of
from m2gen.bench.entries import BenchWorkload
from m2gen.bench.kinds import Call, Kind
from m2gen.bench.side_by_side import Result
from m2gen.db import Database, Environment, Estimate, failures, verdict
from m2gen.db.rank import preference
from m2gen.errors import UsageError
from m2gen.measure.statistics import difference, estimate
from m2gen.spec import Objective

BETWEEN_SESSIONS = 0.01
"""Fraction by which medians of one binary differ between sessions (docs/performance.md), which no single run shows."""
SAMPLES = {"forward": "forward_ms", "forward+backward": "step_ms"}
"""The attribute of ``TimerResult`` with the samples of each call that is compared."""

_OTHER_RUNS = {"sweeps": "sweeps", "layer_rows": "whole layers", "link": "layers over ranks"}
"""What documents of other runs are of, by a key that they alone have."""


@dataclass(frozen=True)
class TimedCall:
    """The call and implementation of a recorded time."""

    variant: str
    call: Call
    batch: int
    seq: int
    implementation: str
    """Either ``default`` or ``tuned``."""
    what: str
    """One of the keys of ``SAMPLES``."""
    packed: bool = False


@dataclass(frozen=True)
class Baseline:
    """Times of an earlier run on one device, and their toolchains."""

    device: str
    times: Mapping[TimedCall, Estimate]
    toolchains: tuple[str, ...] = ()

    def has(self, workload: BenchWorkload, kinds: Collection[Kind]) -> bool:
        """Return whether there is a time of a workload on implementations of such kinds."""
        asked = (workload.variant.key, workload.call, workload.batch, workload.seq, workload.packed)
        places = (place for place in self.times if place.implementation in kinds)
        return any((place.variant, place.call, place.batch, place.seq, place.packed) == asked for place in places)


@dataclass(frozen=True)
class Comparison:
    """A recorded time and the time of now."""

    layer: str
    place: TimedCall
    before: Estimate
    now: Estimate | None
    noise: float
    """Fraction by which the medians of one binary differed in this run, and at least ``BETWEEN_SESSIONS``."""
    failure: str = ""

    @property
    def change(self) -> float | None:
        """The increase as a fraction of the recorded time."""
        return None if self.now is None else self.now.median_ms / self.before.median_ms - 1

    @property
    def slower(self) -> bool:
        """Whether the call is slower beyond noise and both intervals, or fails now."""
        return self.now is None or self.now.low_ms > self.before.high_ms * (1 + self.noise)


def baseline(path: Path, here: Environment) -> Baseline:
    """Read the output of ``m2gen bench --json``, or the records of a tuning database for the device at hand.

    Raises UsageError if there is no such file or folder, it cannot be used, or is of another device.
    """
    if path.is_dir():
        return _of_database(Database(path), here)
    content = read_json(path)
    for key, what in _OTHER_RUNS.items():
        if isinstance(content, dict) and key in content:
            raise UsageError(f"--against {path} must be a run of workloads, got one of {what}")
    read = run_of(content, path)
    assert isinstance(read, Document)
    if read.environment.device != here.device:
        raise UsageError(f"--against {path} must be of {here.device}, got one of {read.environment.device}")
    times: dict[TimedCall, Estimate] = {}
    for row in read.rows:
        for what, found in (("forward", row.forward), ("forward+backward", row.step)):
            if found is not None and row.implementation in ("default", "tuned") and not row.failure:
                place = TimedCall(row.variant, row.call, row.batch, row.seq, row.implementation, what, row.packed)
                times.setdefault(place, found.estimate)
    return Baseline(here.device, times, (_toolchain(read.environment),))


def _toolchain(environment: Environment) -> str:
    return f"torch {environment.torch}, triton {environment.triton}, driver {environment.driver}"


def _of_database(database: Database, here: Environment) -> Baseline:
    times: dict[TimedCall, Estimate] = {}
    toolchains: dict[str, None] = {}
    records = database.contents().records
    known = failures(records)
    for record in sorted(records, key=preference):  # of several, the one that a build would take
        sizes, timing, environment = record.problem, record.timing, record.environment
        if timing is None or environment.device != here.device or sizes.lengths or record.tunable.kernel is not None:
            continue
        if verdict(record) in known:
            continue
        # a search for inference times what a forward without gradients takes
        what = "forward" if record.key.objective is Objective.INFER else "forward+backward"
        place = TimedCall(record.key.variant, Call.SEQUENCE, sizes.batch, sizes.seq, "tuned", what)
        times.setdefault(place, timing.tuned)
        times.setdefault(replace(place, implementation="default"), timing.default)
        toolchains[_toolchain(environment)] = None
    if not times:
        raise UsageError(f"--against {database.root} must have records of {here.device}, got none")
    return Baseline(here.device, times, tuple(toolchains))


def compare(results: Sequence[Result], before: Baseline, kinds: Collection[Kind], seed: int = 0) -> list[Comparison]:
    """Compare a workload's results, each implementation twice (``side_by_side(..., arms=2)``), with times of ``kinds``.

    If nothing is tuned any more, the default, which serves now, is compared with the recorded tuned time.
    """
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.entry.implementation.name, []).append(result)
    workload = results[0].entry.workload
    found = []
    for name in (kind for kind in (Kind.DEFAULT, Kind.TUNED) if kind in kinds):
        arms = by_name.get(name) or by_name.get("default", [])
        for what in SAMPLES:
            sizes = (workload.variant.key, workload.call, workload.batch, workload.seq)
            place = TimedCall(*sizes, name, what, workload.packed)
            if arms and place in before.times:
                found.append(_comparison(arms, place, before.times[place], seed))
    return found


def _comparison(arms: Sequence[Result], place: TimedCall, before: Estimate, seed: int) -> Comparison:
    layer = arms[0].entry.workload.layer
    failures = [str(arm.failure) for arm in arms if arm.failure]
    if failures:
        return Comparison(layer, place, before, None, BETWEEN_SESSIONS, failures[0])
    one, *others = (getattr(arm.found, SAMPLES[place.what]) for arm in arms)
    noise = max([BETWEEN_SESSIONS, *(difference(one, other, seed) for other in others)])
    return Comparison(layer, place, before, estimate([*one, *chain.from_iterable(others)], seed), noise)
