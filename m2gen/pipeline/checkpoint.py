"""Read the folder of a published checkpoint, and return the spec of what its M2RNN layers need built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from m2gen.db.exchange import is_stream, write_whole
from m2gen.device import TARGETS, detect
from m2gen.errors import UsageError, os_errors_as
from m2gen.runtime.checkpoints import CheckpointError, dtype_of, read_config, spec_text
from m2gen.spec import parse_spec

USUAL_TARGET = "sm_90"
"""What is built for where neither anybody nor a GPU says another arch."""


@dataclass(frozen=True)
class CheckpointRequest:
    """A checkpoint's folder, and what its spec is to say; what is None or empty comes from the folder and the GPU."""

    folder: Path
    name: str | None = None
    targets: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()


def spec_of_checkpoint(request: CheckpointRequest) -> str:
    """Return the YAML of the spec.

    Raises UsageError for a folder that is no checkpoint's, and SpecError where the spec would not be one.
    """
    name = request.name or _name_of(request.folder)
    try:
        config = read_config(request.folder)
        dtypes = request.dtypes or (dtype_of(request.folder, config),)
        text = spec_text(config, name=name, targets=request.targets or (_target(),), dtypes=dtypes)
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    parse_spec(text, f"the spec of {request.folder}")
    return text


def write_spec(path: Path, text: str) -> None:
    """Write a spec's file, unless it is there already; raises UsageError where it cannot be written, or differs."""
    with os_errors_as(UsageError, f"{path} must be writable"):
        if path.is_file() and not is_stream(path):
            if path.read_bytes() != text.encode():
                raise UsageError(f"{path} must be absent or this spec, got another file, which may have been edited")
            return
        write_whole(path, text.encode())


def _name_of(folder: Path) -> str:
    """Return a folder's name with what an identifier may hold."""
    words = re.sub(r"\W+", "_", folder.resolve().name, flags=re.ASCII).strip("_").lower()
    return words if words[:1].isalpha() else f"m2rnn_{words}".rstrip("_")


def _target() -> str:
    device = detect()
    return device.arch if device and device.arch in TARGETS else USUAL_TARGET
