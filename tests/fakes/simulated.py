"""A GPU whose every candidate does what a script says: times, noise, hangs, crashes, wrong results. No torch here.

The script is a JSON file that ``M2GEN_SIMULATION`` names, so that worker processes find it: lists of slugs under
``hang``, ``crash``, ``sticky``, ``wrong``, ``full``, ``unlaunchable`` and ``spilling``, a part of noise for ``noisy``
ones, milliseconds for some under ``ms`` or for all under ``every``, bytes for some under ``peak``, the seconds that a
step ``takes``. Whatever reaches the GPU or the compiler is a line of the file ``log``.

Time is simulated, too: budgets pass as tasks say that they took, and a task is out of time once it hangs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2gen.bucket import bucket_of
from m2gen.db import Environment, Failure, Reason, TensorError
from m2gen.device import TARGETS, Device
from m2gen.measure.gpu import raised
from m2gen.measure.workers import Lost, Service, Worker
from m2gen.schedule import AnySchedule, Family, learned
from m2gen.schedule.layer_knobs import Tiles
from m2gen.tune.gpu import GPU
from m2gen.tune.services import Services, TuningContext
from m2gen.tune.trial import Compiled, CompileTask, Measurement, Samples, Step, Task

if TYPE_CHECKING:
    import pytest

VARIABLE = "M2GEN_SIMULATION"
DEVICE = replace(TARGETS["sm_90"], name="Simulated GPU")
ENVIRONMENT = Environment("sm_90", DEVICE.name, DEVICE.sm_count, "1.0", "2.11", "3.6", "12.9")
PEAK = 1000
"""Bytes of candidates that the script does not mention."""
HANGS = "hangs"
"""Line in the log for a step that never ends."""


def place(folder: Path, patch: pytest.MonkeyPatch, spec: str) -> Path:
    """Work in a folder with a cache of its own, no script yet, and a spec, whose path is returned.

    Variants are served by the defaults of families, around which searches are simulated, whatever the learned rule is.
    """
    patch.chdir(folder)
    patch.setattr(learned, "rules", dict)
    patch.setenv("M2GEN_CACHE_DIR", str(folder / "cache"))
    patch.setenv(VARIABLE, "")
    (folder / "one.yaml").write_text(spec, encoding="utf-8")
    return folder / "one.yaml"


def script(path: Path, **says: Any) -> Path:
    """Write a script, make it that of this process and its children, and return the path of its log."""
    log = path.with_suffix(".log")
    path.write_text(json.dumps({"log": str(log), **says}), encoding="utf-8")
    os.environ[VARIABLE] = str(path)
    return log


def lines(log: Path) -> list[str]:
    """Return the log of steps that reached the compiler and the GPU."""
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def _script() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(os.environ[VARIABLE]).read_text(encoding="utf-8"))
    return found


def _note(says: dict[str, Any], what: str, schedule: AnySchedule) -> None:
    with open(says["log"], "a", encoding="utf-8") as stream:
        stream.write(f"{what} {schedule.slug}\n")


def milliseconds(schedule: AnySchedule, base: AnySchedule) -> tuple[float, float]:
    """Return times of forward and backward that grow with the distance from an optimum that is not the default.

    That of tiles has twice the default's first knob and 2 warps.
    """

    def apart(value: int, best: int) -> int:
        return abs(value.bit_length() - best.bit_length())

    if isinstance(schedule, Tiles) or isinstance(base, Tiles):
        first, warps = next(iter(base.AXES)), getattr(schedule, "warps", 2)
        far = apart(getattr(schedule, first), 2 * getattr(base, first)) + apart(warps, 2)
        return 0.1 + 0.02 * far, 0.1 + 0.01 * far
    forward, backward = schedule.forward, schedule.backward
    family = 0.05 if schedule.family is Family.MMA else 0.0
    one = 1.0 + 0.1 * apart(forward.rows, 16) + 0.15 * apart(forward.warps, 1) + 0.05 * apart(forward.unroll, 8)
    other = 2.0 + 0.3 * apart(backward.rows, 16) + 0.2 * apart(backward.warps, 1) + 0.2 * apart(backward.chunk, 4)
    shared = 0.05 * apart(schedule.interval, 32) + (0.5 if schedule.tanh != base.tanh else 0.0)
    return one + family + shared, other + shared


class AcceleratorError(RuntimeError):
    """The error that torch raises for a kernel, which stays with the process."""


_ERRORS: list[AcceleratorError] = []
"""Errors of this process, none of whose later calls works."""


def measure(task: Task) -> Measurement:
    """Do one step as the script says."""
    says = _script()
    if task.step is Step.PREPARE:
        return Measurement()
    _note(says, str(task.step), task.schedule)
    found = _step(says, task)
    return replace(found, seconds=says.get("takes", 0.01))


def _step(says: dict[str, Any], task: Task) -> Measurement:
    slug = task.schedule.slug
    if slug in says.get("full", ()):
        return Measurement(stopped="No space left on device")
    if slug in says.get("sticky", ()):
        _ERRORS.append(AcceleratorError("CUDA error: an illegal memory access was encountered"))
    for error in _ERRORS:
        return Measurement(failure=raised(error))
    if slug in says.get("hang", ()):
        _note(says, HANGS, task.schedule)
        time.sleep(1e6)
    if slug in says.get("crash", ()):
        os.kill(os.getpid(), signal.SIGSEGV)
    if slug in says.get("memory", ()):
        return Measurement(failure=Failure(Reason.MEMORY, "must fit the GPU, got torch.OutOfMemoryError"))
    unseen = task.step in (Step.HELD_OUT, Step.VERIFY)
    if slug in says.get("wrong", ()) or (unseen and slug in says.get("wrong_held_out", ())):
        return Measurement(failure=Failure(Reason.WRONG, "dq of plain must be within 1e-3, got 2e-1"))
    errors = (TensorError("dq", 1e-4, 1e-3), TensorError("y", 2e-4, 1e-3))
    if unseen:
        return Measurement((TensorError("dq", 3e-4, 1e-3),))
    return Measurement(errors if task.step is Step.SCREEN else (), _samples(says, task))


def _samples(says: dict[str, Any], task: Task) -> Samples:
    slug = task.schedule.slug
    seed = int.from_bytes(hashlib.sha256(f"{slug} {task.step}".encode()).digest()[:4], "big")
    draw = random.Random(seed + len(lines(Path(says["log"]))))
    forward, backward = milliseconds(task.schedule, task.subject.tunable.default(task.subject.device))
    if slug in says.get("ms", {}):
        forward = backward = says["ms"][slug] / 2
    if "every" in says:
        forward = backward = says["every"] / 2
    noise = says.get("noisy", {}).get(slug, 0.002)

    def each(middle: float) -> tuple[float, ...]:
        return tuple(middle * (1 + noise * draw.uniform(-1, 1)) for _ in range(10))

    backwards = each(backward) if task.subject.tunable.times_backward(task.subject.objective) else ()
    return Samples(each(forward), backwards, says.get("peak", {}).get(slug, PEAK))


def compile_(task: CompileTask) -> Compiled:
    """Compile as the script says: every candidate has its own machine code, but those under ``same`` one name."""
    says, slug = _script(), task.schedule.slug
    _note(says, "compile", task.schedule)
    if slug in says.get("full", ()):
        return Compiled(stopped="No space left on device")
    if slug in says.get("unlaunchable", ()):
        return Compiled(failure=Failure(Reason.LAUNCH, "shared memory must be at most 1 byte, got 2"), seconds=0.01)
    spills = 8 if slug in says.get("spilling", ()) else 0
    return Compiled(64, spills, 1024, says.get("same", {}).get(slug, slug), seconds=0.01)


def _compile_lost(task: CompileTask, lost: Lost) -> Compiled:
    return Compiled(failure=Failure(Reason.LAUNCH, lost.reason))


def nothing() -> None:
    """Prepare nothing."""


class Inline(Worker[Any, Any]):
    """A worker that does its task at once, in this process."""

    def begin(self, task: Any) -> None:
        self.task = task
        self.pipe, theirs = Pipe()
        theirs.send(self._service.serve(task))
        theirs.close()

    @property
    def left(self) -> float:
        return 1.0

    def collect(self) -> tuple[Any, Any]:
        task, result = super().collect()
        TIME.passes(result.seconds)
        return task, result

    def stop(self) -> None:
        self.task = None


class Time:
    """A clock that shows the seconds which tasks took, and jumps beyond every limit when one begins to hang."""

    def __init__(self) -> None:
        self._passed = 0.0

    def passes(self, seconds: float) -> None:
        """Be later."""
        self._passed += seconds

    def __call__(self) -> float:
        log = Path(_script()["log"])
        return self._passed + 2 * SECONDS * sum(line.startswith(HANGS) for line in lines(log))


TIME = Time()
SECONDS = 0.5
"""Longest that a step may take; how often it is looked whether one hangs."""


def context(device: Device = DEVICE, *, inline: bool = True, compilers: int = 2) -> TuningContext:
    """Return a context whose GPU is simulated, in this process or in workers of its own, and lost as a real one is."""
    measuring = replace(GPU, serve=measure, prepare=nothing, seconds=SECONDS, now=TIME)
    compiling: Service[CompileTask, Compiled] = Service(compile_, nothing, 1e6, _compile_lost, now=TIME)
    services = Services(compiling, measuring, compilers, Inline if inline else Worker)
    environment = replace(ENVIRONMENT, device=device.name, sm_count=device.sm_count)
    return TuningContext(device, environment, f"simulated-{os.getpid()}", "simulated:0", services, TIME)


__all__ = ["DEVICE", "bucket_of", "context", "lines", "measure", "place", "script"]
