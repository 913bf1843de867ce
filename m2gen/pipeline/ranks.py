"""Check and time a spec's layers over several ranks of this host."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from m2gen.bench.ranks.entries import PAIR, RankCase, RankDocument, RankJob, Shape, read, write
from m2gen.bench.ranks.kinds import Form
from m2gen.bench.ranks.launch import CPU, run_ranks, worker_command
from m2gen.cache import materialise
from m2gen.db import Record
from m2gen.db.choice import choose
from m2gen.errors import UsageError
from m2gen.pipeline.plan import Plan, Progress, relevant, render
from m2gen.spec import Dtype, Heads
from m2gen.variant import BuiltVariant, Variant

WIDTHS = {"m2rnn_7b": 1536, "m2rnn_410m": 1024}
"""Hidden sizes of the published models, whose recurrences specs have; of others it is N V."""
NARROW = 32
"""Hidden size on CPUs."""
HEADS_SIZE, TOKENS_SIZE = (8, 4096), (8, 8192)
"""Sequences and their tokens by what lies over ranks."""
REPEATS, CPU_REPEATS = 20, 3
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True)
class RanksRequest:
    """The layers and sizes to run over ranks."""

    ranks: int
    layers: tuple[str, ...] = ()
    """Names of layers; if empty, those of published models, or all if the spec has none."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Sequences and their tokens, for every form; if empty, what the forms are meant for."""
    seed: int = 0
    forms: tuple[Form, ...] = tuple(Form)
    """Forms to run, each beside one rank."""


def has_gpus(ranks: int) -> bool:
    """Return whether ranks can be GPUs, or must be CPUs; raises UsageError for some GPUs, but too few."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < count < ranks:
        raise UsageError(f"--gpus must be at most the {count} that torch sees, got {ranks}")
    return count > 0


def ranks_job(planned: Plan, request: RanksRequest, records: Sequence[Record], *, cuda: bool) -> RankJob:
    """Return what ranks are to do, with the package of the layers and of their shares; raises UsageError."""
    if request.ranks < 2:
        raise UsageError(f"--gpus must be at least 2, got {request.ranks}")
    shapes, variants = [], []
    for name, variant in _chosen(planned, request.layers).items():
        heads = dict(zip("qkvfw", variant.heads.counts, strict=True)) | {"g": variant.total_heads}
        width = WIDTHS.get(name, variant.total_heads * variant.head_dim) if cuda else NARROW
        dtype = variant.dtype if cuda else Dtype.FP32
        shape = Shape(name, width, variant.state_expansion, variant.head_dim, heads, dtype)
        shapes.append(shape)
        variants += [BuiltVariant(each, (name,)) for each in dict.fromkeys(_shares(variant, request.ranks))]
    known = (*relevant(records, variants),)
    devices = dict.fromkeys(choice.device for choice in planned.choices)
    chosen = (c for d in devices for v in variants for c in choose(v, d, planned.spec.tuning.objective, known))
    package = materialise(f"packages/{planned.origin.name}", render(replace(planned, choices=tuple(chosen))).files)
    cases = tuple(case for shape in shapes for case in _cases(shape, request, cuda=cuda))
    return RankJob(str(package), cases, request.ranks, cuda, REPEATS if cuda else CPU_REPEATS, request.seed)


def over_ranks(job: RankJob, progress: Progress) -> Iterator[RankDocument]:
    """Yield the results so far whenever there are more; raises RanksError once a rank fails, dies or hangs."""
    environment = LOOPBACK if job.cuda else {**LOOPBACK, **CPU}
    with tempfile.TemporaryDirectory(prefix="m2gen-ranks-") as name:
        folder = Path(name)
        write(folder / "job.json", job)
        commands = [worker_command(folder, rank) for rank in range(job.ranks)]
        progress.start("ranks", len(job.cases))
        known = 0
        try:
            for _ in chain(run_ranks(commands, folder, environment), (None,)):
                document = _results(folder)
                if document is not None and len(document.rows) > known:
                    for row in document.rows[known:]:
                        progress.advance(f"{row.layer} {row.form} B{row.batch} S{row.seq}")
                    known = len(document.rows)
                    yield document
        finally:
            progress.finish()


def _results(folder: Path) -> RankDocument | None:
    path = folder / "results.json"
    return read(path, RankDocument) if path.is_file() else None


def _chosen(planned: Plan, names: Sequence[str]) -> dict[str, Variant]:
    """Return one variant of each layer: the first in bf16, or of any dtype where there is none."""
    layers = planned.layers(names)
    if not names:
        layers = {name: layer for name, layer in layers.items() if name in WIDTHS} or layers
    found: dict[str, Variant] = {}
    for built in sorted(planned.variants, key=lambda each: each.variant.dtype is not Dtype.BF16):
        for name in built.layers:
            if name in layers:
                found.setdefault(name, built.variant)
    return {name: found[name] for name in layers}


def _shares(variant: Variant, ranks: int) -> Iterator[Variant]:
    """Yield a variant and what ranks, or pairs of them, have of its heads, where heads can be shared out."""
    for count in (1, PAIR, ranks):
        fits = all(n % count == 0 or count % n == 0 for n in variant.heads.counts)
        if fits and variant.total_heads % count == 0:
            names = ("q", "k", "v", "f", "w")
            heads = {name: max(n // count, 1) for name, n in zip(names, variant.heads.counts, strict=True)}
            yield replace(variant, heads=Heads(**heads))


def _cases(shape: Shape, request: RanksRequest, *, cuda: bool) -> Iterator[RankCase]:
    """Yield the forms of a layer at each size, after one rank doing the same work."""
    heads = (Form.HEADS, Form.HEADS_TOKENS)
    tokens = (Form.EXCHANGE, Form.PIPELINE, *([Form.BOTH] if request.ranks > PAIR else []))
    planned: list[tuple[tuple[int, int], tuple[Form, ...]]]
    if request.sizes:
        planned = [(size, (*heads, *tokens)) for size in request.sizes]
    elif cuda:
        planned = [(HEADS_SIZE, heads), (TOKENS_SIZE, tokens)]
    else:
        planned = [((2, 2 * request.ranks), (*heads, *tokens))]
    for (batch, seq), forms in planned:
        asked = [form for form in forms if form in request.forms]
        yield from (RankCase(shape, form, batch, seq) for form in (Form.ONE, *asked) if asked)
