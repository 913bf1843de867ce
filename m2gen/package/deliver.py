"""A package in one of its forms: a folder to import, a wheel, or a repository of the kernels Hub."""

from __future__ import annotations

from pathlib import Path

from m2gen.package.emit import Origin, Package
from m2gen.package.hub import kernel_name, kernel_repository
from m2gen.package.wheel import write_wheel
from m2gen.package.write import MANIFEST, Format, write


def deliver(form: Format, out: Path, origin: Origin, package: Package, manifest: str) -> Path:
    """Write a package below ``out`` in one of its forms, in one step, and return the folder or file that it is.

    Raises EmitError where that cannot be written or something else is in its place, SpecError for a name that the Hub
    does not take.
    """
    files = {**package.files, MANIFEST: manifest}
    if form is Format.WHEEL:
        return write_wheel(out, origin, files, package.content_hash)
    if form is Format.HF_KERNEL:
        write(out / kernel_name(origin), kernel_repository(origin, files), mark="build.toml")
        return out / kernel_name(origin)
    write(out / origin.name, files)
    return out / origin.name
