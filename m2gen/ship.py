"""A generated package in the forms that others install: a wheel, and a kernel repository of the Hugging Face Hub."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from m2gen import __version__, directory
from m2gen.directory import Format
from m2gen.emit import Origin, Package
from m2gen.errors import EmitError, SpecError
from m2gen.render import render_template

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file in a wheel, the earliest that zip can say, so that the same package gives the same bytes."""
LICENSE = "Apache-2.0"
KERNEL_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")
"""What kernel-builder takes for the name of a repository."""


def deliver(form: Format, out: Path, origin: Origin, package: Package, manifest: str) -> Path:
    """Write a package below ``out`` in one of its forms, in one step, and return the folder or file that it is.

    Raises EmitError where that cannot be written or something else is in its place, SpecError for a name that the Hub
    does not take.
    """
    files = {**package.files, directory.MANIFEST: manifest}
    if form is Format.WHEEL:
        return _write_wheel(out, origin, files, package.content_hash)
    if form is Format.HF_KERNEL:
        directory.write(out / kernel_name(origin), kernel_repository(origin, files), mark="build.toml")
        return out / kernel_name(origin)
    directory.write(out / origin.name, files)
    return out / origin.name


def _requirements() -> list[str]:
    """Return what of m2gen's own requirements a package needs, too."""
    return [line for line in metadata.requires("m2gen") or () if re.match(r"(torch|triton)\b", line)]


def wheel(origin: Origin, files: Mapping[str, str], content: str) -> tuple[str, bytes]:
    """Return the file name and the bytes of a wheel that installs the package under its own name; pure."""
    name, version = f"m2gen_{origin.name}", f"{__version__}+{content[:8]}"
    info = f"{name}-{version}.dist-info"
    requires = "".join(f"Requires-Dist: {line}\n" for line in _requirements())
    contents = {f"{origin.name}/{path}": text.encode() for path, text in files.items()}
    contents[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.4\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        f"Summary: M2RNN kernels that m2gen built from {origin.spec_file}\nLicense-Expression: {LICENSE}\n"
        f"Requires-Python: >=3.10\n{requires}"
    ).encode()
    contents[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: m2gen {__version__}\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ).encode()
    record = "".join(f"{path},sha256={_digest(data)},{len(data)}\n" for path, data in contents.items())
    contents[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in contents.items():
            entry = zipfile.ZipInfo(path, EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return f"{name}-{version}-py3-none-any.whl", stream.getvalue()


def _digest(data: bytes) -> str:
    """Return a file's hash as RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _write_wheel(out: Path, origin: Origin, files: Mapping[str, str], content: str) -> Path:
    name, data = wheel(origin, files, content)
    staging = out / f".{name}.new"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(staging, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staging, out / name)
    except OSError as error:
        raise EmitError(f"{out} must be writable: {error.strerror or error}") from error
    finally:
        if out.is_dir():
            staging.unlink(missing_ok=True)
    return out / name


def kernel_name(origin: Origin) -> str:
    """Return the name of the Hub's repository, whose module has underscores instead.

    Raises SpecError for one that kernel-builder refuses.
    """
    name = origin.name.replace("_", "-")
    if KERNEL_NAME.fullmatch(name) is None:
        words = "two or more of a-z, 0-9 and _, a letter first and no _ last, for the Hub"
        raise SpecError([f"{origin.spec_file}: $.name must be {words}, got {origin.name!r}"])
    return name


def kernel_repository(origin: Origin, files: Mapping[str, str]) -> dict[str, str]:
    """Return the files of a source repository as the Hub's kernel-builder takes it; pure.

    The package is ``torch-ext/<name>/``; its ``layers`` have no state, so that their forward can replace others'.
    """
    module = {f"torch-ext/{origin.name}/{path}": text for path, text in files.items()}
    facts = {"name": origin.name, "repository": kernel_name(origin), "command": f"{origin.command} --format hf-kernel"}
    shared = {name: render_template(f"hub/{name}.j2", **facts) for name in ("build.toml", "flake.nix", "CARD.md")}
    return {**shared, **module}
