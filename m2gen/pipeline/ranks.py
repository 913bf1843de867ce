"""Check and time a spec's layers over several ranks of this host."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from m2gen.bench.ranks.entries import (
    HYBRID,
    PAIR,
    QUIET_SECONDS,
    RankCase,
    RankDocument,
    RankJob,
    Shape,
    read,
    write,
)
from m2gen.bench.ranks.kinds import Form
from m2gen.bench.ranks.launch import CPU, LOOPBACK, run_ranks, worker_command
from m2gen.cache import materialise
from m2gen.db import Record
from m2gen.db.choice import choose
from m2gen.errors import RanksError, UsageError
from m2gen.measure import lock
from m2gen.measure.context import gpu_name
from m2gen.pipeline.plan import Plan, Progress, relevant, render
from m2gen.spec import Dtype, Heads
from m2gen.variant import BuiltVariant, Variant

NARROW = 32
"""Hidden size on CPUs."""
HEADS_SIZE, TOKENS_SIZE = (8, 4096), (8, 8192)
"""Sequences and their tokens by what lies over ranks."""
LENGTHS = (16384, 65536, 262144)
"""Tokens of one long sequence."""
HYBRID_SIZE = (8, 4096)
"""Sequences of each rank of a hybrid model, and their tokens."""
REPEATS, CPU_REPEATS = 20, 3
RANK_BYTES = 2**29
"""Memory of a rank on CPUs: what torch takes, and a layer of a few heads."""
QUIET_SECONDS_A_CPU = 30.0
"""Longest between two results for each of many CPUs: they share the cores of a host."""
EVERY_FORM = tuple(Form)


@dataclass(frozen=True)
class RanksRequest:
    """The layers and sizes to run over ranks."""

    ranks: int
    layers: tuple[str, ...] = ()
    """Names of layers; if empty, those of published models, or all if the spec has none."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Sequences and their tokens, for every form; of hybrid models, the sequences of each rank."""
    lengths: tuple[int, ...] = ()
    """Tokens of one sequence, for the forms that exchange tokens; without these and sizes, what forms are meant for."""
    seed: int = 0
    forms: tuple[Form, ...] = EVERY_FORM
    """Forms to run, each beside one rank."""


def has_gpus(ranks: int) -> bool:
    """Return whether ranks can be GPUs, or must be CPUs; raises UsageError for too few GPUs, or too little memory."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < count < ranks:
        raise UsageError(f"--gpus must be at most the {count} that torch sees, got {ranks}")
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // RANK_BYTES
    if not count and ranks > most:
        size = f"whose memory holds as many ranks of {RANK_BYTES / 2**30:g} GiB"
        raise UsageError(f"--gpus must be at most {most} on the CPUs of this host, {size}, got {ranks}")
    return count > 0


def ranks_job(planned: Plan, request: RanksRequest, records: Sequence[Record], *, cuda: bool) -> RankJob:
    """Return what ranks are to do, with the package of the layers and of their shares; raises UsageError."""
    variants = [
        BuiltVariant(each, (name,))
        for name, (variant, _) in fitted_layers(planned, request).items()
        for each in dict.fromkeys(_shares(variant, request.ranks))
    ]
    known = (*relevant(records, variants),)
    devices = dict.fromkeys(choice.device for choice in planned.choices)
    chosen = (c for d in devices for v in variants for c in choose(v, d, planned.spec.tuning.objective, known))
    package = materialise(f"packages/{planned.origin.name}", render(replace(planned, choices=tuple(chosen))).files)
    cases, repeats = ranks_cases(planned, request, cuda=cuda), REPEATS if cuda else CPU_REPEATS
    quiet = QUIET_SECONDS if cuda else max(QUIET_SECONDS, QUIET_SECONDS_A_CPU * request.ranks)
    return RankJob(str(package), cases, request.ranks, cuda, repeats, request.seed, quiet)


def ranks_cases(planned: Plan, request: RanksRequest, *, cuda: bool) -> tuple[RankCase, ...]:
    """Return the forms of layers, and of a hybrid of the narrowest, in the order in which they run."""
    if request.ranks < 2:
        raise UsageError(f"--gpus must be at least 2, got {request.ranks}")
    shapes = [
        _shape(name, variant, width if cuda else NARROW, variant.dtype if cuda else Dtype.FP32)
        for name, (variant, width) in fitted_layers(planned, request).items()
    ]
    cases = [case for shape in shapes for case in _cases(shape, request, cuda=cuda)]
    if shapes and Form.FSDP in request.forms and (request.sizes or not request.lengths):
        cases += _hybrid_cases(min(shapes, key=lambda shape: shape.hidden_size), request, cuda=cuda)
    if not cases and request.forms != EVERY_FORM:
        known = dict.fromkeys(case.form for case in ranks_cases(planned, replace(request, forms=EVERY_FORM), cuda=cuda))
        names = ", ".join(form for form in known if form is not Form.ONE)
        asked = ", ".join(request.forms)
        raise UsageError(f"--form must be among {names} for {request.ranks} ranks and these sizes, got {asked}")
    return tuple(cases)


def _shape(name: str, variant: Variant, width: int, dtype: Dtype) -> Shape:
    heads = dict(zip("qkvfw", variant.heads.counts, strict=True)) | {"g": variant.total_heads}
    return Shape(name, width, variant.state_expansion, variant.head_dim, heads, dtype)


def over_ranks(job: RankJob, progress: Progress) -> Iterator[RankDocument]:
    """Yield the results so far whenever there are more; raises RanksError once a rank fails, dies or hangs."""
    environment = LOOPBACK if job.cuda else {**LOOPBACK, **CPU}
    with ExitStack() as held, tempfile.TemporaryDirectory(prefix="m2gen-ranks-") as name:
        for gpu in sorted(map(gpu_name, range(job.ranks))) if job.cuda else ():
            held.enter_context(lock.exclusive(gpu))
        folder = Path(name)
        write(folder / "job.json", job)
        commands = [worker_command(folder, rank) for rank in range(job.ranks)]
        progress.start("ranks", len(job.cases))
        known = 0
        try:
            for _ in _and_once_more(run_ranks(commands, folder, environment, job.quiet_seconds)):
                document = _results(folder)
                if document is not None and len(document.rows) > known:
                    for row in document.rows[known:]:
                        progress.advance(f"{row.layer} {row.form} B{row.batch} S{row.seq}")
                    known = len(document.rows)
                    yield document
        finally:
            progress.finish()


def _and_once_more(steps: Iterator[None]) -> Iterator[None]:
    """Yield for each step, and after the last also where that raises, for what was written since."""
    try:
        yield from steps
    except RanksError:
        yield
        raise
    yield


def _results(folder: Path) -> RankDocument | None:
    path = folder / "results.json"
    return read(path, RankDocument) if path.is_file() else None


def fitted_layers(planned: Plan, request: RanksRequest) -> dict[str, tuple[Variant, int]]:
    """Return one variant of each layer, whose heads fit the ranks, and its model's width.

    The variant is the first in bf16, or of any dtype where there is none; its width is N V where the spec has none.
    """
    layers = planned.layers(request.layers)
    if not request.layers:
        layers = {name: layer for name, layer in layers.items() if layer.hidden is not None} or layers
    built: dict[str, Variant] = {}
    for each in sorted(planned.variants, key=lambda each: each.variant.dtype is not Dtype.BF16):
        for name in each.layers:
            built.setdefault(name, each.variant)
    found: dict[str, tuple[Variant, int]] = {}
    for name, layer in layers.items():
        whole = built[name]
        variant = fitting(whole, request.ranks)
        label = name if variant is whole else f"{name}_{variant.total_heads}_heads"
        found[label] = variant, layer.hidden or whole.total_heads * whole.head_dim
    return found


def fitting(variant: Variant, ranks: int) -> Variant:
    """Return a variant with as many heads more as ranks need to share them out; itself where that does not help."""
    if variant.total_heads % ranks == 0 and all(n % ranks == 0 or ranks % n == 0 for n in variant.heads.counts):
        return variant
    counts = [n if n < variant.total_heads and ranks % n == 0 else -(-n // ranks) * ranks for n in variant.heads.counts]
    if any(max(counts) % n for n in counts):
        return variant
    return replace(variant, heads=Heads(**dict(zip(("q", "k", "v", "f", "w"), counts, strict=True))))


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
    heads, handed = (Form.HEADS, Form.HEADS_TOKENS), (Form.PIPELINE,)
    exchanged = (Form.EXCHANGE, *([Form.MESH] if request.ranks > PAIR else []))
    planned: list[tuple[tuple[int, int], tuple[Form, ...]]]
    planned = [(size, (*heads, *exchanged, *handed)) for size in request.sizes]
    planned += [((1, length), exchanged) for length in request.lengths]
    if not planned and cuda:
        planned = [(HEADS_SIZE, heads), (TOKENS_SIZE, (*exchanged, *handed))]
        planned += [((1, length), exchanged) for length in LENGTHS]
    elif not planned:
        planned = [((2, 2 * request.ranks), (*heads, *exchanged, *handed))]
    for (batch, seq), forms in planned:
        asked = [form for form in forms if form in request.forms]
        yield from (RankCase(shape, form, batch, seq) for form in (Form.ONE, *asked) if asked)


def _hybrid_cases(shape: Shape, request: RanksRequest, *, cuda: bool) -> Iterator[RankCase]:
    """Yield a hybrid model of a layer on one rank, and on all with as many sequences for each."""
    model = replace(shape, name=f"{shape.name}_hybrid", blocks=HYBRID)
    for batch, seq in request.sizes or [HYBRID_SIZE if cuda else (1, 8)]:
        yield RankCase(model, Form.ONE, batch, seq)
        yield RankCase(model, Form.FSDP, batch * request.ranks, seq)
