"""``backend="reference"``: the package's own eager recurrence, for any dims, dtype and device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import Spy, arguments, assert_same, changed, differentiate, module_of, packed
from support import GATED_HEADS, build_package, import_package, make_schedule, make_variant

from m2gen.problem import Inputs, Problem, make_inputs
from m2gen.runtime import reference

UNBUILT = make_variant(5, 3, (1, 3, 3, 3, 1))


def eager(inputs: Inputs, clip: float | None = 1.0, clamp_total: bool = False):
    """Differentiate m2gen's reference in float32 or wider."""
    state = torch.promote_types(inputs.q.dtype, torch.float32)
    arithmetic = reference.Arithmetic(state, inputs.q.dtype)
    return differentiate(reference.m2rnn, inputs, clip=clip, clamp_total=clamp_total, arithmetic=arithmetic)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("mode", ["carry", "total"])
def test_is_the_reference(modules, device, mode, clip) -> None:
    """Results and gradients have the bits of m2gen's reference, in the package's clip mode."""
    package = modules("one_level_atomic", mode)
    inputs = make_inputs(make_variant(clip=mode), Problem(2, 3, initial_state=True), seed=3).to(device)
    given = differentiate(package.m2rnn, inputs, clip=clip, backend="reference")
    assert_same(given, eager(inputs, clip, mode == "total"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_dims_and_dtype(package, device, monkeypatch, dtype) -> None:
    """Dims and dtypes without kernels run on the reference, also in float64, and no kernel does."""
    drawn = make_inputs(UNBUILT, Problem(1, 3, initial_state=True), seed=3).to(device)
    inputs = changed(drawn, ("q", "k", "v", "weight", "forget"), lambda x: x.to(dtype))
    spy = Spy(package, monkeypatch)
    given = differentiate(package.m2rnn, inputs, backend="reference")
    assert given["y"].dtype == dtype
    assert given["state"].dtype == torch.promote_types(dtype, torch.float32)
    assert_same(given, eager(inputs))
    assert spy.names == spy.launched == []


def test_packed_with_a_computed_gate(package, device) -> None:
    """Offsets, gate parameters and states are handed on."""
    variant = make_variant(heads=GATED_HEADS, gate="softplus")
    inputs = packed(make_inputs(variant, Problem(2, 2, initial_state=True), seed=3).to(device))
    assert_same(differentiate(package.m2rnn, inputs, backend="reference"), eager(inputs))


@pytest.mark.parametrize("sequences", [None, 0, 2])
def test_without_tokens_gradients_are_zeros_as_those_of_kernels(package, device, sequences) -> None:
    """Results of no tokens are differentiable, so that no parameter goes without a gradient."""
    inputs = make_inputs(make_variant(), Problem(2, 0), seed=3).to(device)
    operands = [getattr(inputs, name).requires_grad_() for name in ("q", "k", "v", "weight", "forget")]
    given = list(operands)
    offsets = None
    if sequences is not None:
        given = [x if name == 3 else x[0] for name, x in enumerate(operands)]
        offsets = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
    for backend in ("kernels", "reference"):
        y, state = package.m2rnn(*given, cu_seqlens=offsets, backend=backend)
        for result in (y, state):
            gradients = torch.autograd.grad(result.sum(), operands, retain_graph=True)
            assert all(not gradient.any() for gradient in gradients)


def test_wrong_operands_are_refused_as_for_kernels(package, operands) -> None:
    """The reference is behind the same checks of shapes and dtypes."""
    with pytest.raises(ValueError, match=r"^m2rnn: k must begin with"):
        package.m2rnn(**{**operands, "k": operands["k"][:, 1:]}, backend="reference")
    with pytest.raises(TypeError, match=r"^m2rnn: v must be"):
        package.m2rnn(**{**operands, "v": operands["v"].half()}, backend="reference")


def test_offsets_are_checked_for_the_reference_too(package, device) -> None:
    """Offsets that do not cover the tokens are refused, rather than leaving some out."""
    inputs = packed(make_inputs(make_variant(), Problem(2, 2, initial_state=True), seed=3).to(device))
    short = changed(inputs, ("cu_seqlens",), lambda x: x.clamp(max=3))
    with pytest.raises(ValueError, match=r"^m2rnn: cu_seqlens must end at the 4 tokens of q, got 3$"):
        package.m2rnn(**arguments(short), backend="reference")


def test_without_the_final_state(package, operands) -> None:
    """output_final_state means the same."""
    y, state = package.m2rnn(**operands, output_final_state=False, backend="reference")
    assert state is None
    assert torch.equal(y, package.m2rnn(**operands, backend="reference")[0])


def test_a_package_needs_no_m2gen(tmp_path: Path) -> None:
    """A copy of a package runs its reference where m2gen, its templates and the interpreter are nowhere to be found."""
    import_package(tmp_path / "copied", build_package("copied", [make_variant()], make_schedule()), "m2gen_test_needs")
    code = (
        "import sys, torch\n"
        "sys.modules['m2gen'] = sys.modules['jinja2'] = None\n"
        "from copied import m2rnn\n"
        "x = torch.zeros(1, 2, 1, 16)\n"
        "v = torch.zeros(1, 2, 2, 16)\n"
        "y, state = m2rnn(x, x, v, torch.eye(16).repeat(2, 1, 1), torch.ones(1, 2, 2), backend='reference')\n"
        "assert y.shape == (1, 2, 2, 16)\n"
        "assert state.shape == (1, 2, 16, 16)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_packages_reference_is_m2gens(package) -> None:
    """The code of the two files is the same, so that neither can change alone."""
    own, original = Path(module_of(package, "reference").__file__), Path(reference.__file__)
    code, expected = (path.read_text(encoding="utf-8").split('"""', 2)[2] for path in (own, original))
    assert code == expected
