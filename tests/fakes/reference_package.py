"""A package whose kernels are the eager reference in the kernels' own dtypes: what verification must find right."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from m2gen.variant import Variant
from m2gen.verify.oracle import Operator, eager, own_arithmetic


def reference_package(variant: Variant, name: str = "reference_package_of_tests") -> Any:
    """Return a module with ``m2rnn`` and ``m2rnn_step`` that computes ``variant`` without kernels."""
    operator: Operator = eager(variant, own_arithmetic(variant))
    module: Any = ModuleType(name)

    def m2rnn(
        q: Tensor, k: Tensor, v: Tensor, *rest: Any, output_final_state: bool = True, deterministic: Any = None, **facts
    ) -> tuple[Tensor, Tensor | None]:
        kind = q.device.type
        if torch.is_autocast_enabled(kind):
            q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
        with torch.autocast(kind, enabled=False):
            y, state = operator(q, k, v, *rest, **facts)
        return y.clone(), state.float().clone() if output_final_state else None

    def m2rnn_step(q, k, v, weight, forget, state, **gate) -> tuple[Tensor, Tensor]:
        token = (x.unsqueeze(1) for x in (q, k, v))
        y, after = operator(*token, weight, forget.unsqueeze(1), state, None, clip=None, **gate)
        return y.squeeze(1), state.copy_(after)

    module.m2rnn, module.m2rnn_step = m2rnn, m2rnn_step
    return module
