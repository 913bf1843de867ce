"""Time schedules of one layer side by side, after checking each against the oracle, as m2gen bench does.

    python tools/compare_schedules.py specs/h200.yaml m2rnn_7b 0 default portable_f32x1u4a_b32x1c2a_i16_ptx

The number is the index of the layer's workload in the spec. Needs a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from m2gen.bench.entries import BenchWorkload, Implementation
from m2gen.bench.kinds import Kind
from m2gen.bench.side_by_side import Result, side_by_side
from m2gen.cache import materialise
from m2gen.db.choice import Choice
from m2gen.device import PORTABLE, Device
from m2gen.errors import M2genError
from m2gen.package.emit import Origin, package
from m2gen.pipeline.bench import this_bench_context
from m2gen.schedule import Schedule, check, default, parse
from m2gen.spec import load_spec
from m2gen.variant import BuiltVariant, expand


def implementation(built: BuiltVariant, schedule: Schedule, device: Device) -> Implementation:
    """Return a package that runs a variant by one schedule on ``device``."""
    choices = [Choice(built, PORTABLE, default(built.variant, PORTABLE)), Choice(built, device, schedule)]
    made = package(Origin("compared", "compared.yaml", "0" * 12), choices)
    return Implementation(Kind.DEFAULT, schedule, "named", materialise(f"packages/{schedule.slug}", made.files))


def line(result: Result) -> str:
    """Return a result as a line of a Markdown table."""
    slug = result.entry.implementation.schedule.slug
    if result.failure is not None:
        return f"| `{slug}` | {result.failure.message} | | | |"
    assert result.forward is not None
    assert result.step is not None
    forward, step = result.forward.estimate, result.step.estimate
    times = [f"{x.median_ms:.3f} ({x.low_ms:.3f} to {x.high_ms:.3f})" for x in (forward, step)]
    return f"| `{slug}` | {' | '.join(times)} | {result.found.extra_bytes / 1e9:.2f} | {result.found.host_us:.0f} |"


def main() -> None:
    """Print the table of the schedules on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("layer")
    parser.add_argument("workload", type=int)
    parser.add_argument("schedules", nargs="+", help="as m2gen names them, or default")
    given = parser.parse_args()
    spec = load_spec(given.spec)
    if given.layer not in spec.layers:
        parser.error(f"layer must be among {', '.join(spec.layers)}, got {given.layer!r}")
    if not 0 <= given.workload < len(spec.layers[given.layer].workloads):
        parser.error(f"workload must be below {len(spec.layers[given.layer].workloads)}, got {given.workload}")
    built = next(built for built in expand(spec) if given.layer in built.layers)
    size = spec.layers[given.layer].workloads[given.workload]
    with this_bench_context("compare_schedules") as context:
        usual = default(built.variant, context.device)
        named = [usual if slug == "default" else parse(slug) for slug in given.schedules]
        timed = [implementation(built, check(built.variant, s, context.device), context.device) for s in named]
        workload = BenchWorkload(given.layer, built.variant, size.batch, size.seq, packed=size.packed)
        print(f"{workload.name}\n")
        print(
            "| schedule | forward ms | forward and backward ms | extra GB | host us |\n| --- | --- | --- | --- | --- |"
        )
        for result in side_by_side(workload, timed, context):
            print(line(result), flush=True)


if __name__ == "__main__":
    try:
        main()
    except M2genError as error:
        raise SystemExit(f"compare_schedules: {error}") from None
