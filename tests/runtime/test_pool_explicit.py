"""The choice of kernels for tokens on pools: explicit layouts where a GPU, a dtype and a rounding allow them."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import import_package, make_variant

from m2gen.device import PORTABLE, TARGETS
from m2gen.package import emit
from m2gen.schedule import default
from m2gen.variant import BuiltVariant

HEADS = (1, 1, 4, 2, 4)
NARROW, WIDE, SINGLE = (64, 16), (128, 64), (32, 32)
VARIANTS = (
    make_variant(*NARROW, HEADS, "bf16"),
    make_variant(*WIDE, HEADS, "fp16"),  # more rows than a program holds at once
    make_variant(*SINGLE, HEADS, "fp32"),
)
ARCHS = ("sm_90", "gfx942")


@pytest.fixture(scope="module")
def dispatch(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the module that chooses kernels, of a package for a GPU of NVIDIA's, one of AMD's, and the interpreter."""
    choices = [
        emit.Choice(BuiltVariant(variant, ("layer",)), device, default(variant, device))
        for device in (PORTABLE, *(TARGETS[arch] for arch in ARCHS))
        for variant in VARIANTS
    ]
    package = emit.package(emit.Origin("chosen", "chosen.yaml", "0" * 12), choices)
    found = import_package(tmp_path_factory.mktemp("chosen"), package, "m2gen_test_chosen_pools")
    return importlib.import_module(f"{found.__name__}.dispatch")


def chosen(dispatch: ModuleType, dims: tuple[int, int], dtype: torch.dtype, *, seeded: bool = False) -> str:
    """Return the name of the module that takes tokens of these dims."""
    q = torch.zeros(1, 1, dims[0], dtype=dtype)
    module: ModuleType = dispatch.pool_steps_kernels((*dims, *HEADS), q, seeded)
    return module.__name__.rpartition(".")[2]


def test_tokens_go_to_explicit_layouts_where_they_can(dispatch, monkeypatch) -> None:
    """NVIDIA's tensor cores take operands of 16 bits; random roundings, float32 and other GPUs go to Triton's."""
    monkeypatch.setattr(dispatch, "device_of", lambda device: ("sm_90", 132))
    assert chosen(dispatch, NARROW, torch.bfloat16).startswith("pool_explicit_k64_v16")
    assert chosen(dispatch, NARROW, torch.float16).startswith("pool_explicit_k64_v16")
    assert chosen(dispatch, NARROW, torch.bfloat16, seeded=True).startswith("pool_k64_v16")
    assert chosen(dispatch, NARROW, torch.float32).startswith("pool_k64_v16")
    assert chosen(dispatch, SINGLE, torch.float32).startswith("pool_k32_v32")


@pytest.mark.parametrize("arch", ["gfx942", "portable"])
def test_other_archs_have_none(dispatch, monkeypatch, arch: str) -> None:
    """They take the module of every arch."""
    monkeypatch.setattr(dispatch, "device_of", lambda device: (arch, 132))
    assert chosen(dispatch, NARROW, torch.bfloat16).startswith("pool_k64_v16")


def test_a_package_has_those_that_a_program_holds_whole(dispatch) -> None:
    """States of more rows than a program holds at once, and variants of float32 alone, have no such module."""
    built = importlib.import_module(dispatch.__name__.replace(".dispatch", ".built"))
    assert set(built.POOL_EXPLICIT) == {"sm_90"}
    assert set(built.POOL_EXPLICIT["sm_90"]) == {(*NARROW, *HEADS)}
    kernels = Path(built.__file__).parent / "kernels"
    assert [path.stem for path in kernels.glob("pool_explicit_*.py")] == list(built.POOL_EXPLICIT["sm_90"].values())
