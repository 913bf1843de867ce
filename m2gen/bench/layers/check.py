"""Hold a layer's output and all its gradients, or the tokens that it decodes, against float64 before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from m2gen.bench.layers.subject import Exact, LayerSubject
from m2gen.db import Failure, Reason
from m2gen.measure.checks import STEPS
from m2gen.verify import FACTOR, Oracle, TensorResult, judge

BATCH, TOKENS = 2, 4
"""Sequences of a check, and tokens that are decoded one after the other."""
DRAWS = 4
"""Inputs whose largest error in the layer's own dtype, of the plain form, gives the budgets."""
NO_REFERENCE = "the adapter has no plain form to check against"


def failure_of(subject: LayerSubject, hidden: int, device: torch.device, *, decodes: bool) -> Failure | None:
    """Return why a layer must not be timed, or None: results beyond twice what its dtype makes of the plain form."""
    if subject.exact is None:
        return Failure.of(Reason.WRONG, NO_REFERENCE)
    seq = TOKENS if decodes else STEPS
    known, x = _known(subject, subject.exact, (BATCH, seq, hidden), device, decodes=decodes)
    if decodes:
        given: Mapping[str, Tensor] = {"y": _decoded(subject, x)}
    else:
        parameters = dict(subject.module.named_parameters())
        given = _differentiated(lambda _, x: subject.call(x), parameters, x)
    return next((_failure(found, decodes) for found in judge(given, known) if not found.passed), None)


def _failure(found: TensorResult, decodes: bool) -> Failure:
    where = "decoding" if decodes else "the layer"
    return Failure.of(Reason.WRONG, f"{found.tensor} of {where} {found.verdict}")


def _known(
    subject: LayerSubject, exact: Exact, size: tuple[int, int, int], device: torch.device, *, decodes: bool
) -> tuple[Oracle, Tensor]:
    """Return float64 results and budgets, and the inputs of which they are."""
    parameters = {name: p.detach() for name, p in subject.module.named_parameters()}
    dtype = next(p.dtype for p in parameters.values() if p.dim() > 1)
    wide = {name: p.double() for name, p in parameters.items()}
    evaluate: Callable[..., Mapping[str, Tensor]] = _forward if decodes else _differentiated
    worst: dict[str, float] = {}
    for seed in reversed(range(DRAWS)):
        x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        truth, rounded = evaluate(exact, wide, x.double()), evaluate(exact, parameters, x)
        for name, value in truth.items():
            norm = value.norm().item() or 1.0
            worst[name] = max(worst.get(name, 0.0), (rounded[name].double() - value).norm().item() / norm)
    dtypes = {name: x.dtype for name, x in rounded.items()}
    budgets = {name: FACTOR * error + torch.finfo(dtype).eps / 2 for name, error in worst.items()}
    return Oracle(truth, budgets, dtypes), x


def _forward(exact: Exact, parameters: Mapping[str, Tensor], x: Tensor) -> Mapping[str, Tensor]:
    with torch.no_grad():
        return {"y": exact(parameters, x)}


def _differentiated(call: Exact, parameters: Mapping[str, Tensor], x: Tensor) -> Mapping[str, Tensor]:
    """Return y, and the gradients of x and of every parameter, for the same uneven loss in every dtype."""
    leaves = {name: p.requires_grad_() for name, p in parameters.items()}
    x = x.detach().requires_grad_()
    y = call(leaves, x)
    dy = torch.linspace(-400, 400, y.numel(), device=y.device).cos().view_as(y).to(y.dtype)
    gradients = torch.autograd.grad(y, [x, *leaves.values()], dy)
    return {"y": y.detach(), **dict(zip(["dx", *(f"d{name}" for name in leaves)], gradients, strict=True))}


def _decoded(subject: LayerSubject, x: Tensor) -> Tensor:
    assert subject.decoder is not None
    decoder = subject.decoder(x.shape[0], 0)
    with torch.no_grad():
        return torch.cat([decoder.step(x[:, t : t + 1]).clone() for t in range(x.shape[1])], 1)
