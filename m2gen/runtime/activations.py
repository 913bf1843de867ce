"""Activations of q, k and v, and of MLPs, by the names that published configurations use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "activate"]


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "celu": F.celu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "hard_sigmoid": F.hardsigmoid,
    "hard_swish": F.hardswish,
    "hard_tanh": F.hardtanh,
    "leaky_reLU": F.leaky_relu,
    "log_sigmoid": F.logsigmoid,
    "mish": F.mish,
    "relu": F.relu,
    "relu2": _squared_relu,
    "relu6": F.relu6,
    "relu_squared": _squared_relu,
    "selu": F.selu,
    "sigmoid": Tensor.sigmoid,
    "silu": F.silu,
    "soft_plus": F.softplus,
    "softplus": F.softplus,
    "swish": F.silu,
    "tanh": Tensor.tanh,
}
"""Functions by name, none of which has parameters, draws numbers or splits its input."""


def activate(name: str | None, x: Tensor) -> Tensor:
    """Return the activation of x; x itself for None."""
    return x if name is None else ACTIVATIONS[name](x)
