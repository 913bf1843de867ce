"""Fixtures of tests of models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import hf_of, models_package, write_checkpoint
from leftovers import kept_registries


@pytest.fixture(scope="session")
def hf_built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the module for transformers of a package that runs the checkpoints, built once."""
    return hf_of(models_package(tmp_path_factory.mktemp("transformers")))


@pytest.fixture
def hf(hf_built: Any) -> Iterator[Any]:
    """Return that module, of which Auto classes make models in this test."""
    with kept_registries():
        hf_built.register()
        yield hf_built


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a checkpoint's name to its folder."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else write_checkpoint(root / name, name)

    return folder
