"""Text that every machine has, as bytes, and batches of it that depend on nothing but the seed and the step."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

TOKENS = 256
LIMIT = 32 << 20
"""Bytes of text that are read at most."""


def read(files: Sequence[str]) -> Tensor:
    """Return the files' bytes one after the other; without any, those of the standard library's Python sources."""
    paths = [Path(name) for name in files] or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    try:
        text = b"\n".join(path.read_bytes() for path in paths)[:LIMIT]
    except OSError as error:
        raise SystemExit(f"text must be files that can be read: {error}") from None
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def digest_of(text: Tensor) -> str:
    """Return 16 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.numpy().data).hexdigest()[:16]


def batch(text: Tensor, size: int, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Return inputs and next bytes (size, length) of a step, so that a run that was interrupted sees the same ones."""
    if len(text) <= length + 1:
        raise SystemExit(f"text must have more than {length + 1} bytes, got {len(text)}")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - length - 1, (size,), generator=generator)
    rows = text[starts[:, None] + torch.arange(length + 1)].long()
    return rows[:, :-1], rows[:, 1:]
