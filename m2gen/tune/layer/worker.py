"""Check, time and compile a candidate for a kernel around a recurrence, in worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch

from m2gen.measure.checks import Verdict, verdict_of
from m2gen.measure.clock import Clock
from m2gen.schedule.layer import AnyTiles
from m2gen.tune.clock import captured
from m2gen.tune.layer.calls import AroundCall, load
from m2gen.tune.layer.exact import layer_oracle
from m2gen.tune.layer.operands import LayerCase, LayerSizes, Operands, checked_cases, draw, timed_case
from m2gen.tune.subject import Subject
from m2gen.tune.trial import Step
from m2gen.verify import Oracle, TensorResult, judge
from m2gen.verify.oracle import same
from m2gen.verify.subject import poisoned


def asked_of(subject: Subject, step: Step) -> tuple[LayerCase, ...]:
    """Return the calls on which a step checks a candidate."""
    assert subject.kernel is not None
    usual, held_out = (
        checked_cases(subject.kernel, approximate=subject.device.is_nvidia, held_out=late) for late in (False, True)
    )
    return {Step.HELD_OUT: held_out, Step.VERIFY: usual + held_out}.get(step, usual)


def prepare(subject: Subject, device: torch.device) -> None:
    """Compute the oracle's answers before the first candidate needs them."""
    for case in asked_of(subject, Step.SCREEN):
        _answered(subject, case, device)
    with poisoned():  # the first use imports a compiler
        pass


def check_tiles(subject: Subject, tiles: AnyTiles, cases: Iterable[LayerCase], device: torch.device) -> Verdict:
    """Judge a kernel by float64 on every call, and whether its bits repeat; the first failure ends the check."""
    module = load(subject.variant, tiles)

    def judged() -> Iterator[tuple[str, TensorResult]]:
        for case in cases:
            operands, known = _answered(subject, case, device)
            call = AroundCall(tiles.family, module, LayerSizes(subject.variant), case, operands)
            with poisoned():
                first = call.results()
                again = call.results()
            for result in (*judge(first, known), *same(again, first)):
                yield case.name, result

    return verdict_of(judged())


def capture(subject: Subject, tiles: AnyTiles, seed: int, device: torch.device) -> Clock:
    """Capture a kernel on the problem of the search."""
    return captured(_timed_call(subject, tiles, _timed_operands(subject, seed, device), seed))


def calls_of(subject: Subject, tiles: AnyTiles) -> Iterator[AroundCall]:
    """Yield the call that is timed, then those of the check, on meta tensors."""
    module, meta = load(subject.variant, tiles), torch.device("meta")
    yield _timed_call(subject, tiles, _timed_operands(subject, 0, meta), 0)
    for case in asked_of(subject, Step.VERIFY):
        operands = draw(tiles.family, subject.variant, case, meta)
        yield AroundCall(tiles.family, module, LayerSizes(subject.variant), case, operands)


def launched(subject: Subject, tiles: AnyTiles) -> Any:
    """Return how a module's kernels are launched."""
    return load(subject.variant, tiles).LAUNCH


def _timed_call(subject: Subject, tiles: AnyTiles, operands: Operands, seed: int) -> AroundCall:
    trains = subject.tunable.times_backward(subject.objective)
    module = load(subject.variant, tiles)
    return AroundCall(tiles.family, module, LayerSizes(subject.variant), _timed(subject, seed), operands, trains)


def _timed(subject: Subject, seed: int) -> LayerCase:
    return timed_case(subject.batch, subject.seq, approximate=subject.device.is_nvidia, seed=seed)


@lru_cache(maxsize=1)
def _timed_operands(subject: Subject, seed: int, device: torch.device) -> Operands:
    assert subject.kernel is not None
    return draw(subject.kernel, subject.variant, _timed(subject, seed), device)


@lru_cache(maxsize=8)
def _answered(subject: Subject, case: LayerCase, device: torch.device) -> tuple[Operands, Oracle]:
    assert subject.kernel is not None
    operands = draw(subject.kernel, subject.variant, case, device)
    return operands, layer_oracle(subject.kernel, subject.variant, case, operands)
