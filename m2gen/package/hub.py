"""Make a kernel repository of the Hugging Face Hub from a generated package, which loads as it is."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from m2gen import __version__
from m2gen.errors import SpecError
from m2gen.kernels.render import render_template
from m2gen.package.directory import MANIFEST, Format
from m2gen.package.emit import Origin, Package
from m2gen.package.owned import hashes

LICENSE = "apache-2.0"
"""Identifier of the licence, as the Hub spells it."""
VERSION = 1
"""Version of the package's interface, as the Hub counts."""
BACKENDS = ("cpu", "cuda", "rocm")
"""Builds of torch that the repository serves; CPU tensors run in Triton's interpreter or on the eager reference."""
TEMPLATES = ("build.toml", "flake.nix", "CARD.md")
KERNEL_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")
"""Names that the Hub accepts for a kernel."""


def kernel_name(origin: Origin) -> str:
    """Return the name of the repository: the package's with dashes for underscores.

    Raises SpecError for a name that the Hub refuses.
    """
    name = origin.name.replace("_", "-")
    if KERNEL_NAME.fullmatch(name) is None:
        contract = "two or more of a-z, 0-9 and _, a letter first and no _ last, for the Hub"
        raise SpecError([f"{origin.spec_file}: $.name must be {contract}, got {origin.name!r}"])
    return name


def kernel_repository(origin: Origin, package: Package, manifest: str) -> dict[str, str]:
    """Return the files of a repository; pure.

    The ``kernels`` library loads ``build/torch-<backend>/``; kernel-builder makes the same of ``torch-ext/<name>/`` and
    ``build.toml``. The layers have no state, so that their forward can replace that of other layers.
    """
    module = {**package.files, MANIFEST: manifest}
    command = f"{origin.command} --format {Format.HF_KERNEL}"
    facts = {"name": package.name, "repository": kernel_name(origin), "command": command}
    about = {"version": VERSION, "license": LICENSE, "backends": BACKENDS}
    files = {name: render_template(f"hub/{name}.j2", **facts, **about) for name in TEMPLATES}
    files |= {f"torch-ext/{package.name}/{path}": text for path, text in module.items()}
    for backend in BACKENDS:
        variant = {**module, "metadata.json": _metadata(origin, package.namespace, backend, module)}
        files |= {f"build/torch-{backend}/{path}": text for path, text in variant.items()}
    return {**files, MANIFEST: _manifest(origin, files)}


def _metadata(origin: Origin, namespace: str, backend: str, module: Mapping[str, str]) -> str:
    """Return the metadata.json that the ``kernels`` library reads.

    Its ``id`` becomes the name of the module, and has to be the namespace of the operators.
    """
    digests = {path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for path, text in module.items()}
    facts = {
        "name": kernel_name(origin),
        "id": namespace,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": dict(sorted(digests.items()))},
    }
    return _json(facts)


def _manifest(origin: Origin, files: Mapping[str, str]) -> str:
    """Return the repository's own MANIFEST.json, which lists the files that m2gen wrote and may replace."""
    spec = {"file": origin.spec_file, "hash": origin.spec_hash}
    made = {"name": origin.name, "m2gen": __version__, "format": Format.HF_KERNEL}
    return _json({**made, "spec": spec, "files": hashes(files)})


def _json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=2) + "\n"
