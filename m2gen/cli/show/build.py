"""What each command prints, and the exit status that follows from it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from m2gen import __version__
from m2gen.cache import cache_dir
from m2gen.cli.show.report import print_json, print_table
from m2gen.db.choice import Choice
from m2gen.device import PORTABLE, TARGETS, detect
from m2gen.kernels.render import templates_dir
from m2gen.pipeline import BuildOutcome, CheckRow, Plan, shipped_database, shipped_specs, state

NUMBERS = ("registers", "spills B", "shared B", "code B")
KERNEL_COLUMNS = ("variant", "kernel", "target", *NUMBERS, "from", "problems, notes")
SCHEDULE_COLUMNS = ("variant", "target", "programs/SM", "schedule", "from", "of")


def _kernel_cells(row: CheckRow) -> tuple[Any, ...]:
    taken = row.resources
    numbers = (taken.registers, taken.spill_bytes, taken.shared_bytes, taken.code_bytes) if taken else ("",) * 4
    return (row.variant, row.kernel, row.arch, *numbers, row.source, "; ".join((*row.problems, *row.notes)))


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


def _choice_cells(choice: Choice) -> tuple[Any, ...]:
    """Return a line about a schedule; the last cell is where its record comes from, and what is to be said of it."""
    record = choice.record
    notes = [record.environment.device, *filter(None, [state(record)])] if record else []
    where = (choice.variant.key, choice.device.arch, choice.calls, choice.schedule.slug)
    return (*where, choice.source, "; ".join(notes))


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
    """Show the schedules that serve each variant and what the kernels take."""
    shown = [choice for choice in planned.choices if verbose or choice.device != PORTABLE]
    if as_json:
        kernels = [_kernel_json(row) for row in outcome.rows]
        facts = {"package": str(outcome.directory), "namespace": outcome.package.namespace}
        chosen = [_choice_json(choice) for choice in shown]
        print_json({**facts, "verified": outcome.verified, "schedules": chosen, "kernels": kernels})
        return
    if not quiet:
        print_table("Schedules", SCHEDULE_COLUMNS, map(_choice_cells, shown))
        print_table("Kernels", KERNEL_COLUMNS, map(_kernel_cells, outcome.rows))
    files = len(outcome.package.files) + 1
    print(f"{outcome.directory}: {len(planned.variants)} variants, {files} files, verified on: {outcome.verified}")


def show_difference(planned: Plan, lines: Sequence[str], *, as_json: bool, quiet: bool) -> int:
    """Print the diff of ``build --check``; return 1 if there is one."""
    if as_json:
        print_json({"spec": planned.origin.spec_file, "current": not lines, "diff": list(lines)})
    elif lines:
        print("\n".join(lines))
        print(f"m2gen: {planned.origin.name} is stale; run `{planned.origin.command}`", file=sys.stderr)
    elif not quiet:
        print(f"{planned.origin.name} is what {planned.origin.spec_file} renders")
    return 1 if lines else 0


def show_check(rows: Sequence[CheckRow], *, as_json: bool, quiet: bool, verbose: bool = False) -> int:
    """Print the resources of every kernel; return 1 if one cannot launch."""
    if as_json:
        print_json({"kernels": [_kernel_json(row) for row in rows]})
    elif not quiet:
        schedules = [(row.schedule,) if verbose else () for row in rows]
        columns = (*KERNEL_COLUMNS, "schedule") if verbose else KERNEL_COLUMNS
        print_table(
            "Kernels", columns, [(*_kernel_cells(row), *more) for row, more in zip(rows, schedules, strict=True)]
        )
    broken = [row for row in rows if row.problems]
    for row in broken if not as_json else ():
        print(f"m2gen: {row.variant} {row.kernel} on {row.arch}: {'; '.join(row.problems)}", file=sys.stderr)
    return 1 if broken else 0


def show_spec(planned: Plan, *, as_json: bool) -> None:
    """Print the variants of a spec and the layers that need them."""
    rows = [
        {
            "variant": built.variant.key,
            "layers": list(built.layers),
            "K": built.variant.state_expansion,
            "V": built.variant.head_dim,
            "heads": built.variant.total_heads,
            "dtype": str(built.variant.dtype),
            "clip": str(built.variant.clip),
            "tanh": str(built.variant.tanh),
        }
        for built in planned.variants
    ]
    if as_json:
        print_json({"spec": planned.origin.spec_file, "hash": planned.origin.spec_hash, "variants": rows})
        return
    title = f"{planned.origin.spec_file}: {len(rows)} variants for {', '.join(planned.spec.targets)}"
    cells = [[", ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
    print_table(title, list(rows[0]), cells)


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def show_info(*, as_json: bool) -> None:
    """Print what m2gen runs on and with, and what is missing."""
    device = detect()
    packages = ("torch", "triton", "jinja2", "optuna", "pyyaml", "rich", "pydantic", "typer")
    versions = {"m2gen": __version__, "python": platform.python_version(), **{p: _version_of(p) for p in packages}}
    folders = {
        "specs": shipped_specs(),
        "templates": templates_dir(),
        "tuning_db": shipped_database().root,
        "cache": cache_dir(),
    }
    missing = [name for name, value in versions.items() if value == "missing"]
    missing += [name for name, path in folders.items() if name != "cache" and not path.is_dir()]
    missing += [] if device else ["GPU (kernels run in Triton's interpreter)"]
    facts = {
        "device": asdict(device) if device else None,
        "versions": versions,
        "folders": {name: str(path) for name, path in folders.items()},
        "targets": list(TARGETS),
        "missing": missing,
    }
    if as_json:
        print_json(facts)
        return
    gpu = f"{device.name} ({device.arch}, {device.sm_count} SMs)" if device else "none"
    rows = [("device", gpu), *versions.items(), *((name, str(path)) for name, path in folders.items())]
    print_table(
        "m2gen",
        ("what", "value"),
        [*rows, ("targets", ", ".join(TARGETS)), ("missing", ", ".join(missing) or "nothing")],
    )
