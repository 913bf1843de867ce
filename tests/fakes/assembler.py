"""Assemblers in the place of Triton's: one begins and never ends, the other takes the compiler down with it."""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path

import pytest

SCRIPT = """#!{python} -S
import fcntl, os, signal, sys, time
if "--version" in sys.argv:
    sys.exit(print("Cuda compilation tools, release 12.8, V12.8.93"))
began = open({began!r}, "a")
fcntl.flock(began, fcntl.LOCK_SH)
began.write("began\\n")
began.flush()
{then}
"""
NEVER_ENDS = "time.sleep(1e6)"
CRASHES = "os.kill(os.getppid(), signal.SIGSEGV)"


class Assembler:
    """The assembler, which writes a line into a file as it begins, and holds a lock on that for as long as it runs."""

    def __init__(self, folder: Path, then: str) -> None:
        folder.mkdir()
        self.began = folder / "began"
        self.began.touch()
        program = folder / "ptxas"
        program.write_text(SCRIPT.format(python=sys.executable, began=str(self.began), then=then), encoding="utf-8")
        program.chmod(0o755)
        self.environment = {
            "TRITON_PTXAS_PATH": str(program),
            "TRITON_PTXAS_BLACKWELL_PATH": str(program),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }
        """Variables that have Triton call it, for kernels of which none is in the cache."""

    def replace(self, patch: pytest.MonkeyPatch) -> None:
        """Have Triton call it in processes that are started from now on."""
        for name, value in self.environment.items():
            patch.setenv(name, value)

    def calls(self) -> int:
        """Return how often it began."""
        return len(self.began.read_text(encoding="utf-8").splitlines())

    def wait(self) -> None:
        """Wait until it runs no more."""
        with self.began.open("a", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
