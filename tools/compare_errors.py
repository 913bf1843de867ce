"""Compare the errors of one layer's schedules with those of the portable templates, against float64; needs a GPU.

    python tools/compare_errors.py specs/h200.yaml m2rnn_7b default

For each problem of the tuner's check and each tensor: the relative error of the portable family's default, and every
other schedule's as a multiple of it. Exits with 1 where a multiple is over 1.1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from m2gen.errors import M2genError, UsageError
from m2gen.measure.checks import STEPS, SeededCase, seeded_cases
from m2gen.pipeline.bench import this_bench_context
from m2gen.schedule import Portable, Schedule, check, default, parse
from m2gen.spec import Objective, load_spec
from m2gen.tune.candidate import load
from m2gen.tune.check import Candidate, check_candidate
from m2gen.variant import Variant, expand

MOST = 1.1
"""Largest error of another schedule, as a multiple of the portable kernels' error."""


def errors(variant: Variant, schedule: Schedule, asked: SeededCase) -> dict[str, float]:
    """Return the relative error of every tensor; raises UsageError for a schedule that fails the check."""
    candidate = Candidate(load(variant, schedule), variant, schedule, Objective.TRAIN)
    verdict = check_candidate(candidate, (asked,), torch.device("cuda"))
    if verdict.failure is not None:
        raise UsageError(f"{schedule.slug}: {verdict.failure.message}")
    return {error.tensor: error.error for error in verdict.errors}


def compared(variant: Variant, schedules: list[Schedule]) -> Iterator[tuple[str, str, float, list[float]]]:
    """Yield problem, tensor, the first schedule's error, and those of the others as multiples of it."""
    portable, *others = schedules
    for asked in (*seeded_cases(variant, STEPS), *seeded_cases(variant, STEPS, held_out=True)):
        usual = errors(variant, portable, asked)
        found = [errors(variant, schedule, asked) for schedule in others]
        for tensor, error in usual.items():
            yield f"{asked.case.name} {asked.seed}", tensor, error, [x[tensor] / error for x in found]


def main() -> int:
    """Print the table of the schedules on the command line; return 1 if an error is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("layer")
    parser.add_argument("schedules", nargs="+", help="as m2gen names them, or default")
    given = parser.parse_args()
    spec = load_spec(given.spec)
    if given.layer not in spec.layers:
        parser.error(f"layer must be among {', '.join(spec.layers)}, got {given.layer!r}")
    variant = next(built.variant for built in expand(spec) if given.layer in built.layers)
    with this_bench_context("compare_errors") as context:
        usual = default(variant, context.device)
        named = [usual if slug == "default" else parse(slug) for slug in given.schedules]
        every = [Portable.default(variant, context.device), *(check(variant, s, context.device) for s in named)]
        slugs = " | ".join(f"`{schedule.slug}`" for schedule in every)
        print(f"{variant.key}\n\n| problem | tensor | {slugs} |\n| --- | --- |{' --- |' * len(every)}")
        worst = 0.0
        for problem, tensor, error, multiples in compared(variant, every):
            worst = max(worst, *multiples)
            print(f"| {problem} | {tensor} | {error:.2e} | {' | '.join(f'{x:.3f}' for x in multiples)} |", flush=True)
    print(f"\nThe largest multiple is {worst:.3f}.")
    return int(worst > MOST)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except M2genError as error:
        raise SystemExit(f"compare_errors: {error}") from None
