"""Registers that do not hold a kernel: shipped specs spill nothing but what is named here, and check says why."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from assembler import CRASHES, Assembler
from support import make_variant

from m2gen.db.choice import Choice
from m2gen.device import TARGETS
from m2gen.kernels.demand import demand_of
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.package.emit import Origin
from m2gen.pipeline import check, open_spec, plan
from m2gen.pipeline.plan import Plan
from m2gen.schedule import default, parse
from m2gen.variant import BuiltVariant

SPILLS = {
    "k9_v9_q7_k7_v7_f7_w7_fp32_carry_approx": 24,  # of the learned rule: 1.38 times as fast as what spills 8
    "k9_v9_q7_k7_v7_f7_w7_bf16_carry_approx": 48,  # 16 where calls have no segments
    "k9_v9_q7_k7_v7_f7_w7_fp16_carry_approx": 48,  # of the learned rule: 1.08 times as fast as what spills nothing
    "k16_v64_q4_k4_v4_f4_w4_fp32_carry_exact_softplus": 24,
    "k64_v16_q1_k1_v48_f48_w48_bf16_carry_exact_softplus": 32,  # before and after its steps
    "k64_v16_q1_k1_v132_f132_w132_bf16_carry_approx": 48,  # slots: addresses, in none of the steps
    "k64_v16_q1_k1_v84_f84_w84_bf16_carry_approx": 48,
    "k64_v64_q8_k8_v8_f8_w8_bf16_carry_approx": 8,  # an address, in none of the steps
    "k64_v64_q16_k16_v16_f16_w16_bf16_carry_approx": 8,
}
"""Variants of shipped specs whose defaults spill, and how many bytes a thread at most."""
ELSEWHERE = {
    "3.6": {
        "k9_v9_q7_k7_v7_f7_w7_bf16_carry_approx": 48,
        "k9_v9_q7_k7_v7_f7_w7_fp16_carry_approx": 64,
        "k64_v16_q1_k1_v132_f132_w132_bf16_carry_approx": 80,
        "k64_v16_q1_k1_v84_f84_w84_bf16_carry_approx": 80,
        "k16_v64_q4_k4_v4_f4_w4_fp32_carry_exact_softplus": 168,
        "k64_v16_q1_k1_v48_f48_w48_bf16_carry_exact_softplus": 232,  # with some 4 loads in each step
    },
    "3.8": {
        "k9_v9_q7_k7_v7_f7_w7_bf16_carry_approx": 40,
        "k9_v9_q7_k7_v7_f7_w7_fp16_carry_approx": 64,
        "k64_v16_q1_k1_v132_f132_w132_bf16_carry_approx": 56,
        "k64_v16_q1_k1_v84_f84_w84_bf16_carry_approx": 56,
        "k16_v64_q4_k4_v4_f4_w4_fp32_carry_exact_softplus": 40,
    },
    "3.9": {
        "k64_v64_q8_k8_v8_f8_w8_bf16_carry_approx": 24,
        "k64_v64_q16_k16_v16_f16_w16_bf16_carry_approx": 24,
        "k9_v9_q7_k7_v7_f7_w7_fp32_carry_approx": 48,
        "k64_v16_q1_k1_v132_f132_w132_bf16_carry_approx": 96,
        "k64_v16_q1_k1_v84_f84_w84_bf16_carry_approx": 96,
        "k16_v64_q4_k4_v4_f4_w4_fp32_carry_exact_softplus": 48,
        "k64_v16_q1_k1_v48_f48_w48_bf16_carry_exact_softplus": 208,
        "k64_v16_q1_k1_v48_f48_w48_fp32_carry_exact_softplus": 8,
    },
}
"""The same by the ptxas of other Tritons than 3.7.1, by whose word the defaults were chosen."""
VERSION = ".".join(metadata.version("triton").split(".")[:2])
MOST = SPILLS | ELSEWHERE.get(VERSION, {})
CUT = {"3.6": 8, "3.7": 8, "3.8": 32, "3.9": 136}
"""Bytes a thread that the published layers spill on sm_80 in segments, by Triton; in one segment they spill nothing."""


class Silent:
    """Progress that nobody sees."""

    def start(self, stage: str, total: int) -> None: ...
    def advance(self, item: str) -> None: ...
    def finish(self) -> None: ...


@pytest.mark.parametrize("spec", ["a100", "b200", "mi300x", "h200", "examples"])
def test_defaults_of_shipped_specs_spill_nothing(spec: str) -> None:
    """On every target of the spec, or what is named spills no more than it did."""
    for row in check(plan(f"{spec}.yaml", records=()), Silent()):
        assert row.resources is not None, row
        assert row.resources.spill_bytes <= MOST.get(row.variant, 0), row
        assert bool(row.notes) == bool(row.resources.spill_bytes)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_segments_take_no_registers(arch: str) -> None:
    """The published layers compile in segments for every kind of target, and spill nothing but what is named."""
    variant, device = make_variant(64, 16, (1, 1, 84, 84, 84), "bf16", tanh="approx"), TARGETS[arch]
    usual = "mma_f32x1u8a_b32x1c2as_i16_ptx" if device.is_nvidia else default(variant, device).slug
    schedule = replace(parse(usual), segments=7)
    spec, _ = open_spec("tiny.yaml")
    choices = (Choice(BuiltVariant(variant, ("cut",)), device, schedule),)
    for row in check(Plan(spec, Origin("cut", "cut.yaml", "0" * 12), choices), Silent()):
        assert row.resources is not None, row
        assert row.resources.spill_bytes <= (CUT.get(VERSION, 0) if arch == "sm_80" else 0)
        assert not row.problems


def test_a_weight_of_128_columns_lies_in_shared_memory() -> None:
    """Its kernels have it there; what spills in the backward is said, with what takes the registers."""
    variant, device = make_variant(64, 128, (1, 1, 8, 8, 8), "bf16", tanh="approx"), TARGETS["sm_90"]
    schedule = default(variant, device)
    spec, _ = open_spec("tiny.yaml")
    choices = (Choice(BuiltVariant(variant, ("wide",)), device, schedule),)
    forward, backward, _ = check(Plan(spec, Origin("wide", "wide.yaml", "0" * 12), choices), Silent())
    for row in (forward, backward):
        assert row.resources is not None
        assert row.resources.shared_bytes >= 128 * 128 * 2
        assert not row.problems
    assert forward.notes == ()
    demand = demand_of(Lowering(variant, schedule), Direction.BACKWARD)
    assert (demand.states, demand.weights) == (56, 128)  # 7 tiles of 16 x 128; two operands of bf16 and a float32 sum
    square = make_variant(64, 64, (16, 16, 16, 16, 16), "bf16")
    grouped = demand_of(Lowering(square, default(square, device)), Direction.BACKWARD)
    assert (grouped.states, grouped.weights) == (160, 32)  # 5 tiles of 64 x 64 and one sum of it, over 128 threads
    note = "spills: tiles of the state alone take 56 of 255 registers a thread, and state weights 128"
    assert backward.resources is not None
    assert backward.notes == ((note,) if backward.resources.spill_bytes else ())  # the ptxas of Triton 3.9 spills none


def test_a_compiler_that_dies_is_named_and_costs_no_other_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache_dir: Path
) -> None:
    """The assembler of one vendor takes its process down; kernels of both vendors' targets have a line."""
    Assembler(tmp_path / "assembler", CRASHES).replace(monkeypatch)
    variant = make_variant(dtype="bf16", tanh="approx")
    schedule = parse("portable_f16x1u4a_b16x1c2a_i16_exp")
    spec, _ = open_spec("tiny.yaml")
    built = BuiltVariant(variant, ("broken",))
    choices = tuple(Choice(built, TARGETS[arch], schedule) for arch in ("gfx942", "sm_90"))
    rows = check(Plan(spec, Origin("broken", "broken.yaml", "0" * 12), choices), Silent())
    assert {row.arch for row in rows if row.resources is None} == {"sm_90"}
    problems = {row.problems[0].partition(": ")[2] for row in rows if row.problems}
    assert problems == {"its process ended with SIGSEGV while compiling"}
    assert len(rows) == 6
