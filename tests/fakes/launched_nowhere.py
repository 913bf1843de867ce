"""Calls of a package on CPU tensors whose launches go as on a GPU, up to a driver that loads and launches nothing.

Run as ``launched_nowhere.py FOLDER NAME CALLS`` it makes the calls and prints, as JSON, the kernels that Triton
compiled and those that it found in its cache; CALLS is the JSON of [use, operands, offsets, steps] lists.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

ARCH, TARGET, SMS = "sm_90", GPUTarget("cuda", 90, 32), 132


class Driver:
    """A driver of Triton that takes every kernel and runs none."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda name, binary, shared, device: (object(), 1, 32, 0, 1024),
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def opened(folder: str, name: str) -> Any:
    """Import a package and have its operators take CPU tensors as those of a GPU."""
    sys.path.insert(0, folder)
    package = importlib.import_module(name)
    served = importlib.import_module(f"{name}.library").OPERATORS
    vars(served.launches.dispatch)["device_of"] = lambda device: (ARCH, SMS)
    approximates = importlib.import_module(f"{name}.built").APPROXIMATE
    vars(served.launches.dispatch)["approximates"] = lambda device: approximates
    triton.runtime.driver.set_active(Driver())
    return package


def offsets_of(dtype: str, tokens: int) -> torch.Tensor | None:
    return torch.tensor([0, tokens // 3, tokens], dtype=getattr(torch, dtype)) if dtype else None


def layer_call(package: Any, built: Any, use: str, parameters: str, offsets: str, steps: int) -> None:
    """Call the layer of every variant as a model does."""
    for rows, cols, heads, dtype, _ in built.VARIANTS:
        groups = dict(zip("qkvfw", heads, strict=True))
        layer = package.M2RNN(48, rows, cols, groups, dtype=dtype)
        if parameters == "autocast":
            layer.float()
        lead, cu_seqlens = ((2 * steps,), offsets_of(offsets, 2 * steps)) if offsets else ((2, steps), None)
        with torch.autocast("cpu", dtype, enabled=parameters == "autocast"):
            x = torch.zeros(*lead, 48, dtype=torch.float32 if parameters == "autocast" else dtype)
            if use == "train":
                layer(x, cu_seqlens=cu_seqlens).float().square().sum().backward()
                continue
            with torch.no_grad():
                cache = layer.allocate_cache(2, dtype=dtype)
                if use == "decode":
                    layer(x[:, :1], cache)
                else:
                    layer(x, cu_seqlens=cu_seqlens)
                    layer(x, cache, cu_seqlens=cu_seqlens)


def operator_call(package: Any, built: Any, use: str, offsets: str, steps: int) -> None:
    """Call the operator of every variant on contiguous tensors."""
    for rows, cols, (q, k, v, f, w), dtype, gate in built.VARIANTS:
        lead, cu_seqlens = ((2 * steps,), offsets_of(offsets, 2 * steps)) if offsets else ((2, steps), None)
        lead = (2,) if use == "decode" else lead
        shapes = {"q": (*lead, q, rows), "k": (*lead, k, rows), "v": (*lead, v, cols), "weight": (w, cols, cols)}
        tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
        tensors["forget"] = torch.zeros(*lead, f, dtype=dtype)
        if gate:
            tensors |= {"A_log": torch.zeros(f), "dt_bias": torch.zeros(f)}
        if use == "decode":
            package.m2rnn_step(**tensors, state=torch.zeros(2, max(q, k, v, f, w), rows, cols))
            continue
        state = torch.zeros(2, max(q, k, v, f, w), rows, cols)
        if use == "infer":
            package.m2rnn(**tensors, cu_seqlens=cu_seqlens)
            package.m2rnn(**tensors, initial_state=state, cu_seqlens=cu_seqlens)
            continue
        for x in tensors.values():
            x.requires_grad_()
        if use == "train":
            package.m2rnn(**tensors, cu_seqlens=cu_seqlens)[0].float().square().sum().backward()
        else:
            y, last = package.m2rnn(**tensors, initial_state=state.requires_grad_(), cu_seqlens=cu_seqlens)
            (y.float().square().sum() + last.sum()).backward()


def main(folder: str, name: str, calls: str) -> None:
    package = opened(folder, name)
    built = importlib.import_module(f"{name}.built")
    kernels: dict[bool, list[str]] = {True: [], False: []}

    def listen(*, metadata: Any, cache_hit: bool, **_: Any) -> None:
        kernels[cache_hit].append(metadata["name"])

    triton.knobs.compilation.listener = listen
    for use, operands, offsets, steps in json.loads(calls):
        if operands == "operator":
            operator_call(package, built, use, offsets, steps)
        else:
            layer_call(package, built, use, operands, offsets, steps)
    place = str(Path(package.__file__).parent)
    print(json.dumps({"found": kernels[True], "compiled": kernels[False], "package": place}))


if __name__ == "__main__":
    main(*sys.argv[1:])
