"""What a checkpoint of the published implementation needs built: the dims of its M2RNN blocks, and a spec of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .block_config import layer_arguments

CONFIG = "config.json"
M2RNN_BLOCK = "m2rnn"
SHORT_DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "BF16": "bf16", "F16": "fp16", "F32": "fp32"
}  # fmt: skip
"""Names of dtypes in specs, by those of configurations and of safetensors files."""
BITS = ("BF16", "F16", "F32")
MOST_STEPS = 4096
"""The longest workload that a spec is written with; tuning it takes seconds a trial already."""


class CheckpointError(ValueError):
    """A configuration that cannot be read, or asks for what is not supported; the message names the key."""


@dataclass(frozen=True)
class Dims:
    """Rows K and columns V of a state, and the heads of q, k, v, f and w, by which kernels are built."""

    state_expansion: int
    head_dim: int
    heads: tuple[int, int, int, int, int]


def arguments_of(block: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Return the layer's arguments that the M2RNN block of layer i gives; raises CheckpointError, naming the key."""
    try:
        return layer_arguments(block)
    except ValueError as error:
        reason = str(error).removeprefix("M2RNN: ")
        raise CheckpointError(f"{CONFIG}: $.sequence_mixer_blocks[{i}].{reason}") from None


def dims_of(block: Mapping[str, Any], i: int) -> Dims:
    """Return the dims of the M2RNN block of layer i; raises CheckpointError, naming the key."""
    given = arguments_of(block, i)
    q, k, v, f, w = (given["heads"][operand] for operand in "qkvfw")
    return Dims(given["state_expansion"], given["head_dim"], (q, k, v, f, w))


def m2rnn_blocks(config: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the M2RNN blocks of a configuration, each with the number of its layer."""
    blocks = config.get("sequence_mixer_blocks")
    if not isinstance(blocks, Sequence) or not all(isinstance(block, Mapping) for block in blocks):
        raise CheckpointError(f"{CONFIG}: $.sequence_mixer_blocks must be a list of mappings, got {blocks!r}")
    for i, block in enumerate(blocks):
        if block.get("sequence_mixer_type") == M2RNN_BLOCK:
            yield i, block


def spec_text(
    config: Mapping[str, Any],
    *,
    name: str = "checkpoint",
    targets: Sequence[str] = ("sm_90",),
    dtypes: Sequence[str] = ("bf16",),
) -> str:
    """Return the YAML of a spec with a layer for each set of dims that a configuration's M2RNN blocks have.

    Raises CheckpointError for a configuration without M2RNN blocks.
    """
    layers: dict[Dims, list[int]] = {}
    for i, block in m2rnn_blocks(config):
        layers.setdefault(dims_of(block, i), []).append(i)
    if not layers:
        raise CheckpointError(f"{CONFIG}: $.sequence_mixer_blocks must have a block of type {M2RNN_BLOCK}, got none")
    steps = _steps_of(config)
    lines = [
        f"# The M2RNN layers of {name}.", "",
        "schema: 1", f"name: {name}", f"targets: [{', '.join(targets)}]", "", "layers:",
    ]  # fmt: skip
    for number, (dims, users) in enumerate(layers.items()):
        heads = ", ".join(f"{operand}: {count}" for operand, count in zip("qkvfw", dims.heads, strict=True))
        lines += [
            f"  m2rnn{number or ''}:  # layers {', '.join(map(str, users))}",
            f"    head_dim: {dims.head_dim}",
            f"    state_expansion: {dims.state_expansion}",
            f"    heads: {{{heads}}}",
            f"    dtypes: [{', '.join(dtypes)}]",
            f"    workloads: [{{batch: 1, seq: {steps}}}]",
        ]
    lines += [
        "", "numerics:",
        "  clip: carry  # as published models were trained on GPUs",
        f"  tanh: {'exact' if 'fp32' in dtypes else 'approx'}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _steps_of(config: Mapping[str, Any]) -> int:
    """Return the length of a spec's workload: all positions of a model, or as many as are quickly tuned for."""
    positions = config.get("max_position_embeddings", MOST_STEPS)
    if type(positions) is not int or positions < 1:
        raise CheckpointError(f"{CONFIG}: $.max_position_embeddings must be a positive integer, got {positions!r}")
    return min(positions, MOST_STEPS)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration in a checkpoint's folder; raises CheckpointError for what is not one."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} must be a readable file ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(config).__name__}")
    return config


def dtype_of(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the dtype, as specs name it, that a checkpoint is loaded in: the configuration's, else its weights'."""
    told = config.get("dtype") or config.get("torch_dtype")
    if told is None:
        return next((SHORT_DTYPES[dtype] for dtype in _stored_dtypes(folder)), "bf16")
    if not isinstance(told, str) or told not in SHORT_DTYPES:
        raise CheckpointError(f"{folder / CONFIG}: $.dtype must be of {', '.join(SHORT_DTYPES)}, got {told!r}")
    return SHORT_DTYPES[told]


def _stored_dtypes(folder: Path) -> Iterator[str]:
    """Yield the dtypes of matrices in a folder's safetensors files; raises CheckpointError for a file that is none."""
    for path in sorted(folder.glob("*.safetensors")):
        yield from _dtypes_in(path)


def _dtypes_in(path: Path) -> list[str]:
    """Return the dtypes of a file's weights which are matrices and of a dtype that kernels have: norms may differ."""
    try:
        entries = [entry for name, entry in _header(path).items() if name.endswith("weight")]
        return [entry["dtype"] for entry in entries if entry["dtype"] in BITS and len(entry["shape"]) > 1]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} must be a safetensors file ({type(error).__name__}: {error})") from None


def _header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: after its length in 8 bytes, JSON."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"its header would have {length} bytes")
        header: dict[str, Any] = json.loads(file.read(length))
    return header
