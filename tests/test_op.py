"""The generated operator as a user of PyTorch meets it: registration, errors, compilation, memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import OPERANDS, SCHEDULES, STEPS, build_package, import_package, make_variant
from torch import Tensor

from m2gen.problem import Problem, make_inputs

INTERVAL = SCHEDULES["one_level_atomic"].interval


def _op(package: ModuleType) -> ModuleType:
    return sys.modules[f"{package.__name__}.op"]


def test_operators_are_registered_under_a_name_of_their_own(package, modules) -> None:
    """Packages of different content register under different namespaces, each with forward and backward."""
    one, other = _op(package).NAMESPACE, _op(modules("two_level_atomic", "carry")).NAMESPACE
    assert one != other
    for namespace in (one, other):
        assert str(getattr(torch.ops, namespace).forward.default) == f"{namespace}.forward.default"
        assert str(getattr(torch.ops, namespace).backward.default) == f"{namespace}.backward.default"


CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck_forward(package, operands, save, packed) -> None:
    """Torch finds the schema, the fake tensors and the autograd registration of the forward in order."""
    flat = {name: x.flatten(0, 1) if packed and name in "q k v forget" else x for name, x in operands.items()}
    offsets = torch.tensor([0, STEPS], dtype=torch.int32, device=operands["q"].device) if packed else None
    leaves = [x.requires_grad_() if save else x for x in flat.values()]
    torch.library.opcheck(_op(package)._FORWARD, (*leaves, offsets, 1.0, save), test_utils=CHECKS)


def test_opcheck_backward(package, operands) -> None:
    """Torch finds the schema and the fake tensors of the backward in order."""
    five = list(operands.values())[:5]
    y, state, checkpoints = _op(package)._FORWARD(*operands.values(), None, 1.0, True)
    arguments = (torch.ones_like(y), torch.ones_like(state), *five, checkpoints, None, 1.0)
    torch.library.opcheck(_op(package)._BACKWARD, arguments, test_utils=CHECKS[:2])


def _gradients(function: Callable[..., Any], operands: dict[str, Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in operands.values()]
    y, state = function(*leaves)
    return [y.detach(), state.detach(), *torch.autograd.grad(y.sum() + state.sum(), leaves)]


def test_torch_compile_sees_one_graph(package, operands) -> None:
    """Compiled without a graph break, the operator gives the same results and gradients."""
    compiled = torch.compile(package.m2rnn, fullgraph=True, backend="aot_eager")
    for given, expected in zip(_gradients(compiled, operands), _gradients(package.m2rnn, operands), strict=True):
        torch.testing.assert_close(given, expected)


def test_activation_checkpointing(package, operands) -> None:
    """A recomputed forward gives the same gradients."""
    again = torch.utils.checkpoint.checkpoint

    def recomputed(*leaves: Tensor) -> Any:
        return again(package.m2rnn, *leaves, use_reentrant=False)

    for given, expected in zip(_gradients(recomputed, operands), _gradients(package.m2rnn, operands), strict=True):
        torch.testing.assert_close(given, expected)


def test_only_some_operands_need_gradients(package, operands) -> None:
    """Asking for one gradient gives that of asking for all."""
    every = _gradients(package.m2rnn, operands)[2:]
    for name, expected in zip(OPERANDS, every, strict=True):
        leaf = operands[name].detach().requires_grad_()
        y, state = package.m2rnn(**{**operands, name: leaf})
        torch.testing.assert_close(torch.autograd.grad(y.sum() + state.sum(), leaf)[0], expected)


def test_results_have_the_promised_dtypes_and_shapes(package, device) -> None:
    """y comes in q's dtype, the state and its gradient in float32, the other gradients in their operand's dtype."""
    inputs = make_inputs(make_variant(dtype="bf16"), Problem(1, 2, initial_state=True), seed=0).to(device)
    leaves = [getattr(inputs, name).detach().requires_grad_() for name in OPERANDS]
    y, state = package.m2rnn(*leaves)
    assert (y.dtype, y.shape) == (torch.bfloat16, (1, 2, 2, 16))
    assert (state.dtype, state.shape) == (torch.float32, (1, 2, 16, 16))
    gradients = torch.autograd.grad(y.float().sum() + state.sum(), leaves)
    assert [(g.dtype, g.shape) for g in gradients] == [(x.dtype, x.shape) for x in leaves]


def test_the_initial_state_is_read_only(package, operands) -> None:
    """A call leaves all operands as they were, and returns a state of its own."""
    before = {name: x.clone() for name, x in operands.items()}
    _, state = package.m2rnn(**operands)
    assert all(torch.equal(operands[name], x) for name, x in before.items())
    assert state.data_ptr() != operands["initial_state"].data_ptr()


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "no leaf", "gradients"])
def test_checkpoints_are_saved_only_for_gradients(package, operands, monkeypatch, mode) -> None:
    """Without a gradient to compute, the forward allocates no checkpoints."""
    operator, saved = _op(package)._FORWARD, []

    def spy(*arguments: Any) -> Any:
        results = operator(*arguments)
        saved.append(results[2].shape[0])
        return results

    monkeypatch.setattr(_op(package), "_FORWARD", spy)
    leaves = {name: x.detach().requires_grad_(mode != "no leaf") for name, x in operands.items()}
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with contexts.get(mode, torch.enable_grad)():
        package.m2rnn(**leaves)
    assert saved == [-(-STEPS // INTERVAL) if mode == "gradients" else 0]


def test_the_final_state_may_be_left_out(package, operands) -> None:
    """Without output_final_state, None stands in its place, and y is the same."""
    y, state = package.m2rnn(**operands, output_final_state=False)
    assert state is None
    assert torch.equal(y, package.m2rnn(**operands)[0])


def test_a_second_copy_under_another_name(tmp_path: Path, operands) -> None:
    """Two copies of one package in one process share operators and give the same bits."""
    package = build_package("copied", [make_variant()], SCHEDULES["one_step_partial"])
    one, two = (import_package(tmp_path / name, package, f"m2gen_test_{name}") for name in ("one", "two"))
    assert one.m2rnn is not two.m2rnn
    assert _op(one).NAMESPACE == _op(two).NAMESPACE
    for first, second in zip(_gradients(one.m2rnn, operands), _gradients(two.m2rnn, operands), strict=True):
        assert torch.equal(first, second)


def test_offsets_of_any_stride(package, operands) -> None:
    """Offsets that are a column of a wider tensor are read as that column."""
    flat = {name: x.flatten(0, 1) if name in "q k v forget" else x for name, x in operands.items()}
    flat["initial_state"] = flat["initial_state"].expand(2, -1, -1, -1)
    offsets = torch.tensor([[0, 1], [2, 1], [STEPS, 1]], dtype=torch.int32, device=flat["q"].device)[:, 0]
    for given, expected in zip(
        package.m2rnn(**flat, cu_seqlens=offsets), package.m2rnn(**flat, cu_seqlens=offsets.contiguous()), strict=True
    ):
        assert torch.equal(given, expected)


def test_a_second_derivative_is_refused(package, operands) -> None:
    """Differentiating a gradient raises, rather than giving something else than the second derivative."""
    q = operands["q"].detach().requires_grad_()
    y, _ = package.m2rnn(**{**operands, "q": q})
    (gradient,) = torch.autograd.grad(y.sum(), q, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(gradient.square().sum(), q)


@pytest.mark.gpu
def test_cuda_graphs_replay_the_operator(package, operands) -> None:
    """A captured call reads its operands anew at each replay."""
    with torch.no_grad():
        package.m2rnn(**operands)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = package.m2rnn(**operands)
        operands["v"].mul_(0.5)
        graph.replay()
        torch.testing.assert_close(y, package.m2rnn(**operands)[0])
