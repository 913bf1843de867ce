"""(variant, schedule) to source text: pure, so the same input gives the same bytes on any machine."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from m2gen.kernels import layouts
from m2gen.kernels.arguments import Direction, arguments, options
from m2gen.kernels.loads import BACKWARD_VECTORS, FORWARD_VECTORS, backward_words, forward_words
from m2gen.kernels.outputs import backward_outputs, forward_output
from m2gen.schedule import WARPGROUP_ROWS, Layouts, Reduction, Schedule, Scratch, Tanh
from m2gen.spec import ClipMode, Dtype, Fp32Products
from m2gen.variant import Variant, padded

SHORT = 64
"""Tokens up to which y's contributors store rows of their own, whatever the schedule says. Fewer than any problem by
which a schedule is tuned, so that the kernels that are timed are those that were verified."""
SUM_ELEMENTS = 256
"""Elements that one warp of the kernel that adds contributors' rows."""
TRITON_DTYPE = {Dtype.BF16: "tl.bfloat16", Dtype.FP16: "tl.float16", Dtype.FP32: "tl.float32"}


@cache
def templates_dir() -> Path:
    """Return the templates' directory: beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).resolve().parents[1]
    inside = here / "templates"
    return inside if inside.is_dir() else here.parent / "templates"


@cache
def reference_source() -> str:
    """Return the eager reference's module, which packages carry as it is: it imports nothing of m2gen."""
    return (Path(__file__).resolve().parents[1] / "runtime" / "reference.py").read_text(encoding="utf-8")


@cache
def template_hash() -> str:
    """Return 12 hex digits that change when any template does."""
    digest = hashlib.sha256()
    for path in sorted(templates_dir().rglob("*.j2")):
        name = path.relative_to(templates_dir()).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
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
        *([("SEGMENTS", schedule.segments), ("SHORTEST", schedule.shortest_segment)] if schedule.segments > 1 else []),
        *([("SUM_BLOCK", SUM_ELEMENTS * forward.warps)] if _shares(variant, schedule) else []),
    ]


def _shares(variant: Variant, schedule: Schedule) -> bool:
    """Whether any tensor has several contributors."""
    return any(out.shared for out in (forward_output(variant, schedule), *backward_outputs(variant, schedule)))


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


def _options(variant: Variant, schedule: Schedule, direction: Direction) -> str:
    return ", ".join(f"{name}={value}" for name, value in options(variant, schedule, direction).items())


def _sums(variant: Variant, schedule: Schedule) -> dict[str, Any]:
    """Return what several programs write, and when the launchers have them use atomics."""
    y, outputs = forward_output(variant, schedule), backward_outputs(variant, schedule)
    backward_shares = any(out.shared for out in outputs)

    def atomic(shares: bool, reduction: Reduction) -> str:
        return "not deterministic" if shares and reduction is Reduction.ATOMIC else "False"

    return {
        "y": y,
        "backward_outputs": outputs,
        "shares": _shares(variant, schedule),
        "forward_atomic": atomic(y.shared, schedule.forward.reduction),
        "backward_atomic": atomic(backward_shares, schedule.backward.reduction),
    }


def _gate(variant: Variant, schedule: Schedule) -> dict[str, Any]:
    """Return what the templates place for the kind of gate."""
    contributors = variant.total_heads // variant.heads.f * schedule.backward.parts(variant)
    computes = variant.computes_gate
    return {
        "computes_gate": computes,
        "gate_template": f"_gate_{variant.gate}.py.j2",
        "gate_legend": "x_t, from which the gate is computed" if computes else "x_t, which is the gate itself",
        "outside_gate": 'float("-inf")' if computes else "1.0",
        "gate_parameters": ", rate, dt_bias" if computes else "",
        "gate_arguments": "A_log, dt_bias, " if computes else "",
        "gate_gradients": "dA_log, ddt_bias, " if computes else "",
        "gate_flags": "WANT_GATE=want_gate, " if computes else "",
        "gate_wanted": "want_A_log, want_dt_bias" if computes else "_, _",
        "gate_shape": f"{variant.heads.f}, {contributors}",
    }


def _products(variant: Variant, schedule: Schedule) -> dict[str, Any]:
    """Return how operands of products are rounded and multiplied."""
    interpretable = schedule.layouts is Layouts.AUTO  # the interpreter runs no others
    narrows = variant.dtype is Dtype.BF16 and interpretable
    return {
        "dot_precision": f', input_precision="{variant.products}"' if variant.dtype is Dtype.FP32 else "",
        "tf32": variant.products is Fp32Products.TF32,
        "interpretable": interpretable,
        "widens": narrows,
        # A sum that begins with a large number rounds each of its terms to that number's last place. Triton makes one
        # sum of a product and what is added to it, but for what tl.fma adds.
        "added_apart": interpretable,
        "weight_added_apart": variant.dtype is Dtype.FP32,
        "as_operand": "to_bfloat16(x)" if narrows else f"x.to({TRITON_DTYPE[variant.dtype]})",
    }


def _checkpoints(variant: Variant, schedule: Schedule) -> dict[str, Any]:
    """Return where the backward finds the states that it starts from."""
    chunk = "tl.maximum(before - first, 0) // CHUNK"
    if schedule.backward.scratch is Scratch.SHARED:
        shape = "tl.float32, [INTERVAL // CHUNK, BACKWARD_ROWS, V_PAD]"
        return {
            "two_level": True,
            "begin_scratch": (f"rebuilt = tl.allocate_shared_memory({shape}, BACKWARD_SCRATCH)",),
            "keep_state": "rebuilt.index(tl.cast(t // CHUNK, tl.int32)).store(h_0)",
            "chunk_range": "last, first - 1",
            "chunk_state": f"rebuilt.index(tl.cast({chunk}, tl.int32))",
            "load_chunk_state": "kept.load(BACKWARD_TILE)",
            "scratch": "None",
        }
    if schedule.two_level:
        elements = schedule.scratch_bytes(variant) // 4
        return {
            "two_level": True,
            "begin_scratch": (
                "scratch += program.to(tl.int64) * (INTERVAL // CHUNK * BACKWARD_ROWS * V_PAD)",
                "scratch_offsets = (state_rows - part * BACKWARD_ROWS) * V_PAD + cols[None, :]",
            ),
            "keep_state": "tl.store(scratch + t // CHUNK * (BACKWARD_ROWS * V_PAD) + scratch_offsets, h_0)",
            "chunk_range": "last, first - 1",
            "chunk_state": f"scratch + {chunk} * (BACKWARD_ROWS * V_PAD) + scratch_offsets",
            "load_chunk_state": "tl.load(kept)",
            "scratch": f"q.new_empty(programs, {elements}, dtype=torch.float32)",
        }
    checkpoint = "tl.cast(tl.maximum(before, 0) // INTERVAL, tl.int64) * (N * K * V)"
    return {
        "two_level": False,
        "chunk_range": "end, -1",
        "chunk_state": f"checkpoints + {checkpoint} + state_offsets",
        "load_chunk_state": "tl.load(kept, mask=state_mask, other=0.0)",
        "scratch": "None",
    }


def _launch(variant: Variant, schedule: Schedule) -> dict[str, Any]:
    """Return the launchers' grids and shapes."""
    heads, rows, cols = variant.total_heads, variant.state_expansion, variant.head_dim
    weight_parts = heads // variant.heads.w * schedule.backward.parts(variant)
    return {
        "interval": schedule.interval,
        "interval_padded": padded(schedule.interval),
        "forward_programs": heads * schedule.forward.parts(variant),
        "backward_programs": heads * schedule.backward.parts(variant),
        "step_programs": heads,
        "forward_warps": schedule.forward.warps,
        "forward_options": _options(variant, schedule, Direction.FORWARD),
        "backward_options": _options(variant, schedule, Direction.BACKWARD),
        "short": SHORT,
        "sum_block": SUM_ELEMENTS * schedule.forward.warps,
        "state_shape": f"{heads}, {rows}, {cols}",
        "step_shape": f"{heads}, {cols}",
        "weight_shape": f"{variant.heads.w}, {weight_parts}, {cols}, {cols}",
    }


def render_kernel(variant: Variant, schedule: Schedule, provenance: str) -> str:
    """Return the module of one variant run by one schedule: kernels, then the functions that launch them."""
    return render_template(
        "kernel.py.j2",
        title=f"M2RNN kernels for {variant.key}, schedule {schedule.slug}.",
        provenance=provenance,
        constants=_constants(variant, schedule),
        **{f"{direction}_parameters": _parameters(variant, schedule, direction) for direction in Direction},
        forward_steps=range(schedule.forward.unroll),
        backward_steps=range(schedule.backward.chunk),
        tanh_ptx=schedule.tanh is Tanh.PTX,
        clip_carry=variant.clip is ClipMode.CARRY,
        segmented=schedule.segments > 1,
        **_products(variant, schedule),
        **_gate(variant, schedule),
        **_sums(variant, schedule),
        **_checkpoints(variant, schedule),
        **_launch(variant, schedule),
        **forward_words(schedule),
        **backward_words(variant, schedule),
        **layouts.words(variant, schedule),
        forward_vectors=FORWARD_VECTORS,
        backward_vectors=BACKWARD_VECTORS,
        group_rows=WARPGROUP_ROWS,
    )


@cache
def kernel_hash(variant: Variant, schedule: Schedule) -> str:
    """Return 12 hex digits that change when the kernels that were measured are no longer what is rendered."""
    return hashlib.sha256(render_kernel(variant, schedule, "").encode()).hexdigest()[:12]
