"""Kernels of ``mma`` and ``wgmma``: what they compile to, and what they share with portable ones."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from support import ROOT, make_variant

from m2gen.device import TARGETS
from m2gen.kernels import compile
from m2gen.kernels.arguments import arguments
from m2gen.kernels.compile import Job, compiled, load_kernels
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.render import render_kernel
from m2gen.kernels.resources import Resources
from m2gen.pipeline.check import compile_all
from m2gen.schedule import Mma, Portable, Schedule, check, parse
from m2gen.schedule.slots import slots_bytes
from m2gen.schedule.wgmma import OPERANDS_BYTES
from m2gen.spec import GateKind
from m2gen.variant import Variant

VARIANTS = {
    "published": make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx"),
    "masked_softplus": make_variant(24, 9, (2, 1, 4, 2, 4), "fp16", "total", gate="softplus"),
    "square": make_variant(64, 64, (2, 2, 2, 2, 2), "bf16", tanh="approx"),
}

GATES = ("bf16", "fp32")


def start_worker() -> None:
    """Compile in this process, which is not that of the interpreter's tests."""
    os.environ.pop("TRITON_INTERPRET", None)


def assembly_with_gates(k: Lowering, direction: Direction, dtype: str) -> str:
    """Return a kernel's PTX for sm_90 where gates are of this dtype and operands of the variant's."""
    compile.arguments = lambda *of: [replace(x, type=f"*{dtype}") if x.name == "x" else x for x in arguments(*of)]
    return str(compiled(Job(k, direction, TARGETS["sm_90"])).asm["ptx"])


def mma(variant: Variant, arch: str) -> Schedule:
    return Mma.default(variant, TARGETS[arch])


def source(variant: Variant, arch: str = "sm_90") -> str:
    return render_kernel(Lowering(variant, mma(variant, arch)))


def test_they_compile() -> None:
    """They compile without a GPU; with one warp a program, shared memory has the backward's scratch and no operands."""
    targets = {"published": ("sm_80", "sm_86", "sm_90"), "masked_softplus": ("sm_90",), "square": ("sm_90",)}
    jobs = [
        Job(Lowering(variant, mma(variant, arch)), direction, TARGETS[arch])
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
        if k.slots and job.direction is Direction.BACKWARD:
            scratch = slots_bytes(k.variant, k.backward)
        if k.slots and job.direction is Direction.FORWARD:
            scratch = 8 * 16 * 16 * 4  # parts of y: steps of 8 rows a warp and 16 columns
        if k.slots and job.direction is Direction.STEP:
            continue  # sums of two warps, as the compiler likes
        assert resources.shared_bytes == scratch or k.variant is VARIANTS["square"]


@pytest.mark.parametrize(("cols", "spilled"), [(24, 16), (64, 48), (128, 320)])
def test_slots_of_warps_with_columns_of_their_own_compile(cols: int, spilled: int) -> None:
    """Their shared memory is what the schedule says; what spills is in none of the steps, but at 128 columns."""
    variant, device = make_variant(64, cols, (8, 8, 8, 8, 8), "bf16", tanh="approx"), TARGETS["sm_90"]
    warps = variant.padded_cols // 16
    k = Lowering(variant, check(variant, parse(f"mma_f16x{warps}u8at_b16x{warps}c8atx_i8_ptx"), device))
    places = 2 * 16 * variant.padded_cols * 2  # of the state, in turn
    expected = {Direction.FORWARD: (places, 0), Direction.BACKWARD: (slots_bytes(variant, k.backward), spilled)}
    for job, found in compile_all([Job(k, d, device) for d in expected], 2, lambda _: None).items():
        assert isinstance(found, Resources), found
        shared, most = expected[job.direction]
        assert found.shared_bytes == shared
        assert found.spill_bytes <= most
        assert not found.limits(device, warps)


@pytest.mark.parametrize(
    ("slug", "spilled"), [("mma_f64x2u8a_b32x1c2as_i16_ptx", 0), ("mma_f64x2u8a_b32x1c2as_i16_s7_ptx", 32)]
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


@pytest.mark.parametrize(
    ("slug", "registers"),
    [("f64x2u8at_b64x2c8at", 168), ("f64x2u8at255_b64x2c8at", 255), ("f64x4u8at_b64x4c8at", 128)],
)
def test_forwards_with_slots_take_few_registers(slug: str, registers: int) -> None:
    """Unless they may have more, an SM has three of their warps a scheduler; warps share what they have summed of y."""
    variant, device = VARIANTS["published"], TARGETS["sm_90"]
    k = Lowering(variant, check(variant, parse(f"mma_{slug}_i8_ptx"), device))
    assert Job(k, Direction.FORWARD, device).options.get("maxnreg", 0) == k.forward_registers
    (found,) = compile_all([Job(k, Direction.FORWARD, device)], 1, lambda _: None).values()
    assert isinstance(found, Resources)
    assert (found.spill_bytes, found.shared_bytes) == (0, k.forward.warps * 16 * 8 * 4)
    assert registers - 64 < found.registers <= registers


def test_both_texts_have_the_same_recurrence() -> None:
    """What the two families differ in is where things lie and how they are summed, never the recurrence."""
    variant = VARIANTS["published"]
    portable = render_kernel(Lowering(variant, Portable.default(variant, TARGETS["sm_90"])))
    mma = render_kernel(Lowering(variant, parse("mma_f32x1u8a_b32x1c2as_i16_ptx")))
    for statement in (
        "return tl.fma(u, z, f * h)",
        "h_1 = f_0 * h_0 + u_0 * z_0",
        "g = clamp(c, bound) + column(q_0, c) * dy_0.to(tl.float32)[None, :]",
        "slope_0 = u_0 - u_0 * z_0 * z_0",
        "d = g * slope_0",
    ):
        assert statement in portable
        assert statement.replace("tl.", "gl.") in mma
    assert "c = tl.fma(f_0, g, product(d_operand, w_t, zeros))" in portable
    assert "c = f_0 * g + product(d_operand, w_t, zeros)" in mma


def test_the_interpreter_imports_them(tmp_path: Path) -> None:
    """A package that has them for a GPU works in the interpreter, which runs others."""
    (tmp_path / "kernels.py").write_text(source(VARIANTS["published"]))
    code = "import kernels; assert callable(kernels.m2rnn_forward_kernel)"
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert load_kernels(source(VARIANTS["published"])).INTERVAL.value == 8
    variant, slug = GROUPED["square"]
    assert load_kernels(render_kernel(Lowering(variant, parse(slug)))).INTERVAL.value == 8


GROUPED = {
    "square": (make_variant(64, 64, (2, 2, 2, 2, 2), "bf16", tanh="approx"), "wgmma_aa_i8_ptx"),
    "masked_softplus": (
        make_variant(96, 40, (1, 2, 4, 2, 4), "bf16", "total", gate="softplus"),
        "wgmma_pp_i4_exp",
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
            needed = schedule.scratch_bytes(variant) + OPERANDS_BYTES
            assert needed - 1024 < resources.shared_bytes <= needed
        assert resources.spill_bytes <= (160 if job.direction is Direction.BACKWARD else 0)
    assert b"wgmma" in compiled(jobs[0]).asm["ptx"].encode()


def test_loads_stay_ahead_of_a_branch() -> None:
    """Whether the forward saves states or not, ptxas has a branch between the loads of an iteration and its steps."""
    variant = VARIANTS["published"]
    text = source(variant)
    steps = text[text.index("for t in range(0, whole, UNROLL)") :]
    assert steps.index("next_values = gl.load") < steps.index("if SAVE:") < steps.index("elif t & 0x40000000 != 0")
    assert steps.index("elif t & 0x40000000 != 0") < steps.index("h = advance(")


def test_float32_gates_are_loaded_by_lane() -> None:
    """So ptxas does not wait for one as soon as it is loaded, which it moves to a uniform register otherwise.

    What 16 bits hold is converted first, and its kernel is as it was.
    """
    variant = VARIANTS["published"]
    k = Lowering(variant, check(variant, parse("mma_f64x4u8at_b64x4c8at_i8_ptx"), TARGETS["sm_90"]))
    calls = [(k, direction, dtype) for direction in (Direction.FORWARD, Direction.BACKWARD) for dtype in GATES]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), start_worker) as pool:
        found = list(pool.map(assembly_with_gates, *zip(*calls, strict=True)))
    assert ["%laneid" in text for text in found] == [dtype == "fp32" for _, _, dtype in calls]


def test_gates_that_a_kernel_computes_are_loaded_as_they_are() -> None:
    """They are used at once, and kernels of 32 rows a warp would spill."""
    texts = {
        (variant, warps): render_kernel(
            Lowering(variant, check(variant, parse(f"mma_f64x{warps}u8at_b64x{warps}c8at_i8_ptx"), TARGETS["sm_90"]))
        )
        for variant in (VARIANTS["published"], replace(VARIANTS["published"], gate=GateKind.SOFTPLUS))
        for warps in (2, 4)
    }
    assert [(v.gate, warps) for (v, warps), text in texts.items() if "by_lane" in text] == [(GateKind.GIVEN, 4)]
