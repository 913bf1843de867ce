"""Elements of tensors that share memory: what a kernel writes in place must be its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class Places:
    """What calls found out that agree in the shapes and strides of what they write, and of what they read."""

    __slots__ = ("apart", "read", "written")

    def __init__(self, written: Tensor, read: Iterable[Tensor | None]) -> None:
        self.written = _span(written)
        self.read = [0 if x is None else _span(x) for x in read]
        self.apart: set[tuple[str, int]] = set()
        """Tensors, and how far they are from what is written, that lie among its elements and yet share none."""

    def meet(self, addresses: Sequence[int]) -> bool:
        """Whether one of the tensors at ``addresses`` may share memory with what is written, which is the last."""
        start = addresses[-1]
        end = start + self.written
        for address, span in zip(addresses, self.read, strict=False):
            if address < end and start < address + span:
                return True
        return False


def check_written(
    caller: str, name: str, written: Tensor, read: Mapping[str, Tensor | None], known: Places | None = None
) -> Places:
    """Raise RuntimeError if elements of ``written`` share memory with each other, or with tensors ``read``, by name.

    Returns what a call whose tensors have the same shapes and strides may hand over as ``known``; as long as their
    addresses do not ``meet``, it need not.
    """
    if known is None:
        if overlaps_itself(written.shape, written.stride()):
            raise RuntimeError(f"{caller}: {name}: {ITSELF}")
        known = Places(written, read.values())
    start = written.data_ptr()
    for (other, x), span in zip(read.items(), known.read, strict=True):
        if x is not None and known.written:
            apart = x.data_ptr() - start
            if apart < known.written and apart + span > 0 and (other, apart) not in known.apart:
                if not in_other_parts(written, x, apart) and torch.isin(_bytes(x), _bytes(written)).any():
                    raise RuntimeError(f"{caller}: {name} and {other}: {ANOTHER}")
                known.apart.add((other, apart))
    return known


def in_other_parts(one: Tensor, other: Tensor, apart: int) -> bool:
    """Whether two tensors, the other ``apart`` bytes after the one, lie in parts of pages of one size that do not meet.

    That is how engines keep all states of a request together. To look at every element of a pool would take minutes.
    """
    dims = [[(step * x.element_size(), size) for step, size in _dims(x) if step and size > 1] for x in (one, other)]
    for page in {step for each in dims for step, _ in each}:
        within = (_reach((step, size) for step, size in each if step % page) for each in dims)
        first, second = (reach + x.element_size() for reach, x in zip(within, (one, other), strict=True))
        if first <= apart % page <= page - second:
            return True
    return False


# torch's own words
ITSELF = (
    "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
    "Please clone() the tensor before performing the operation."
)
ANOTHER = (
    "unsupported operation: some elements of the input tensor and the written-to tensor refer to a single memory "
    "location. Please clone() the tensor before performing the operation."
)


def overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of a tensor are at the same place.

    Views of tensors nest: a step along one dim is longer than all that the dims of shorter steps reach. What does not,
    which takes ``as_strided``, is decided by looking at every element.
    """
    dims = sorted((step, size) for step, size in zip(strides, shape, strict=True) if size != 1)
    if any(size == 0 for _, size in dims):
        return False
    while dims and dims[-1][0] > _reach(dims[:-1]):
        dims.pop()
    if not dims:
        return False
    count = 1
    for _, size in dims:
        count *= size
    return dims[0][0] == 0 or count > _reach(dims) + 1 or _unique(_places(dims)).numel() < count


def _reach(dims: Iterable[tuple[int, int]]) -> int:
    """How far from the first element the last one is, of dims given as (stride, size)."""
    return sum(step * (size - 1) for step, size in dims)


def _places(dims: Iterable[tuple[int, int]]) -> Tensor:
    """Where each element is, in elements from the first."""
    places = torch.zeros(1, dtype=torch.int64)
    for step, size in dims:
        places = (places[:, None] + step * torch.arange(size)).flatten()
    return places


def _dims(x: Tensor) -> list[tuple[int, int]]:
    return list(zip(x.stride(), x.shape, strict=True))


def _span(x: Tensor) -> int:
    """How many bytes there are from a tensor's first element to the end of its last."""
    return (_reach(_dims(x)) + 1) * x.element_size() if x.numel() else 0


def _bytes(x: Tensor) -> Tensor:
    first = x.data_ptr() + x.element_size() * _unique(_places([dim for dim in _dims(x) if dim[0]]))
    return (first[:, None] + torch.arange(x.element_size())).flatten()


def _unique(x: Tensor) -> Tensor:
    different: Tensor = torch.unique(x)
    return different
