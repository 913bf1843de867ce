"""Calls of the launchers of the kernels that serve some operands."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import dispatch, launchers, offsets
from .buffers import Operands
from .known import KnownCall
from .relaunch import Known


def on_device(launcher: Callable[..., Any], device: int, arguments: tuple[Any, ...]) -> Any:
    """Call a launcher with the GPU ``device`` current, since that is where Triton launches; -1 is the CPU."""
    if device < 0 or device == torch.cuda.current_device():
        return launcher(*arguments)
    with torch.cuda.device(device):
        return launcher(*arguments)


def forward(
    operands: Operands,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    deterministic: bool,
    call: KnownCall | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the kernel that serves these operands; return y, the final state and, if ``save``, checkpoints.

    Offsets are checked as ``cu_seqlens_cpu`` has them where it is given, else as ``cu_seqlens``.
    """
    q = operands[0]
    if cu_seqlens is not None:
        offsets.check_offsets(cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu, q.shape[0])
    kernels, known = _kernels(call, operands, cu_seqlens)
    results: tuple[Tensor, Tensor, Tensor | None] = on_device(
        launchers.forward, q.get_device(),
        (kernels, operands, initial_state, cu_seqlens, save, deterministic, known),
    )  # fmt: skip
    return results


def backward(
    dy: Tensor,
    dstate: Tensor | None,
    operands: Operands,
    checkpoints: Tensor,
    cu_seqlens: Tensor | None,
    bound: float,
    wanted: list[bool],
    deterministic: bool,
    call: KnownCall | None = None,
) -> list[Tensor]:
    """Run the kernel that serves these operands; return the ``wanted`` gradients."""
    kernels, known = _kernels(call, operands, cu_seqlens)
    gradients: list[Tensor] = on_device(
        launchers.backward, operands[0].get_device(),
        (kernels, dy, dstate, operands, checkpoints, cu_seqlens, bound, wanted, deterministic, known),
    )  # fmt: skip
    return gradients


def step(operands: Operands, state: Tensor, call: KnownCall | None = None) -> Tensor:
    """Advance ``state`` in place by the kernel that serves these operands; return y."""
    kernels, known = _kernels(call, operands, None)
    y: Tensor = on_device(launchers.step, operands[0].get_device(), (kernels, operands, state, known))
    return y


def _kernels(call: KnownCall | None, operands: Operands, cu_seqlens: Tensor | None) -> tuple[ModuleType, Known | None]:
    """Return the kernels that serve a call and what is known of its launches; ``call`` is as ``check`` returned it."""
    if call is None:
        return dispatch.kernels_for(*operands[:6], cu_seqlens), None
    if call.kernels is None:
        call.kernels = dispatch.kernels_for(*operands[:6], cu_seqlens)
    return call.kernels, call.launches
