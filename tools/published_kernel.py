"""An adapter of ``m2gen bench`` for the published Triton kernels of M2RNN, which are needed for nothing else.

They are in github.com/open-lm-engine/accelerated-model-architectures, whose package ``xma`` must be importable:

    m2gen bench --spec h200.yaml --only tuned --only peer --peer tools.published_kernel:published

They keep every state (B, S, N, K, V) in the operands' dtype for their backward, and take the forget gate itself.
Triton's autotuner times 24 candidates of each kernel; with ``published_of_few`` those of 1 to 8 warps and 1 or 2
stages, compiled at once, for runs of many layers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from m2gen.variant import Variant


def published(variant: Variant) -> Callable[..., Any] | None:
    """Return the published operator for a variant, or None if that computes the gate, which theirs does not."""
    if variant.computes_gate:
        return None
    from xma.layers.m2rnn import m2rnn

    def operator(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        forget: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        clip: float | None,
    ) -> tuple[Tensor, Tensor]:
        longest = None if cu_seqlens is None else q.shape[0]  # a bound that their kernels do not read
        y, state = m2rnn(q, k, v, weight, forget.to(q.dtype), initial_state, clip, cu_seqlens, longest)
        return y, state.float()

    return operator


def published_of_few(variant: Variant) -> Callable[..., Any] | None:
    """Return the published operator, whose autotuner has candidates of 1 to 8 warps and 1 or 2 stages alone."""
    from triton.runtime.autotuner import Autotuner

    from tools import parallel_autotune

    operator = published(variant)
    if operator is not None:
        parallel_autotune.install()
        for direction in ("forward", "backward"):
            module = importlib.import_module(f"xma.layers.m2rnn.triton_implementation.{direction}")
            for kernel in vars(module).values():
                if isinstance(kernel, Autotuner):
                    kernel.configs = [each for each in kernel.configs if each.num_warps <= 8 and each.num_stages <= 2]
    return operator
