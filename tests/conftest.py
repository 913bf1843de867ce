"""Fixtures of every test; puts Triton into its interpreter before anything imports it where torch sees no GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

settings.register_profile(
    "ci", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")
"""The same examples on every machine, however busy, and no verdict on how long they take; of the checks of health, only
``too_slow`` is about time. ``--hypothesis-profile=default`` draws others."""

OF_TERMINALS = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "LC_ALL")
"""Variables that say what a terminal is like, and so change what commands print."""
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)

from command_line import SPEC  # noqa: E402  (imports torch's users)
from interpreter import quicken, refuse_mixed_masks  # noqa: E402
from leftovers import kept_registries, left, state  # noqa: E402
from support import OPERANDS, STEPS, build_modules, make_variant  # noqa: E402  (imports triton's users)

from m2gen.problem import Problem, make_inputs  # noqa: E402

if not HAS_GPU:
    quicken()
    refuse_mixed_masks()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the switch that rewrites golden files."""
    parser.addoption("--update-golden", action="store_true", help="Rewrite tests/golden from what the sources render.")
    parser.addoption("--slow", action="store_true", help="Also run what takes minutes.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where torch sees none, and what takes minutes unless it is asked for."""
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes on two cores: --slow runs it"))
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache, database and terminal out of the tests, and the tests out of the user's cache.

    The processes of a run share one, so that none compiles what another did.
    """
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M2GEN_CACHE_DIR", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"))
        for name in ("M2GEN_TUNING_DB", "M2GEN_DEBUG", *OF_TERMINALS):
            patch.delenv(name, raising=False)
        patch.setenv("MPLBACKEND", "agg")
        yield


@pytest.fixture(scope="module", autouse=True)
def _leaves_nothing(_own_cache: None) -> Iterator[None]:
    """Fail the last test of a file that leaves to other files of its process what they could depend on."""
    with kept_registries():
        before = state()
        yield
        assert left(before, state()) == {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have each test draw the same numbers, whatever was run before it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give one test an empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("M2GEN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return where kernels run: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], ModuleType]:
    """Return a function from (schedule name, clip mode) to a package that serves every variant of ``support``."""
    return build_modules(tmp_path_factory.mktemp("packages"))


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a spec of one small variant, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text(SPEC, encoding="utf-8")
    return tmp_path / "one.yaml"


@pytest.fixture
def package(modules: Callable[[str, str], ModuleType]) -> ModuleType:
    """Return an imported package."""
    return modules("one_level_atomic", "carry")


@pytest.fixture
def operands(device: torch.device) -> dict[str, Tensor]:
    """Return the operands of one sequence by name."""
    inputs = make_inputs(make_variant(), Problem(1, STEPS, initial_state=True), seed=0).to(device)
    return {name: getattr(inputs, name) for name in OPERANDS}
