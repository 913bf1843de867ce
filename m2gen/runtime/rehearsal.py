"""Calls as models make them, of the operator and the layer, on tensors without memory: launches compile kernels."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import absent, built, compiled, dispatch, fused, launch_plan, layer_op, library
from .facts import HeadCounts, VariantKey
from .layer import M2RNN
from .op import m2rnn, m2rnn_step
from .stubs import build_stub

HIDDEN = 64
"""Width of the layers, on which no kernel depends."""
BATCH = 2
LONG = 4096
"""Steps of a sequence that is no short one for any kernel."""
LENGTHS_AROUND = (fused.LEAST_TOKENS, fused.LEAST_TOKENS // (2 * BATCH))
"""Steps of sequences with whose tokens the layer lays its projection out, and with whose it does not."""
DIVISORS = (16, 8, 4, 2, 1)
"""Powers of two that a length is a multiple of, which decide which strides are multiples of 16."""


class Scene(NamedTuple):
    """Calls that reach one kernel of a module: how models make them, and what their tensors are like."""

    module: str
    variant: str
    use: str
    """``train``, ``train_states``, ``infer`` or ``decode``."""
    operands: str
    """``layer``: what ``M2RNN`` in the variant's dtype passes; ``autocast``: the same with parameters in float32;
    ``operator``: contiguous tensors, all in that dtype."""
    offsets: str
    """dtype of the offsets of a packed batch; empty for a dense one."""
    side: str
    """``forward``, ``backward`` or ``around``: which kernels to compile of those that are launched, the last being the
    layer's own around the recurrence."""
    lengths: tuple[int, ...]
    """Steps of a sequence; none for those that differ for the kernels."""
    deterministic: bool


class Kernel(NamedTuple):
    """A compiled kernel of a module, by name and Triton's hash, and whether it lay in Triton's cache."""

    module: str
    name: str
    digest: str
    found: bool


def compile_scene(scene: Scene, arch: str) -> list[Kernel]:
    """Compile the kernels of a scene for an arch into Triton's cache; return them.

    It is for a process of its own, which has no GPU thereafter.
    """
    kernels: dict[str, Kernel] = {}
    module = next(module for module in loaded() if compiled.name_of(module) == scene.module)

    def seen(kernel: Any) -> None:
        build_stub(kernel)
        owner = _module_of(kernel.src.fn)
        kernels.setdefault(kernel.hash, Kernel(owner, kernel.metadata.name, kernel.hash, kernel.hash in _FOUND))

    def wanted(function: Any) -> bool:
        around = _module_of(function) in built.LAYER_KERNELS.values()
        side = {"m2rnn_forward_kernel": "forward", "m2rnn_backward_kernel": "backward"}.get(function.__name__)
        return scene.side == "around" if around else side in (None, scene.side) and scene.side != "around"

    importlib.import_module("triton").knobs.compilation.listener = _listen
    torch.use_deterministic_algorithms(scene.deterministic)
    with absent.compiling(absent.target_of(arch), seen, wanted):
        for call in _calls(scene, module):
            with Launching(module):
                call()
    return list(kernels.values())


def _module_of(function: Any) -> str:
    """Return the name within ``kernels`` of the module of a function that Triton compiles."""
    return str(function.fn.__module__).rpartition(".")[2]


_FOUND: set[str] = set()
"""Hashes of kernels that lay in Triton's cache when this process first looked."""


def _listen(*, metadata: Mapping[str, Any], cache_hit: bool, **_: Any) -> None:
    if cache_hit:
        _FOUND.add(metadata["hash"])


def loaded() -> Iterator[ModuleType]:
    """Yield the package's modules of kernels, some more than once."""
    for table in dispatch.KERNELS.values():
        for modules in table.values():
            yield from modules


def forget_paths() -> None:
    """Have kernels that are compiled from now on name no folder of this machine as that of their source.

    Debuggers' line tables have it, and the time at which a file of that name changed.
    """
    function = importlib.import_module("triton.runtime.jit").JITCallable
    root = Path(importlib.import_module("triton.runtime").__path__[0]).parent
    for jitted in [x for x in gc.get_objects() if isinstance(x, function)]:
        code = jitted.fn.__code__
        path = Path(code.co_filename)
        place = f"triton/{path.relative_to(root)}" if path.is_relative_to(root) else f"{built.NAME}/kernels/{path.name}"
        jitted.fn.__code__ = code.replace(co_filename=f"/{place}")


class Launching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the mode, operators on tensors without memory launch the kernels of one module."""

    def __init__(self, kernels: ModuleType) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._launched = library.launched()
        vars(dispatch)["kernels_for"] = lambda *operands: kernels
        layer_op.forget_calls()  # which may be of another module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._launched.get(func, func)(*args, **(kwargs or {}))


def _calls(scene: Scene, kernels: ModuleType) -> Iterator[Callable[[], None]]:
    key = next(key for key, name in built.VARIANTS.items() if name == scene.variant)
    make = OperatorCaller if scene.operands == "operator" else LayerCaller
    caller: Caller = make(key, scene)
    for steps in scene.lengths or (LENGTHS_AROUND if scene.side == "around" else lengths_of(kernels)):
        yield from caller.of(steps)


def lengths_of(kernels: ModuleType) -> list[int]:
    """Return lengths that differ for the kernels: in the divisors of strides, and long ones from short ones."""
    plan = launch_plan.plan_of(kernels)
    first = [max(LONG, 2 * plan.shortest_segment + 16)]
    if plan.segments > 1:
        first.append(plan.shortest_segment // BATCH)
    if plan.forward_adds:
        first.append(plan.short // BATCH)
    return [longest // 16 * 16 - 16 + divisor for longest in first for divisor in DIVISORS]


class Caller:
    """Calls of one kind of a scene's variant."""

    def __init__(self, key: VariantKey, scene: Scene) -> None:
        self.rows, self.cols, counts, self.dtype, self.computes_gate = key
        self.heads = HeadCounts(*counts)
        self.total = max(counts)
        self.scene = scene

    def of(self, steps: int) -> Iterator[Callable[[], None]]:
        """Yield the calls of the scene on sequences of that many steps."""
        if self.scene.use == "train":
            yield lambda: self.train(steps)
        elif self.scene.use == "train_states":
            for begins, ends in ((True, True), (True, False), (False, True)):
                yield lambda begins=begins, ends=ends: self.train(steps, begins, ends)  # type: ignore[misc]
            yield lambda: self.train(steps, given=True)
        elif self.scene.use == "infer":
            yield lambda: self.infer(steps, False)
            yield lambda: self.infer(steps, True)
        else:
            yield self.decode

    def train(self, steps: int, begins: bool = False, ends: bool = False, given: bool = False) -> None:
        """Run forward and backward.

        ``begins`` with an initial state that has a gradient, ``ends`` with a gradient of the final state; ``given``
        with an initial state that has none.
        """
        raise NotImplementedError

    def infer(self, steps: int, begins: bool) -> None:
        """Run the forward, from an initial state or not."""
        raise NotImplementedError

    def decode(self) -> None:
        """Run a step."""
        raise NotImplementedError

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, gradient: bool = False) -> Tensor:
        """Return a contiguous tensor without memory."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta", requires_grad=gradient)

    def lead(self, steps: int) -> tuple[int, ...]:
        """Return the dims of tokens."""
        return (BATCH * steps,) if self.scene.offsets else (BATCH, steps)

    def offsets(self) -> Tensor | None:
        """Return the offsets of a packed batch."""
        dtype = self.scene.offsets
        return torch.empty(BATCH + 1, dtype=getattr(torch, dtype), device="meta") if dtype else None

    def state(self, gradient: bool = False) -> Tensor:
        """Return a state."""
        return self.tensor(BATCH, self.total, self.rows, self.cols, dtype=torch.float32, gradient=gradient)


class OperatorCaller(Caller):
    """Calls of ``m2rnn`` and ``m2rnn_step``."""

    def operands(self, *lead: int, gradient: bool = False) -> dict[str, Any]:
        """Return the operands for some dims of tokens."""
        heads, rows, cols = self.heads, self.rows, self.cols
        shapes = {
            "q": (*lead, heads.q, rows), "k": (*lead, heads.k, rows), "v": (*lead, heads.v, cols),
            "weight": (heads.w, cols, cols), "forget": (*lead, heads.f),
        }  # fmt: skip
        found = {name: self.tensor(*shape, gradient=gradient) for name, shape in shapes.items()}
        if self.computes_gate:
            for name in ("A_log", "dt_bias"):
                found[name] = self.tensor(heads.f, dtype=torch.float32, gradient=gradient)
        return found

    def train(self, steps: int, begins: bool = False, ends: bool = False, given: bool = False) -> None:
        state = self.state(begins) if begins or given else None
        operands = self.operands(*self.lead(steps), gradient=True)
        y, last = m2rnn(**operands, initial_state=state, cu_seqlens=self.offsets())
        torch.autograd.backward([y, last] if ends else [y], [torch.empty_like(x) for x in ([y, last] if ends else [y])])

    def infer(self, steps: int, begins: bool) -> None:
        with torch.no_grad():
            m2rnn(
                **self.operands(*self.lead(steps)),
                initial_state=self.state() if begins else None, cu_seqlens=self.offsets(),
            )  # fmt: skip

    def decode(self) -> None:
        with torch.no_grad():
            m2rnn_step(**self.operands(BATCH), state=self.state())


class LayerCaller(Caller):
    """Calls of ``M2RNN``, whose operands are views of what it projects and convolves."""

    def __init__(self, key: VariantKey, scene: Scene) -> None:
        super().__init__(key, scene)
        heads = self.heads._asdict()
        self.layer = M2RNN(HIDDEN, self.rows, self.cols, heads, device="meta", dtype=self.dtype)
        if scene.operands == "autocast":
            self.layer.float()
            for projection in (self.layer.input_projection, self.layer.output_projection):
                projection.to(self.dtype)  # in which autocast makes their products, but not without memory

    def train(self, steps: int, begins: bool = False, ends: bool = False, given: bool = False) -> None:
        conv = state = None
        if begins or given:
            cache = self.layer.allocate_cache(BATCH)
            conv, state = cache.conv, cache.state.requires_grad_(begins)
        x = self.tensor(*self.lead(steps), HIDDEN, gradient=True)
        y, _, last = self.layer.scan(x, conv, state, self.offsets())
        torch.autograd.backward([y, last] if ends else [y], [torch.empty_like(x) for x in ([y, last] if ends else [y])])

    def infer(self, steps: int, begins: bool) -> None:
        cache = self.layer.allocate_cache(BATCH) if begins else None
        with torch.no_grad():
            self.layer(self.tensor(*self.lead(steps), HIDDEN), cache, None, self.offsets())

    def decode(self) -> None:
        with torch.no_grad():
            self.layer(self.tensor(BATCH, 1, HIDDEN), self.layer.allocate_cache(BATCH))
