"""The limits of a spec, its choices, and the types of its single values."""

from __future__ import annotations

import keyword
import sys
from enum import StrEnum
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from m2gen.spec.contract import Breach, choice, must_be, one_of, refuse

MAX_STATE_EXPANSION = 256
"""Largest K for which the templates are verified."""
MAX_HEAD_DIM = 128
"""Largest V that the templates serve: a program holds the V x V state weight in its registers."""
MAX_HEADS = 65535
"""Largest head count: the extent of a launch grid's second and third axes."""
MAX_VARIANTS = 4096
"""Most variants that one spec may ask for."""
MAX_SIZE = 2**31 - 1
_MAX_NAME = 64
IMPORTED = ("fla", "lm_engine", "m2gen", "numpy", "torch", "transformers", "triton", "xma")
"""Packages that generated code or its build imports, if only in integrations, so that no spec may have their names."""
_TAKEN = {name.lower() for name in (*IMPORTED, *sys.stdlib_module_names, "test")}

KnownTarget = Literal["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"]
KNOWN_TARGETS: tuple[str, ...] = get_args(KnownTarget)


class Dtype(StrEnum):
    """Element type of q, k, v, the weight's products and y."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class StateDtype(StrEnum):
    """Element type of the state and of everything that accumulates."""

    FP32 = "fp32"


class ClipMode(StrEnum):
    """The gradient of the state that the backward clamps."""

    CARRY = "carry"
    """The gradient carried from later steps, before the output's share is added."""
    TOTAL = "total"
    """The sum of both shares."""


class TanhMode(StrEnum):
    """Whether tanh may use the GPU's approximate instruction."""

    EXACT = "exact"
    APPROX = "approx"


class GateKind(StrEnum):
    """The source of the forget gate."""

    GIVEN = "given"
    """The operand ``forget`` is f itself."""
    SOFTPLUS = "softplus"
    """The kernel computes f = exp(-exp(A_log) softplus(x + dt_bias)) from x = ``forget``, per head."""


class Fp32Products(StrEnum):
    """How products of fp32 operands are multiplied; sums are float32 either way."""

    IEEE = "ieee"
    TF32 = "tf32"
    """Products run on tensor cores, with operands rounded to 11 significant bits."""


class Objective(StrEnum):
    """The calls that tuning makes fast."""

    TRAIN = "train"
    """Forward and backward together."""
    INFER = "infer"


def _identifier(value: str) -> str:
    if keyword.iskeyword(value) or (value.startswith("__") and value.endswith("__")):
        raise ValueError(value)
    return value


def _free(value: str) -> str:
    """Refuse a name that would shadow another package, or overwrite its files, also where file names ignore case."""
    if value.lower() in _TAKEN:
        others = ", ".join(IMPORTED)
        raise refuse([Breach((), f"name no package that others import ({others}, Python's own modules)", value)])
    return value


def _name_words(also: str = "") -> str:
    return f"a Python identifier (ASCII, at most {_MAX_NAME} characters, no keyword, no dunder{also})"


LayerName = Annotated[
    str,
    Field(strict=True, pattern=rf"^[A-Za-z_][A-Za-z0-9_]{{0,{_MAX_NAME - 1}}}$"),
    AfterValidator(_identifier),
    must_be(_name_words()),
]
SpecName = Annotated[
    str,
    Field(strict=True, pattern=rf"^[A-Za-z][A-Za-z0-9_]{{0,{_MAX_NAME - 1}}}$"),
    AfterValidator(_identifier),
    must_be(_name_words(", no leading underscore")),
    AfterValidator(_free),
]
HeadDim = Annotated[
    int,
    Field(strict=True, ge=1, le=MAX_HEAD_DIM),
    must_be(f"an integer from 1 to {MAX_HEAD_DIM} (registers sum the gradient of the V x V state weight)"),
]
StateExpansion = Annotated[
    int,
    Field(strict=True, ge=1, le=MAX_STATE_EXPANSION),
    must_be(f"an integer from 1 to {MAX_STATE_EXPANSION} (the most rows that kernels are verified for)"),
]
HeadCount = Annotated[int, Field(strict=True, ge=1, le=MAX_HEADS), must_be(f"an integer from 1 to {MAX_HEADS}")]
Size = Annotated[int, Field(strict=True, ge=1, le=MAX_SIZE), must_be(f"an integer from 1 to {MAX_SIZE}")]
Duration = Annotated[
    str,
    Field(strict=True, pattern=r"^[1-9][0-9]{0,5}[smh]$"),
    must_be("a whole number of seconds, minutes or hours such as 90s, 10m or 1h"),
]
Target = Annotated[KnownTarget, one_of(KNOWN_TARGETS)]
ElementType = Annotated[Dtype, choice(Dtype)]
StateElementType = Annotated[StateDtype, choice(StateDtype)]
Clip = Annotated[ClipMode, choice(ClipMode)]
Tanh = Annotated[TanhMode, choice(TanhMode)]
Gate = Annotated[GateKind, choice(GateKind)]
Products = Annotated[Fp32Products, choice(Fp32Products)]
Goal = Annotated[Objective, choice(Objective)]
