"""Configurations of the published block, as the options of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .activations import ACTIVATIONS
from .init import Initialisation
from .layer_config import NORMS

REQUIRED = (
    "k_head_dim", "v_head_dim", "num_q_heads", "num_k_heads", "num_v_heads", "num_f_heads", "num_g_heads",
    "num_weight_heads", "use_residual", "kernel_size", "activation_function", "add_bias", "gradient_clipping",
    "normalization_function",
)  # fmt: skip
OPTIONAL: Mapping[str, Any] = {
    "sequence_mixer_type": "m2rnn",
    "A_init_min": 0.0,
    "A_init_max": 16.0,
    "dt_init_min": 1e-3,
    "dt_init_max": 0.1,
    "dt_init_floor": 1e-4,
}
"""Keys that may be left out, and what they are then."""


def layer_arguments(block: Mapping[str, Any], init: Initialisation | None = None) -> dict[str, Any]:
    """Return the arguments of ``M2RNN`` after hidden_size that give the layer of a published block, by name.

    Keys of ``block`` are those of the published implementation, all of ``REQUIRED`` and any of ``OPTIONAL``. ``init``
    says how weights are drawn; the ranges of the decay parameters are the block's.

    Every head of the state has a gate of its own: A_log and dt_bias are (N,) whatever num_f_heads is, so ``heads`` has
    N of f, and num_f_heads is the layer's ``forget_inputs``.

    Raises ValueError, naming the key, for one that is missing, unknown, or of a value that the published block cannot
    run either.
    """
    given = {**OPTIONAL, **block}
    for key in REQUIRED:
        if key not in given:
            raise _error(key, "be given", None)
    for key in given:
        if key not in REQUIRED and key not in OPTIONAL:
            raise ValueError(
                f"M2RNN: {key} is no key of a published block; those are {', '.join((*REQUIRED, *OPTIONAL))}"
            )
    _check_types(given)
    heads = _heads(given)
    _check_options(given)
    return {
        "state_expansion": given["k_head_dim"],
        "head_dim": given["v_head_dim"],
        "heads": heads,
        "forget_inputs": given["num_f_heads"],
        "residual": given["use_residual"],
        "conv_width": given["kernel_size"],
        "activation": None if given["activation_function"] == "identity" else given["activation_function"],
        "norm": given["normalization_function"],
        "bias": given["add_bias"],
        "clip": None if given["gradient_clipping"] is None else abs(given["gradient_clipping"]),
        "init": replace(
            init or Initialisation(),
            A_range=(given["A_init_min"], given["A_init_max"]),
            dt_range=(given["dt_init_min"], given["dt_init_max"]),
            dt_floor=given["dt_init_floor"],
        ),
    }


_ROLES = {"q": "q", "k": "k", "v": "v", "f": "f", "g": "g", "w": "weight"}
"""Heads by role, and how keys call the role."""


def _error(key: str, rule: str, value: Any) -> ValueError:
    return ValueError(f"M2RNN: {key} must {rule}, got {value!r}")


def _check_types(given: Mapping[str, Any]) -> None:
    if given["sequence_mixer_type"] != "m2rnn":
        raise _error("sequence_mixer_type", "be m2rnn", given["sequence_mixer_type"])
    for key in ("k_head_dim", "v_head_dim", *(f"num_{name}_heads" for name in _ROLES.values())):
        if type(given[key]) is not int or given[key] < 1:
            raise _error(key, "be an integer of at least 1", given[key])
    for key in ("use_residual", "add_bias"):
        if type(given[key]) is not bool:
            raise _error(key, "be true or false", given[key])
    for key in ("gradient_clipping", *(key for key in OPTIONAL if key != "sequence_mixer_type")):
        value = given[key]
        if (value is not None or key != "gradient_clipping") and type(value) not in (int, float):
            raise _error(key, "be a number", value)
    for key, name in (("A", "A_init_max"), ("dt", "dt_init_max")):
        least = given[f"{key}_init_min"]
        if least < 0 or (key == "dt" and least == 0):
            raise _error(f"{key}_init_min", "be at least 0" if key == "A" else "be above 0", least)
        if given[name] < least:
            raise _error(name, f"be at least {key}_init_min, {least}", given[name])


def _heads(given: Mapping[str, Any]) -> dict[str, int]:
    """Return the heads of a layer by role; raises for those that the published block cannot run."""
    counts = {role: given[f"num_{name}_heads"] for role, name in _ROLES.items()}
    total = max(count for role, count in counts.items() if role != "g")
    for role in "qkvw":
        if total % counts[role]:
            raise _error(f"num_{_ROLES[role]}_heads", f"divide {total}, the most of any", counts[role])
    if counts["f"] not in (1, total):
        raise _error("num_f_heads", f"be 1 or {total}, as A_log and dt_bias have {total} entries", counts["f"])
    if counts["g"] != total:
        raise _error("num_g_heads", f"be {total}, as the normalised result has that many heads", counts["g"])
    if given["use_residual"] and counts["v"] not in (1, total):
        raise _error("num_v_heads", f"be 1 or {total} with use_residual, as D has {total} rows", counts["v"])
    return {**counts, "f": total}


def _check_options(given: Mapping[str, Any]) -> None:
    width, activation, norm = (given[key] for key in ("kernel_size", "activation_function", "normalization_function"))
    if width is not None and (type(width) is not int or width < 2):
        raise _error("kernel_size", "be null or an integer of at least 2", width)
    if width is None and activation is not None:
        raise _error("activation_function", "be null where kernel_size is null", activation)
    if activation not in (None, "identity", *ACTIVATIONS):
        raise _error("activation_function", f"be null or one of identity, {', '.join(ACTIVATIONS)}", activation)
    if norm is not None and norm not in NORMS:
        raise _error("normalization_function", f"be null or one of {', '.join(NORMS)}", norm)
