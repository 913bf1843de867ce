"""Build a package from a plan: render, compile, verify, write."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from m2gen.cache import key_of, load_result, store_result
from m2gen.device import PORTABLE, detect
from m2gen.errors import CompileError, UsageError, VerifyError
from m2gen.kernels.compile import toolchain
from m2gen.package import emit
from m2gen.package.deliver import check_delivery, deliver
from m2gen.package.directory import MANIFEST, Format, diff
from m2gen.package.emit import Package
from m2gen.pipeline.check import CheckRow, check
from m2gen.pipeline.compiled import compiled_files
from m2gen.pipeline.plan import Plan, Progress, render
from m2gen.pipeline.verify import VerifyRequest, failure_lines, verify

NOT_VERIFIED = "not verified"
"""How a package is verified that nobody asked to verify."""


@dataclass(frozen=True)
class BuildOutcome:
    """The result of a build: the package, its folder or wheel, the kernels' resources, and how they were verified."""

    package: Package
    directory: Path
    rows: tuple[CheckRow, ...]
    verified: str
    """Backend that verified the package, or ``NOT_VERIFIED``."""


def build(
    planned: Plan,
    out: Path,
    progress: Progress,
    *,
    verified: bool = True,
    form: Format = Format.PACKAGE,
    compiled: bool = False,
) -> BuildOutcome:
    """Render, compile, verify and write ``out/<name>/``, or another form; a failure at any stage writes nothing.

    With ``compiled`` the package brings along kernels that the Triton at hand compiled. Raises CompileError,
    VerifyError or PlaceError.
    """
    rendered = render(planned)
    check_delivery(form, out, planned.origin, rendered)  # fails before minutes of compiling
    rows = check(planned, progress)
    broken = [row for row in rows if row.problems]
    if broken:
        raise CompileError("\n".join(f"{row.place}: {'; '.join(row.problems)}" for row in broken))
    backend = _verified_once(planned, rendered, progress) if verified else NOT_VERIFIED
    if compiled:
        arches = dict.fromkeys(choice.device.arch for choice in planned.choices if choice.device != PORTABLE)
        rendered = replace(rendered, files={**rendered.files, **compiled_files(rendered, arches, progress)})
    place = deliver(form, out, planned.origin, rendered, emit.manifest_text(rendered, _resources(rows)))
    return BuildOutcome(rendered, place, tuple(rows), backend)


def _resources(rows: Iterable[CheckRow]) -> dict[str, Any]:
    kernels = [
        {"variant": row.variant, "kernel": row.kernel, "arch": row.arch, **asdict(row.resources)}
        for row in rows
        if row.resources is not None
    ]
    return {"toolchain": toolchain(), "kernels": kernels}


@dataclass(frozen=True)
class _Verified:
    """A verification that passed, as the cache keeps it."""

    cases: int


def _verified_once(planned: Plan, rendered: Package, progress: Progress) -> str:
    """Verify, unless the same package passed with the same m2gen on the same kind of device before."""
    device = detect()
    backend = device.name if device else "interpreter (its portable kernels)"
    sources = (path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.parent.rglob("*.py")))
    key = key_of(rendered.content_hash, backend, toolchain(), *sources)
    if load_result("verified", key, _Verified) is None:
        outcome = verify(planned, VerifyRequest(quick=True), progress)
        failures = failure_lines(outcome)
        if failures:
            raise VerifyError("\n".join(failures))
        store_result("verified", key, _Verified(len(outcome.reports)))
    return backend


def committed_specs(out: Path) -> list[str]:
    """Return the spec file of each package in ``out``; raises UsageError if there is none.

    Repositories of the Hub and leftovers of killed builds are not packages.
    """
    manifests = [path for path in sorted(out.glob(f"*/{MANIFEST}")) if path.parent.name[0] != "."]
    names = [name for path in manifests if (name := _spec_of(path)) is not None]
    if not names:
        raise UsageError(f"{out} must hold at least one generated package, got none")
    return names


def _spec_of(manifest: Path) -> str | None:
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        return None if "format" in facts else str(facts["spec"]["file"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"got {type(error).__name__}: {error}"
        raise UsageError(f"{manifest} must be a package's manifest, which names its spec, {reason}") from error


def difference(planned: Plan, out: Path) -> list[str]:
    """Return a unified diff from ``out/<name>/`` to the rendered package; empty if they agree.

    What depends on the toolchain, not on the sources, is left out: the manifest's resources, and compiled kernels.
    """
    rendered = render(planned)
    expected = {**rendered.files, MANIFEST: emit.manifest_text(rendered, {})}
    return diff(out / planned.origin.name, expected)
