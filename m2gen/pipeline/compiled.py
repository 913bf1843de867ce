"""Compiled kernels for a package to bring along: what its own warm-up compiles, for the Triton at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable

from m2gen.cache import cache_dir, materialise
from m2gen.errors import CompileError
from m2gen.package.emit import Package
from m2gen.pipeline.plan import Progress


def compiled_files(rendered: Package, arches: Iterable[str], progress: Progress) -> dict[str, str]:
    """Return the files of compiled kernels by path, for each arch; raises CompileError if one cannot be compiled.

    They are kept in m2gen's cache, apart from Triton's: those there name paths of this machine as their source.
    """
    files: dict[str, str] = {}
    folder = materialise("packages", {f"{rendered.name}/{path}": text for path, text in rendered.files.items()})
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache_dir() / "compiled")}
    arches = list(arches)
    progress.start("compile to bring along", len(arches))
    for arch in arches:
        command = [sys.executable, "-m", rendered.name, "warm-up", "--device", arch, "--entries"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"kernels to bring along for {arch} must compile, got {done.stderr.strip()}")
        files |= json.loads(done.stdout)
        progress.advance(arch)
    progress.finish()
    return files
