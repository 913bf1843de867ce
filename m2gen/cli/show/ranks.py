"""Print the results of ``m2gen bench --gpus``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m2gen.bench.ranks.entries import PAIR, RankCase, RankDocument, RankRow, one_of
from m2gen.bench.ranks.kinds import Form
from m2gen.bench.ranks.model import predicted_ms
from m2gen.cli.show.bench import ms_text
from m2gen.cli.show.report import Display, print_json, write_json
from m2gen.cli.show.table import Table, print_tables

COLUMNS = ("layer", "forward ms", "step ms", "captured ms", "efficiency", "recurrence ms", "communication", "sent GB",
           "predicted ms", "off", "peak GB", "worst error")  # fmt: skip
NAMES = {
    Form.ONE: "one rank",
    Form.HEADS: "heads",
    Form.HEADS_TOKENS: "heads, tokens outside",
    Form.EXCHANGE: "tokens, exchanged",
    Form.PIPELINE: "tokens, handed on",
    Form.MESH: "mesh",
    Form.FSDP: "FSDP",
}


def run_ranks(documents: Iterable[RankDocument], display: Display, out: Path | None = None) -> int:
    """Show the last document, also after an interruption; return 1 if any result is wrong.

    ``out`` has what is known whenever there is more of it.
    """
    document: RankDocument | None = None
    try:
        for document in documents:
            if out is not None:
                write_json(dumped(document), out)
    finally:
        if document is not None:
            show_ranks(document, display)
    return 1 if document is None or any(row.failure for row in document.rows) else 0


def show_ranks(document: RankDocument, display: Display) -> None:
    """Print every form beside one rank doing the same work."""
    if display.as_json:
        print_json(dumped(document))
    else:
        print_tables(tables(document))


def dumped(document: RankDocument) -> dict[str, Any]:
    """Return the values of a document, and beside each row's what they say of one rank and of the model."""
    rows = [{**asdict(row), **compared(row, case, document)} for row, case in _cases(document)]
    return {**asdict(document), "rows": rows}


def compared(row: RankRow, case: RankCase, document: RankDocument) -> dict[str, float | None]:
    """Return a step's efficiency against one rank, its communication's part, and what the model predicts.

    Efficiency is what each of the ranks does in a second as a part of what one rank by itself does.
    """
    one = one_of(row, document.rows)
    fused = document.environment is not None  # CPUs run the reference
    predicted = predicted_ms(case, row, one, document.link, fused=fused) if one is not None else None
    return {
        "efficiency": None if one is None or row.form is Form.ONE else _efficiency(row, one),
        "communication": row.communication_ms / row.device_ms if row.communication_ms and row.device_ms else None,
        "predicted_ms": predicted,
        "predicted_off": predicted / row.device_ms - 1 if predicted and row.device_ms else None,
    }


def _efficiency(row: RankRow, one: RankRow) -> float | None:
    """Return what a rank does in a second as a part of what one alone does: both as graphs, or both called by hosts."""
    captured = row.captured_ms is not None and one.captured_ms is not None
    here, alone = (row.captured_ms, one.captured_ms) if captured else (row.step_ms, one.step_ms)
    return alone * row.batch / (one.batch * row.ranks * here) if here and alone else None


def tables(document: RankDocument) -> Iterator[Table]:
    """Yield the table of times, and that of forms that have none."""
    there = document.environment.device if document.environment is not None else "CPU"
    rows: list[Any] = []
    before, ranks = None, max((row.ranks for row in document.rows), default=0)
    for row, case in _cases(document):
        if row.failure or row.unfit:
            continue
        batch = f"B{row.batch // row.ranks} a rank" if case.shape.blocks else f"B{row.batch}"
        size = f"{row.layer} {case.shape.dtype}, hidden {case.shape.hidden_size}, {batch} S{row.seq}"
        rows += [size] if size != before else []
        rows.append(_cells(row, compared(row, case, document)))
        before = size
    link = document.link
    notes = [
        "step: forward and backward, with the sums of gradients that ranks share; medians of the slowest rank",
        "captured: a step as a CUDA graph, which waits for no host; what follows is of that, where there is one",
        "recurrence: of one rank's heads and tokens, alone; communication: a step's collectives alone, as its part",
        f"link: {link.gb_per_s:.3g} GB/s a rank, {1e3 * link.latency_ms:.3g} µs a collective",
        "worst error: of outputs and gradients against float64, as a part of its budget",
    ]
    reasons = dict.fromkeys((NAMES[row.form], row.uncaptured) for row in document.rows if row.uncaptured)
    notes += [f"{name} is not captured: {why}" for name, why in reasons]
    yield Table(f"{ranks} ranks over {document.backend} on {there}", COLUMNS, rows, notes)
    if failed := [row for row in document.rows if row.failure or row.unfit]:
        cells = [(row.layer, NAMES[row.form], f"B{row.batch} S{row.seq}", row.failure or row.unfit) for row in failed]
        yield Table("Without times", ("layer", "form", "size", "why"), cells)


def _cells(row: RankRow, found: dict[str, float | None]) -> tuple[str, ...]:
    mesh = f" {row.ranks // PAIR} x {PAIR}" if row.form is Form.MESH else ""
    return (
        NAMES[row.form] + mesh,
        _ms(row.forward_ms),
        _ms(row.step_ms),
        _ms(row.captured_ms),
        _part(found["efficiency"], ".0%"),
        _ms(row.recurrence_ms),
        _part(found["communication"], ".0%"),
        f"{row.sent_bytes / 1e9:.3f}" if row.sent_bytes else "",
        _ms(found["predicted_ms"]),
        _part(found["predicted_off"], "+.0%"),
        f"{row.peak_bytes / 1e9:.2f}" if row.peak_bytes else "",
        "" if row.worst is None else f"{row.worst:.2f} {row.worst_tensor}",
    )


def _ms(value: float | None) -> str:
    return "" if value is None else ms_text(value)


def _part(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _cases(document: RankDocument) -> list[tuple[RankRow, RankCase]]:
    return list(zip(document.rows, document.cases, strict=False))
