"""Run what touches Triton on every version that m2gen supports: ``check``, ``verify`` and that part of the suite.

    .venv/bin/python tools/tritons.py                                  # all versions and all of it
    .venv/bin/python tools/tritons.py 3.9.0 -- tests/kernels -x -n 2   # these arguments of pytest, in place of its own

Each version has an environment in ``build/tritons/``, which pip fills with that Triton alone; everything else is that
of the Python which runs this. The exit status is 1 if anything failed, once all has run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDS: dict[str, tuple[str, ...]] = {"3.6.0": ("numpy<2.4",), "3.7.1": (), "3.8.0": (), "3.9.0": ()}
"""Versions, and what else each needs beside the constraints."""
SUITE = tuple(f"tests/{room}" for room in ("kernels", "package", "tune", "verify", "runtime"))
"""Rooms whose tests render, compile or interpret kernels."""
SPECS = ("tiny.yaml", "h200.yaml")


def environment(version: str, folder: Path) -> Path:
    """Return a Python that has a version of Triton and otherwise what this one has, installed once."""
    base = folder / version
    python = base / "bin" / "python"
    done = base / "installed"
    if done.exists():
        return python
    venv.create(base, clear=True)
    scheme = sysconfig.get_preferred_scheme("prefix")
    packages = sysconfig.get_path("purelib", scheme, vars={"base": str(base)})
    wanted = (f"triton=={version}", *NEEDS.get(version, ()))
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages)
    for requirement in wanted:
        subprocess.run([*pip, "--upgrade", requirement], check=True)
    rest = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(packages) / "rest.pth").write_text(rest, encoding="utf-8")  # after its own on the path
    done.touch()
    return python


def commands(python: Path, pytest: Sequence[str]) -> Iterator[list[str]]:
    """Yield what is run on a version."""
    m2gen = [str(python), "-m", "m2gen"]
    for spec in SPECS:
        yield [*m2gen, "check", "--spec", spec, "--quiet"]
    yield [*m2gen, "verify", "--spec", SPECS[0], "--quick", "--quiet"]
    yield [str(python), "-m", "pytest", "-q", *(pytest or SUITE)]


def main(arguments: Sequence[str]) -> int:
    """Run everything, then print a line for each command with its exit status."""
    own, pytest = list(arguments), []
    if "--" in own:
        own, pytest = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=list(NEEDS), metavar="VERSION", help="as pip names it")
    versions = parser.parse_args(own).versions
    said: list[str] = []
    for version in versions:
        try:
            python = environment(version, ROOT / "build" / "tritons")
        except subprocess.CalledProcessError as error:
            said.append(f"triton {version}: status {error.returncode}: pip install {error.cmd[-1]}")
            print(said[-1], flush=True)
            continue
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        for command in commands(python, pytest):
            status = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode
            said.append(f"triton {version}: status {status}: {' '.join(command[2:])}")
            print(said[-1], flush=True)
    print("", *said, sep="\n")
    return int(any(": status 0: " not in line for line in said))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
