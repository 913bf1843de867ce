"""Who has a candidate of a search, and whether that process is gone."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from m2gen.measure.lock import alive

BOOT = Path("/proc/sys/kernel/random/boot_id")
PROCESSES = Path("/proc/self/ns/pid")
"""The space in which this process has its number; containers of one host have spaces of their own."""


@dataclass(frozen=True)
class Claim:
    """Who has a candidate: a worker, and its process on a host since a boot."""

    worker: str
    host: str
    boot: str
    pid: int
    begun: bool = False
    """Whether the candidate is on the GPU, which may take the machine down."""
    space: str = ""
    """The space of ``pid``; empty where it is not known."""

    @classmethod
    def of(cls, worker: str) -> Claim:
        """Return a claim of this process."""
        boot = BOOT.read_text(encoding="ascii").strip() if BOOT.exists() else ""
        space = os.readlink(PROCESSES) if PROCESSES.is_symlink() else ""
        return cls(worker, platform.node(), boot, os.getpid(), space=space)

    def gone(self, here: Claim) -> bool:
        """Return whether the process of this claim is known to be gone: it was on this host, and is not any more."""
        if self.host != here.host or self.rebooted(here):
            return self.rebooted(here)
        return self.space in ("", here.space) and (not alive(self.pid) or self._earlier(here))

    def rebooted(self, here: Claim) -> bool:
        """Return whether this host was started again since."""
        return self.host == here.host and self.boot != here.boot

    def _earlier(self, here: Claim) -> bool:
        """Return whether it is of an earlier search of the process that asks."""
        return (self.worker, self.pid) == (here.worker, here.pid)
