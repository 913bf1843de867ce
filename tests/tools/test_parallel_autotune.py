"""Candidates of Triton's autotuner that compile at once: all of them, with what the call has, and chosen as before."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support import ROOT
from triton.runtime.autotuner import Autotuner, Config

from m2gen.kernels.compile import load_module


class Kernel:
    """A kernel that notes what it is to be compiled with."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> None:
        """Compile without a launch."""
        self.asked.append({"arguments": arguments, "grid": grid, **options})


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the tool; the autotuner is itself again thereafter."""
    monkeypatch.setattr(Autotuner, "prune_configs", Autotuner.prune_configs)
    monkeypatch.setattr(Autotuner, "m2gen_parallel", False, raising=False)
    module: ModuleType = load_module(ROOT / "tools" / "parallel_autotune.py", "parallel_autotune")
    return module


def test_every_candidate_is_compiled_once(tool: ModuleType) -> None:
    """Twice installed it does the same; a launch's own word for whether it compiles alone is left out."""
    tool.install()
    tool.install()
    kernel, configs = Kernel(), [Config({"BLOCK": size}, num_warps=2) for size in (16, 32)]
    tuner: Any = SimpleNamespace(configs=configs, early_config_prune=None, perf_model=None, fn=kernel, nargs={"x": 7})
    assert Autotuner.prune_configs(tuner, {"grid": (3,), "warmup": False, "N": 5}) == configs
    assert [(each["arguments"], each["grid"], each["N"]) for each in kernel.asked] == [((7,), (3,), 5)] * 2
    assert [(each["BLOCK"], each["num_warps"]) for each in kernel.asked] == [(16, 2), (32, 2)]
