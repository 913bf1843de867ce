"""Groups of parameters for optimisers: what weight decay acts on, and what is a matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

from .gate import DecayGate
from .norm import RMSNorm

__all__ = ["parameter_groups"]

_NORMS = (RMSNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_NAMES_OF_NORMS = ("RMSNorm", "LayerNorm")
"""How names of models' own classes of norms end."""


def _declared(module: nn.Module) -> str | None:
    """Return the group of the module's own parameters, where it says that: a part of a layer over ranks does."""
    group: str | None = getattr(module, "parameter_group", None)
    return group


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the module's own parameters by its names for them, those behind a parametrization or a mask, too."""
    for name, parameter in module.named_parameters(recurse=False):
        yield name.removesuffix("_orig"), parameter  # what torch.nn.utils.prune masks
    if parametrize.is_parametrized(module):
        for name, behind in cast(nn.ModuleDict, module.parametrizations).items():
            for part, parameter in behind.named_parameters(recurse=False):
                yield name if part == "original" else f"{name}.{part}", parameter


def _undecayed(module: nn.Module) -> list[nn.Parameter]:
    """Return the module's own parameters that weight decay must leave alone: decay parameters, norms, D and biases."""
    own = dict(_own(module))
    norm = isinstance(module, _NORMS) or type(module).__name__.endswith(_NAMES_OF_NORMS)
    if norm or isinstance(module, DecayGate) or _declared(module) == "undecayed":
        return list(own.values())
    names = ("D", "skip") if hasattr(module, "decay_gate") else ()
    return [parameter for name, parameter in own.items() if name in names or _is_bias(name)]


def _is_bias(name: str) -> bool:
    """Whether torch's own modules give a bias such a name: ``bias``, ``in_proj_bias``, ``bias_ih_l0``."""
    return name == "bias" or name.endswith("_bias") or name.startswith("bias_")


def mark_no_weight_decay(layer: nn.Module) -> None:
    """Set ``_no_weight_decay`` on the layer's parameters that published training leaves out of weight decay."""
    for module in layer.modules():
        for parameter in _undecayed(module):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]


class MarksNoWeightDecay:
    """What a model of transformers inherits so that its parameters are marked: those that are loaded or copied, too."""

    def post_init(self) -> None:
        """Mark parameters after a model was made, or drawn anew."""
        super().post_init()  # type: ignore[misc]
        mark_no_weight_decay(cast(nn.Module, self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy, or of a pickle, and mark parameters, whose copies have no marks."""
        super().__setstate__(state)  # type: ignore[misc]
        mark_no_weight_decay(cast(nn.Module, self))

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load a model, whose parameters are not the ones that were made with it, and mark them."""
        loaded = super().from_pretrained(*arguments, **options)  # type: ignore[misc]
        mark_no_weight_decay(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return an optimiser's groups of all parameters of a model: ``params``, ``weight_decay`` and a ``name`` each.

    "undecayed" has weight_decay 0: A_log, dt_bias, D, norms, biases, and whatever has ``_no_weight_decay``. All others
    have ``weight_decay``: "matrices", 2-D weights of linear projections; "state_weights", the stacks (Nw, V, V) of a
    matrix for each head of the state weight; and "others", such as embeddings and convolutions.

    An optimiser of matrices, such as Muon, takes "matrices", and of "state_weights" every (V, V) for itself: it must
    treat the first dim as a batch, or leave the group to AdamW. Flattened to (Nw V, V) they would be orthogonalised
    against each other. A head of the model's vocabulary is a linear projection, too, and is better left to AdamW.

    Marks get lost where a wrapper makes parameters anew, so modules are asked for theirs, too, also for those behind a
    parametrization. Groups without parameters are left out, and shared parameters are in one group only.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "state_weights": [], "others": [], "undecayed": []}
    seen: set[int] = set()
    for module in model.modules():
        left_out = {id(parameter) for parameter in _undecayed(module)}
        for name, parameter in _own(module):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if id(parameter) in left_out or getattr(parameter, "_no_weight_decay", False):
                group = "undecayed"
            elif (declared := _declared(module)) is not None:
                group = declared
            elif name == "state_weight" and parameter.dim() == 3:
                group = "state_weights"
            elif isinstance(module, nn.Linear) and parameter.dim() == 2:
                group = "matrices"
            else:
                group = "others"
            groups[group].append(parameter)
    decay = {name: 0.0 if name == "undecayed" else weight_decay for name in groups}
    return [{"params": having, "weight_decay": decay[name], "name": name} for name, having in groups.items() if having]
