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
    options: str = "",
) -> BuildOutcome:
    """Render, compile, verify and write ``out/<name>/``, or another form; a failure at any stage writes nothing.

    With ``compiled`` the package brings along kernels that the Triton at hand compiled. A failed verification says how
    to see it again, with the ``options`` that give the plan. Raises CompileError, VerifyError or PlaceError.
    """
    rendered = render(planned)
    check_delivery(form, out, planned.origin, rendered)  # fails before minutes of compiling
    rows = check(planned, progress)
    broken = [row for row in rows if row.problems]
    if broken:
        raise CompileError("\n".join(f"{row.place}: {'; '.join(row.problems)}" for row in broken))
    backend = _verified_once(planned, rendered, progress, options) if verified else NOT_VERIFIED
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


def _verified_once(planned: Plan, rendered: Package, progress: Progress, options: str = "") -> str:
    """Verify, unless the same package passed with the same m2gen on the same kind of device before."""
    device = detect()
    backend = device.name if device else "interpreter (its portable kernels)"
    sources = (path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.parent.rglob("*.py")))
    key = key_of(rendered.content_hash, backend, toolchain(), *sources)
    if load_result("verified", key, _Verified) is None:
        outcome = verify(planned, VerifyRequest(quick=True, options=options), progress)
        failures = failure_lines(outcome)
        if failures:
            raise VerifyError("\n".join(failures))
        store_result("verified", key, _Verified(len(outcome.reports)))
    return backend


@dataclass(frozen=True)
class Committed:
    """A package on disk, and the file name of the spec that its manifest names."""

    folder: Path
    spec_file: str

    def check(self, planned: Plan) -> None:
        """Raise UsageError unless a plan is of this package, and not of another whose spec has the same file name."""
        if planned.origin.name != self.folder.name:
            raise UsageError(
                f"{self.folder / MANIFEST}: $.spec.file must name a spec of {self.folder.name}, got {self.spec_file},"
                f" which is of {planned.origin.name}; compare with another spec by --spec"
            )


def committed_packages(out: Path) -> list[Committed]:
    """Return the packages in ``out``; raises UsageError if there is none, or a manifest that is of another folder's.

    Repositories of the Hub and leftovers of killed builds are not packages.
    """
    manifests = [path for path in sorted(out.glob(f"*/{MANIFEST}")) if path.parent.name[0] != "."]
    found = [Committed(path.parent, file) for path in manifests if (file := _spec_of(path)) is not None]
    if not found:
        raise UsageError(f"{out} must hold at least one generated package, got none")
    return found


def _spec_of(manifest: Path) -> str | None:
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        if "format" in facts:
            return None
        name, file = str(facts["name"]), str(facts["spec"]["file"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"got {type(error).__name__}: {error}"
        raise UsageError(f"{manifest} must be a package's manifest, which names its spec, {reason}") from error
    if name != manifest.parent.name:
        advice = "move the folder elsewhere, or compare one package by --spec"
        raise UsageError(f"{manifest}: $.name must be its folder's, {manifest.parent.name!r}, got {name!r}; {advice}")
    return file


def difference(planned: Plan, out: Path) -> list[str]:
    """Return a unified diff from ``out/<name>/`` to the rendered package; empty if they agree.

    What depends on the toolchain, not on the sources, is left out: the manifest's resources, and compiled kernels.
    """
    rendered = render(planned)
    expected = {**rendered.files, MANIFEST: emit.manifest_text(rendered, {})}
    return diff(out / planned.origin.name, expected)
