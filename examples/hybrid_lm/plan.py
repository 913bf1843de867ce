"""What hybrids.yaml says, and the models that it describes: of one size, all have as many parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from corpus import Choice
from data import TOKENS
from decoder import Attention, Decoder, layer_of, package_of
from gated_delta import GatedDelta
from model import Config, load
from settings import check, merged, readable
from torch import nn

TOLERANCE = 0.01
"""Part by which parameters of two models of a size may differ."""


@dataclass(frozen=True)
class Delta:
    """Heads of Gated DeltaNet and their state."""

    heads: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Size:
    """Models of a size, of which ``variants`` are trained from each of ``seeds``; all variants if there are none.

    ``block`` is how many parameters a mixer and its MLP have together; ``delta`` names kinds of Gated DeltaNet.
    """

    layer: str
    width: int
    layers: int
    block: int
    heads: int
    delta: Mapping[str, Delta]
    seeds: tuple[int, ...]
    variants: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind of mixer."""
        return ("attention", "m2rnn", *self.delta)


@dataclass(frozen=True)
class Validation:
    """Bytes that are judged: at each point of the curve, and at the end."""

    curve: int
    final: int


@dataclass(frozen=True)
class Plan:
    """What hybrids.yaml says."""

    package: str
    dtype: str
    compile: tuple[str, ...]
    text: Choice
    seq: int
    batch: int
    steps: int
    warmup: int
    learning_rate: float
    weight_decay: float
    evaluate_every: int
    save_every: int
    validation: Validation
    variants: Mapping[str, tuple[str, ...]]
    compare: tuple[tuple[str, str], ...]
    sizes: Mapping[str, Size]

    def runs(self) -> list[Run]:
        """Return every run, the claim's first: seed by seed, size by size."""
        return [
            Run(self, name, variant, seed)
            for name, size in self.sizes.items()
            for seed in size.seeds
            for variant in size.variants or self.variants
        ]


@dataclass(frozen=True)
class Run:
    """One model to train."""

    plan: Plan
    size_name: str
    variant: str
    seed: int

    @property
    def size(self) -> Size:
        """The model's size."""
        return self.plan.sizes[self.size_name]

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        pattern = self.plan.variants[self.variant]
        return tuple(pattern[i % len(pattern)] for i in range(self.size.layers))

    @property
    def file_name(self) -> str:
        """Name the run in a folder."""
        words = f"{self.size_name} {self.variant} seed {self.seed}".replace("²", "2")
        return "".join(letter if letter.isalnum() else "_" for letter in words)

    @property
    def config(self) -> Config:
        """The config as a Trainer takes it."""
        plan, size = self.plan, self.size
        whole = load(Path(__file__).parent / "config.yaml", {})
        return replace(
            whole, package=plan.package, layer=size.layer, mixers=self.mixers, width=size.width, heads=size.heads,
            dtype=plan.dtype, compile=False, seq=plan.seq, batch=plan.batch, steps=plan.steps,
            warmup=plan.warmup, learning_rate=plan.learning_rate, weight_decay=plan.weight_decay, seed=self.seed,
        )  # fmt: skip

    def model(self, _: Config | None = None) -> Decoder:
        """Return the model, with parameters drawn from torch's generator."""
        hidden = hidden_of(self)
        mixers = [mixer_of(kind, self) for kind in self.mixers]
        model = Decoder(mixers, self.size.width, TOKENS, TOKENS, [hidden[kind] for kind in self.mixers])
        for kind, block in zip(self.mixers, model.blocks, strict=True):
            if kind in self.plan.compile:
                block.compile(fullgraph=True, dynamic=False)
        return model


def mixer_of(kind: str, run: Run) -> nn.Module:
    """Return a mixer of one of the size's kinds."""
    size = run.size
    if kind == "attention":
        return Attention(size.width, size.heads)
    if delta := size.delta.get(kind):
        return GatedDelta(size.width, delta.heads, delta.rows, delta.columns)
    layer: nn.Module = layer_of(package_of(run.plan.package), size.layer, size.width)
    return layer


def parameters_of(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def hidden_of(run: Run) -> dict[str, int]:
    """Return the width, a multiple of 8, of the MLP beside each kind of mixer, with which blocks are equally large."""
    with torch.device("meta"):
        counts = {kind: parameters_of(mixer_of(kind, run)) for kind in run.size.kinds}
    hidden = {kind: 8 * round((run.size.block - count) / (16 * run.size.width)) for kind, count in counts.items()}
    if min(hidden.values()) < 1:
        raise SystemExit(f"{run.size_name}: block must be more than its mixers' parameters, got {run.size.block}")
    return hidden


def state_of(kind: str, run: Run) -> int:
    """Return the elements that a layer keeps of a sequence; for attention those of ``seq`` tokens."""
    if kind == "attention":
        return 2 * run.size.width * run.plan.seq
    with torch.device("meta"):
        layer: Any = mixer_of(kind, run)
    return int(
        layer.state_size if kind in run.size.delta else layer.total_heads * layer.state_expansion * layer.head_dim
    )


def check_equal(plan: Plan) -> None:
    """End the program unless the models of each size have as many parameters, up to ``TOLERANCE``."""
    for name in plan.sizes:
        with torch.device("meta"):
            counts = {run.variant: parameters_of(run.model()) for run in plan.runs() if run.size_name == name}
        if max(counts.values()) > (1 + TOLERANCE) * min(counts.values()):
            raise SystemExit(f"models of {name} must have as many parameters, got {counts}")


def load_plan(path: Path, changes: Mapping[str, Any]) -> Plan:
    """Read a plan and change some of its values; what is missing, unknown or of no sense ends the program."""
    values = merged(path, changes, {field.name for field in fields(Plan)})
    with readable(path):
        variants = {name: tuple(mixers) for name, mixers in values["variants"].items()}
        sizes = {name: _size(size) for name, size in values["sizes"].items()}
        plan = Plan(**values | {
            "compile": tuple(values["compile"]), "text": Choice(**_tuples(values["text"])), "variants": variants,
            "validation": Validation(**values["validation"]), "compare": tuple(map(tuple, values["compare"])),
            "sizes": sizes,
        })  # fmt: skip
    check(path, plan, free=("seeds", "warmup"), empty=("compile", "roots", "variants", "compare"))
    _check_names(path, plan)
    return plan


def _check_names(path: Path, plan: Plan) -> None:
    """End the program where a size or a comparison names a variant, or a variant a mixer, that is none."""
    named = {name for size in plan.sizes.values() for name in size.variants} | {
        x for pair in plan.compare for x in pair
    }
    unknown = sorted(named - plan.variants.keys())
    if unknown:
        raise SystemExit(f"{path}: sizes and compare must name variants, got {', '.join(unknown)}")
    for name, size in plan.sizes.items():
        for variant in size.variants or plan.variants:
            mixers = plan.variants[variant]
            if not mixers or set(mixers) - set(size.kinds):
                kinds = ", ".join(size.kinds)
                raise SystemExit(f"{path}: $.variants.{variant} must be of {kinds} at {name}, got {list(mixers)}")


def _size(values: dict[str, Any]) -> Size:
    return Size(**_tuples(values) | {"delta": {kind: Delta(**delta) for kind, delta in values["delta"].items()}})


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}
