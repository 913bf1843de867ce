"""Verification cases and their reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from m2gen.problem import Draw, Gates, Problem, Weights
from m2gen.spec import Fp32Products
from m2gen.variant import Variant


class Feature(StrEnum):
    """The part of the operator's contract that a case is about; summaries have a line for each."""

    RECURRENCE = "recurrence"
    PACKED = "packed"
    STATES = "states"
    DECODING = "decoding"
    DTYPES = "dtypes"
    GATE = "gate"
    LAYOUTS = "layouts"
    DETERMINISM = "determinism"
    HEADS = "heads"
    DIMS = "dims"
    PYTORCH = "pytorch"
    DROP_IN = "drop_in"
    LAYER = "layer"
    POOLS = "pools"
    DRIFT = "drift"


class Loss(StrEnum):
    """The results that have an incoming gradient."""

    Y = "y"
    STATE = "state"
    BOTH = "both"


class Layout(StrEnum):
    """The memory layout of the operands and incoming gradients."""

    PLAIN = "plain"
    STRIDED = "strided"
    """Operands are every other element of a wider tensor."""
    TRANSPOSED = "transposed"
    """The first and the second dim are swapped in memory."""
    SLICED = "sliced"
    """Operands are slices of a fused projection's last dim."""
    EXPANDED = "expanded"
    """One step of one sequence is expanded with stride 0."""


class LayerForm(StrEnum):
    """Options of the layer of a case."""

    PUBLISHED = "4_wide"
    BIASED = "biased"
    TWO_WIDE = "2_wide"
    THREE_WIDE = "3_wide"
    NO_CONVOLUTION = "no_conv"
    BARE = "bare"


class Check(StrEnum):
    """The check of a case; ``m2gen.verify.checks`` has a function for each."""

    GRADIENTS = "gradients"
    """Compare results and all gradients with float64."""
    SINGLE = "single"
    """Compare each gradient when it is wanted alone."""
    INFERENCE = "inference"
    """Compare results with float64 when no gradient is wanted."""
    AUTOCAST = "autocast"
    CHUNKED = "chunked"
    ISOLATED = "isolated"
    DECODING = "decoding"
    REPEATED = "repeated"
    OPCHECK = "opcheck"
    COMPILE = "compile"
    GRAPH = "graph"
    STEP_GRAPH = "step_graph"
    CHECKPOINT = "checkpoint"
    DROP_IN = "drop_in"
    LAYER = "layer"
    """Compare results and all gradients of the package's layer with float64."""
    LAYER_DECODING = "layer_decoding"
    POOL = "pool"
    """Compare a prompt, a token and drafts on slots of a pool with float64."""
    POOL_PROMPTS = "pool_prompts"
    POOL_KEPT = "pool_kept"
    LAYER_POOL = "layer_pool"
    DRIFT = "drift"

    @property
    def needs_gpu(self) -> bool:
        """Whether the interpreter cannot run it in reasonable time."""
        return self in (Check.GRAPH, Check.STEP_GRAPH, Check.DRIFT)


@dataclass(frozen=True)
class Case:
    """One case: a problem, how its inputs are drawn, how the operator is called, and what is differentiated."""

    name: str
    problem: Problem
    loss: Loss = Loss.BOTH
    gates: Gates = Gates.MIXED
    weights: Weights = Weights.TRAINED
    dy_scale: float = 1.0
    value_scale: float = 1.0
    clip: float | None = 1.0
    wide: bool = False
    layout: Layout = Layout.PLAIN
    deterministic: bool = False
    narrow_state: bool = False
    """Whether decoding keeps the state in bf16 between steps, as does the eager loop that its budget comes from."""
    layer: LayerForm = LayerForm.PUBLISHED
    padded: bool = False
    """Whether the first sequence of a layer's batch is padded in front."""
    feature: Feature = Feature.RECURRENCE
    check: Check = Check.GRADIENTS

    @property
    def draw(self) -> Draw:
        """How the inputs are drawn."""
        repeated = self.layout is Layout.EXPANDED
        return Draw(self.gates, self.weights, self.dy_scale, self.value_scale, self.wide, repeated)

    @property
    def question(self) -> Case:
        """The case reduced to the facts that the oracle's answer depends on."""
        layout = self.layout if self.layout is Layout.EXPANDED else Layout.PLAIN
        plain = Case("", self.problem)
        return replace(self, name="", layout=layout, deterministic=False, feature=plain.feature, check=plain.check)


@dataclass(frozen=True)
class TensorResult:
    """One tensor's relative error ‖out - ref‖ / ‖ref‖ (absolute if ref is 0) and its budget."""

    tensor: str
    error: float
    budget: float
    """Largest error allowed; 0 if the tensor must have the same bits as another."""
    over: bool = False
    """Whether the error must be over the budget: a control, which is known to be wrong."""

    @property
    def passed(self) -> bool:
        if self.over:
            return self.error > self.budget
        return self.error <= self.budget < math.inf  # False for NaN, and where the reference itself overflows

    @property
    def verdict(self) -> str:
        """The requirement and the error, for messages."""
        if self.budget == math.inf:
            return "must have a budget, got a reference that overflows in the kernel's dtypes"
        if not self.budget and not self.over:
            return f"must have the same bits, got a relative difference of {self.error:.2e}"
        return f"must be {'over' if self.over else 'within'} {self.budget:.2e}, got {self.error:.2e}"

    @property
    def part(self) -> float:
        """The error as a fraction of the budget; 0 for equal bits."""
        if 0 < self.budget < math.inf:
            return self.error / self.budget
        return 0.0 if self.passed else float("inf")


@dataclass(frozen=True)
class CaseReport:
    """The results of one case."""

    variant: str
    dtype: str
    """Dtype of the variant's operands; ``tf32`` if its products are."""
    feature: Feature
    case: str
    seed: int
    results: tuple[TensorResult, ...]
    seconds: float
    failure: str = ""
    """Why there are no results, in one line: the exception, or how the process ended."""
    spec: str = ""
    """Spec file of the variant."""
    schedule: str = ""
    """Slug of the schedule."""
    name: str = ""
    """Name of the variant: the spec's layers and dtype."""

    @property
    def passed(self) -> bool:
        return not self.failure and all(result.passed for result in self.results)


def report(
    variant: Variant,
    case: Case,
    seed: int,
    results: tuple[TensorResult, ...] = (),
    seconds: float = 0.0,
    failure: str = "",
) -> CaseReport:
    """Return the report of ``case`` on ``variant``."""
    tf32 = variant.products is Fp32Products.TF32
    dtype = str(variant.products if tf32 else variant.dtype)
    return CaseReport(variant.key, dtype, case.feature, case.name, seed, results, seconds, failure)
