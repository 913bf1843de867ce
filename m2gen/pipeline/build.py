"""Take a plan to a package on disk: rendered, compiled, verified, written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m2gen.cache import key_of, load_result, store_result
from m2gen.device import detect
from m2gen.errors import CompileError, UsageError, VerifyError
from m2gen.kernels.compile import toolchain
from m2gen.package import emit
from m2gen.package.deliver import deliver
from m2gen.package.emit import Package
from m2gen.package.hub import kernel_name
from m2gen.package.write import MANIFEST, Format, diff
from m2gen.pipeline.check import CheckRow, check
from m2gen.pipeline.plan import Plan, Progress, render
from m2gen.pipeline.verify import VerifyRequest, failure_lines, verify


@dataclass(frozen=True)
class BuildOutcome:
    """What a build made: the package, the folder or wheel it is in, what its kernels take, how they were verified."""

    package: Package
    directory: Path
    rows: tuple[CheckRow, ...]
    verified: str
    """Backend that verified the package, or why none did."""


def build(
    planned: Plan, out: Path, progress: Progress, *, verified: bool = True, form: Format = Format.PACKAGE
) -> BuildOutcome:
    """Render, compile, verify and write ``out/<name>/``, or another form; a failure at any stage writes nothing."""
    if form is Format.HF_KERNEL:
        kernel_name(planned.origin)  # one that the Hub refuses is said before minutes are spent
    rendered = render(planned)
    rows = check(planned, progress)
    broken = [row for row in rows if row.problems]
    if broken:
        reasons = (f"{row.variant} {row.kernel} on {row.arch}: {'; '.join(row.problems)}" for row in broken)
        raise CompileError("\n".join(reasons))
    backend = _verified_once(planned, rendered, progress) if verified else "not verified"
    place = deliver(form, out, planned.origin, rendered, emit.manifest_text(rendered, _resources(rows)))
    return BuildOutcome(rendered, place, tuple(rows), backend)


def _resources(rows: Iterable[CheckRow]) -> dict[str, Any]:
    kernels = [
        {"variant": row.variant, "kernel": row.kernel, "arch": row.arch, **asdict(row.resources)}
        for row in rows
        if row.resources is not None
    ]
    return {"toolchain": toolchain(), "kernels": kernels}


def _verified_once(planned: Plan, rendered: Package, progress: Progress) -> str:
    """Verify unless this very package passed with this very m2gen on this kind of device before."""
    device = detect()
    backend = device.name if device else "interpreter (its portable kernels)"
    sources = (path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.parent.rglob("*.py")))
    key = key_of(rendered.content_hash, backend, toolchain(), *sources)
    if load_result("verified", key) is None:
        outcome = verify(planned, VerifyRequest(quick=True), progress)
        failures = failure_lines(outcome)
        if failures:
            raise VerifyError("\n".join(failures))
        store_result("verified", key, {"cases": len(outcome.reports)})
    return backend


def committed_specs(out: Path) -> list[str]:
    """Return the spec file that each package in ``out`` names; raises UsageError where there is none."""
    manifests = sorted(out.glob(f"*/{MANIFEST}"))
    try:
        names = [str(json.loads(path.read_text(encoding="utf-8"))["spec"]["file"]) for path in manifests]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{out} must hold packages whose {MANIFEST} names their spec ({error})") from error
    if not names:
        raise UsageError(f"{out} must hold at least one generated package, got none")
    return names


def difference(planned: Plan, out: Path) -> list[str]:
    """Return a unified diff from what lies in ``out/<name>/`` to what the sources render; empty when they agree.

    The manifest's resources depend on the toolchain, not on the sources, and are left out.
    """
    rendered = render(planned)
    expected = {**rendered.files, MANIFEST: emit.manifest_text(rendered, {})}
    return diff(out / planned.origin.name, expected)
