"""Calls that the generated operator refuses, and how it says so."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support import OPERANDS, make_variant
from torch import Tensor

from m2gen.problem import Problem, make_inputs


def _half(x: Tensor) -> Tensor:
    return x.half()


WRONG = {
    "clip": ({"clip": -1.0}, ValueError, "clip must be a bound of at least 0 or None, got -1.0"),
    "nan": ({"clip": float("nan")}, ValueError, "clip must be a bound of at least 0 or None, got nan"),
    "rank": ({"q": lambda x: x[0]}, ValueError, "q must be (B, S, Nq, K), got (5, 1, 16)"),
    "steps": ({"k": lambda x: x[:, 1:]}, ValueError, "k must begin with (1, 5) as q does, got (1, 4, 1, 16)"),
    "key_dim": ({"k": lambda x: x[..., 1:]}, ValueError, "k must end with q's K = 16, got (1, 5, 1, 15)"),
    "weight": ({"weight": lambda x: x[:, 1:]}, ValueError, "weight must be (Nw, 16, 16), got (2, 15, 16)"),
    "gate": ({"forget": lambda x: x[..., None]}, ValueError, "forget must be (B, S, Nf), got (1, 5, 2, 1)"),
    "state": ({"initial_state": lambda x: x[:, 1:]}, ValueError, "must be (1, 2, 16, 16), got (1, 1, 16, 16)"),
    "v_dtype": ({"v": _half}, TypeError, "v must be torch.float32, got torch.float16"),
    "gate_dtype": ({"forget": _half}, TypeError, "forget must be torch.float32, got torch.float16"),
    "integers": ({"initial_state": lambda x: x.long()}, TypeError, "must be a floating-point tensor, got torch.int64"),
    "offsets": ({"cu_seqlens": lambda x: torch.zeros(2)}, ValueError, "q must be (T, Nq, K), got (1, 5, 1, 16)"),
}
"""What is wrong with a call, and the error that must say so."""


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls_say_what_was_expected_and_given(package, operands, wrong) -> None:
    """One line names the argument, the expectation and what came instead."""
    changes, error, message = WRONG[wrong]
    call = {**operands, **{name: x(operands.get(name)) if callable(x) else x for name, x in changes.items()}}
    with pytest.raises(error, match=re.escape(message)) as caught:
        package.m2rnn(**call)
    assert str(caught.value).startswith("m2rnn: ")
    assert "\n" not in str(caught.value)


def test_a_packed_call_checks_its_offsets(package, operands) -> None:
    """Offsets of another dtype or rank are refused."""
    flat = {name: x.flatten(0, 1) if name in "q k v forget" else x for name, x in operands.items()}
    for offsets, error in ((torch.zeros(2), TypeError), (torch.zeros(1, 2, dtype=torch.int32), ValueError)):
        with pytest.raises(error, match="cu_seqlens must be"):
            package.m2rnn(**flat, cu_seqlens=offsets.to(flat["q"].device))


def test_an_unbuilt_variant_says_what_to_build(package, device) -> None:
    """The error names what was asked, what is built, and lines that the spec's loader accepts."""
    inputs = make_inputs(make_variant(8, 8, (1, 1, 3, 3, 3)), Problem(1, 2), seed=0).to(device)
    with pytest.raises(package.VariantNotBuiltError) as caught:
        package.m2rnn(*(getattr(inputs, name) for name in OPERANDS))
    message = str(caught.value)
    assert "K=8, V=8, heads q: 1, k: 1, v: 3, f: 3, w: 3, torch.float32" in message
    assert make_variant().key in message
    assert "head_dim: 8, state_expansion: 8, heads: {q: 1, k: 1, v: 3, f: 3, w: 3}, dtypes: [fp32]" in message
    assert "m2gen build --spec one_level_atomic_carry.yaml" in message


def _arch_of(package: ModuleType) -> Callable[[torch.device], str]:
    return sys.modules[f"{package.__name__}.dispatch"].arch_of.__wrapped__


def test_cpu_tensors_need_the_interpreter(package, monkeypatch) -> None:
    """Without the interpreter, CPU tensors are refused with what to set."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        _arch_of(package)(torch.device("cpu"))


def test_an_unlisted_gpu_gets_the_portable_kernels_and_a_warning(package, monkeypatch) -> None:
    """A GPU that the package was not built for is served, and told of."""
    properties = SimpleNamespace(major=7, minor=5, gcnArchName="gfx000:sramecc+")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with pytest.warns(UserWarning, match="was built for portable; (sm_75|gfx000) gets the portable kernels"):
        assert _arch_of(package)(torch.device("cuda")) == "portable"
