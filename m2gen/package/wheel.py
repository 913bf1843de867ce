"""Build a wheel of a generated package with hatchling, and put it in place in one step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
import zlib
from importlib import metadata
from pathlib import Path

from m2gen import __version__
from m2gen.errors import EmitError, PlaceError, os_errors_as
from m2gen.kernels.render import render_template, templates_dir
from m2gen.package import owned
from m2gen.package.emit import Origin, Package
from m2gen.package.place import check_folder, check_new, locked, resolved, write_file

LICENSE = "Apache-2.0"
TORCH = "torch>=2.10"
"""The first version whose GPU builds bring a Triton that m2gen supports, as ``triton`` or ``triton-rocm``."""
TRANSFORMERS = "transformers>=5.24"
"""What ``hf`` of a package needs, as that says itself."""
REASON = 300
"""Number of characters that an error repeats of hatchling's output: the last ones, where the reason is."""
EPOCH = "315532800"
"""Time of every file in a wheel, 1980, the earliest in zip files: the same package gives the same bytes."""


def wheel_name(package: Package) -> str:
    """Return the file name of a package's wheel, which depends on the package's content alone."""
    return f"{_project(package).replace('-', '_')}-{_version(package)}-py3-none-any.whl"


def _project(package: Package) -> str:
    """Return the normalised name of the distribution: lower case, without a dash at the end."""
    return f"m2gen-{re.sub('_+', '-', package.name).strip('-')}".lower()


def _version(package: Package) -> str:
    """Return a version that PyPI accepts and that no other content has.

    PyPI refuses local versions (``0.1.0+hash``), so the content's hash is the number of a post-release.
    """
    return f"{__version__}.post{int(package.content_hash[:8], 16)}"


def license_text() -> str:
    """Return the licence of m2gen and of generated code, which lies beside the templates' folder."""
    return (templates_dir().parent / "LICENSE").read_text(encoding="utf-8")


def _triton() -> str:
    """Return the requirement of m2gen itself on Triton, of a checkout's own file where m2gen is not installed."""
    try:
        lines = metadata.requires("m2gen") or []
    except metadata.PackageNotFoundError:
        lines = _declared()
    found = next((line for line in lines if re.match(r"triton\b", line)), None)
    if found is None:
        raise EmitError("a wheel must be built by an m2gen that is installed or a checkout, got one that is neither")
    return found


def _declared() -> list[str]:
    """Return the requirements in the pyproject.toml of a checkout, as installers write them; none if there is none."""
    try:
        text = (templates_dir().parent / "pyproject.toml").read_text(encoding="utf-8")
        lines = tomllib.loads(text)["project"]["dependencies"]
    except (OSError, ValueError, LookupError):
        return []
    named = (re.fullmatch(r"([\w.-]+)(.*)", line) for line in lines)
    return [f"{found[1]}{','.join(sorted(found[2].split(',')))}" for found in named if found]


def _sources(origin: Origin, package: Package, manifest: str) -> dict[str, str]:
    """Return the files of the project that hatchling builds."""
    facts = {"project": _project(package), "name": package.name}
    needs = {"license": LICENSE, "torch": TORCH, "triton": _triton(), "transformers": TRANSFORMERS}
    modules = {f"{package.name}/{path}": text for path, text in {**package.files, owned.MANIFEST: manifest}.items()}
    return {
        "pyproject.toml": render_template("wheel/pyproject.toml.j2", version=_version(package), **facts, **needs),
        "README.md": render_template("wheel/README.md.j2", command=f"{origin.command} --wheel", **facts),
        "LICENSE": license_text(),
        **modules,
    }


def wheel(origin: Origin, package: Package, manifest: str) -> bytes:
    """Return a wheel that installs the package under its own name; raises EmitError if it cannot be built."""
    try:
        with tempfile.TemporaryDirectory(prefix="m2gen-") as folder:
            root = Path(folder)
            for path, text in _sources(origin, package, manifest).items():
                target = root / "project" / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(text.encode())
            _hatchling(root / "project", root / "dist")
            return (root / "dist" / wheel_name(package)).read_bytes()
    except OSError as error:
        raise EmitError(f"a wheel must be built in the folder for temporary files, got {error}") from error


def _hatchling(project: Path, out: Path) -> None:
    """Run the backend in a separate process, since it reads the working directory and the environment."""
    command = [sys.executable, "-P", "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmitError(f"hatchling must build a wheel of the package, got {' '.join(done.stderr.split())[-REASON:]}")


def check_wheel(out: Path, package: Package) -> None:
    """Raise the errors of ``write_wheel`` that can be found without building."""
    check_folder(out)
    check_new(out / wheel_name(package), resolved(out / wheel_name(package)))
    _refuse_other(out / wheel_name(package), package)


def write_wheel(out: Path, origin: Origin, package: Package, manifest: str) -> Path:
    """Write a package's wheel to a folder, unless it is there already, and return its path.

    Raises PlaceError if a file of its name is not m2gen's, or the folder cannot be written.
    """
    check_wheel(out, package)
    data, shown = wheel(origin, package, manifest), out / wheel_name(package)
    with os_errors_as(PlaceError, f"{out} must be writable"):
        out.mkdir(parents=True, exist_ok=True)
        real = resolved(shown)
        with locked(real.parent) as alone:
            if alone:
                owned.clean(real.parent, real.name)
            _refuse_other(shown, package, data)
            if not owned.equal(real, data):
                _put(real, data)
    return shown


def _put(real: Path, data: bytes) -> None:
    staging = real.parent / owned.staging_name(real.name)
    try:
        write_file(staging / real.name, data)
        (staging / real.name).replace(real)
    finally:
        owned.remove(staging, [real.name])


def _refuse_other(shown: Path, package: Package, data: bytes = b"") -> None:
    real = resolved(shown)
    if os.path.lexists(real) and not owned.equal(real, data) and not _is_own(real, package):
        raise PlaceError(f"{shown} must be absent or a wheel that m2gen built, got something else; move that elsewhere")


def _is_own(path: Path, package: Package) -> bool:
    """Return whether a wheel holds the files of m2gen's manifest in it and its own metadata, and nothing else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            modules = owned.listed(archive.read(f"{package.name}/{owned.MANIFEST}"))
    except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return False
    described = f"{wheel_name(package).removesuffix('-py3-none-any.whl')}.dist-info/"
    own = {f"{package.name}/{path}" for path in modules}
    return bool(own) and all(name in own or name.startswith(described) for name in names)
