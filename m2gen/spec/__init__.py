"""YAML specs: what a user asks for, read once, checked as a whole, and frozen."""

from m2gen.spec.fields import (
    KNOWN_TARGETS,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_STATE_EXPANSION,
    MAX_VARIANTS,
    ClipMode,
    Dtype,
    Objective,
    StateDtype,
    TanhMode,
)
from m2gen.spec.load import find_spec, json_schema, load_spec, parse_spec, spec_hash
from m2gen.spec.model import (
    HeadGrid,
    Heads,
    Layer,
    Layers,
    Numerics,
    Point,
    Spec,
    Tuning,
    Workload,
)

__all__ = [
    "KNOWN_TARGETS",
    "MAX_HEADS",
    "MAX_HEAD_DIM",
    "MAX_STATE_EXPANSION",
    "MAX_VARIANTS",
    "ClipMode",
    "Dtype",
    "HeadGrid",
    "Heads",
    "Layer",
    "Layers",
    "Numerics",
    "Objective",
    "Point",
    "Spec",
    "StateDtype",
    "TanhMode",
    "Tuning",
    "Workload",
    "find_spec",
    "json_schema",
    "load_spec",
    "parse_spec",
    "spec_hash",
]
