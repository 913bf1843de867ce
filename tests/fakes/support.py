"""Variants, schedules and small packages that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import ModuleType

from m2gen.device import PORTABLE, detect
from m2gen.kernels.compile import load_module
from m2gen.package import emit
from m2gen.schedule import (
    Family,
    Mma,
    MmaBackward,
    MmaForward,
    Portable,
    PortableBackward,
    PortableForward,
    Reduction,
    Schedule,
    Scratch,
    Tanh,
    check,
    default,
)
from m2gen.spec import ClipMode, Dtype, Fp32Products, GateKind, Heads, StateDtype, TanhMode
from m2gen.variant import BuiltVariant, Variant

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


def make_variant(
    rows: int = 16,
    cols: int = 16,
    heads: tuple[int, int, int, int, int] = (1, 1, 2, 2, 2),
    dtype: str = "fp32",
    clip: str = "carry",
    tanh: str = "exact",
    gate: str = "given",
    products: str = "ieee",
) -> Variant:
    """Return a variant; ``heads`` are those of q, k, v, f and w."""
    groups = Heads(**dict(zip("qkvfw", heads, strict=True)))
    numerics = (ClipMode(clip), TanhMode(tanh), GateKind(gate), Fp32Products(products))
    return Variant(rows, cols, groups, Dtype(dtype), StateDtype.FP32, *numerics)


def make_schedule(
    reduction: str = "atomic",
    *,
    interval: int = 4,
    unroll: int = 2,
    chunk: int = 2,
    forward_rows: int = 16,
    backward_rows: int = 16,
    warps: int = 1,
    tanh: str = "exp",
) -> Portable:
    """Return a portable schedule of 16 rows a program and four steps between checkpoints, unless told otherwise."""
    forward = PortableForward(forward_rows, warps, unroll, Reduction(reduction))
    return Portable(forward, PortableBackward(backward_rows, warps, chunk, Reduction(reduction)), interval, Tanh(tanh))


def as_mma(schedule: Portable, scratch: Scratch = Scratch.L2) -> Mma:
    """Return the schedule of the mma family that has a portable one's knobs."""
    backward = schedule.backward
    other = MmaBackward(backward.rows, backward.warps, backward.chunk, backward.reduction, scratch)
    forward = MmaForward(**asdict(schedule.forward))
    return Mma(forward, other, schedule.interval, schedule.tanh, schedule.segments)


SCHEDULES = {
    "one_level_atomic": make_schedule("atomic", interval=4, unroll=2, chunk=4),
    "two_level_atomic": make_schedule("atomic", interval=4, unroll=4, chunk=2),
    "two_level_partial": make_schedule("partial", interval=6, unroll=3, chunk=2),
    "one_step_partial": make_schedule("partial", interval=1, unroll=1, chunk=1),
}

HEADS = (
    (1, 1, 1, 1, 1),
    (1, 1, 4, 4, 4),
    (4, 4, 1, 2, 1),
    (2, 4, 4, 1, 2),
    (4, 2, 2, 4, 1),
    (1, 2, 4, 2, 4),
)
"""Head counts of q, k, v, f and w: each is somewhere 1, all four, and a proper divisor."""
DIMS = ((16, 16), (9, 9), (24, 17), (32, 16))
"""K and V: full tiles, masked ones, and rows that take two programs of 16."""
DTYPES = tuple(Dtype)
OPERANDS = ("q", "k", "v", "weight", "forget", "initial_state")
STEPS = 5
"""Steps of the one sequence on which tests call the operator."""


GATED_HEADS = (2, 1, 4, 2, 4)
"""Head counts of q, k, v, f and w if the kernel computes the gate, whose parameters two heads share."""


def variants(clip: str) -> list[Variant]:
    """Return every variant that the packages of ``build_modules`` hold."""
    grouped = [make_variant(heads=heads, clip=clip) for heads in HEADS]
    sized = [make_variant(rows, cols, dtype=dtype, clip=clip) for rows, cols in DIMS for dtype in DTYPES]
    gated = [make_variant(heads=GATED_HEADS, dtype=dtype, clip=clip, gate="softplus") for dtype in DTYPES]
    return list(dict.fromkeys([*grouped, *sized, *gated]))


def build_package(name: str, chosen: Iterable[Variant], schedule: Schedule) -> emit.Package:
    """Render a package whose variants all run by one schedule, portable, or for this GPU alone."""
    choices = []
    for variant in chosen:
        built = BuiltVariant(variant, ("layer",))
        if schedule.family is Family.PORTABLE:
            choices.append(emit.Choice(built, PORTABLE, check(variant, schedule, PORTABLE)))
            continue
        device = detect()
        assert device is not None, "nothing but a GPU runs other families"
        choices.append(emit.Choice(built, PORTABLE, default(variant, PORTABLE)))
        choices.append(emit.Choice(built, device, check(variant, schedule, device)))
    return emit.package(emit.Origin(name, f"{name}.yaml", "0" * 12), choices)


def default_package(name: str, chosen: Iterable[Variant]) -> emit.Package:
    """Render a package as ``m2gen build`` would for this machine: default schedules for its GPU, and portable ones."""
    devices = [PORTABLE, *filter(None, [detect()])]
    choices = [
        emit.Choice(BuiltVariant(variant, ("layer",)), device, default(variant, device))
        for device in devices
        for variant in chosen
    ]
    return emit.package(emit.Origin(name, f"{name}.yaml", "0" * 12), choices)


def import_package(folder: Path, package: emit.Package, name: str | None = None) -> ModuleType:
    """Write a package's files to ``folder`` and import it under ``name``."""
    for path, text in package.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return load_module(folder / "__init__.py", name or f"m2gen_test_{folder.name}")


def build_modules(folder: Path) -> Callable[[str, str], ModuleType]:
    """Return a function that builds and imports the package of (schedule name, clip mode), once each."""

    @cache
    def module(schedule: str, clip: str) -> ModuleType:
        name = f"{schedule}_{clip}"
        return import_package(folder / name, build_package(name, variants(clip), SCHEDULES[schedule]))

    return module
