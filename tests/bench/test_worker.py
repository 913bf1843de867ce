"""The benchmark's worker on a stand-in GPU, which checks, captures and samples each kind of implementation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, pairwise, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import REPLAY_MS, stand_in_gpu
from support import build_package, make_schedule, make_variant

from m2gen.bench import check, clock, operators, serving, worker
from m2gen.bench.entries import BenchWorkload, Entry, Implementation, TimerResult, TimerTask, serving_workloads
from m2gen.bench.kinds import Call, Kind, TimerStep
from m2gen.cache import materialise
from m2gen.db import Failure, Reason
from m2gen.measure import gpu
from m2gen.measure.clock import Replay
from m2gen.measure.workers import Lost, Worker

VARIANT = make_variant(heads=(1, 1, 2, 2, 2))
GATED = make_variant(heads=(1, 1, 2, 2, 2), gate="softplus")
SCHEDULE = make_schedule("atomic", interval=4)
SEQUENCE = BenchWorkload("base", VARIANT, 2, 6)
TOKEN = BenchWorkload("base", VARIANT, 3, 1, Call.DECODE)
NARROW = replace(TOKEN, call=Call.DECODE_BF16)
POOLED, ORDERED = (replace(TOKEN, call=call) for call in (Call.DECODE_POOL, Call.DECODE_ORDERED))
PROMPTS = [BenchWorkload("base", VARIANT, 3, 6, call, packed=True) for call in (Call.PREFILL, Call.PREFILL_POOL)]
DRAFTS = [BenchWorkload("base", VARIANT, 3, 2, call) for call in (Call.SINGLES, Call.STEPS)]
LOOPS = {Kind.EAGER: Implementation(Kind.EAGER, SCHEDULE), Kind.COMPILED: Implementation(Kind.COMPILED, SCHEDULE)}


@pytest.fixture(scope="module")
def generated() -> Implementation:
    """Return the implementation that is a package of two variants."""
    package = build_package("timed", [VARIANT, GATED], SCHEDULE)
    return Implementation(Kind.DEFAULT, SCHEDULE, "default", materialise("packages/timed", package.files))


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in_gpu(monkeypatch)
    monkeypatch.setattr(gpu, "TORCH_DEVICE", "cpu")
    monkeypatch.setattr(check, "STEPS", 6)
    monkeypatch.setattr(clock, "CALLS", 1)
    monkeypatch.setattr(clock, "TIMINGS", 2)
    monkeypatch.setattr(clock, "WARM_UPS", 1)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    worker._CLOCKS.clear()
    yield
    worker._CLOCKS.clear()


def served(
    implementation: Implementation, workload: BenchWorkload = SEQUENCE, step: TimerStep = TimerStep.ADMIT
) -> TimerResult:
    """Return the result of the worker's function."""
    return worker.serve(TimerTask(Entry(workload, implementation), step))


@pytest.mark.parametrize("gated", [False, True], ids=["given", "softplus"])
@pytest.mark.parametrize(
    "workload", [SEQUENCE, TOKEN, NARROW, POOLED, ORDERED, *PROMPTS, *DRAFTS], ids=lambda w: str(w.call)
)
def test_a_generated_operator(generated: Implementation, workload: BenchWorkload, gated: bool) -> None:
    """Admitted with its memory and its host's time, then sampled; where engines serve there is no backward."""
    workload = replace(workload, variant=GATED if gated else VARIANT)
    admitted = served(generated, workload)
    assert admitted.failure is None
    assert admitted.extra_bytes == 1000
    assert admitted.host_us is not None
    assert admitted.host_us > 0
    sampled = served(generated, workload, TimerStep.SAMPLE)
    assert sampled.forward_ms == (REPLAY_MS,) * clock.MOST
    steps = clock.MOST if workload.call is Call.SEQUENCE else 0
    assert sampled.step_ms == (2 * REPLAY_MS,) * steps, "the forward that saves, and the backward"


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("workload", [SEQUENCE, TOKEN, NARROW], ids=lambda w: str(w.call))
def test_loops_of_pytorch(kind: Kind, workload: BenchWorkload) -> None:
    """The reference passes the check of the kernels, as it is and compiled in one graph."""
    implementation = LOOPS[kind]
    admitted = served(implementation, workload)
    assert admitted.failure is None
    assert admitted.host_us is None
    assert served(implementation, workload, TimerStep.SAMPLE).forward_ms


def test_loops_are_timed_on_fewer_steps() -> None:
    """Loops run only as many steps as their kind allows, and the check of a compiled one has that size."""
    long = BenchWorkload("base", VARIANT, 2, 4096)
    steps = {kind: Entry(long, implementation).steps for kind, implementation in LOOPS.items()}
    assert steps == {Kind.EAGER: 128, Kind.COMPILED: 8}
    (asked,) = check._cases(Entry(long, LOOPS[Kind.COMPILED]))
    assert (asked.case.problem.batch, asked.case.problem.seq) == (2, 8)


def test_state_of_decoding_is_judged(generated: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that leaves the state as it was is named, and so is none that passes."""
    module = operators.package_at(generated.package)
    right = module.m2rnn_step

    def forgetful(*operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, _ = right(*operands[:5], operands[5].clone())
        return y, operands[5]

    check._failure.cache_clear()
    monkeypatch.setattr(module, "m2rnn_step", forgetful)
    failure = served(generated, TOKEN).failure
    check._failure.cache_clear()
    assert failure is not None
    assert failure.reason is Reason.WRONG
    assert failure.message.startswith("y of decoding must be within")


def without(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    """Return what makes an operator see another value of an argument."""

    def made(right: Any) -> Any:
        return lambda *operands, **given: right(*operands, **{**given, name: value(given[name])})

    return made


@pytest.mark.parametrize(
    ("workload", "function", "wrong", "message"),
    [
        (DRAFTS[1], "m2rnn_steps", without("accepted", torch.ones_like), "y of decoding"),
        (DRAFTS[1], "m2rnn_steps", without("indices", lambda table: table.flip(1)), "y of decoding"),
        (DRAFTS[0], "m2rnn_step", without("out_indices", torch.zeros_like), "y of decoding"),
        (PROMPTS[1], "m2rnn", without("has_initial_state", torch.zeros_like), "y of prompts"),
        (PROMPTS[1], "m2rnn", without("has_initial_state", torch.ones_like), "y of new_prompts"),
        (PROMPTS[1], "m2rnn", without("out_indices", lambda slots: slots.roll(1)), "state of prompts"),
        (PROMPTS[0], "m2rnn", without("initial_state", lambda state: None), "y of prompts"),
    ],
)
def test_slots_of_engines_are_judged(
    generated: Implementation, workload, function, wrong, message, monkeypatch
) -> None:
    """A call that starts from another state than it should, or leaves one elsewhere, is wrong."""
    module = operators.package_at(generated.package)
    check._failure.cache_clear()
    monkeypatch.setattr(module, function, wrong(getattr(module, function)))
    failure = served(generated, workload).failure
    check._failure.cache_clear()
    assert failure is not None
    assert failure.reason is Reason.WRONG
    assert failure.message.startswith(f"{message} must be within")


@pytest.mark.parametrize("call", [Call.SINGLES, Call.STEPS])
def test_drafts_of_a_call(generated: Implementation, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tokens at once are one call of the package; one by one they are four, through the same slots."""
    module = operators.package_at(generated.package)
    calls: list[dict[str, torch.Tensor]] = []

    def noted(right: Any) -> Any:
        return lambda *operands, **given: calls.append(given) or right(*operands, **given)

    for name in ("m2rnn_step", "m2rnn_steps"):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    _, workload = serving_workloads("base", VARIANT, 3)[-2:]
    workload = replace(workload, call=call)
    run = serving.served(generated, workload, clock._drawn(workload, torch.device("cpu")))
    y = torch.stack([*run()], 1)
    assert y.shape == (3, 4, 2, VARIANT.head_dim)
    assert bool(y.isfinite().all())
    if call is Call.STEPS:
        (given,) = calls
        assert given["indices"].unique().numel() == 3 * 4
        assert given["accepted"].tolist() == [1, 1, 1]
    else:
        assert len(calls) == 4
        for before, after in pairwise(calls):
            assert torch.equal(after["indices"], before["out_indices"])


PEERS = """
def right(variant):
    from m2gen.runtime.reference import m2rnn
    return lambda *operands, clip: m2rnn(*operands, clip=clip)

def unclipped(variant):
    from m2gen.runtime.reference import m2rnn
    return lambda *operands, clip: m2rnn(*operands, clip=None)

def other(variant):
    return None

def missing(variant):
    import nobody_has_this

def broken(variant):
    raise RuntimeError("no luck")
"""


@pytest.mark.parametrize(
    ("function", "reason", "message"),
    [
        ("right", None, ""),
        ("unclipped", Reason.WRONG, "of plain must be within"),
        ("other", Reason.LAUNCH, "does not serve"),
        ("missing", Reason.LAUNCH, "nobody_has_this"),
        ("broken", Reason.CRASH, "no luck"),
    ],
)
def test_peers(
    function: str, reason: Reason | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter in the working directory is found; one that is wrong, serves others or breaks is never timed."""
    (tmp_path / "some_peer.py").write_text(PEERS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = served(Implementation(Kind.PEER, SCHEDULE, f"some_peer:{function}", label="peer"))
    assert (found.failure and found.failure.reason) == reason
    if found.failure is not None:
        assert message in found.failure.message


@pytest.mark.parametrize(("function", "timed"), [("right", True), ("unclipped", True), ("missing", False)])
def test_timing_only(function: str, timed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is wrong is timed when that is asked for, with the reason; one that cannot run is not."""
    (tmp_path / "wrong_peer.py").write_text(PEERS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    peer = Implementation(Kind.PEER, SCHEDULE, f"wrong_peer:{function}", label="peer", timing_only=True)
    admitted = served(peer)
    assert (admitted.failure is None) is timed
    assert (admitted.unverified is not None) is (function == "unclipped")
    assert bool(served(peer, step=TimerStep.SAMPLE).forward_ms) is timed


def test_clocks_of_one_workload_are_kept(generated: Implementation) -> None:
    """Rounds reuse captures; another workload drops them."""
    served(generated)
    served(generated, step=TimerStep.SAMPLE)
    assert list(worker._CLOCKS) == [Entry(SEQUENCE, generated)]
    served(generated, TOKEN)
    assert list(worker._CLOCKS) == [Entry(TOKEN, generated)]


def _dies(task: TimerTask) -> TimerResult:
    raise SystemExit(3)


def _hangs(task: TimerTask) -> TimerResult:
    import time

    time.sleep(1e6)
    return TimerResult()


NEVER, AT_ONCE = repeat(0.0), count(step=3600.0)
"""Clocks by which a task is never out of time, and is when it is first looked for."""


@pytest.mark.parametrize(("serve", "clock", "reason"), [(_dies, NEVER, Reason.CRASH), (_hangs, AT_ONCE, Reason.HANG)])
def test_an_implementation_that_takes_its_process_down(serve, clock, reason, generated: Implementation) -> None:
    """A crash and a hang are that implementation's failure, and the next one gets a new process."""
    timer = Worker(replace(worker.GPU, serve=serve, seconds=60.0, now=partial(next, clock)))
    try:
        for _ in range(2 if reason is Reason.CRASH else 1):
            found = timer.ask(TimerTask(Entry(SEQUENCE, generated), TimerStep.ADMIT))
            assert found.failure is not None
            assert found.failure.reason is reason
    finally:
        timer.stop()


def test_a_cuda_error_makes_a_process_suspect() -> None:
    """The context of an illegal access serves nobody else."""
    assert worker.GPU.suspect(TimerResult(failure=Failure(Reason.CRASH, "illegal access")))
    assert not worker.GPU.suspect(TimerResult(failure=Failure(Reason.WRONG, "y")))
    assert worker.GPU.lost(TimerTask(Entry(SEQUENCE, LOOPS[Kind.EAGER]), TimerStep.ADMIT), Lost("x")).failure


def test_a_replay_keeps_what_its_graph_reads() -> None:
    """A graph holds addresses and no memory: operands that nobody else has are there for the last replay, too."""
    operand = torch.ones(1)
    kept = weakref.ref(operand)
    replay = Replay(partial(torch.Tensor.sum, operand))
    del operand
    replay.enqueue()
    assert kept() is not None
    del replay
    assert kept() is None


def test_results_of_rounds_add_up() -> None:
    """Times are joined, the largest peak and the last host's time stay, and a failure of any round is the first's."""
    wrong, crash = Failure(Reason.WRONG, "y"), Failure(Reason.CRASH, "illegal access")
    first = TimerResult((1.0,), (2.0,), 10, host_us=5.0, failure=wrong, unverified=crash)
    later = TimerResult((3.0,), (4.0,), 5)
    joined = TimerResult((1.0, 3.0), (2.0, 4.0), 10, 5.0, wrong, crash)
    assert first + later == joined
    assert first + replace(later, host_us=6.0, failure=crash, unverified=wrong) == replace(joined, host_us=6.0)
    assert (later + first).failure == wrong
    assert (later + first).unverified == crash
