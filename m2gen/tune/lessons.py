"""Lessons: the times of all trials of one workload, from journals of searches or from the compact file of a repository.

A compact file has a line for each workload, then one for each of its trials: the schedule's slug and the medians of
its forward and backward in milliseconds. Journals of m2gen 0.2.0, whose lines are trials, are read as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import Field, PositiveInt, TypeAdapter

from m2gen.bucket import Bucket, bucket_of
from m2gen.device import Device, limits
from m2gen.errors import ScheduleError, TuneError, UsageError, os_errors_as
from m2gen.schedule import Schedule, parse, problems
from m2gen.schedule.layer_knobs import Tiles
from m2gen.schedule.learned import Kernels, features, kernels_of
from m2gen.schedule.recipes import Recipe
from m2gen.spec import Objective
from m2gen.tune.study import decode_trial, read_journal
from m2gen.tune.trial import Trial
from m2gen.variant import Variant, parse_variant

FEWEST = 4
"""Fewest trials that say which of them is fast."""
UNKNOWN = math.log(2)
"""Logarithm of what a recipe is taken to cost on a workload that it was not timed on."""
DIGITS = 5
"""Digits of a millisecond that are kept: medians differ by a thousandth between sessions."""
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class TrialTimes:
    """Milliseconds of one schedule on one workload."""

    schedule: Schedule
    forward_ms: float
    backward_ms: float

    @property
    def ms(self) -> float:
        return self.forward_ms + self.backward_ms


@dataclass(frozen=True)
class Workplace:
    """One workload on one kind of GPU."""

    variant: Variant
    batch: int
    seq: int
    device: Device

    @property
    def name(self) -> str:
        return f"{self.variant.key} B{self.batch} S{self.seq}"

    @cached_property
    def bucket(self) -> Bucket:
        return bucket_of(self.batch, self.variant.total_heads, self.device.sm_count)

    @cached_property
    def having(self) -> dict[str, float]:
        """What the rule asks of it."""
        return features(self.variant, self.bucket)

    @cached_property
    def kernels(self) -> Kernels:
        return kernels_of(self.variant, self.device)


@dataclass(frozen=True)
class Lesson:
    """The trials of one workload."""

    at: Workplace
    trials: tuple[TrialTimes, ...]

    @cached_property
    def best_ms(self) -> float:
        """The time of the fastest trial, or of the fastest pair of kernels from two."""
        forwards, backwards = self._parts
        pairs = (
            one + other
            for (both, forward), one in forwards.items()
            for (b, backward), other in backwards.items()
            if both == b and _pairable(forward, backward)
        )
        return min((*pairs, *self._whole.values()))

    @cached_property
    def _whole(self) -> dict[Schedule, float]:
        return {trial.schedule: trial.ms for trial in self.trials}

    @cached_property
    def _parts(self) -> tuple[dict[Any, float], dict[Any, float]]:
        """Milliseconds of each forward and each backward, by its knobs and those that both have."""
        forwards: dict[Any, float] = {}
        backwards: dict[Any, float] = {}
        for trial in self.trials:
            one, other = _parts_of(trial.schedule)
            forwards[one] = min(trial.forward_ms, forwards.get(one, math.inf))
            backwards[other] = min(trial.backward_ms, backwards.get(other, math.inf))
        return forwards, backwards

    def ms(self, schedule: Schedule) -> float | None:
        """Return a schedule's time, that of its kernels in two trials if need be; None if they were not timed."""
        if schedule in self._whole:
            return self._whole[schedule]
        found = [times.get(part) for times, part in zip(self._parts, _parts_of(schedule), strict=True)]
        return None if found[0] is None or found[1] is None else found[0] + found[1]

    def cost(self, recipe: Recipe) -> float | None:
        """Return the logarithm of a recipe's time over the best, or ``UNKNOWN``; None if it is not valid here."""
        if recipe not in self._costs:
            schedule = recipe.at(self.at.variant, self.at.device)
            valid = not problems(self.at.variant, schedule, self.at.device)
            ms = self.ms(schedule) if valid else None
            self._costs[recipe] = math.log(ms / self.best_ms) if ms is not None else UNKNOWN if valid else None
        return self._costs[recipe]

    @cached_property
    def _costs(self) -> dict[Recipe, float | None]:
        return {}


@dataclass(frozen=True)
class _Header:
    """What a file says of a workload before its trials."""

    variant: str
    batch: PositiveInt
    seq: PositiveInt
    arch: str
    device: str
    sm_count: PositiveInt
    objective: Objective = Objective.TRAIN


_HEADER = TypeAdapter(_Header)
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError, ScheduleError)
_TIMED: TypeAdapter[tuple[str, float, float]] = TypeAdapter(tuple[str, Milliseconds, Milliseconds])


def _pairable(forward: Any, backward: Any) -> bool:
    """Whether a schedule can have both: a forward with slots has the tile of its backward."""
    slots = getattr(forward, "slots", False)
    return not slots or (forward.rows, forward.warps) == (backward.rows, backward.warps)


def _parts_of(schedule: Schedule) -> tuple[object, object]:
    both = schedule.family, schedule.interval, schedule.tanh, schedule.segments, schedule.slots
    return (both, schedule.forward), (both, schedule.backward)


def read(paths: Iterable[Path]) -> tuple[Lesson, ...]:
    """Return the lessons of journals and compact files, of each workload one, in order of names.

    Trials that failed, schedules that are not valid (any more), searches for inference, journals that do not say on
    what GPU they were made, and fewer than ``FEWEST`` trials teach nothing. Of a schedule's times in several files the
    shortest counts. Raises TuneError, and UsageError for a file that cannot be read.
    """
    found: dict[Workplace, dict[Schedule, TrialTimes]] = {}
    for path in paths:
        for at, timed in _read_one(path).items():
            known = found.setdefault(at, {})
            for trial in timed.values():
                schedule = trial.schedule.on(at.device)  # some are from before this GPU's clamp was used
                if problems(at.variant, schedule, at.device):
                    continue
                same = known.get(schedule, trial)
                known[schedule] = min(replace(trial, schedule=schedule), same, key=lambda t: (t.ms, t.forward_ms))
    enough = {at: by for at, by in found.items() if len(by) >= FEWEST}
    lessons = [Lesson(at, tuple(by[s] for s in sorted(by, key=lambda s: s.slug))) for at, by in enough.items()]
    return tuple(sorted(lessons, key=lambda lesson: (lesson.at.device.arch, lesson.at.device.name, lesson.at.name)))


def _read_one(path: Path) -> dict[Workplace, dict[Schedule, TrialTimes]]:
    """Return the trials of one file: the last of each schedule, as in a search; a torn last line is none."""
    with os_errors_as(UsageError, f"{path} must be readable"):
        *lines, _torn = path.read_bytes().split(b"\n")
    return _of_journal(path) if lines and b'"op_code"' in lines[0] else _of_lines(path, lines)


def _of_journal(path: Path) -> dict[Workplace, dict[Schedule, TrialTimes]]:
    found: dict[Workplace, dict[Schedule, TrialTimes]] = {}
    try:
        for header, trials in read_journal(path):
            at = _workplace(header)
            if at is not None:
                _put(found.setdefault(at, {}), map(_times_of, trials))
    except _UNREADABLE as error:
        what = f"got {type(error).__name__}: {error}"
        raise TuneError(f"{path} must be a journal of searches of this m2gen, {what[:200]}") from error
    return found


def _of_lines(path: Path, lines: Iterable[bytes]) -> dict[Workplace, dict[Schedule, TrialTimes]]:
    found: dict[Workplace, dict[Schedule, TrialTimes]] = {}
    trials: dict[Schedule, TrialTimes] | None = None
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if header := value.get("search") or value.get("workload"):
                at = _workplace(header)
                trials = {} if at is None else found.setdefault(at, {})
            elif trials is None:
                raise ValueError("no workload before it")
            elif "begun" not in value:
                _put(trials, [_timed(value)])
        except _UNREADABLE as error:
            what = "a line of a journal or of a file of --trials"
            raise TuneError(f"{path}:{number} must be {what}, got {line[:40].decode(errors='replace')!r}") from error
    return found


def _put(into: dict[Schedule, TrialTimes], trials: Iterable[tuple[Schedule, TrialTimes | None]]) -> None:
    for schedule, timed in trials:
        into.pop(schedule, None)
        into |= {} if timed is None else {schedule: timed}


def _workplace(given: Any) -> Workplace | None:
    if "arch" not in given or "kernel" in given:  # a kernel around a recurrence has defaults of its own
        return None
    header = _HEADER.validate_python(given)
    if header.objective is not Objective.TRAIN:
        return None
    device = replace(limits(header.arch), name=header.device, sm_count=header.sm_count)
    return Workplace(parse_variant(header.variant), header.batch, header.seq, device)


def _timed(value: Mapping[str, Any]) -> tuple[Schedule, TrialTimes | None]:
    """Return the schedule of a line and its times, which a trial that failed, or was not for training, has not."""
    if "timed" in value:
        slug, forward, backward = _TIMED.validate_python(value["timed"])
        return parse(slug), TrialTimes(parse(slug), forward, backward)
    return _times_of(decode_trial(value["trial"]))


def _times_of(trial: Trial) -> tuple[Schedule, TrialTimes | None]:
    schedule = trial.schedule
    if isinstance(schedule, Tiles):
        raise ValueError(f"{schedule.slug} must be a schedule of a recurrence")
    if trial.failure or trial.samples is None or not trial.samples.backward_ms:
        return schedule, None
    forward, backward = median(trial.samples.forward_ms), median(trial.samples.backward_ms)
    return schedule, TrialTimes(schedule, round(forward, DIGITS), round(backward, DIGITS))


def written(lessons: Iterable[Lesson]) -> str:
    """Return the compact file of lessons."""
    lines: list[dict[str, object]] = []
    for lesson in lessons:
        at = lesson.at
        where = {"arch": at.device.arch, "device": at.device.name, "sm_count": at.device.sm_count}
        lines.append({"workload": {"variant": at.variant.key, "batch": at.batch, "seq": at.seq, **where}})
        lines += [{"timed": [t.schedule.slug, t.forward_ms, t.backward_ms]} for t in lesson.trials]
    return "".join(json.dumps(line) + "\n" for line in lines)
