"""Print the results of ``m2gen build``, ``check`` and ``spec``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from m2gen.cli.show.names import calls, closest, counted, record_notes
from m2gen.cli.show.report import print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.db.choice import Choice
from m2gen.device import PORTABLE
from m2gen.errors import listed
from m2gen.pipeline import NOT_VERIFIED, BuildOutcome, CheckRow, Plan, state
from m2gen.variant import BuiltVariant

KERNEL_COLUMNS = ("layer", "kernel", "registers", "spills B", "shared B", "code B", "from")
SCHEDULE_COLUMNS = ("layer", "programs/SM", "schedule", "from")
MORE_COLUMNS = ("variant", "slug")
"""Columns that --verbose adds to either table."""


def kernel_tables(rows: Sequence[CheckRow], *, verbose: bool) -> Iterator[Table]:
    """Yield a table of kernels for each target, with notes on those that spill."""
    columns = (*KERNEL_COLUMNS, *MORE_COLUMNS) if verbose else KERNEL_COLUMNS
    for arch in dict.fromkeys(row.arch for row in rows):
        shown = [row for row in rows if row.arch == arch]
        cells = [(*_kernel_cells(row), *((row.variant, row.schedule) if verbose else ())) for row in shown]
        notes = [f"{row.name} {row.kernel} {note}" for row in shown for note in row.notes]
        yield Table(f"Kernels for {arch}", columns, cells, notes)


def _kernel_cells(row: CheckRow) -> tuple[Any, ...]:
    taken = row.resources
    numbers = (taken.registers, taken.spill_bytes, taken.shared_bytes, taken.code_bytes) if taken else ("",) * 4
    return (row.name, row.kernel, *numbers, closest(row.source))


def _kernel_json(row: CheckRow) -> dict[str, Any]:
    return {
        "variant": row.variant,
        "kernel": row.kernel,
        "target": row.arch,
        "schedule": row.schedule,
        "from": row.source,
        "resources": asdict(row.resources) if row.resources else None,
        "problems": list(row.problems),
        "notes": list(row.notes),
    }


def schedule_tables(planned: Plan, *, verbose: bool) -> Iterator[Table]:
    """Yield a table of schedules for each target, with notes on their records."""
    names = planned.names
    columns = (*SCHEDULE_COLUMNS, *MORE_COLUMNS) if verbose else SCHEDULE_COLUMNS
    for device in dict.fromkeys(choice.device for choice in planned.choices if verbose or choice.device != PORTABLE):
        shown = [choice for choice in planned.choices if choice.device == device]
        cells = [
            (names[c.variant], calls(c.buckets), c.schedule.describe(), c.source)
            + ((c.variant.key, c.schedule.slug) if verbose else ())
            for c in shown
        ]
        yield Table(f"Schedules for {device.arch}", columns, cells, record_notes(c.record for c in shown))


def _choice_json(choice: Choice) -> dict[str, Any]:
    record = choice.record
    return {
        "variant": choice.variant.key,
        "target": choice.device.arch,
        "programs_an_sm": list(choice.buckets),
        "schedule": choice.schedule.slug,
        "tier": choice.tier,
        "record": record and record.id,
        "device": record and record.environment.device,
        "flag": state(record) if record else "",
    }


def show_build(planned: Plan, outcome: BuildOutcome, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print the schedules that serve each variant, and the resources of the kernels."""
    if as_json:
        shown = [choice for choice in planned.choices if verbose or choice.device != PORTABLE]
        kernels = [_kernel_json(row) for row in outcome.rows]
        facts = {"package": str(outcome.directory), "namespace": outcome.package.namespace}
        chosen = [_choice_json(choice) for choice in shown]
        print_json({**facts, "verified": outcome.verified, "schedules": chosen, "kernels": kernels})
        return
    if not quiet:
        print_tables([*schedule_tables(planned, verbose=verbose), *kernel_tables(outcome.rows, verbose=verbose)])
        print()
    files = len(outcome.package.files) + 1
    how = NOT_VERIFIED if outcome.verified == NOT_VERIFIED else f"verified on: {outcome.verified}"
    print(f"{outcome.directory}: {counted(len(planned.variants), 'variant')}, {counted(files, 'file')}, {how}")


@dataclass(frozen=True)
class Compared:
    """A plan, the diff from the package on disk to what the plan renders, and the command that builds it anew."""

    planned: Plan
    diff: Sequence[str]
    command: str


def show_differences(compared: Sequence[Compared], *, every: bool, as_json: bool, quiet: bool) -> int:
    """Print the diffs of ``build --check``, in one document of ``every`` package or that of one; return 1 if any is."""
    stale = [each for each in compared if each.diff]
    if as_json:
        packages = [_difference_json(each, every=every) for each in compared]
        print_json({"current": not stale, "packages": packages} if every else packages[0])
        return 1 if stale else 0
    for each in compared:
        origin = each.planned.origin
        if each.diff:
            print("\n".join(each.diff))
            print(f"m2gen: {origin.name} is stale; run `{each.command}`", file=sys.stderr)
        elif not quiet:
            print(f"{origin.name} is up to date with {origin.spec_file}")
    return 1 if stale else 0


def _difference_json(each: Compared, *, every: bool) -> dict[str, Any]:
    name = {"package": each.planned.origin.name} if every else {}
    return {**name, "spec": each.planned.origin.spec_file, "current": not each.diff, "diff": list(each.diff)}


def show_check(rows: Sequence[CheckRow], *, as_json: bool, quiet: bool, verbose: bool = False) -> int:
    """Print the resources of every kernel; return 1 if one cannot launch."""
    if as_json:
        print_json({"kernels": [_kernel_json(row) for row in rows]})
    elif not quiet:
        print_tables(kernel_tables(rows, verbose=verbose))
    broken = [row for row in rows if row.problems]
    lines = (f"{row.place}: {'; '.join(row.problems)}" for row in broken)
    for line in listed(lines) if not as_json else ():
        print(f"m2gen: {line}", file=sys.stderr)
    return 1 if broken else 0


SPEC_COLUMNS = ("layer", "K", "V", "heads q k v f w", "clip", "tanh", "gate")


def show_spec(planned: Plan, *, as_json: bool, verbose: bool) -> None:
    """Print the variants of a spec and the layers that need them."""
    if as_json:
        variants = [_variant_json(built) for built in planned.variants]
        print_json({"spec": planned.origin.spec_file, "hash": planned.origin.spec_hash, "variants": variants})
    else:
        print_tables([spec_table(planned, verbose=verbose)])


def spec_table(planned: Plan, *, verbose: bool) -> Table:
    """Return the table of a spec's variants."""
    names = planned.names
    rows = [
        (names[v], v.state_expansion, v.head_dim, " ".join(map(str, v.heads.counts)), v.clip, v.tanh, v.gate)
        + ((v.key,) if verbose else ())
        for v in names
    ]
    title = f"{planned.origin.spec_file}: {counted(len(rows), 'variant')} for {', '.join(planned.spec.targets)}"
    return Table(title, (*SPEC_COLUMNS, "variant") if verbose else SPEC_COLUMNS, rows)


def _variant_json(built: BuiltVariant) -> dict[str, Any]:
    variant = built.variant
    return {
        "variant": variant.key,
        "layers": list(built.layers),
        "K": variant.state_expansion,
        "V": variant.head_dim,
        "heads": variant.total_heads,
        "dtype": str(variant.dtype),
        "clip": str(variant.clip),
        "tanh": str(variant.tanh),
    }
