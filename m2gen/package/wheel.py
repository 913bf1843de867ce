"""A generated package as a wheel, the same bytes wherever it is made."""

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

from m2gen import __version__
from m2gen.errors import EmitError
from m2gen.package.emit import Origin

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file in a wheel, the earliest that zip can say, so that the same package gives the same bytes."""
LICENSE = "Apache-2.0"


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


def write_wheel(out: Path, origin: Origin, files: Mapping[str, str], content: str) -> Path:
    """Put the wheel of a package into the folder ``out``, in one step; raises EmitError where that is not possible."""
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
