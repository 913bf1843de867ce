"""(variant, schedule) to source text: pure, so the same input gives the same bytes on any machine."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from m2gen.outputs import backward_outputs, forward_output
from m2gen.schedule import Schedule, Tanh
from m2gen.signature import Direction, arguments
from m2gen.spec import ClipMode, Dtype
from m2gen.variant import Variant

TRITON_DTYPE = {Dtype.BF16: "tl.bfloat16", Dtype.FP16: "tl.float16", Dtype.FP32: "tl.float32"}


@cache
def templates_dir() -> Path:
    """Return the templates' directory: beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).resolve().parent
    inside = here / "templates"
    return inside if inside.is_dir() else here.parent / "templates"


@cache
def template_hash() -> str:
    """Return 12 hex digits that change when any template does."""
    digest = hashlib.sha256()
    for path in sorted(templates_dir().glob("*.j2")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_dir()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render_template(template: str, /, **values: Any) -> str:
    """Render one template of ``templates/`` with exactly the names it uses."""
    return _environment().get_template(template).render(**values)


def _constants(variant: Variant, schedule: Schedule) -> list[tuple[str, int]]:
    heads, forward, backward = variant.heads, schedule.forward, schedule.backward
    return [
        ("K", variant.state_expansion),
        ("V", variant.head_dim),
        ("V_PAD", variant.padded_cols),
        ("N", variant.total_heads),
        ("NQ", heads.q),
        ("NK", heads.k),
        ("NV", heads.v),
        ("NF", heads.f),
        ("NW", heads.w),
        ("INTERVAL", schedule.interval),
        ("FORWARD_ROWS", forward.rows),
        ("FORWARD_PARTS", forward.parts(variant)),
        ("UNROLL", forward.unroll),
        ("BACKWARD_ROWS", backward.rows),
        ("BACKWARD_PARTS", backward.parts(variant)),
        ("CHUNK", backward.chunk),
    ]


def _parameters(variant: Variant, schedule: Schedule, direction: Direction) -> list[str]:
    """Return the kernel's parameter list, a few to a line."""
    lines: list[str] = []
    for argument in arguments(variant, schedule, direction):
        text = f"{argument.name}: tl.constexpr," if argument.flag else f"{argument.name},"
        if lines and len(lines[-1]) + len(text) < 105 and argument.flag == ("constexpr" in lines[-1]):
            lines[-1] += " " + text
        else:
            lines.append(text)
    return lines


def render_kernel(variant: Variant, schedule: Schedule, provenance: str) -> str:
    """Return the module of one variant run by one schedule: kernels, then the functions that launch them."""
    outputs = backward_outputs(variant, schedule)
    two_level = schedule.two_level
    weight_parts = variant.total_heads // variant.heads.w * schedule.backward.parts(variant)
    tile = schedule.interval // schedule.backward.chunk * schedule.backward.rows * variant.padded_cols
    return render_template(
        "kernel.py.j2",
        title=f"M2RNN kernels for {variant.key}, schedule {schedule.slug}.",
        provenance=provenance,
        constants=_constants(variant, schedule),
        forward_parameters=_parameters(variant, schedule, Direction.FORWARD),
        backward_parameters=_parameters(variant, schedule, Direction.BACKWARD),
        tanh_ptx=schedule.tanh is Tanh.PTX,
        clip_carry=variant.clip is ClipMode.CARRY,
        dot_precision=', input_precision="ieee"' if variant.dtype is Dtype.FP32 else "",
        widens=variant.dtype is Dtype.BF16,
        operand_cast=f".to({TRITON_DTYPE[variant.dtype]})",
        y=forward_output(variant, schedule),
        forward_steps=range(schedule.forward.unroll),
        backward_steps=range(schedule.backward.chunk),
        backward_outputs=outputs,
        two_level=two_level,
        chunk_range="last, first - 1" if two_level else "end, -1",
        chunk_states=(
            "scratch + tl.maximum(before - first, 0) // CHUNK * (BACKWARD_ROWS * V_PAD) + scratch_offsets"
            if two_level
            else "checkpoints + tl.cast(tl.maximum(before, 0) // INTERVAL, tl.int64) * (N * K * V) + state_offsets"
        ),
        chunk_mask="" if two_level else ", mask=state_mask, other=0.0",
        scratch=f"q.new_empty(programs, {tile}, dtype=torch.float32)" if two_level else "None",
        weight_shape=f"{variant.heads.w}, {weight_parts}, {variant.head_dim}, {variant.head_dim}",
        interval=schedule.interval,
        forward_programs=variant.total_heads * schedule.forward.parts(variant),
        backward_programs=variant.total_heads * schedule.backward.parts(variant),
        forward_warps=schedule.forward.warps,
        backward_warps=schedule.backward.warps,
        state_shape=f"{variant.total_heads}, {variant.state_expansion}, {variant.head_dim}",
    )
