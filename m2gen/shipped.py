"""The location of files that ship with m2gen: specs, templates, the tuning database."""

from __future__ import annotations

from pathlib import Path


def shipped(folder: str) -> Path:
    """Return a folder that ships with m2gen: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder
