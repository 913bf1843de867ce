"""The stages of each command, from a plan to its outcome; no other room chains stages."""

from m2gen.bench.against import baseline
from m2gen.bench.entries import BenchContext
from m2gen.pipeline.bench import (
    BenchRequest,
    Swept,
    bench,
    regressions,
    sweep,
    this_bench_context,
    workloads,
)
from m2gen.pipeline.build import NOT_VERIFIED, BuildOutcome, Committed, build, committed_packages, difference
from m2gen.pipeline.check import CheckRow, check
from m2gen.pipeline.checkpoint import CheckpointRequest, spec_of_checkpoint, write_spec
from m2gen.pipeline.contribute import Contribution, contribution
from m2gen.pipeline.db import Answer, Question, Superfluous, open_database, state, superfluous, why
from m2gen.pipeline.goals import Goal, TuneRequest
from m2gen.pipeline.layers import LayersRequest, bench_layers, layer_workloads, this_layer_context
from m2gen.pipeline.plan import Plan, open_spec, plan, render, shipped_database, shipped_specs
from m2gen.pipeline.ranks import RanksRequest, has_gpus, over_ranks, ranks_cases, ranks_job
from m2gen.pipeline.recheck import Recheck, Replayed, replay, verify_records
from m2gen.pipeline.tune import Size, Tuned, dry_run, dry_run_device, this_tuning_context, tune
from m2gen.pipeline.verify import VerifyOutcome, VerifyRequest, failed, failure_lines, reproduce, verify, verify_full

__all__ = [
    "NOT_VERIFIED",
    "Answer",
    "BenchContext",
    "BenchRequest",
    "BuildOutcome",
    "CheckRow",
    "CheckpointRequest",
    "Committed",
    "Contribution",
    "Goal",
    "LayersRequest",
    "Plan",
    "Question",
    "RanksRequest",
    "Recheck",
    "Replayed",
    "Size",
    "Superfluous",
    "Swept",
    "TuneRequest",
    "Tuned",
    "VerifyOutcome",
    "VerifyRequest",
    "baseline",
    "bench",
    "bench_layers",
    "build",
    "check",
    "committed_packages",
    "contribution",
    "difference",
    "dry_run",
    "dry_run_device",
    "failed",
    "failure_lines",
    "has_gpus",
    "layer_workloads",
    "open_database",
    "open_spec",
    "over_ranks",
    "plan",
    "ranks_cases",
    "ranks_job",
    "regressions",
    "render",
    "replay",
    "reproduce",
    "shipped_database",
    "shipped_specs",
    "spec_of_checkpoint",
    "state",
    "superfluous",
    "sweep",
    "this_bench_context",
    "this_layer_context",
    "this_tuning_context",
    "tune",
    "verify",
    "verify_full",
    "verify_records",
    "why",
    "workloads",
    "write_spec",
]
