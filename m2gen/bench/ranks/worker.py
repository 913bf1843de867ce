"""One rank of a job: checks each case with the others, then times it."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, distributed

from m2gen.bench.ranks.check import DTYPES, Expected, checked_size, expected, make_model
from m2gen.bench.ranks.entries import Link, RankCase, RankDocument, RankJob, RankRow, Shape, read, write
from m2gen.bench.ranks.forms import ForRanks, OverRanks, over_ranks
from m2gen.bench.ranks.kinds import Form
from m2gen.bench.ranks.launch import write_error
from m2gen.bench.ranks.pulse import Pulse
from m2gen.bench.ranks.timing import (
    Collective,
    captured,
    link,
    peak_bytes,
    recorded,
    recurrence_of,
    repeat,
    slowest_ms,
    together,
)
from m2gen.db import Environment
from m2gen.kernels.compile import load_module


def main(folder: Path, rank: int) -> NoReturn:
    """Do a job as one of its ranks, and end the process; the first one writes results after each case."""
    faulthandler.enable()
    pulse = Pulse(folder, rank)
    try:
        job = read(folder / "job.json", RankJob)
        _join(folder, job, rank)
        _Rank(job, folder, rank, pulse).serve()
    except BaseException as error:
        lines = f"{type(error).__name__}: {error}".splitlines()
        with contextlib.suppress(OSError):  # of a full disk, say: the status says that it failed
            write_error(folder, rank, lines[0])
        with contextlib.suppress(OSError):
            traceback.print_exc()
        _leave(1)
    _leave(0)


def _leave(status: int) -> NoReturn:
    """End without the interpreter's last steps, in which a backend's threads may wait for other ranks, or abort."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _join(folder: Path, job: RankJob, rank: int) -> None:
    if job.cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    distributed.init_process_group(
        "nccl" if job.cuda else "gloo",
        init_method=f"file://{folder / 'store'}",
        timeout=timedelta(seconds=job.quiet_seconds),
        device_id=torch.device("cuda", rank) if job.cuda else None,  # or collectives guess which GPU is theirs
        rank=rank,
        world_size=job.ranks,
    )


class _Rank:
    """The cases of a job on one rank."""

    def __init__(self, job: RankJob, folder: Path, rank: int, pulse: Pulse) -> None:
        self.job, self.folder, self.rank, self.pulse = job, folder, rank, pulse
        self.device = torch.device("cuda", rank) if job.cuda else torch.device("cpu")
        path = Path(job.package)
        name = f"m2gen_package_{path.name}"
        self.package: Any = load_module(path / "__init__.py", name)
        parallel = load_module(path / "parallel" / "__init__.py", f"{name}.parallel")
        self.for_ranks = ForRanks(parallel, importlib.import_module(f"{name}.sharding"))
        fused: Any = importlib.import_module(f"{name}.fused")
        fused.LEAST_TOKENS = 1  # so that checks lay rows out as steps of more tokens do
        self.known: dict[tuple[str, int, int, bool], Expected] = {}

    def serve(self) -> None:
        """Do every case."""
        self.for_ranks.parallel.check_ranks_agree(distributed.group.WORLD)
        backend = "nccl" if self.job.cuda else "gloo"
        document = RankDocument(_environment(self.device), backend, Link(*link(self.device, 10)), self.job.cases)
        for case in self.job.cases:
            document = replace(document, rows=(*document.rows, self._row(case)))
            if self.rank == 0:
                write(self.folder / "results.json", document)
        together(self.device)  # none leaves what another still waits in

    def _row(self, case: RankCase) -> RankRow:
        row = RankRow(case.shape.name, case.form, case.batch, case.seq, 1 if case.form is Form.ONE else self.job.ranks)
        parts = self.job.ranks if case.form.shares_tokens else 1
        if case.seq % parts:
            return replace(row, unfit=f"{case.seq} tokens of a sequence must be divided by {parts} ranks")
        if case.form is Form.FSDP and case.batch % self.job.ranks:
            return replace(row, unfit=f"{case.batch} sequences must be divided by {self.job.ranks} ranks")
        self.pulse.at(f"checks {_title(case)}")
        try:
            self._over(case)
        except ValueError as error:  # the same on every rank
            return replace(row, unfit=str(error).splitlines()[0])
        for packed in (False, True) if case.packs else (False,):
            ratio, name = self._expected(case, packed).judged(self._over(case))
            label = f"{name}, packed" if packed else name
            if not ratio <= 1:
                return replace(row, failure=f"{label} must be within its budget, got {ratio:.3g} of it")
            if row.worst is None or ratio > row.worst:
                row = replace(row, worst=ratio, worst_tensor=label)
        self.pulse.at(f"times {_title(case)}")
        return self._timed(case, row)

    def _over(self, case: RankCase) -> OverRanks:
        return over_ranks(case.form, self._model(case.shape), self.for_ranks)

    def _model(self, shape: Shape) -> Any:
        return make_model(self.package, shape, self.job.cuda, self.job.seed)

    def _expected(self, case: RankCase, packed: bool) -> Expected:
        key = (case.shape.name, *checked_size(case, self.job.ranks), packed)
        if key not in self.known:
            self.known[key] = self._found(case, packed)
        return self.known[key]

    def _found(self, case: RankCase, packed: bool) -> Expected:
        """Return what one rank gives: each GPU computes it, of CPUs the first for all, which share their cores."""
        found: list[Any] = [None]
        if self.job.cuda or self.rank == 0:
            found = [expected(partial(self._model, case.shape), case, self.job.ranks, packed=packed)]
        if not self.job.cuda:
            distributed.broadcast_object_list(found)
        (known,) = found
        return cast(Expected, known)

    def _timed(self, case: RankCase, row: RankRow) -> RankRow:
        over = self._over(case)
        seqs, tokens = (over.parts, 1) if case.form is Form.FSDP else (1, over.parts)
        size = (case.batch // seqs, case.seq // tokens, case.shape.hidden_size)
        made: dict[str, Any] = {"device": self.device, "dtype": DTYPES[case.shape.dtype]}
        x, weights = (torch.randn(size, **made) for _ in range(2))
        step, repeats = _step(over, x.requires_grad_(), weights), self.job.repeats
        if not repeats:
            step()  # the first of its kind, which ranks also compare
            return _counted(row, step)[0]
        forward_ms = slowest_ms(lambda: _forward(over, x), self.device, repeats)
        step_ms = slowest_ms(step, self.device, repeats)
        peak = peak_bytes(step, self.device)
        if self.job.cuda and case.form.captured:
            row = self._captured(step, row)
        row, calls = _counted(row, step)
        alone = None
        if case.form is not Form.PIPELINE:
            alone = slowest_ms(partial(repeat, calls), self.device, repeats) if calls else 0.0
        recurrence = recurrence_of(self.package, *case.recurrence(self.job.ranks), self.device)
        return replace(
            row,
            forward_ms=forward_ms,
            step_ms=step_ms,
            recurrence_ms=slowest_ms(recurrence, self.device, repeats),
            communication_ms=alone,
            peak_bytes=peak,
        )

    def _captured(self, step: Callable[[], None], row: RankRow) -> RankRow:
        """Return a row with the time of the step as a CUDA graph."""
        replay, why = captured(step, self.device)
        if replay is None:
            return replace(row, uncaptured=why)
        return replace(row, captured_ms=slowest_ms(replay, self.device, self.job.repeats))


def _title(case: RankCase) -> str:
    return f"{case.shape.name} {case.form} B{case.batch} S{case.seq}"


def _forward(over: OverRanks, x: Tensor) -> Tensor:
    with torch.no_grad():
        return over.call(x)


def _counted(row: RankRow, step: Callable[[], None]) -> tuple[RankRow, list[Collective]]:
    """Return a row with what a step sends, and its collectives."""
    with recorded() as calls:
        step()
    return replace(row, collectives=len(calls), sent_bytes=sum(call.sent_bytes for call in calls)), calls


def _step(over: OverRanks, x: Tensor, weights: Tensor) -> Callable[[], None]:
    def step() -> None:
        over.module.zero_grad()
        x.grad = None
        torch.autograd.backward(over.call(x), weights)
        over.sum_gradients()

    return step


def _environment(device: torch.device) -> Environment | None:
    from m2gen.device import detect
    from m2gen.measure.context import environment

    found = detect() if device.type == "cuda" else None
    return None if found is None else environment(found)
