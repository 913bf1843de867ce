"""What packages ask of the Triton that runs them, which need not be the one that built them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from calls import module_of
from support import import_package, make_variant
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from m2gen.device import PORTABLE, TARGETS
from m2gen.kernels import compile as compiling
from m2gen.kernels.compile import Job, compiled, load_kernels, toolchain
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.options import options_of
from m2gen.kernels.render import render_kernel
from m2gen.measure.workers import Lost, Service, run_isolated, without_interpreter
from m2gen.package import emit
from m2gen.schedule import Mma, Portable, Schedule, Wgmma, default
from m2gen.variant import BuiltVariant

HOPPER, AMPERE, AMD = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 86, 32), GPUTarget("hip", "gfx942", 64)
LESS = "--Ofast-compile=min"
BLACKWELL = TARGETS["sm_100"]
"""Its assembler knows the level in every Triton; that of Hopper does from 3.9 on."""


def lowering(family: type[Schedule], *shape: Any, **facts: Any) -> Lowering:
    """Return the default kernels of a family for a variant."""
    variant = make_variant(*shape, **facts)
    return Lowering(variant, family.default(variant, TARGETS["sm_90"]))


PUBLISHED = lowering(Mma, 64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
HAS_ZEROS = {
    "slots": PUBLISHED,
    "padded rows": lowering(Portable, 9, 16),
    "padded columns": lowering(Mma, 16, 17, dtype="fp16"),
}
WGMMA = lowering(Wgmma, 64, 64, (2,) * 5, "bf16", tanh="approx")
HAS_NONE = {
    "portable": lowering(Portable, 16, 16),
    "one warp": lowering(Mma, 16, 16, dtype="bf16"),
    "wgmma": WGMMA,
    "padded wgmma": lowering(Wgmma, 60, 60, (2,) * 5, "bf16", tanh="approx"),
}
EVERY = {**HAS_ZEROS, **HAS_NONE}


@pytest.fixture(autouse=True)
def _nothing_asked_of_ptxas(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in compiling.ASSEMBLER:
        monkeypatch.delenv(name, raising=False)


def as_of(version: str, k: Lowering, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the kernels of a lowering, imported on a GPU's machine with a Triton of that version."""
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return load_kernels(f"# Triton {version}, HIP {torch.version.hip}\n{render_kernel(k)}")


@pytest.mark.parametrize("name", HAS_ZEROS)
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0", "3.9.0", "3.10.0"])
@pytest.mark.parametrize("target", [HOPPER, GPUTarget("cuda", 103, 32), AMPERE, AMD])
def test_where_ptxas_is_told_to_try_less(monkeypatch, name, version, target) -> None:
    """Triton 3.9 and later have it for Hopper and later, where their assembler is that of CUDA 13.4."""
    module = as_of(version, HAS_ZEROS[name], monkeypatch)
    less = version in ("3.9.0", "3.10.0") and target.backend == "cuda" and target.arch >= 90
    assert module.forward_effort(target) == (LESS if less else None)


@pytest.mark.parametrize("version", ["3.8.0", "3.9.0"])
@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("PTXAS_OPTIONS", "-v --maxrregcount 128", f"{LESS} -v --maxrregcount 128"),
        ("PTXAS_OPTIONS", "-O1", "-O1"),
        ("PTXAS_OPTIONS", "-v --opt-level 3", "-v --opt-level 3"),
        ("PTXAS_OPTIONS", "--Ofast-compile=0", "--Ofast-compile=0"),
        ("PTXAS_OPTIONS", "-Ofc mid", "-Ofc mid"),
        ("DISABLE_PTXAS_OPT", "1", None),
    ],
)
def test_the_users_options_of_ptxas_stand(monkeypatch, version, variable, value, expected) -> None:
    """Other options stay beside the level; another level replaces it, as ptxas refuses two."""
    monkeypatch.setenv(variable, value)
    usual = value if variable == "PTXAS_OPTIONS" else None
    module = as_of(version, PUBLISHED, monkeypatch)
    assert module.forward_effort(HOPPER) == (usual if version == "3.8.0" else expected)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("version", ["3.8.0", "3.9.0"])
def test_launches_have_it_for_the_forward_alone(monkeypatch, name, version) -> None:
    """Launches have it only where the forward carries zeros; all have products and sums fused."""
    kept: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *_, **options: kept.append((self.fn.__name__, options)))
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: HOPPER))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    module = as_of(version, EVERY[name], monkeypatch)
    for kernel in (module.m2rnn_forward_kernel, module.m2rnn_step_kernel):
        kernel[(1, 1, 1)](**module.LAUNCH["forward_options"])
    less = {"ptx_options": LESS} if name in HAS_ZEROS and version == "3.9.0" else {}
    usual = {"grid": (1, 1, 1), "warmup": False, **options_of(EVERY[name], Direction.FORWARD)}
    assert usual["enable_fp_fusion"] is True
    assert kept == [("m2rnn_forward_kernel", {**usual, **less}), ("m2rnn_step_kernel", usual)]


def test_other_vendors_launches_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's compiler refuses an option that it does not know."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    module = as_of("3.9.0", HAS_ZEROS["padded rows"], monkeypatch)
    assert isinstance(module.m2rnn_forward_kernel, triton.JITFunction)


def _told(job: Job) -> tuple[bool, str | None]:
    """Return what Triton told ptxas of one kernel, were it 3.9."""
    triton.__version__ = "3.9.0"
    found = compiled(job).metadata
    return found.enable_fp_fusion, found.ptx_options


def _lost(job: Job, lost: Lost) -> tuple[bool, str | None]:
    return False, lost.reason


def test_what_is_checked_is_what_packages_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-compilation asks the module, and tells ptxas the same; every kernel is compiled with fusion."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the worker imports triton with this module
    jobs = [Job(EVERY[name], direction, BLACKWELL) for name in ("slots", "one warp") for direction in Direction]
    service = Service(_told, without_interpreter, 600.0, _lost, now=lambda: 0.0)
    for job, found in run_isolated([jobs], service, 1):
        less = job.direction is Direction.FORWARD and job.lowering == PUBLISHED
        assert found == (True, LESS if less else None)


@pytest.mark.parametrize("name", ["reinterpret", "_reinterpret"])
def test_shared_memory_is_reinterpreted_by_either_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Kernels use the name that Triton had before 3.9, which the module gives back."""
    for other in ("reinterpret", "_reinterpret"):
        monkeypatch.delattr(language.shared_memory_descriptor, other, raising=False)
    monkeypatch.setattr(language.shared_memory_descriptor, name, method := object(), raising=False)
    monkeypatch.setattr(language.shared_memory_descriptor, "_reinterpret", method, raising=False)
    if name == "reinterpret":
        monkeypatch.delattr(language.shared_memory_descriptor, "_reinterpret")
    load_kernels(f"# by {name}\n{render_kernel(WGMMA)}")
    assert language.shared_memory_descriptor._reinterpret is method


@pytest.mark.parametrize("names", [("async_copy_global_to_shared",), ("async_copy_global_to_shared", "async_load")])
def test_memory_is_copied_by_either_name(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    """Triton 3.9 has removed the name that it had alone before 3.8, and left an error in its place."""
    assert PUBLISHED.slots
    for name in ("async_copy_global_to_shared", "async_load"):
        monkeypatch.delattr(async_copy, name, raising=False)
        if name in names:
            monkeypatch.setattr(async_copy, name, name, raising=False)
    module = load_kernels(f"# by {names}\n{render_kernel(PUBLISHED)}")
    assert module.async_load == names[-1]


@pytest.mark.parametrize("version", ["3.8.0", "3.9.0", "3.10.0"])
def test_packages_serve_the_fast_families_with_every_triton(monkeypatch, tmp_path: Path, version) -> None:
    """No version of Triton has its own, slower choice of kernels."""
    monkeypatch.setattr(triton, "__version__", version)
    gpu, variant = TARGETS["sm_90"], make_variant(heads=(1, 1, 2, 1, 1), dtype="bf16")
    built = BuiltVariant(variant, ("layer",))
    choices = [emit.Choice(built, device, default(variant, device)) for device in (PORTABLE, gpu)]
    name = f"package_{version.replace('.', '_')}"
    package = import_package(tmp_path / name, emit.package(emit.Origin(name, "s.yaml", "0" * 12), choices))
    dispatch = module_of(package, "dispatch")
    monkeypatch.setattr(dispatch, "device_of", lambda device: ("sm_90", gpu.sm_count))
    (key,) = dispatch.built.VARIANTS
    kernels, _ = dispatch.table_of(key, torch.device("cuda"))
    assert kernels
    assert all(hasattr(module, "gluon") for module in kernels)


def test_the_assemblers_options_are_of_the_toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled with other options is not taken for what would be compiled now."""
    plain = toolchain()
    monkeypatch.setenv("PTXAS_OPTIONS", "-O1")
    assert toolchain() == f"{plain}, PTXAS_OPTIONS=-O1"
