"""A generated package as a source repository of the Hugging Face kernels Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping

from m2gen.errors import SpecError
from m2gen.kernels.render import render_template
from m2gen.package.emit import Origin

KERNEL_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")
"""What kernel-builder takes for the name of a repository."""


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
