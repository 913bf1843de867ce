"""A stand-in for Triton and Gluon that runs rendered kernels on CPU tensors, program by program, with numpy.

Triton's interpreter runs no Gluon. Here layouts move nothing, since a tensor is what its logical elements are; only
shuffles, which name lanes, need to know which elements lanes have, and the kernels' own layouts say that of tiles: of
rows a lane has every eighth, of summed columns every fourth. Loads and stores outside of a tensor raise IndexError.
Tensor cores round nothing here beyond their operands, ``tanh.approx`` is exact, and programs run one after the other.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


class Dtype:
    """A dtype of Triton; bfloat16 is float32 here, rounded to nearest even."""

    def __init__(self, name: str, numpy: Any) -> None:
        self.name, self.numpy = name, np.dtype(numpy)

    def of(self, array: Any) -> np.ndarray:
        """Return the array in this dtype."""
        array = np.asarray(array).astype(self.numpy)
        if self.name == "bfloat16":
            bits = array.view(np.uint32)
            array = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
        return array


FLOAT32, INT32, INT64 = Dtype("float32", np.float32), Dtype("int32", np.int32), Dtype("int64", np.int64)
DTYPES = {"float32": FLOAT32, "int32": INT32, "int64": INT64, "int16": Dtype("int16", np.int16)}
DTYPES |= {"bfloat16": Dtype("bfloat16", np.float32), "float16": Dtype("float16", np.float16)}


def plain(x: Any) -> Any:
    """Return a tensor's array, anything else as it is."""
    return x.array if isinstance(x, Tensor) else x


class Tensor:
    """A tensor of a program."""

    tile: Any = None
    """The layout of the tiles of the kernel that runs."""

    def __init__(self, array: Any, dtype: Dtype | None = None) -> None:
        self.array = np.asarray(plain(array))
        self.dtype = dtype or DTYPES.get(str(self.array.dtype), FLOAT32)

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=self.tile)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def to(self, dtype: Dtype) -> Tensor:
        return Tensor(dtype.of(self.array), dtype)

    def reshape(self, shape: list[int]) -> Tensor:
        return Tensor(self.array.reshape(shape), self.dtype)

    def permute(self, dims: tuple[int, ...]) -> Tensor:
        return Tensor(self.array.transpose(dims), self.dtype)

    def split(self) -> tuple[Tensor, Tensor]:
        return Tensor(self.array[..., 0], self.dtype), Tensor(self.array[..., 1], self.dtype)

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.array[index], self.dtype)

    def __index__(self) -> int:
        return int(self.array)

    def __bool__(self) -> bool:
        return bool(self.array)

    def __neg__(self) -> Tensor:
        return Tensor(-self.array)


def _binary(name: str, reflected: bool) -> Callable[[Any, Any], Any]:
    act = getattr(operator, name)

    def method(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        one, two = (plain(other), self.array) if reflected else (self.array, plain(other))
        return Tensor(act(one, two))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "rshift", "lshift"):
    setattr(Tensor, f"__{_name.rstrip('_')}__", _binary(_name, reflected=False))
    setattr(Tensor, f"__r{_name.rstrip('_')}__", _binary(_name, reflected=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tensor, f"__{_name}__", _binary(_name, reflected=False))
Tensor.__hash__ = object.__hash__  # type: ignore[method-assign]


class Pointer:
    """Addresses in the storage of a torch tensor."""

    def __init__(self, storage: torch.Tensor, offsets: Any) -> None:
        self.storage, self.offsets = storage, np.asarray(offsets, dtype=np.int64)
        self.dtype = SimpleNamespace(element_ty=DTYPES[str(storage.dtype).removeprefix("torch.")])

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.storage, self.offsets + np.asarray(plain(other), dtype=np.int64))

    def __sub__(self, other: Any) -> Pointer:
        return self + -np.asarray(plain(other), dtype=np.int64)

    __radd__ = __add__

    def to(self, dtype: Dtype) -> Pointer:
        """Return these addresses, which a prefetch has as numbers."""
        return self

    def at(self, mask: Any, *shaped: Any) -> tuple[np.ndarray, ...]:
        """Return places that are inside the storage, what is accessed, and other values in their shape."""
        mask = True if mask is None else plain(mask)
        places, mask, *others = np.broadcast_arrays(self.offsets, mask, *(plain(x) for x in shaped))
        if mask.any() and not 0 <= places[mask].min() <= places[mask].max() < self.storage.numel():
            raise IndexError("a kernel must stay inside its tensors")
        return (np.where(mask, places, 0), mask, *others)


def load(pointer: Pointer, mask: Any = None, other: Any = 0.0, cache_modifier: str = "") -> Tensor:
    places, mask, other = pointer.at(mask, other)
    if not pointer.storage.numel():
        return Tensor(other)
    found = pointer.storage[torch.from_numpy(places.copy())]
    dtype = DTYPES[str(found.dtype).removeprefix("torch.")]
    values = found.float().numpy() if dtype.name == "bfloat16" else found.numpy()
    return Tensor(dtype.of(np.where(mask, values, other)), dtype)


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    places, mask, value = pointer.at(mask, value)
    values = torch.from_numpy(value[mask].copy()).to(pointer.storage.dtype)
    pointer.storage[torch.from_numpy(places[mask])] = values


def atomic_add(pointer: Pointer, value: Any, mask: Any = None, sem: str = "") -> Tensor:
    before = load(pointer, mask)
    places, mask, value = pointer.at(mask, value)
    added = torch.from_numpy(value[mask].copy()).to(pointer.storage.dtype)
    pointer.storage.index_add_(0, torch.from_numpy(places[mask]), added)
    return before


class Shared:
    """A tensor in shared memory; views of it share its elements."""

    def __init__(self, array: np.ndarray, dtype: Dtype) -> None:
        self.array, self.dtype = array, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def index(self, place: Any) -> Shared:
        return Shared(self.array[int(place)], self.dtype)

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.array[(slice(None),) * dim + (slice(start, start + length),)], self.dtype)

    def permute(self, dims: tuple[int, ...]) -> Shared:
        return Shared(self.array.transpose(dims), self.dtype)

    def _reinterpret(self, dtype: Dtype, shape: list[int], layout: Any) -> Shared:
        assert dtype is self.dtype
        return Shared(self.array.reshape(shape), dtype)  # contiguous, so a view

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.array.copy(), self.dtype)

    def store(self, x: Tensor) -> None:
        assert x.shape == self.shape
        self.array[...] = self.dtype.of(x.array)


def allocate_shared_memory(dtype: Dtype, shape: list[int], layout: Any, value: Tensor | None = None) -> Shared:
    found = Shared(np.full(shape, np.nan, dtype.numpy), dtype)
    if value is not None:
        found.store(value)
    return found


def copy_ahead(place: Shared, address: Pointer, mask: Any = None) -> None:
    """Copy what an asynchronous copy will bring; what its mask leaves out is nobody's to read."""
    place.store(load(address, mask, np.nan))


def product_of_slots(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Return m16n8k8's product: ``rows`` has 8 slots twice, ``cols`` columns c % 8 down, c // 8 and slots across."""
    left = rows[..., :8]
    right = cols[:, :8].reshape(-1, 8, 2, 8).transpose(0, 3, 2, 1).reshape(-1, 8, 16)
    return left @ right


def product(a: Any, b: Any, total: Any, use_acc: bool = True, **_: Any) -> Tensor:
    made = a.array.astype(np.float32) @ b.array.astype(np.float32)
    return Tensor(made + total.array if use_acc else made)


def exchange(x: np.ndarray, lanes: int) -> np.ndarray:
    """Butterfly shuffle: return the values of lane ^ ``lanes``, with eight rows a warp, and four columns in sums."""
    axis, bit = (0, lanes // 4) if lanes >= 4 else (1, lanes)
    assert x.shape[0] % 8 == 0
    assert axis == 0 or x.shape[1] == 4
    return np.take(x, np.arange(x.shape[axis]) ^ bit, axis)


def inline_asm_elementwise(text: str, constraints: str, operands: list[Any], dtype: Dtype, **_: Any) -> Any:
    if text.startswith("prefetch"):
        return operands[0].at(None)
    if "%laneid" in text:  # times what is zero
        assert not np.any(plain(operands[0]))
        return 0
    x = operands[0].array
    if text.startswith("tanh.approx"):
        return Tensor(np.tanh(x))
    if text.startswith("shfl.sync.bfly"):
        return Tensor(exchange(x, int(re.findall(r", (\d+),", text)[0])), dtype)
    if text.startswith("min.NaN.xorsign.abs"):
        bound = operands[1].array
        return Tensor(np.copysign(np.minimum(np.abs(x), np.abs(bound)), np.where(np.signbit(bound), -x, x)))
    if text.startswith("and.b32"):
        return Tensor(np.where(operands[1].array == -1, x, 0), dtype)
    if text.startswith(("fma.rn.bf16x2", "fma.rn.f16x2")):
        return Tensor(x * operands[1].array + operands[2].array).to(dtype)
    if text.startswith("mma.sync.aligned.m16n8k8"):
        return Tensor(operands[2].array + product_of_slots(x, operands[1].array))
    assert text.startswith("movmatrix"), text
    *_, rows, cols = x.shape  # blocks of 8 x 8 are transposed where they lie
    return Tensor(x.reshape(-1, rows // 8, 8, cols // 8, 8).transpose(0, 1, 4, 3, 2).reshape(x.shape), dtype)


def _layout(warps: list[int] | None = None) -> Any:
    found = SimpleNamespace(warps_per_cta=warps)
    found.parent = found
    return found


class Constant(int):
    """A ``gl.constexpr`` of a module."""

    @property
    def value(self) -> int:
        return int(self)


def _maths(act: Callable[..., Any]) -> Callable[..., Tensor]:
    def apply(*x: Any, propagate_nan: Any = None) -> Tensor:
        """Take Python's numbers as float32, as kernels do; numpy would make float64 of two of them."""
        return Tensor(act(*(np.float32(one) if isinstance(one, float) else plain(one) for one in x)))

    return apply


def language() -> ModuleType:
    """Return the module that kernels import as ``gl``."""
    gl: Any = ModuleType("gluon_on_cpu.language")
    for name, dtype in DTYPES.items():
        setattr(gl, name, dtype)
    gl.constexpr = lambda value: Constant(value) if isinstance(value, int) else value
    gl.NVMMADistributedLayout = lambda version, warps, shape: _layout(warps)
    for name in ("DotOperand", "Slice", "Blocked", "DistributedLinear", "SwizzledShared", "NVMMAShared"):
        setattr(gl, f"{name}Layout", lambda *_, **__: _layout())
    gl.load, gl.store, gl.atomic_add, gl.inline_asm_elementwise = load, store, atomic_add, inline_asm_elementwise
    gl.allocate_shared_memory, gl.shared_memory_descriptor = allocate_shared_memory, Shared
    gl.arange = lambda start, end, layout=None: Tensor(np.arange(start, end, dtype=np.int32))
    gl.zeros = lambda shape, dtype, layout=None: Tensor(np.zeros(shape, dtype.numpy), dtype)
    gl.full = lambda shape, value, dtype, layout=None: Tensor(np.full(shape, value, dtype.numpy), dtype)
    gl.cast = lambda x, dtype: Tensor(x).to(dtype)
    gl.minimum, gl.maximum, gl.where = _maths(np.minimum), _maths(np.maximum), _maths(np.where)
    gl.abs, gl.exp, gl.exp2 = _maths(np.abs), _maths(np.exp), _maths(np.exp2)
    gl.fma = _maths(lambda a, b, c: a * b + c)
    gl.sum = lambda x, axis=None: Tensor(x.array.sum(axis), x.dtype)
    gl.cdiv = lambda x, y: Tensor(-(-plain(x) // y))
    gl.join = _maths(lambda x, y: np.stack([x, y], -1))
    gl.broadcast = lambda x, y: tuple(map(Tensor, np.broadcast_arrays(x.array, y.array)))
    gl.convert_layout = lambda x, layout, assert_trivial=False: x
    gl.static_range = range
    return gl


OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
"""Keywords of launches that are the compiler's."""


class Kernel:
    """A kernel, launched program by program."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **flags: Any) -> None:
            flags = {name: value for name, value in flags.items() if name not in OPTIONS}
            known = self.function.__globals__
            side = "BACKWARD" if "backward" in self.function.__name__ else "FORWARD"
            Tensor.tile = known[f"{side}_TILE"]
            known["gl"].num_programs = lambda axis: Tensor(np.int32(grid[axis]))
            for program in range(grid[0]):
                known["gl"].program_id = lambda axis, program=program: Tensor(np.int32(program))
                self.function(*map(_argument, arguments), **flags)

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return Pointer(whole, x.storage_offset())
    return Tensor(np.int64(x)) if type(x) is int else x


def _jit(function: Any = None, **_: Any) -> Any:
    return Kernel(function) if function else Kernel


def load_module(source: str) -> ModuleType:
    """Return a rendered module whose launchers run its kernels here."""
    gl: Any = language()
    named: Any = SimpleNamespace(PropagateNan=SimpleNamespace(ALL=None), debug_barrier=lambda: None)
    products: Any = SimpleNamespace(mma_v2=product, warpgroup_mma=product, fence_async_shared=lambda: None)
    products.async_copy = SimpleNamespace(
        async_copy_global_to_shared=copy_ahead, commit_group=lambda: None, wait_group=lambda _: None
    )
    products.warpgroup_mma_wait = lambda left, waited: waited[0]
    gluon = SimpleNamespace(jit=_jit, language=gl)
    modules: dict[str, Any] = {"triton": SimpleNamespace(language=named, __version__="3.6.0"), "triton.language": named}
    modules |= {"triton.experimental": SimpleNamespace(gluon=gluon), "triton.experimental.gluon": gluon}
    below = "triton.experimental.gluon.language"
    modules |= {
        below: gl,
        f"{below}.nvidia": gl,
        f"{below}.nvidia.ampere": products,
        f"{below}.nvidia.hopper": products,
    }
    made = ModuleType("kernels_on_cpu")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        exec(compile(source, "<kernels>", "exec"), made.__dict__)
    return made
