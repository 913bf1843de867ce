"""Fixtures of the tests that need a GPU; their logic also runs in the interpreter, on small sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

import pytest
import torch
from support import default_package, import_package

from m2gen.variant import Variant


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], ModuleType]:
    """Return a function from a variant to a package that serves it by default schedules, built once each."""
    folder = tmp_path_factory.mktemp("default")

    @cache
    def module(variant: Variant) -> ModuleType:
        name = f"default_{variant.key}"
        return import_package(folder / name, default_package(name, [variant]))

    return module


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    """Hand large allocations back, so that each test has the whole card."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
