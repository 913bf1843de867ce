"""Check every output and gradient of an implementation against float64 before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from m2gen.bench.entries import Entry, Implementation
from m2gen.bench.kinds import Call, Kind
from m2gen.bench.operators import Stepper, sequence_operator, stepper
from m2gen.bench.serving import Drafting, DraftSlots, drafting, pooled, prompts
from m2gen.db import Failure
from m2gen.measure.checks import STEPS, SeededCase, check, seeded_cases
from m2gen.problem import Inputs, Problem, packed_problem
from m2gen.variant import Variant
from m2gen.verify import Case, Loss, Oracle, TensorResult, differentiate, judge
from m2gen.verify.oracle import gate_of
from m2gen.verify.subject import poisoned

TOKENS = 4
"""Number of tokens, one after the other, on which decoding is judged."""
SEED = 200


def failure_of(entry: Entry, device: torch.device) -> Failure | None:
    """Return why an entry must not be timed, or None; computed once for all workloads with the same question."""
    return _failure(entry.implementation, entry.workload.variant, _cases(entry), device, entry.workload.call)


def _cases(entry: Entry) -> tuple[SeededCase, ...]:
    """Return the cases of an entry: those of tuning, for others than generated operators the dense ones.

    A peer that is timed on packed sequences is asked some, from zeros as they are timed. ``torch.compile`` unrolls a
    sequence, so its case has the size that is timed; calls of engines have their own batch.
    """
    workload = entry.timed
    if workload.call.prefills:
        return _prompt_cases(workload.batch)
    if workload.call.decodes:
        problem = Problem(workload.batch, 2 * workload.seq if workload.call.drafts else TOKENS, initial_state=True)
        case = Case("decoding", problem, Loss.Y, narrow_state=workload.call.narrow_state)
        return (SeededCase(case, SEED),)
    if entry.implementation.kind is Kind.COMPILED:
        problem = Problem(workload.batch, workload.seq)
        return (SeededCase(Case("plain_clipped", problem, Loss.Y, dy_scale=3.0), SEED + 1),)
    asked = seeded_cases(workload.variant, STEPS)
    if entry.implementation.kind.generated:
        return asked
    packed = SeededCase(Case("packed", Problem(0, 0, lengths=(5, 3 * STEPS - 1, 17)), Loss.Y), SEED + 2)
    dense = tuple(each for each in asked if each.case.problem.lengths is None)
    return (*dense, packed) if workload.packed else dense


def _prompt_cases(batch: int) -> tuple[SeededCase, ...]:
    """Return short prompts of the batch that is timed, from states, and prompts of any length from zeros."""
    short = replace(packed_problem(batch, 2 * TOKENS), initial_state=True)
    fresh = Problem(0, 0, lengths=(0, 5, 3 * STEPS - 1))  # of which the mean is more than a segment
    return (SeededCase(Case("prompts", short, Loss.Y), SEED), SeededCase(Case("new_prompts", fresh, Loss.Y), SEED + 1))


@lru_cache(maxsize=256)
def _failure(
    implementation: Implementation,
    variant: Variant,
    asked: tuple[SeededCase, ...],
    device: torch.device,
    call: Call,
) -> Failure | None:
    def judged(case: Case, inputs: Inputs, known: Oracle) -> tuple[TensorResult, ...]:
        with poisoned() if implementation.kind.generated else nullcontext():
            given = _results(implementation, variant, case, inputs, call)
        return judge(given, known)

    return check(variant, asked, judged, device).failure


def _results(
    implementation: Implementation, variant: Variant, case: Case, inputs: Inputs, call: Call
) -> Mapping[str, Tensor]:
    if call.prefills:
        run, where = prompts(sequence_operator(implementation, variant), inputs, call)
        with torch.no_grad():
            y, states = run()
        return {"y": y, "state": states[where]}
    if call.drafts:
        return _speculated(drafting(implementation, variant, call), inputs)
    if call.decodes:
        return _decoded(stepper(implementation, variant), inputs, case, call.pooled)
    return differentiate(sequence_operator(implementation, variant), inputs, case)


def _decoded(step: Stepper, inputs: Inputs, case: Case, in_slots: bool) -> Mapping[str, Tensor]:
    """Return y of every token, one step after the other, and the state after the last."""
    options: dict[str, Tensor] = dict(gate_of(inputs))
    assert inputs.initial_state is not None
    state = inputs.initial_state.to(torch.bfloat16 if case.narrow_state else torch.float32, copy=True)
    if in_slots:
        state, table = pooled(state)
        options["indices"] = table[:, 0]
    outputs = []
    with torch.no_grad():
        for t in range(inputs.q.shape[1]):
            token = [x[:, t] for x in (inputs.q, inputs.k, inputs.v)]
            y, state = step(*token, inputs.weight, inputs.forget[:, t], state, **options)
            outputs.append(y)
    if in_slots:
        state = state[options["indices"].long()]
    return {"y": torch.stack(outputs, 1), "state": state}


def _speculated(made: Callable[[Inputs, DraftSlots], Drafting], inputs: Inputs) -> Mapping[str, Tensor]:
    """Return y of every token and the last states, of requests that accept other numbers of drafts in every call.

    Half as many tokens as there are make one call. A request that is through is skipped until all are.
    """
    assert inputs.initial_state is not None
    batch, seq = inputs.q.shape[:2]
    device, generator = inputs.q.device, torch.Generator().manual_seed(0)
    pool, table = pooled(inputs.initial_state, seq // 2)
    requests, ahead = torch.arange(batch, device=device)[:, None], torch.arange(seq // 2, device=device)
    at = torch.zeros(batch, dtype=torch.int64, device=device)
    accepted = last = torch.ones_like(at)
    y = inputs.v.new_full((batch, seq, *inputs.dy.shape[-2:]), torch.nan)
    while bool((at < seq).any()):
        places = at[:, None] + ahead
        there, rows = places < seq, places.clamp(max=seq - 1)
        own = {name: getattr(inputs, name)[requests, rows] for name in ("q", "k", "v", "forget")}
        with torch.no_grad():
            found = torch.stack([*made(replace(inputs, **own), DraftSlots(pool, table, accepted.int()))()], 1)
        y[requests.expand_as(rows)[there], rows[there]] = found[there]
        drawn = torch.randint(1, seq // 2 + 1, (batch,), generator=generator).to(device)
        counted = torch.minimum(drawn, seq - at)
        at = at + counted
        last = torch.where(counted > 0, counted, last)
        accepted = counted.masked_fill(at == seq, 0)
    return {"y": y, "state": pool[table.gather(1, last[:, None] - 1)[:, 0].long()]}
