"""Print what m2gen runs on and with: what ``m2gen info`` shows, and reports of faults should come with."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from m2gen import __version__
from m2gen.cache import cache_dir, shortcoming
from m2gen.cli.show.report import print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.device import TARGETS, Device, detect
from m2gen.kernels.compile import ASSEMBLER
from m2gen.kernels.render import templates_dir
from m2gen.measure.context import environment, installed
from m2gen.pipeline import shipped_database, shipped_specs

ALWAYS = ("torch", "triton")
"""What m2gen needs, should its own metadata be missing, as in a checkout that was not installed."""
VARIABLES = ("M2GEN_CACHE_DIR", "M2GEN_TUNING_DB", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_HOME")
"""Variables of the environment that change what m2gen does, beside those of the assembler and of the driver."""
GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def show_info(*, as_json: bool) -> None:
    """Print what m2gen runs on and with, and what is missing."""
    device = detect()
    facts = _facts(device)
    if as_json:
        print_json(facts)
    else:
        print_tables([Table("m2gen", ("what", "value"), list(_rows(device, facts)))])


def _facts(device: Device | None) -> dict[str, Any]:
    folders = {
        "specs": shipped_specs(),
        "templates": templates_dir(),
        "tuning_db": shipped_database().root,
        "cache": cache_dir(),
    }
    needed = {name: installed(name) or "missing" for name in dependencies()}
    missing = [name for name, version in needed.items() if version == "missing"]
    missing += [name for name, path in folders.items() if name != "cache" and not path.is_dir()]
    missing += [] if device else ["GPU (kernels run in Triton's interpreter)"]
    missing += filter(None, [shortcoming()])
    return {
        "device": asdict(device) if device else None,
        "toolchain": _toolchain(device),
        "versions": {"m2gen": __version__, "python": platform.python_version(), **needed},
        "platform": platform.platform(),
        "folders": {name: str(path) for name, path in folders.items()},
        "variables": {name: os.environ[name] for name in (*VARIABLES, *ASSEMBLER, *GPUS) if name in os.environ},
        "targets": list(TARGETS),
        "missing": missing,
    }


def _toolchain(device: Device | None) -> dict[str, str]:
    """Return what lies below torch and Triton on the GPU at hand, as records have it; nothing without a GPU."""
    if device is None:
        return {}
    here = environment(device)
    return {"driver": here.driver, "ptxas": here.ptxas}


def dependencies() -> tuple[str, ...]:
    """Return the names of the packages that m2gen requires, without those of its extras."""
    required: Sequence[str]
    try:
        required = metadata.requires("m2gen") or ALWAYS
    except metadata.PackageNotFoundError:
        required = ALWAYS
    names = (re.match(r"[\w.-]+", line) for line in required if "extra ==" not in line)
    return tuple(sorted(name.group() for name in names if name))


def _rows(device: Device | None, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "device", f"{device.name} ({device.arch}, {device.sm_count} SMs)" if device else "none"
    for group in ("toolchain", "versions"):
        yield from facts[group].items()
    yield "platform", facts["platform"]
    for group in ("folders", "variables"):
        yield from facts[group].items()
    yield "targets", ", ".join(facts["targets"])
    yield "missing", ", ".join(facts["missing"]) or "nothing"
