"""The only module that chains the stages: each file is one command's way from a plan to its outcome."""

from m2gen.pipeline.bench import bench
from m2gen.pipeline.build import BuildOutcome, build, committed_specs, difference
from m2gen.pipeline.check import CheckRow, check
from m2gen.pipeline.plan import Plan, Progress, open_spec, plan, render, shipped_specs
from m2gen.pipeline.verify import VerifyOutcome, VerifyRequest, failed, failure_lines, reproduce, verify, verify_full

__all__ = [
    "BuildOutcome",
    "CheckRow",
    "Plan",
    "Progress",
    "VerifyOutcome",
    "VerifyRequest",
    "bench",
    "build",
    "check",
    "committed_specs",
    "difference",
    "failed",
    "failure_lines",
    "open_spec",
    "plan",
    "render",
    "reproduce",
    "shipped_specs",
    "verify",
    "verify_full",
]
