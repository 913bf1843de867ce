"""The operator under the name, arguments and results of the published implementation: change one import to switch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import op
from .facts import Backend

__all__ = ["m2rnn"]

_BACKENDS: dict[str | None, Backend] = {None: "kernels", "triton": "kernels", "cuda": "kernels", "torch": "reference"}
"""What serves a call, by the published name of what should."""


def m2rnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    forget_input: Tensor,
    input_state: Tensor | None = None,
    gradient_clipping: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
    *,
    kernel_backend: Any = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence as the published ``m2rnn`` does.

    query (B, S, Nq, K), key (B, S, Nk, K), value (B, S, Nv, V), weight (Nw, V, V), forget_input (B, S, Nf), which is
    the forget gate itself, and input_state (B, N, K, V). A packed batch is (T, ...) in place of (B, S, ...), with
    cu_seqlens (B + 1,) and max_seqlen, of which only the former is needed here.

    gradient_clipping bounds the magnitude of the state's gradient that each step hands to the one before; None for no
    bound, and a negative bound means its absolute value.

    kernel_backend is the published enum's member or its value: triton, cuda and None run the kernels, torch runs
    ``backend="reference"``, which clips as the kernels do, and not as the published PyTorch path.

    Returns the output (B, S, N, V) in value's dtype and the final state (B, N, K, V) in key's. Rounding the state to
    a narrow dtype between calls loses what slow gates wrote; ``op.m2rnn`` returns it in float32.

    Raises ValueError or TypeError for arguments that do not fit together.
    """
    if (cu_seqlens is None) != (max_seqlen is None):
        given = "cu_seqlens" if max_seqlen is None else "max_seqlen"
        raise ValueError(f"m2rnn: cu_seqlens and max_seqlen must be given together, got only {given}")
    chosen = getattr(kernel_backend, "value", kernel_backend)
    if chosen not in _BACKENDS:
        known = ", ".join(name for name in _BACKENDS if name)
        raise ValueError(f"m2rnn: kernel_backend must be None or one of {known}, got {kernel_backend!r}")
    clip = None if gradient_clipping is None else abs(gradient_clipping)
    operands = (query, key, value, weight, forget_input, input_state, cu_seqlens)
    output, state = op.m2rnn(*operands, clip, backend=_BACKENDS[chosen])
    return output, state.to(key.dtype)
