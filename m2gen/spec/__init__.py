"""YAML specs: read once, checked as a whole, and frozen."""

from m2gen.spec.fields import (
    KNOWN_TARGETS,
    MAX_HEAD_DIM,
    MAX_STATE_EXPANSION,
    MAX_VARIANTS,
    ClipMode,
    Dtype,
    Fp32Products,
    GateKind,
    Objective,
    StateDtype,
    TanhMode,
)
from m2gen.spec.load import find_spec, json_schema, load_spec, parse_spec, spec_hash
from m2gen.spec.model import (
    HeadGrid,
    Heads,
    Layer,
    Point,
    Spec,
    Workload,
)

__all__ = [
    "KNOWN_TARGETS",
    "MAX_HEAD_DIM",
    "MAX_STATE_EXPANSION",
    "MAX_VARIANTS",
    "ClipMode",
    "Dtype",
    "Fp32Products",
    "GateKind",
    "HeadGrid",
    "Heads",
    "Layer",
    "Objective",
    "Point",
    "Spec",
    "StateDtype",
    "TanhMode",
    "Workload",
    "find_spec",
    "json_schema",
    "load_spec",
    "parse_spec",
    "spec_hash",
]
