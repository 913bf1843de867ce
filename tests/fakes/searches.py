"""A search over the simulated GPU: its spec, the schedules that scripts name, a watcher that keeps what it is told."""

from __future__ import annotations

from dataclasses import replace

import simulated

from m2gen.schedule import default
from m2gen.tune.log import SearchProgress
from m2gen.tune.trial import Trial
from m2gen.variant import parse_variant

SPEC = """schema: 1
name: one
targets: sm_90
layers:
  base:
    head_dim: 16
    state_expansion: 64
    heads: {q: 1, k: 1, v: 84, f: 84, w: 84}
    dtypes: fp16
    workloads: [{batch: 8, seq: 4096}]
"""
STANDARD = default(parse_variant("k64_v16_q1_k1_v84_f84_w84_fp16_carry_approx"), simulated.DEVICE)


def beside(**knobs: int) -> str:
    """Return the slug of the default with other knobs of the forward."""
    return replace(STANDARD, forward=replace(STANDARD.forward, **knobs)).slug  # type: ignore[arg-type]


DEFAULT = STANDARD.slug
"""What ``standard`` returns for the spec: failures are scripted by name."""
BEST = "portable_f16x1u8p_b16x1c4p_i32_ptx"
"""One of the fastest of the simulation: 3.0 ms, where the default takes 3.75."""
NEIGHBOUR = beside(unroll=4)
"""One knob from the default, so among the first that are tried."""


class Silent:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self.seen: list[SearchProgress] = []

    def stage(self, text: str) -> None: ...

    def trial(self, trial: Trial, progress: SearchProgress) -> None:
        self.trials.append(trial)
        self.seen.append(progress)

    def details(self, text: str) -> None: ...
