"""Have Triton's autotuner compile its candidates at once rather than one after the other.

What it measures and chooses is the same. flash-linear-attention's layer has some hundreds of candidates, which take
minutes to compile one by one.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def install() -> None:
    """Compile the candidates of every autotuned kernel of this process in parallel from now on."""
    import triton
    from triton.runtime.autotuner import Autotuner

    if getattr(Autotuner, "m2gen_parallel", False):
        return
    pruned = Autotuner.prune_configs

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs: list[Any] = pruned(self, kwargs)
        given = {name: value for name, value in kwargs.items() if name != "warmup"}
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                self.fn.warmup(*self.nargs.values(), **{**given, **config.all_kwargs()})
        return configs

    Autotuner.prune_configs = prune_configs
    Autotuner.m2gen_parallel = True
