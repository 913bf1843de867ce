"""Write a generated package in the requested form: a folder to import, a wheel, or a repository of the Hub."""

from __future__ import annotations

from pathlib import Path

from m2gen.package import directory
from m2gen.package.directory import Format
from m2gen.package.emit import Origin, Package, manifest_text
from m2gen.package.hub import kernel_name, kernel_repository
from m2gen.package.wheel import check_wheel, write_wheel


def _folder(form: Format, out: Path, origin: Origin, package: Package, manifest: str) -> tuple[Path, dict[str, str]]:
    """Return the folder and the files of a package or a repository of the Hub."""
    if form is Format.HF_KERNEL:
        return out / kernel_name(origin), kernel_repository(origin, package, manifest)
    return out / origin.name, {**package.files, directory.MANIFEST: manifest}


def check_delivery(form: Format, out: Path, origin: Origin, package: Package) -> None:
    """Raise the errors of ``deliver`` that can be found without writing."""
    if form is Format.WHEEL:
        check_wheel(out, package)
    else:
        directory.check_place(*_folder(form, out, origin, package, manifest_text(package, {})))


def deliver(form: Format, out: Path, origin: Origin, package: Package, manifest: str) -> Path:
    """Write a package below ``out`` in one step, and return its folder or file.

    Raises PlaceError if that cannot be written or holds something else, SpecError for a name that the Hub refuses.
    """
    if form is Format.WHEEL:
        return write_wheel(out, origin, package, manifest)
    folder, files = _folder(form, out, origin, package, manifest)
    directory.write(folder, files)
    return folder
