"""Load the kernels around a recurrence with a candidate's tiles, and launch one as layers do."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from m2gen.kernels.compile import load_kernels
from m2gen.kernels.layer import layer_of, render_layer
from m2gen.runtime import layer_launches as around
from m2gen.runtime.layer_launches import Convolution, Epilogue, LayerKernels
from m2gen.runtime.layer_step import StepSettings, advance
from m2gen.schedule.layer import AnyTiles, LayerTiles
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.tune.layer.operands import EPS, LayerCase, LayerSizes, Operands
from m2gen.variant import Variant

STEP = ("conv_weight", "conv_bias", "state_weight", "A_log", "dt_bias", "skip", "norm", "conv", "state", "indices")
"""Operands of the decode kernel behind the rows of a projection."""


def source_of(variant: Variant, tiles: AnyTiles) -> str:
    """Return the module in which one kernel has these tiles and the others the usual ones."""
    k = layer_of(variant, LayerTiles.of([tiles]))
    assert k is not None
    return render_layer(k)


def load(variant: Variant, tiles: AnyTiles) -> ModuleType:
    """Render and import a candidate's kernels; all processes compile the same cached file."""
    return load_kernels(source_of(variant, tiles))


@dataclass(frozen=True)
class AroundCall:
    """One kernel of a module on the operands of one call."""

    kernel: LayerKernel
    module: ModuleType
    shape: LayerSizes
    case: LayerCase
    operands: Operands
    trains: bool = False
    """Whether the gate's backward is timed beside its forward."""

    def forward(self) -> dict[str, Tensor]:
        """Return the kernel's results by name; decoding writes its states in place."""
        kernels = LayerKernels(self.module)
        found: dict[str, Tensor | None]
        match self.kernel:
            case LayerKernel.CONVOLVE:
                found = {"b": around.convolve(kernels, self._a, self._conv, self._get("before"), self._tokens)}
            case LayerKernel.CONVOLVE_BACKWARD:
                found = self._convolve_backward(kernels)
            case LayerKernel.DECAY:
                dtype = self.shape.dtype if self.case.rounds else torch.float32
                found = {"f": around.decay(kernels, self._x, self._of("A_log"), self._of("dt_bias"), dtype)}
            case LayerKernel.FINISH:
                found = {"o": around.finish(kernels, self._of("y"), self._v, self._g, self._epilogue)}
            case LayerKernel.FINISH_BACKWARD:
                found = self._finish_backward(kernels)
            case LayerKernel.DECODE:
                found = self._decode(kernels)
        return {name: x for name, x in found.items() if x is not None}

    def backward_of(self, results: object) -> dict[str, Tensor]:
        """Return the gradients of the gate, which need nothing of its forward."""
        kernels, dx = LayerKernels(self.module), self._columns_of(self._blank, self._after)
        arguments = (self._x, self._of("A_log"), self._of("dt_bias"), self._of("df"), dx)
        dA_log, ddt_bias = around.decay_backward(kernels, *arguments)
        return {"dx": dx, "dA_log": dA_log, "ddt_bias": ddt_bias}

    def results(self) -> dict[str, Tensor]:
        """Return everything that the kernel computes, from states as they were drawn."""
        kept = {name: x.clone() for name, x in self.operands.items() if name in ("conv", "state")}
        call = AroundCall(self.kernel, self.module, self.shape, self.case, {**self.operands, **kept})
        return call.forward() | (call.backward_of(None) if self.kernel is LayerKernel.DECAY else {})

    def _get(self, name: str) -> Tensor | None:
        return self.operands.get(name)

    def _of(self, name: str) -> Tensor:
        return self.operands[name]

    @property
    def _blank(self) -> Tensor:
        """Rows for the gradients of those of the projection."""
        return torch.empty_like(self._of("rows"))

    @property
    def _after(self) -> tuple[int, int]:
        """First and last column of the gate's inputs, after the output gates."""
        first = self.shape.channels + self.shape.inner
        return first, first + self.shape.variant.heads.f

    def _columns_of(self, rows: Tensor, span: tuple[int, int]) -> Tensor:
        return rows[:, span[0] : span[1]]

    @property
    def _a(self) -> Tensor:
        return self._of("rows")[:, : self.shape.channels]

    @property
    def _x(self) -> Tensor:
        return self._columns_of(self._of("rows"), self._after)

    @property
    def _g(self) -> Tensor:
        return self._of("rows")[:, self.shape.channels : self.shape.channels + self.shape.inner]

    @property
    def _v(self) -> Tensor:
        return self._of("qkv")[:, self.shape.channels - self.shape.inner : self.shape.channels]

    @property
    def _conv(self) -> Convolution:
        return Convolution(self._get("conv_weight"), self._get("conv_bias"), self.case.silu)

    @property
    def _epilogue(self) -> Epilogue:
        return Epilogue(self._get("skip"), self._get("norm"), self.case.epilogue, EPS)

    @property
    def _tokens(self) -> around.Tokens:
        problem, rows = self.case.problem, self._of("rows")
        lead = rows if problem.lengths is not None else torch.unflatten(rows, 0, (problem.batch, problem.seq))
        return around.tokens_of(lead, self._get("cu_seqlens"))

    def _convolve_backward(self, kernels: LayerKernels) -> dict[str, Tensor | None]:
        da = self._columns_of(self._blank, (0, self.shape.channels))
        gradients = (self._of("dq"), self._of("dk"), self._of("dv"))
        bypass = (self._get("du"), self._get("skip"))
        found = around.convolve_backward(
            kernels, self._a, da, self._conv, self._get("before"), self._tokens, gradients, bypass
        )
        return {"da": da, "dconv_weight": found.weight, "dconv_bias": found.bias}

    def _finish_backward(self, kernels: LayerKernels) -> dict[str, Tensor | None]:
        dg = self._columns_of(self._blank, (self.shape.channels, self.shape.channels + self.shape.inner))
        found = around.finish_backward(kernels, self._of("do"), self._of("y"), self._v, self._g, self._epilogue, dg)
        return {"du": found.du, "dg": dg, "dskip": found.skip, "dnorm": found.weight}

    def _decode(self, kernels: LayerKernels) -> dict[str, Tensor | None]:
        variant, case = self.shape.variant, self.case
        dims = (variant.state_expansion, variant.head_dim, *variant.heads.counts)
        settings = StepSettings(dims, case.silu, case.rounds, case.epilogue, EPS)
        operands = (*(self._get(name) for name in STEP), None)
        o = advance(kernels, self._of("rows"), operands, settings, case.approximate)
        return {"o": o, "conv": self._get("conv"), "state": self._get("state")}
