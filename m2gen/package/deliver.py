"""A generated package in the form that was asked for: a folder to import, a wheel, a repository of the Hub."""

from __future__ import annotations

from pathlib import Path

from m2gen.package import directory
from m2gen.package.directory import Format
from m2gen.package.emit import Origin, Package, manifest_text
from m2gen.package.hub import kernel_name, kernel_repository
from m2gen.package.wheel import check_wheel, write_wheel


def _folder(form: Format, out: Path, origin: Origin, package: Package, manifest: str) -> tuple[Path, dict[str, str]]:
    """Return the folder of one of the forms that are folders, and its files."""
    if form is Format.HF_KERNEL:
        return out / kernel_name(origin), kernel_repository(origin, package, manifest)
    return out / origin.name, {**package.files, directory.MANIFEST: manifest}


def check_delivery(form: Format, out: Path, origin: Origin, package: Package) -> None:
    """Raise what ``deliver`` would raise, as far as that can be seen without writing."""
    if form is Format.WHEEL:
        check_wheel(out, package)
    else:
        directory.check_place(*_folder(form, out, origin, package, manifest_text(package, {})))


def deliver(form: Format, out: Path, origin: Origin, package: Package, manifest: str) -> Path:
    """Write a package below ``out`` in one of its forms, in one step, and return the folder or file that it is.

    Raises PlaceError where that cannot be written or something else is in its place, SpecError for a name that the Hub
    does not take.
    """
    if form is Format.WHEEL:
        return write_wheel(out, origin, package, manifest)
    folder, files = _folder(form, out, origin, package, manifest)
    directory.write(folder, files)
    return folder
