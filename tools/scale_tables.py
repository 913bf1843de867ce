"""Write the tables of docs/scale.md between its marks: what is predicted of several GPUs, and what was measured.

python tools/scale_tables.py docs/scale.md --cpus docs/data/ranks_16_cpus.json --cpus docs/data/ranks_64_cpus.json
python tools/scale_tables.py docs/scale.md ... --from docs/data/ranks_4_h200.json --from docs/data/ranks_8_h200.json

``--from`` takes what ``m2gen bench --gpus N --out FILE`` wrote; what one file lacks, the next may have. Predictions are
of the cases that this command runs by default, from docs/data/layers_h200.json, which one GPU measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from m2gen import pipeline
from m2gen.bench.document import ranks_of, read_json
from m2gen.bench.layers.document import LayerRow, load_layers
from m2gen.bench.layers.kinds import LayerKind, Part
from m2gen.bench.ranks.entries import Link, RankDocument, RankRow
from m2gen.bench.ranks.forecast import Forecast, MeasuredLayer, OneGpu, forecast
from m2gen.bench.ranks.kinds import Form
from m2gen.cli.show.bench import ms_text
from m2gen.cli.show.ranks import NAMES, compared
from m2gen.db.exchange import write_whole
from m2gen.errors import M2genError, UsageError, os_errors_as
from m2gen.pipeline import RanksRequest
from m2gen.pipeline.ranks import fitted_layers

BEGIN, END = "<!-- tables of tools/scale_tables.py -->", "<!-- end of tables -->"
DATA = Path(__file__).resolve().parents[1] / "docs" / "data"
SPEC = "h200.yaml"
GPUS = (2, 4, 8)
LINK = Link(gb_per_s=370.0, latency_ms=0.03)
"""What NCCL's maintainers say of NVLink 4 (NVIDIA/nccl-tests#212), and an assumption: docs/scale.md."""
COLUMNS = (
    "form", "size", "one GPU ms", "step ms", "efficiency", "communication", "GB a GPU",
    "measured ms", "captured ms", "efficiency", "communication", "GB a GPU", "prediction off",
)  # fmt: skip


def one_gpu() -> OneGpu:
    """Return what docs/data has of one GPU: layers of the width of models, and recurrences of all their workloads."""
    document = load_layers(DATA / "layers_h200.json")
    assert document is not None
    sms = document.environment.sm_count
    rows = [row for row in document.layer_rows if not row.call.decodes]
    layers = fitted_layers(pipeline.plan(SPEC, None, ()), RanksRequest(2))
    heads = {name: variant.total_heads for name, (variant, _) in layers.items()}
    rows.sort(key=lambda row: row.batch)  # of a layer's workloads that of most sequences is kept
    ours = [(row.layer, _times(row, heads[row.layer])) for row in rows if row.kind is LayerKind.EAGER]
    others = {row.layer: _times(row, 0) for row in rows if row.kind is LayerKind.ATTENTION}
    points = [(t.batch * t.heads / sms, 1e3 * t.recurrence_ms / t.seq) for _, t in ours]
    return OneGpu(dict(ours), others, sorted(points), sms)


def _times(row: LayerRow, heads: int) -> MeasuredLayer:
    assert row.forward is not None
    assert row.step is not None
    times = (row.forward.median_ms, row.step.median_ms, row.parts[Part.RECURRENCE], row.parts[Part.PROJECTIONS])
    return MeasuredLayer(heads, row.hidden, row.batch, row.seq, *times, row.extra_bytes)


def forecasts(ranks: int, known: OneGpu) -> list[Forecast]:
    """Return predictions of what the command runs over so many GPUs by default."""
    planned = pipeline.plan(SPEC, None, ())
    cases = pipeline.ranks_cases(planned, RanksRequest(ranks), cuda=True)
    return [forecast(case, ranks, known, LINK) for case in cases if case.form is not Form.ONE]


def over_gpus(ranks: int, known: OneGpu, measured: Sequence[RankDocument]) -> Iterator[str]:
    """Yield the lines of the table of a number of GPUs."""
    documents = [d for d in measured if d.environment and ranks in (row.ranks for row in d.rows)]
    yield from ("", f"### {ranks} GPUs", "")
    if not documents:
        yield "Predictions; not measured."
    for here in [d.environment for d in documents if d.environment is not None][:1]:
        yield f"Predictions, and measurements on {ranks} x {here.device}, driver {here.driver}, torch {here.torch},"
        yield f"triton {here.triton}. Each run's link, and a collective on it:"
        yield ", ".join(f"{d.link.gb_per_s:.3g} GB/s and {1e3 * d.link.latency_ms:.3g} µs" for d in documents) + "."
    predicted = forecasts(ranks, known)
    for layer in dict.fromkeys(each.case.shape.name for each in predicted):
        yield from ("", f"**{layer}**", "", f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|")
        for each in predicted:
            if each.case.shape.name == layer:
                yield f"| {' | '.join((*_predicted(each), *_measured(each, documents)))} |"


def _predicted(found: Forecast) -> Iterator[str]:
    case = found.case
    yield NAMES[case.form]
    yield f"B{case.batch // found.ranks} a rank S{case.seq}" if case.shape.blocks else f"B{case.batch} S{case.seq}"
    yield ms_text(found.one_ms)
    yield ms_text(found.step_ms)
    yield f"{found.efficiency:.0%}"
    yield f"{found.communication_ms / found.step_ms:.0%}"
    yield f"{found.memory / 1e9:.2f}"


def _measured(found: Forecast, documents: Sequence[RankDocument]) -> list[str]:
    """Return what the first run has that has a predicted case: empty cells for none, or why it has no times."""
    case = found.case
    key = (case.shape.name, case.form, case.batch, case.seq, found.ranks)
    for document in documents:
        for row in document.rows:
            if (row.layer, row.form, row.batch, row.seq, row.ranks) == key:
                return _cells(row, found, document)
    return [""] * 6


def _cells(row: RankRow, found: Forecast, document: RankDocument) -> list[str]:
    if row.step_ms is None or row.device_ms is None:
        return [row.failure or row.unfit, *[""] * 5]
    values = compared(row, found.case, document)
    efficiency, communication = values["efficiency"], values["communication"]
    return [
        ms_text(row.step_ms),
        "" if row.captured_ms is None else ms_text(row.captured_ms),
        "" if efficiency is None else f"{efficiency:.0%}",
        "" if communication is None else f"{communication:.0%}",
        f"{row.peak_bytes / 1e9:.2f}",
        f"{found.step_ms / row.device_ms - 1:+.0%}",
    ]


def over_cpus(document: RankDocument) -> Iterator[str]:
    """Yield the lines of the table of a run on CPUs, which is about results alone."""
    ranks = max(row.ranks for row in document.rows)
    yield from ("", f"### {ranks} ranks on CPUs", "")
    yield "| of | form | size | collectives of a step | sent by a rank | largest error, part of its budget |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in document.rows:
        if row.form is not Form.ONE:
            worst = row.failure or row.unfit or f"{row.worst:.2f} ({row.worst_tensor})"
            sent = f"{row.sent_bytes / 1e3:.0f} kB"
            size = f"B{row.batch} S{row.seq}"
            yield f"| {row.layer} | {NAMES[row.form]} | {size} | {row.collectives} | {sent} | {worst} |"


def written(page: str, measured: Sequence[RankDocument]) -> str:
    """Return a page with the tables of predictions, beside those of runs on GPUs and before those on CPUs."""
    start, end = page.find(BEGIN) + len(BEGIN), page.find(END)
    if not len(BEGIN) <= start <= end:
        raise UsageError(f"a page must have {BEGIN} and, below it, {END}, got none")
    known = one_gpu()
    lines = [line for ranks in GPUS for line in over_gpus(ranks, known, measured)]
    lines += [line for document in measured if document.environment is None for line in over_cpus(document)]
    return f"{page[:start]}\n{chr(10).join(lines).lstrip()}\n\n{page[end:]}"


def _read(path: Path) -> RankDocument:
    document = ranks_of(read_json(path), path)
    if document is None:
        raise UsageError(f"{path}: $ must be what `m2gen bench --gpus N --out FILE` writes")
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--from", dest="runs", type=Path, action="append", default=[], help="a run over GPUs")
    parser.add_argument("--cpus", type=Path, action="append", default=[], help="a run of tools/simulate_ranks.py")
    given = parser.parse_args(arguments)
    documents = [_read(path) for path in (*given.runs, *given.cpus)]
    with os_errors_as(UsageError, f"{given.page} must be readable and writable"):
        text = written(given.page.read_text(encoding="utf-8"), documents)
        write_whole(given.page, text.encode())


if __name__ == "__main__":
    try:
        main()
    except M2genError as error:
        raise SystemExit(f"scale_tables: {error}") from None
