"""Packages to measure: each has one schedule for all calls of a variant, so that small checks reach what is timed."""

from __future__ import annotations

from pathlib import Path

from m2gen.bucket import Bucket
from m2gen.cache import materialise
from m2gen.db.choice import Choice
from m2gen.pipeline.plan import Plan, render
from m2gen.variant import Variant


class Packages:
    """The packages of a plan, each made when it is first asked for."""

    def __init__(self, planned: Plan) -> None:
        self._planned, self._parts = planned, planned.uniform()
        self._folders: dict[int, Path] = {}

    def serving(self, variant: Variant, arch: str, bucket: Bucket) -> tuple[Choice, Path]:
        """Return the choice for a bucket of a variant's calls, and a package in which it is for all of them."""
        (choice,) = (c for c in self._planned.serving(variant, arch) if bucket in c.buckets)
        alone = [any(c.schedule == choice.schedule for c in part.serving(variant, arch)) for part in self._parts]
        place = alone.index(True)
        if place not in self._folders:
            files = render(self._parts[place]).files
            self._folders[place] = materialise(f"packages/{self._planned.origin.name}", files)
        return choice, self._folders[place]
