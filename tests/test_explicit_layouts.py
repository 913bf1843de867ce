"""Kernels whose layouts are written down: where they are valid, what they compile to, and what they share."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import ROOT, make_variant

from m2gen.device import PORTABLE, TARGETS
from m2gen.errors import CompileError
from m2gen.kernels.compile import Job, compiled, load_kernels
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.render import render_kernel
from m2gen.kernels.resources import Resources, binary_of
from m2gen.pipeline.check import compile_all
from m2gen.schedule import WARPGROUP_OPERANDS, Layouts, Schedule, check, parse, problems
from m2gen.schedule.heuristic import default
from m2gen.variant import Variant

VARIANTS = {
    "published": make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx"),
    "masked_softplus": make_variant(24, 9, (2, 1, 4, 2, 4), "fp16", "total", gate="softplus"),
    "square": make_variant(64, 64, (2, 2, 2, 2, 2), "bf16", tanh="approx"),
}


def start_worker() -> None:
    """Compile in this process, which is not that of the interpreter's tests."""
    os.environ.pop("TRITON_INTERPRET", None)


def machine_code(job: Job) -> bytes:
    """Return the machine code of a kernel."""
    return binary_of(compiled(job), job.device)


def explicit(variant: Variant, arch: str) -> Schedule:
    return replace(default(variant, TARGETS[arch]), layouts=Layouts.EXPLICIT)


def source(variant: Variant, arch: str = "sm_90") -> str:
    return render_kernel(Lowering(variant, explicit(variant, arch)))


@pytest.mark.parametrize("arch", ["gfx942", "portable"])
def test_they_need_nvidia(arch: str) -> None:
    """Their products are NVIDIA's, and no interpreter runs them."""
    variant, device = VARIANTS["published"], TARGETS.get(arch, PORTABLE)
    schedule = replace(default(variant, device), layouts=Layouts.EXPLICIT)
    assert problems(variant, schedule, device) == (f"layouts must be auto for bf16 on {arch}, got explicit",)


def test_they_need_operands_of_16_bits() -> None:
    """Registers of a product of float32 operands are laid out otherwise."""
    variant = make_variant(64, 16, dtype="fp32")
    schedule = replace(default(variant, TARGETS["sm_90"]), layouts=Layouts.EXPLICIT)
    reasons = problems(variant, schedule, TARGETS["sm_90"])
    assert reasons == ("layouts must be auto for fp32 on sm_90, got explicit",)


def test_they_compile() -> None:
    """They compile without a GPU; with one warp a program, shared memory has the backward's scratch and no operands."""
    targets = {"published": ("sm_80", "sm_90"), "masked_softplus": ("sm_90",), "square": ("sm_90",)}
    jobs = [
        Job(Lowering(variant, explicit(variant, arch)), direction, TARGETS[arch])
        for name, variant in VARIANTS.items()
        for arch in targets[name]
        for direction in Direction
    ]
    found = compile_all(jobs, 2, lambda _: None)
    for job in jobs:
        resources = found[job]
        assert isinstance(resources, Resources), resources
        assert not resources.limits(job.device, job.warps)
        k = job.lowering
        scratch = k.schedule.scratch_bytes(k.variant) if job.direction is Direction.BACKWARD else 0
        assert resources.shared_bytes == scratch or k.variant is VARIANTS["square"]


@pytest.mark.parametrize(
    ("slug", "spilled"), [("f64x2u8a_b32x1c2as_i16_ptx_explicit", 0), ("f64x2u8a_b32x1c2as_i16_s7_ptx_explicit", 32)]
)
def test_warps_with_rows_of_their_own_compile(slug: str, spilled: int) -> None:
    """They sum y in shared memory, have all registers, and spill next to nothing (with Triton 3.6.0, nothing)."""
    variant, device = VARIANTS["published"], TARGETS["sm_90"]
    schedule = check(variant, parse(slug), device)
    jobs = [Job(Lowering(variant, schedule), direction, device) for direction in Direction]
    assert [job.options.get("maxnreg") for job in jobs] == [255, None, 255]
    found = compile_all(jobs, 2, lambda _: None)
    for job in jobs:
        resources = found[job]
        assert isinstance(resources, Resources), resources
        assert resources.spill_bytes <= (spilled if job.direction is Direction.FORWARD else 0)
        assert not resources.limits(device, job.warps)
    forward = found[jobs[0]]
    assert isinstance(forward, Resources)
    assert forward.shared_bytes == 8 * 16 * 16 * 4  # steps of 8 rows a warp and 16 columns


def test_both_texts_have_the_same_recurrence() -> None:
    """One template: what the two differ in is where things lie and how they are summed, never the recurrence."""
    variant = VARIANTS["published"]
    auto = render_kernel(Lowering(variant, default(variant, TARGETS["sm_90"]).laid_out(Layouts.AUTO)))
    explicit = source(variant)
    for statement in (
        "return tl.fma(u, z, f * h)",
        "h_1 = f_0 * h_0 + u_0 * z_0",
        "g = clamp(c, bound) + column(q_0, c) * dy_0.to(tl.float32)[None, :]",
        "slope_0 = u_0 - u_0 * z_0 * z_0",
        "d = g * slope_0",
    ):
        assert statement in auto
        assert statement in explicit
    assert "c = tl.fma(f_0, g, product(d_operand, w_t, zeros))" in auto
    assert "c = f_0 * g + product(d_operand, w_t, zeros)" in explicit


def test_the_interpreter_imports_them(tmp_path: Path) -> None:
    """A package that has them for a GPU works in the interpreter, which runs others."""
    (tmp_path / "kernels.py").write_text(source(VARIANTS["published"]))
    code = "import kernels; assert callable(kernels.forward)"
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert load_kernels(source(VARIANTS["published"])).INTERVAL.value == 16
    variant, slug = GROUPED["square"]
    assert load_kernels(render_kernel(Lowering(variant, parse(slug)))).INTERVAL.value == 12


def test_a_triton_whose_assembler_never_ends_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error says which versions do, before anything is compiled."""
    monkeypatch.setattr("triton.__version__", "3.9.0")
    variant = VARIANTS["published"]
    job = Job(Lowering(variant, explicit(variant, "sm_90")), Direction.FORWARD, TARGETS["sm_90"])
    with pytest.raises(CompileError, match=r"explicit layouts must have Triton before 3\.9, got 3\.9\.0"):
        compiled(job)


@pytest.mark.parametrize("schedule", ["f16x4u4a_b16x1c2a_i16_ptx_explicit", "f16x1u4a_b16x4c2a_i16_ptx_explicit"])
def test_every_warp_has_a_tile(schedule: str) -> None:
    """Layouts of more warps than a tile has parts are none."""
    side = "forward" if "f16x4" in schedule else "backward"
    expected = f"{side}.warps must be at most 2, each with a 16 x 8 tile, for explicit layouts, got 4"
    assert problems(VARIANTS["published"], parse(schedule), TARGETS["sm_90"]) == (expected,)


GROUPED = {
    "square": (make_variant(64, 64, (2, 2, 2, 2, 2), "bf16", tanh="approx"), "f64x4u1a_b64x4c1as_i12_ptx_warpgroup"),
    "masked_softplus": (
        make_variant(96, 40, (1, 2, 4, 2, 4), "fp16", "total", gate="softplus"),
        "f64x4u1p_b64x4c1ps_i4_exp_warpgroup",
    ),
}


@pytest.mark.parametrize(("variant", "slug"), GROUPED.values(), ids=GROUPED.keys())
def test_warpgroups_compile(variant: Variant, slug: str) -> None:
    """They compile without a GPU, to WGMMA, with at most as much shared memory as the validity predicate counts."""
    device = TARGETS["sm_90"]
    schedule = check(variant, parse(slug), device)
    assert schedule.slug == slug
    jobs = [Job(Lowering(variant, schedule), direction, device) for direction in Direction]
    found = compile_all(jobs, 2, lambda _: None)
    for job in jobs:
        resources = found[job]
        assert isinstance(resources, Resources), resources
        assert not resources.limits(device, job.warps)
        if job.direction is Direction.BACKWARD:
            needed = schedule.scratch_bytes(variant) + WARPGROUP_OPERANDS
            assert needed - 1024 < resources.shared_bytes <= needed + 1024
    assert b"wgmma" in compiled(jobs[0]).asm["ptx"].encode()


@pytest.mark.parametrize(
    ("dims", "arch", "slug", "reason"),
    [
        ((64, 64), "sm_100", "f64x4u1a_b64x4c1as_i12_ptx_warpgroup", "layouts must be auto or explicit on sm_100"),
        ((64, 32), "sm_90", "f64x4u1a_b64x4c1as_i12_ptx_warpgroup", "unless V is from 33 to 64"),
        ((64, 64), "sm_90", "f64x4u2a_b64x4c1as_i12_ptx_warpgroup", "forward must have 64 rows, 4 warps and unroll 1"),
        (
            (64, 64),
            "sm_90",
            "f64x4u1a_b64x4c1a_i12_ptx_warpgroup",
            "backward must have 64 rows, 4 warps, chunk 1",
        ),
        ((64, 64), "sm_90", "f64x4u1a_b64x4c1as_i16_ptx_warpgroup", "bytes of shared memory, got 289920"),
    ],
)
def test_where_warpgroups_are_none(dims: tuple[int, int], arch: str, slug: str, reason: str) -> None:
    """The predicate says which architecture, columns, tiles and memory they need."""
    found = problems(make_variant(*dims, (2, 2, 2, 2, 2), "bf16", tanh="approx"), parse(slug), TARGETS[arch])
    assert any(reason in line for line in found), found


def test_layouts_change_to_warpgroups_and_back() -> None:
    """Warpgroups have tiles of their own, and other layouts the usual ones again."""
    device = TARGETS["sm_90"]
    few, many = (make_variant(64, 64, (n, n, n, n, n), "bf16", tanh="approx") for n in (8, 16))
    assert default(few, device).layouts is Layouts.EXPLICIT
    assert default(many, device) == default(few, device).laid_out(Layouts.WARPGROUP)
    assert default(many, device).laid_out(Layouts.EXPLICIT) == default(few, device)
    assert default(many, device).laid_out(Layouts.AUTO) == default(few, device).laid_out(Layouts.AUTO)
    assert default(many, TARGETS["sm_80"]).layouts is Layouts.EXPLICIT


def test_loads_stay_ahead_of_a_branch() -> None:
    """Whether the forward saves states or not, ptxas has a branch between the loads of an iteration and its steps."""
    variant = VARIANTS["published"]
    text = source(variant)
    steps = text[text.index("for t in range(0, whole, UNROLL)") :]
    assert steps.index("next_values = tl.load") < steps.index("if SAVE:") < steps.index("elif t & 0x40000000 != 0")
    assert steps.index("elif t & 0x40000000 != 0") < steps.index("h = advance(")
