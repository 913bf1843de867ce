"""The operator under torch's tracing, compilation, CUDA graphs and recomputation: all must give eager's bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint as recompute

from m2gen.problem import Problem
from m2gen.verify.case import TensorResult
from m2gen.verify.oracle import Operator, call, differentiate, named_operands, same
from m2gen.verify.subject import CaseContext, inputs_of

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
WARM_UP = 3


class _Recorder(TorchDispatchMode):
    """Records the first call of every operator of one namespace."""

    def __init__(self, namespace: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._namespace = namespace
        self.calls: dict[Any, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self._namespace and func not in self.calls:
            self.calls[func] = tree_map(_copied, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _wanting_gradients(x: Any) -> Any:
    return x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def opcheck(subject: CaseContext) -> Iterable[TensorResult]:
    """Run ``torch.library.opcheck`` on every operator that a training step and a decoding step call."""
    with _Recorder(subject.submodule("library").NAMESPACE) as recorder:
        subject.differentiate()
        with torch.no_grad():
            subject.package.m2rnn_step(*_token(subject), _state(subject), **subject.gate)
    calls = {overload._schema.name.rpartition("::")[2]: (overload, *call) for overload, call in recorder.calls.items()}
    if set(calls) != {"forward", "backward", "step"}:
        raise AssertionError(f"training and decoding must call forward, backward and step, got {', '.join(calls)}")
    for name, (overload, args, kwargs) in calls.items():
        tests: tuple[str, ...] = OPCHECKS
        if name == "forward":  # the others have no derivative to register
            tests = (*OPCHECKS, "test_autograd_registration")
            args, kwargs = tree_map(_wanting_gradients, (args, kwargs))
        torch.library.opcheck(overload, args, kwargs, test_utils=tests)
        yield from (TensorResult(f"{name}.{test}", 0.0, 0.0) for test in tests)


def _token(subject: CaseContext) -> tuple[Tensor, ...]:
    q, k, v, weight, forget, *_ = subject.arguments
    return q[:, 0], k[:, 0], v[:, 0], weight, forget[:, 0]


def _state(subject: CaseContext) -> Tensor:
    return subject.inputs.dstate.clone()


def _other(problem: Problem) -> Problem:
    """Return a problem of other sizes."""
    if problem.lengths is None:
        return replace(problem, batch=problem.batch + 1, seq=problem.seq + 2)
    return replace(problem, lengths=(*problem.lengths, 3))


def compiled(subject: CaseContext) -> Iterable[TensorResult]:
    """Compare ``torch.compile(fullgraph=True)`` with eager on two sizes; the second must not recompile."""

    def plain(*operands: Any, **facts: Any) -> tuple[Tensor, Tensor]:
        return subject.operator(*operands, **facts)

    torch._dynamo.reset()
    backend = "inductor" if subject.device.type == "cuda" else "aot_eager"
    fast = torch.compile(plain, fullgraph=True, backend=backend)

    def dynamic(*operands: Any, **facts: Any) -> tuple[Tensor, Tensor]:
        _mark_sizes(operands)
        return fast(*operands, **facts)

    for problem in (subject.case.problem, _other(subject.case.problem)):
        case = replace(subject.case, problem=problem)
        inputs = inputs_of(subject.variant, case, subject.seed, subject.device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            given = differentiate(dynamic, inputs, case)
        yield from same(given, differentiate(subject.operator, inputs, case))


def _mark_sizes(operands: tuple[Any, ...]) -> None:
    """Tell the compiler that the batch and the steps vary."""
    q, k, v, _, forget, state, offsets = operands
    for x in (q, k, v, forget):
        for dim in range(1 if offsets is not None else 2):
            torch._dynamo.mark_dynamic(x, dim)
    for x in (state, offsets):
        if x is not None:
            torch._dynamo.mark_dynamic(x, 0)


def _replayed(step: Callable[[], Mapping[str, Tensor]], refill: Callable[[], None]) -> Mapping[str, Tensor]:
    """Warm up and capture ``step``, change its inputs by ``refill``, and return the results of a replay."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        outputs = step()
    refill()
    captured.replay()
    torch.cuda.synchronize()
    return outputs


def graph(subject: CaseContext) -> Iterable[TensorResult]:
    """Compare the replay of a captured training step on new inputs with eager."""
    first, second = subject.inputs, inputs_of(subject.variant, subject.case, subject.seed + 1, subject.device)
    leaves = {name: x.clone().requires_grad_() for name, x in named_operands(first).items()}
    gradients = [first.dy.clone(), first.dstate.clone()]

    def step() -> Mapping[str, Tensor]:
        y, state = call(subject.operator, leaves, first, subject.case)
        found = torch.autograd.grad([y, state], list(leaves.values()), gradients)
        return {"y": y, "state": state, **{f"d{name}": x for name, x in zip(leaves, found, strict=True)}}

    def refill() -> None:
        with torch.no_grad():
            for name, x in named_operands(second).items():
                leaves[name].copy_(x)
        gradients[0].copy_(second.dy)
        gradients[1].copy_(second.dstate)

    return same(_replayed(step, refill), differentiate(subject.operator, second, subject.case))


def step_graph(subject: CaseContext) -> Iterable[TensorResult]:
    """Compare a captured decoding step, replayed once, with an eager one."""
    token, state = tuple(x.clone() for x in _token(subject)), _state(subject)
    step = partial(subject.package.m2rnn_step, **subject.gate)

    def captured() -> Mapping[str, Tensor]:
        y, after = step(*token, state)
        return {"y": y, "state": after}

    def refill() -> None:
        state.copy_(subject.inputs.dstate)

    with torch.no_grad():
        given = _replayed(captured, refill)
        expected = step(*_token(subject), _state(subject))
    return same(given, dict(zip(("y", "state"), expected, strict=True)))


def checkpoint(subject: CaseContext) -> Iterable[TensorResult]:
    """Compare a call whose forward is recomputed in the backward with a plain one."""

    def recomputed(*operands: Any, **facts: Any) -> Any:
        return recompute(subject.operator, *operands, use_reentrant=False, **facts)

    operator: Operator = recomputed
    return same(subject.differentiate(operator), subject.differentiate())
