"""Calls that the generated operator refuses, how it says so, and that nothing runs before it does."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from calls import Spy, arguments, module_of, packed
from support import OPERANDS, make_variant

from m2gen.problem import Problem, make_inputs

Change = Callable[[Any], Any]


def _dtype(dtype: torch.dtype) -> Change:
    return lambda x: x.to(dtype)


def _meta(x: Any) -> Any:
    return x.to("meta")


def _value(value: Any) -> Change:
    return lambda _: value


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda _: torch.zeros(shape, dtype=dtype)


SHAPES = {
    "q_rank": ({"q": lambda x: x[0]}, "q must be (B, S, Nq, K), got (5, 1, 16)"),
    "v_rank": ({"v": lambda x: x[None]}, "v must be (B, S, Nv, V), got (1, 1, 5, 2, 16)"),
    "gate_rank": ({"forget": lambda x: x[..., None]}, "forget must be (B, S, Nf), got (1, 5, 2, 1)"),
    "scalar": ({"q": lambda x: x.sum()}, "q must be (B, S, Nq, K), got ()"),
    "steps": ({"k": lambda x: x[:, 1:]}, "k must begin with (1, 5) as q does, got (1, 4, 1, 16)"),
    "batch": ({"v": lambda x: x.repeat(2, 1, 1, 1)}, "v must begin with (1, 5) as q does, got (2, 5, 2, 16)"),
    "gate_steps": ({"forget": lambda x: x[:, :1]}, "forget must begin with (1, 5) as q does, got (1, 1, 2)"),
    "key_dim": ({"k": lambda x: x[..., 1:]}, "k must end with q's K = 16, got (1, 5, 1, 15)"),
    "weight_rows": ({"weight": lambda x: x[:, 1:]}, "weight must be (Nw, 16, 16), got (2, 15, 16)"),
    "weight_cols": ({"weight": lambda x: x[..., 1:]}, "weight must be (Nw, 16, 16), got (2, 16, 15)"),
    "weight_rank": ({"weight": lambda x: x[0]}, "weight must be (Nw, 16, 16), got (16, 16)"),
    "state_heads": ({"initial_state": lambda x: x[:, 1:]}, "must be (1, 2, 16, 16), got (1, 1, 16, 16)"),
    "state_batch": ({"initial_state": lambda x: x.repeat(2, 1, 1, 1)}, "(1, 2, 16, 16), got (2, 2, 16, 16)"),
    "heads_of_v": ({"v": lambda x: x.repeat(1, 1, 3, 1)[:, :, :5]}, r"heads of [fw] must divide 5, .*got 2"),
    "heads_of_q": ({"q": lambda x: x.repeat(1, 1, 3, 1)}, r"heads of [vfw] must divide 3, .*got 2"),
    "no_heads": ({"q": lambda x: x[:, :, :0]}, "heads of q must divide 2, the most of any operand, got 0"),
    "packed_rank": ({"cu_seqlens": _zeros(2, dtype=torch.int32)}, "q must be (T, Nq, K), got (1, 5, 1, 16)"),
    "only_A_log": ({"A_log": _zeros(2)}, "A_log and dt_bias must be given together, got only A_log"),
    "only_dt_bias": ({"dt_bias": _zeros(2)}, "A_log and dt_bias must be given together, got only dt_bias"),
    "A_log_heads": (
        {"A_log": _zeros(3), "dt_bias": _zeros(2)},
        "A_log must be (2,), one for each head of forget, got (3,)",
    ),
    "dt_bias_rank": (
        {"A_log": _zeros(2), "dt_bias": _zeros(1, 2)},
        "must be (2,), one for each head of forget, got (1, 2)",
    ),
}
DEVICES = {
    f"{name}_device": ({name: _meta}, f"{name} must be on {{device}} as q is, got meta") for name in OPERANDS[1:]
}
VALUES = {
    "negative_clip": ({"clip": _value(-1.0)}, "clip must be a bound of at least 0 or None, got -1.0"),
    "nan_clip": ({"clip": _value(float("nan"))}, "clip must be a bound of at least 0 or None, got nan"),
    "backend": ({"backend": _value("eager")}, "backend must be kernels or reference, got 'eager'"),
}
TYPES = {
    "k_dtype": ({"k": _dtype(torch.float64)}, "k must be torch.float32, got torch.float64"),
    "v_dtype": ({"v": _dtype(torch.half)}, "v must be torch.float32, got torch.float16"),
    "gate_dtype": ({"forget": _dtype(torch.half)}, "forget must be torch.float32, got torch.float16"),
    "weight_dtype": ({"weight": _dtype(torch.bfloat16)}, "weight must be torch.float32, got torch.bfloat16"),
    "integer_q": ({"q": _dtype(torch.int32)}, "q must be a floating-point tensor, got torch.int32"),
    "integer_state": (
        {"initial_state": _dtype(torch.int64)},
        "initial_state must be a floating-point tensor, got torch.int64",
    ),
    "narrow_q": ({"q": _dtype(torch.bfloat16)}, "k must be torch.bfloat16, got torch.float32"),
    "list": ({"q": lambda x: x.tolist()}, "q must be a tensor, got list"),
    "numpy": ({"v": lambda x: x.cpu().numpy()}, "v must be a tensor, got ndarray"),
    "none": ({"weight": _value(None)}, "weight must be a tensor, got NoneType"),
    "float_gate": ({"forget": _value(0.5)}, "forget must be a tensor, got float"),
    "sparse": ({"q": lambda x: x.to_sparse()}, "q must be a strided tensor, got torch.sparse_coo"),
    "list_of_offsets": ({"cu_seqlens": _value([0, 5])}, "cu_seqlens must be a tensor, got list"),
    "float_A_log": ({"A_log": _value(0.0), "dt_bias": _zeros(2)}, "A_log must be a tensor, got float"),
    "text_clip": ({"clip": _value("tight")}, "clip must be a bound of at least 0 or None, got "),
    "list_clip": ({"clip": _value([1.0])}, "clip must be a bound of at least 0 or None, got "),
}
WRONG = {
    **{name: (*wrong, ValueError) for name, wrong in (SHAPES | DEVICES | VALUES).items()},
    **{name: (*wrong, (TypeError, ValueError)) for name, wrong in TYPES.items()},
}
"""Wrong calls, with the message and the type of the error."""


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls_say_what_was_expected_and_given(package, operands, device, monkeypatch, wrong) -> None:
    """One line names the argument, the expectation and what came instead, before anything runs."""
    changes, message, error = WRONG[wrong]
    call = {**operands, **{name: change(operands.get(name)) for name, change in changes.items()}}
    spy = Spy(package, monkeypatch)
    with pytest.raises(error) as caught:
        package.m2rnn(**call)
    text, expected = str(caught.value), message.format(device=call["q"].device) if wrong in DEVICES else message
    assert text.startswith("m2rnn: ")
    assert "\n" not in text
    assert expected in text or re.search(expected, text)
    assert spy.names == spy.launched == []


@pytest.mark.parametrize("name", ["A_log", "dt_bias"])
def test_a_gate_parameter_on_another_device(package, operands, name) -> None:
    """The gate's parameters are where q is."""
    parameters = {other: torch.zeros(2, device=operands["q"].device) for other in ("A_log", "dt_bias")}
    parameters[name] = parameters[name].to("meta")
    with pytest.raises(ValueError, match=rf"^m2rnn: {name} must be on .* as q is, got meta$"):
        package.m2rnn(**operands, **parameters)


def test_offsets_on_another_device(package, device) -> None:
    """Offsets are where q is."""
    call = arguments(packed(make_inputs(make_variant(), Problem(1, 2, initial_state=True), seed=0).to(device)))
    call["cu_seqlens"] = call["cu_seqlens"].to("meta")
    with pytest.raises(ValueError, match=r"^m2rnn: cu_seqlens must be on .* as q is, got meta$"):
        package.m2rnn(**call)


def test_a_call_that_passed_does_not_vouch_for_another(package, operands) -> None:
    """The same shapes again, but with one thing wrong, are refused each time."""
    for _ in range(2):
        package.m2rnn(**operands)
        with pytest.raises(TypeError, match="forget must be"):
            package.m2rnn(**{**operands, "forget": operands["forget"].half()})
        with pytest.raises(ValueError, match="initial_state must be"):
            package.m2rnn(**{**operands, "initial_state": operands["initial_state"][:, :1]})


UNBUILT = {
    "dims": (make_variant(8, 8, (1, 1, 3, 3, 3)), "K=8, V=8, heads q: 1, k: 1, v: 3, f: 3, w: 3, torch.float32"),
    "heads": (make_variant(heads=(1, 1, 5, 5, 5)), "K=16, V=16, heads q: 1, k: 1, v: 5, f: 5, w: 5, torch.float32"),
    "dtype": (make_variant(heads=(4, 4, 1, 2, 1), dtype="bf16"), "heads q: 4, k: 4, v: 1, f: 2, w: 1, torch.bfloat16"),
}


@pytest.mark.parametrize("name", UNBUILT)
def test_an_unbuilt_variant_says_what_to_build(package, device, monkeypatch, name) -> None:
    """The error names what was asked, what is built, and lines that the spec's loader accepts."""
    variant, asked = UNBUILT[name]
    inputs = make_inputs(variant, Problem(1, 2), seed=0).to(device)
    spy = Spy(package, monkeypatch)
    with pytest.raises(package.VariantNotBuiltError) as caught:
        package.m2rnn(**arguments(inputs))
    message = str(caught.value)
    heads = ", ".join(f"{role}: {count}" for role, count in zip("qkvfw", variant.heads.counts, strict=True))
    layer = f"head_dim: {variant.head_dim}, state_expansion: {variant.state_expansion}, heads: {{{heads}}}"
    assert asked in message
    assert make_variant().key in message
    assert f"{layer}, dtypes: [{variant.dtype}], gate: given" in message
    lines = yaml.safe_load(message.split("`")[1])
    assert lines["my_layer"]["heads"] == dict(zip("qkvfw", variant.heads.counts, strict=True))
    assert "m2gen build --spec one_level_atomic_carry.yaml" in message
    assert "\n" not in message
    assert spy.launched == []


def test_an_error_names_some_of_many_variants(package, operands, monkeypatch) -> None:
    """Errors name the first twenty variants that are built and count the others, whoever asks."""
    built = module_of(package, "built")
    heads = tuple(make_variant().heads.counts)
    many = {(8, 8 + i, heads, torch.float32, False): f"variant_{i}" for i in range(30)}
    monkeypatch.setattr(built, "VARIANTS", many)
    monkeypatch.setattr(
        built, "LAYERS", {"grid": tuple(key[:3] for key in many)} | {f"layer_{i}": () for i in range(29)}
    )
    twenty = [f"variant_{i}" for i in range(20)]
    with pytest.raises(package.VariantNotBuiltError) as caught:
        package.m2rnn(**{name: x.double() for name, x in operands.items()})
    assert f"built: {'; '.join(twenty)}; and 10 more. To build them" in str(caught.value)
    with pytest.raises(package.VariantNotBuiltError, match="variant_19; and 10 more"):
        package.M2RNN(8, 9, 7, dict(zip("qkvfw", heads, strict=True)))
    with pytest.raises(ValueError, match=f"name one of its variants: {', '.join(twenty)}, and 10 more$"):
        package.M2RNN.from_variant("grid", 8)
    with pytest.raises(ValueError, match=r"a layer \(grid, layer_0, .*layer_18, and 10 more\) or the key"):
        package.M2RNN.from_variant("none", 8)


def test_float64_is_not_built(package, operands) -> None:
    """A dtype that no variant can have is an unbuilt variant, and the error still names it."""
    with pytest.raises(package.VariantNotBuiltError, match=r"torch\.float64"):
        package.m2rnn(**{name: x.double() for name, x in operands.items()})


def _device_of(package: ModuleType) -> Callable[[torch.device], tuple[str, int]]:
    return sys.modules[f"{package.__name__}.dispatch"].device_of.__wrapped__


def test_cpu_tensors_need_the_interpreter(package, monkeypatch) -> None:
    """Without the interpreter, CPU tensors are refused with what to set."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        _device_of(package)(torch.device("cpu"))


def test_an_unlisted_gpu_gets_the_portable_kernels_and_a_warning(package, monkeypatch) -> None:
    """A GPU that the package was not built for is served, and told of."""
    properties = SimpleNamespace(major=7, minor=5, gcnArchName="gfx000:sramecc+", multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with pytest.warns(UserWarning, match="was built for portable; (sm_75|gfx000) gets the portable kernels"):
        assert _device_of(package)(torch.device("cuda")) == ("portable", 40)
