"""The operator under the name, arguments and results of the published implementation: change one import to switch."""

from __future__ import annotations

from torch import Tensor

from . import op

__all__ = ["m2rnn"]


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
) -> tuple[Tensor, Tensor]:
    """Run the recurrence as the published ``m2rnn`` does.

    query (B, S, Nq, K), key (B, S, Nk, K), value (B, S, Nv, V), weight (Nw, V, V), forget_input (B, S, Nf), which is
    the forget gate itself, and input_state (B, N, K, V). A packed batch is (T, ...) in place of (B, S, ...), with
    cu_seqlens (B + 1,) and max_seqlen, of which only the former is needed here.

    gradient_clipping bounds the magnitude of the state's gradient that each step hands to the one before; None for no
    bound, and a negative bound means its absolute value.

    Returns the output (B, S, N, V) in value's dtype and the final state (B, N, K, V) in key's. Rounding the state to
    a narrow dtype between calls loses what slow gates wrote; ``op.m2rnn`` returns it in float32.

    Raises ValueError or TypeError for arguments that do not fit together.
    """
    if (cu_seqlens is None) != (max_seqlen is None):
        given = "cu_seqlens" if max_seqlen is None else "max_seqlen"
        raise ValueError(f"m2rnn: cu_seqlens and max_seqlen must be given together, got only {given}")
    clip = None if gradient_clipping is None else abs(gradient_clipping)
    output, state = op.m2rnn(query, key, value, weight, forget_input, input_state, cu_seqlens, clip)
    return output, state.to(key.dtype)
