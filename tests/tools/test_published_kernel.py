"""The adapter of the published kernels, on stand-ins for their package: which candidates its autotuner has."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from support import make_variant
from triton.runtime.autotuner import Autotuner, Config

from tools.published_kernel import published, published_of_few

KERNELS = "xma.layers.m2rnn.triton_implementation"


def tuner() -> Autotuner:
    """Return an autotuner with the candidates that the published kernels have, of no kernel."""
    made = Autotuner.__new__(Autotuner)
    made.configs = [Config({}, num_warps=2**n, num_stages=stages) for n in range(6) for stages in range(1, 5)]
    return made


@pytest.fixture
def tuners(monkeypatch: pytest.MonkeyPatch) -> list[Autotuner]:
    """Put the package's stand-in among the modules; the autotuner is itself again thereafter."""
    monkeypatch.setattr(Autotuner, "prune_configs", Autotuner.prune_configs)
    monkeypatch.setattr(Autotuner, "m2gen_parallel", False, raising=False)
    made = [tuner(), tuner()]
    modules = {"xma.layers.m2rnn": {"m2rnn": None}}
    modules |= {f"{KERNELS}.{side}": {"kernel": one} for side, one in zip(("forward", "backward"), made, strict=True)}
    for name in ("xma", "xma.layers", KERNELS, *modules):
        module = ModuleType(name)
        vars(module).update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_few_candidates_are_of_few_warps_and_stages(tuners: list[Autotuner]) -> None:
    """Eight of 24 in either kernel, whether asked once or twice; without the word for it, all stay."""
    variant = make_variant()
    assert published(variant) is not None
    assert [len(each.configs) for each in tuners] == [24, 24]
    for _ in range(2):
        assert published_of_few(variant) is not None
        for each in tuners:
            few = {(config.num_warps, config.num_stages) for config in each.configs}
            assert few == {(warps, stages) for warps in (1, 2, 4, 8) for stages in (1, 2)}


def test_a_computed_gate_is_not_theirs(tuners: list[Autotuner]) -> None:
    """Their kernels take the gate itself, and no candidate is touched."""
    assert published_of_few(make_variant(gate="softplus")) is None
    assert [len(each.configs) for each in tuners] == [24, 24]
