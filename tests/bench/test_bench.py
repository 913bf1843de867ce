"""Benchmarks on a scripted timer: who is timed, what is said of them, and never a speed-up of what failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripted
from command_line import TINY, document, fails, run
from records import H100, VARIANT, environment, winner
from scripted import WRONG, Script
from support import ROOT, make_schedule, make_variant

from m2gen import pipeline
from m2gen.bench import peers, sweep
from m2gen.bench.document import dump, load
from m2gen.bench.entries import BenchWorkload, Implementation
from m2gen.bench.kinds import Axis, Call, Kind
from m2gen.bench.side_by_side import ROUNDS, side_by_side
from m2gen.bucket import Bucket
from m2gen.cli.show import bench as shown
from m2gen.cli.show import sweep as shown_sweeps
from m2gen.cli.show.speed import speed_groups
from m2gen.db import Database, Estimate, Failure, Reason, Timing
from m2gen.device import TARGETS
from m2gen.errors import UsageError
from m2gen.measure.roofline import decoding_work, floors_ms, peaks_of, with_states, work_of
from m2gen.problem import packed_problem
from m2gen.schedule import Family, default, parse
from m2gen.spec import Fp32Products

SPEC = """schema: 1
name: timed
targets: sm_90
layers:
  wide:
    head_dim: 16
    state_expansion: 16
    heads: {q: 1, k: 1, v: 2, f: 2, w: 2}
    dtypes: fp32
    workloads: [{batch: 66, seq: 256}]
numerics: {tanh: exact}
"""
LAYER_7B = make_variant(64, 16, (1, 1, 132, 132, 132), dtype="bf16", tanh="approx")
BASE = BenchWorkload("m2rnn_7b", LAYER_7B, 4, 4096)
RECORD = winner(Bucket.ONE)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return the script of the timer that the command line finds."""
    made = Script()
    monkeypatch.setattr(pipeline, "this_bench_context", scripted.given(made))
    return made


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a spec whose one workload is in the bucket of a record in ./db."""
    monkeypatch.chdir(tmp_path)
    Path("timed.yaml").write_text(SPEC, encoding="utf-8")
    Database(Path("db")).add([RECORD])
    return "timed.yaml"


def bench(*arguments: str, status: int = 0) -> Any:
    """Return the document of a run on the timed spec and its record."""
    return document("bench", "--spec", "timed.yaml", "--db", "db", "--quiet", *arguments, status=status)


def rows(found: Any) -> dict[tuple[str, str], Any]:
    """Return the rows of a document by call and implementation."""
    return {(row["call"], row["implementation"]): row for row in found["rows"]}


def test_everyone_side_by_side(spec: str, script: Script) -> None:
    """Default, tuned, eager and compiled are timed in rounds, on the workload and on a token, with their sources."""
    found = rows(bench())
    kinds = ["default", "tuned", "eager", "compiled"]
    calls = ["sequence", "decode", "decode_bf16"]
    engines = ["decode_pool", "decode_ordered", "prefill", "prefill_pool", "singles", "steps"]
    pooled = [(call, kind) for call in engines for kind in ("default", "tuned")]  # loops have no slots and offsets
    assert list(found) == [*((call, kind) for call in calls for kind in kinds), *pooled]
    tuned = found["sequence", "tuned"]
    assert (tuned["schedule"], tuned["source"]) == (RECORD.schedule.slug, f"exact {RECORD.id}")
    assert found["sequence", "default"]["schedule"] == default(VARIANT, TARGETS["sm_90"], Bucket.ONE).slug
    assert {row["host_us"] for row in found.values() if row["schedule"]} == {20.0}
    assert found["decode", "default"]["batch"] == 64
    assert found["decode", "default"]["step"] is None
    rounds = [script.sampled()[4 * i : 4 * i + 4] for i in range(len(calls) * ROUNDS)]
    assert all(sorted(sampled) == sorted(kinds) for sampled in rounds)
    assert len({tuple(sampled) for sampled in rounds}) > 2, "in another order each time"


def test_portable_kernels_take_part_where_the_default_has_others(spec: str, script: Script) -> None:
    """bf16 on sm_90 has kernels of mma by default: beside them, the portable family's default."""
    Path(spec).write_text(SPEC.replace("fp32", "bf16"), encoding="utf-8")
    found = rows(bench("--only", "default", "--only", "portable"))
    usual, portable = (parse(found["sequence", kind]["schedule"]) for kind in ("default", "portable"))
    assert usual.family is Family.MMA
    assert portable.family is Family.PORTABLE


def test_medians_intervals_and_speed_ups(spec: str, script: Script) -> None:
    """The median is the script's, within its interval; speed-ups compare steps, of which loops are timed on fewer."""
    found = rows(bench())
    base = found["sequence", "default"]
    assert base["step"]["low_ms"] <= base["step"]["median_ms"] <= base["step"]["high_ms"]
    assert base["step"]["median_ms"] == pytest.approx(3 * 0.01 * 256 * 66, rel=2e-3)
    assert base["speed_up"] == 1
    assert found["sequence", "tuned"]["speed_up"] == pytest.approx(2, rel=5e-3)
    assert found["sequence", "eager"]["steps"] == 128
    assert found["sequence", "eager"]["speed_up"] == pytest.approx(1 / 40, rel=5e-3)
    assert found["sequence", "compiled"]["steps"] == 8
    assert found["sequence", "compiled"]["speed_up"] == pytest.approx(1 / 10, rel=5e-3)


@pytest.mark.parametrize("when", ["broken", "breaks"])
def test_no_speed_up_of_what_failed(spec: str, script: Script, when: str) -> None:
    """An implementation that fails the check, or later, has no times and no speed-up; the command says so."""
    setattr(script, when, {"tuned": WRONG})
    found = rows(bench(status=1))
    tuned = found["sequence", "tuned"]
    assert (tuned["forward"], tuned["step"], tuned["speed_up"]) == (None, None, None)
    assert tuned["failure"] == f"wrong: {WRONG.message}"
    assert script.sampled().count("tuned") == (0 if when == "broken" else 9), "once on each workload"
    shown = run("bench", "--spec", spec, "--db", "db", "--quiet")
    assert shown.exit_code == 1
    assert f"wrong: {WRONG.message}" in " ".join(shown.stdout.split())


def test_nothing_is_faster_than_a_default_that_failed(spec: str, script: Script) -> None:
    """Without a default that passed there is nothing to compare with."""
    script.broken = {"default": WRONG}
    assert all(row["speed_up"] is None for row in rows(bench(status=1)).values())


def test_what_pytorch_cannot_do_fails_no_benchmark(spec: str, script: Script) -> None:
    """An eager loop that is out of memory is a row that says so; the kernels' status is 0."""
    script.broken = {"eager": Failure(Reason.MEMORY, "OutOfMemoryError: 80 GiB")}
    assert rows(bench())["sequence", "eager"]["failure"] == "memory: OutOfMemoryError: 80 GiB"


def test_only_decode_and_peer(spec: str, script: Script) -> None:
    """Implementations and batches of decoding can be chosen, and peers added; peers decode nothing."""
    found = bench("--only", "default", "--only", "peer", "--peer", "other.kernels:adapter", "--decode", "8")
    assert [(row["implementation"], row["call"], row["batch"]) for row in found["rows"]] == [
        ("default", "sequence", 66),
        ("other.kernels:adapter", "sequence", 66),
        ("default", "decode", 8),
        ("default", "decode_bf16", 8),
        ("default", "decode_pool", 8),
        ("default", "decode_ordered", 8),
        ("default", "prefill", 8),
        ("default", "prefill_pool", 8),
        ("default", "singles", 8),
        ("default", "steps", 8),
    ]
    assert rows(found)["sequence", "other.kernels:adapter"]["source"] == "other.kernels:adapter"
    assert [row["call"] for row in bench("--only", "default", "--decode", "0")["rows"]] == ["sequence"]


SLOWER = {
    Call.DECODE_POOL: 1.03,
    Call.DECODE_ORDERED: 1.01,
    Call.PREFILL_POOL: 1.08,
    Call.SINGLES: 4.0,
    Call.STEPS: 1.5,
}
"""Times of calls over those of a token, or of prompts from states that are not in slots."""


def test_slots_beside_contiguous_states(spec: str, script: Script) -> None:
    """Each call has its time over those beside it, of its own kernels and batch, in JSON and in a table."""
    script.ms = lambda entry: SLOWER.get(entry.workload.call, 1.0) * scripted.FASTER.get(entry.implementation.name, 1.0)
    chosen = ("--only", "default", "--only", "tuned", "--decode", "8", "--decode", "16")
    found = {(row["call"], row["batch"], row["implementation"]): row.get("beside") for row in bench(*chosen)["rows"]}
    for batch in (8, 16):
        for kind in ("default", "tuned"):
            of_call = {call: beside for (call, b, name), beside in found.items() if (b, name) == (batch, kind)}
            assert of_call["decode_ordered"] == {"decode": pytest.approx(1.01, rel=5e-3)}
            beside = {"decode": pytest.approx(1.03, rel=5e-3), "decode_ordered": pytest.approx(1.03 / 1.01, rel=5e-3)}
            assert of_call["decode_pool"] == beside
            assert of_call["prefill_pool"] == {"prefill": pytest.approx(1.08, rel=5e-3)}
            beside = {"singles": pytest.approx(1.5 / 4, rel=5e-3), "decode_pool": pytest.approx(1.5 / 1.03, rel=5e-3)}
            assert of_call["steps"] == beside
            assert not any(of_call[call] for call in ("decode", "decode_bf16", "prefill", "singles"))
    text = run("bench", "--spec", spec, "--db", "db", "--quiet", *chosen).stdout
    table = text.split("Slots of pools, and drafts")[1].split("Schedules")[0]
    for size in ("B8 token, pool", "B16 4 tokens at once, pool", "8 prompts, S1 to 256, pool"):
        assert size in table
    shown = [line.split() for line in table.splitlines()]
    assert ["B16", "token"] in [words[1:3] for words in shown if words[:1] == ["tuned"]]
    assert all(0.3 < float(words[-1].removesuffix("x")) < 1.6 for words in shown if words[:1] == ["default"])


def test_nothing_stands_beside_what_failed(spec: str, script: Script) -> None:
    """A call whose partner has no time has no ratio; the others keep theirs."""
    right = script.ask

    def ask(task: Any) -> Any:
        script.broken = {"default": WRONG} if task.entry.workload.call is Call.SINGLES else {}
        return right(task)

    script.ask = ask  # type: ignore[method-assign]
    found = rows(bench("--only", "default", status=1))
    assert list(found["steps", "default"]["beside"]) == ["decode_pool"]
    assert list(found["decode_pool", "default"]["beside"]) == ["decode", "decode_ordered"]


def test_timing_only(spec: str, script: Script) -> None:
    """A peer whose results are wrong has times and a mark if asked for, else none; ours never has."""
    script.broken = {"a.b:c": WRONG, "tuned": WRONG}
    chosen = ("--only", "default", "--only", "tuned", "--only", "peer", "--peer", "a.b:c", "--decode", "0")
    for asked in (False, True):
        found = rows(bench(*chosen, *(["--timing-only"] if asked else []), status=1))
        peer, tuned = found["sequence", "a.b:c"], found["sequence", "tuned"]
        assert (peer["step"] is not None) is asked
        assert (peer["failure"], peer["unverified"]) == (("", str(WRONG)) if asked else (str(WRONG), ""))
        assert tuned["step"] is None
    text = run("bench", "--spec", spec, "--db", "db", *chosen, "--timing-only").output
    assert "(timing only)" in text
    assert "Timing only: results failed the check" in text


def test_installed_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point is a peer under its name, which cannot be that of a implementation of ours."""
    from importlib.metadata import EntryPoint

    points = [EntryPoint(name, f"{name}:f", peers.GROUP) for name in ("published", "default")]
    monkeypatch.setattr(peers.metadata, "entry_points", lambda group: points if group == peers.GROUP else [])
    assert peers.peers(["a.b:c"]) == {"published": "published:f", "peer default": "default:f", "a.b:c": "a.b:c"}


def test_the_tables(spec: str, script: Script) -> None:
    """Times with intervals, then achieved parts of each limit for whatever is no loop of PyTorch."""
    text = run("bench", "--spec", spec, "--db", "db", "--quiet").stdout
    times, limits = text.split("Achieved parts of the GPU's limits")
    assert "B66 S256" in times
    assert "B64 token" in times
    words = "tuned portable, 16 rows, 1 warp; backward.chunk 4, interval 8"
    assert f"{words} exact {RECORD.id}" in " ".join(times.split())
    assert RECORD.schedule.slug not in times
    assert RECORD.schedule.slug in run("bench", "--spec", spec, "--db", "db", "--quiet", "--verbose").stdout
    header = limits.splitlines()[1].split()
    assert header == ["kernels", "call", "ms", "µs/step", "floor", "ms", "tanh", "float32", "products", "memory"]
    assert "eager" not in limits
    assert "host µs" in times


def test_floors_of_the_7b_layer() -> None:
    """The floors are those in docs/performance.md: on an H200, tanh takes 0.53 ms for each pass over the sequence."""
    entry = Implementation(Kind.DEFAULT, default(LAYER_7B, TARGETS["sm_90"]))
    (result,) = side_by_side(BASE, [entry], scripted.context(Script()))
    assert result.forward is not None
    assert result.forward.floors_ms["tanh"] == pytest.approx(0.53, rel=0.02)
    assert result.forward.floors_ms["float32 arithmetic"] == pytest.approx(0.2, rel=0.2)
    assert result.forward.floors_ms["memory traffic"] == pytest.approx(0.03, rel=0.2)
    assert result.step is not None
    assert result.step.floors_ms["tanh"] == pytest.approx(
        2 * result.forward.floors_ms["tanh"]
    )  # slots evaluate it once
    part = result.forward.parts["tanh"]
    assert part == pytest.approx(result.forward.floors_ms["tanh"] / result.forward.estimate.median_ms)
    elsewhere = replace(scripted.context(Script()), device=TARGETS["sm_90"])
    (unknown,) = side_by_side(BASE, [entry], elsewhere)
    assert unknown.forward is not None
    assert unknown.forward.floors_ms == {}


def test_the_floor_of_products_is_that_of_what_multiplies() -> None:
    """IEEE products run where float32 arithmetic does; tensor cores take half as many of tf32 as of bf16."""
    peaks = peaks_of("NVIDIA H100")
    assert peaks is not None
    single = make_variant(64, 16, (1, 1, 132, 132, 132), dtype="fp32")
    work = work_of(single, default(single, TARGETS["sm_90"]), (4, 4096), training=False)
    ieee, tf32, bf16 = (
        floors_ms(work, peaks, 132, variant)["products"]
        for variant in (single, replace(single, products=Fp32Products.TF32), LAYER_7B)
    )
    assert tf32 == pytest.approx(2 * bf16)
    assert ieee == pytest.approx(bf16 * peaks.product_flops / peaks.flops)


@pytest.mark.parametrize(("chunk", "passes"), [(2, 2), (4, 1)])
def test_the_least_work_of_a_training_step(chunk: int, passes: int) -> None:
    """A backward repeats the forward once, or twice if its chunks rebuild states, and reads what it saved.

    30 tokens of three sequences, whose 10 steps have three checkpoints each: the last interval is not whole.
    """
    variant, schedule = make_variant(64, 16, (1, 1, 2, 2, 2), "bf16"), make_schedule(interval=4, chunk=chunk)
    work = work_of(variant, schedule, (3, 10), training=True)
    elements, operands, y = 30 * 2 * 64 * 16, 30 * (64 + 64 + 2 * 16 + 2) * 2, 30 * 2 * 16 * 2
    checkpoints = 3 * 3 * 2 * 64 * 16 * schedule.checkpoint_bytes(variant)
    assert work.tanh == (1 + passes) * elements
    assert work.flops == (24 + 5 * passes) * elements
    assert work.product_flops == (3 + passes) * 2 * 16 * elements
    assert work.traffic == 3 * operands + 2 * y + 2 * checkpoints


def test_whole_intervals_have_no_checkpoint_more() -> None:
    """8 steps have the two checkpoints of intervals of 4."""
    variant, schedule = make_variant(64, 16, (1, 1, 2, 2, 2), "bf16"), make_schedule(interval=4)
    traffic = [work_of(variant, schedule, (1, seq), training=True).traffic for seq in (8, 16)]
    assert traffic[1] == 2 * traffic[0]


@pytest.mark.parametrize("width", [2, 4])
def test_the_floor_of_decoding_is_the_states_there_and_back(width: int) -> None:
    """B64 of the 7B layer: 64 * 132 * 64 * 16 numbers of the state's width, read and written, and little else."""
    states = 64 * 132 * 64 * 16 * width
    work = decoding_work(LAYER_7B, 64, width)
    assert 2 * states < work.traffic < 2.04 * states
    peaks = peaks_of("NVIDIA H200")
    assert peaks is not None
    assert floors_ms(work, peaks, 132, LAYER_7B)["memory traffic"] == pytest.approx(2e3 * states / 4.8e12, rel=0.04)
    forward = work_of(LAYER_7B, default(LAYER_7B, TARGETS["sm_90"]), (64, 1), training=False)
    assert work.tanh == forward.tanh
    several = decoding_work(LAYER_7B, 64, width, 4)
    assert 5 * states < several.traffic < 5.2 * states, "read once, written after each of four tokens"
    assert (several.tanh, several.flops, several.product_flops) == (
        4 * work.tanh,
        4 * work.flops,
        4 * work.product_flops,
    )
    assert with_states(forward, LAYER_7B, 64).traffic == forward.traffic + 2 * 64 * 132 * 64 * 16 * 4


@pytest.mark.parametrize(
    ("product", "terabytes"),
    [
        ("NVIDIA H200", 4.8), ("NVIDIA H100 80GB HBM3", 3.35), ("NVIDIA A100-SXM4-80GB", 2.04), ("NVIDIA B200", 8.0),
        ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA GH200 480GB", None), ("NVIDIA GB200", None),
        ("NVIDIA A100-PCIE-40GB", None), ("NVIDIA A100-SXM4-40GB", None), ("AMD Instinct MI300X", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)  # fmt: skip
def test_peaks_are_those_of_the_product(product: str, terabytes: float | None) -> None:
    """Products whose names have another's in them have clocks and memory of their own, which are not guessed."""
    peaks = peaks_of(product)
    assert (peaks and peaks.bytes_per_second / 1e12) == terabytes


# ------------------------------------------------------------------------------------------------ against records


def recorded(script: Script, *, factor: float = 1.0, device: str | None = None) -> Path:
    """Write what a run printed, with every time multiplied by ``factor``."""
    found = bench("--decode", "4")
    for row in found["rows"]:
        for times in filter(None, (row["forward"], row["step"])):
            for name in ("median_ms", "low_ms", "high_ms"):
                times[name] *= factor
    if device:
        found["environment"]["device"] = device
    Path("before.json").write_text(json.dumps(found), encoding="utf-8")
    script.asked.clear()
    return Path("before.json")


def against(path: object, status: int, *more: str) -> Any:
    """Return the comparisons of a run."""
    return bench("--decode", "4", "--against", str(path), *more, status=status)["comparisons"]


def test_against_an_earlier_run(spec: str, script: Script) -> None:
    """The same speed passes; each binary is timed twice in the same rounds, and loops are not timed."""
    found = against(recorded(script), 0)
    assert len(found) == 2 * (2 + 8), "two implementations: forward and both of the workload, eight calls of engines"
    assert {c["place"]["implementation"] for c in found} == {"default", "tuned"}
    assert all(0.01 <= c["noise"] < 0.02 for c in found)
    arms = [task.entry.arm for task in script.asked]
    assert arms.count(0) == arms.count(1)
    assert set(script.sampled()) == {"default", "tuned"}


def test_a_slowdown_fails(spec: str, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    """Five percent slower than recorded is beyond one percent of noise; half a percent is not; faster is no failure."""
    assert all(c["slower"] for c in against(recorded(script, factor=0.95), 1))
    assert not any(c["slower"] for c in against(recorded(script, factor=0.995), 0))
    assert not any(c["slower"] for c in against(recorded(script, factor=2.0), 0))
    recorded(script, factor=0.9)
    result = run("bench", "--spec", spec, "--db", "db", "--quiet", "--decode", "0", "--against", "before.json")
    assert result.exit_code == 1
    assert "SLOWER" in result.stdout
    assert "4 of 4 times are slower beyond noise" in result.stderr


def test_noise_that_a_run_beside_itself_shows_is_allowed(spec: str, script: Script) -> None:
    """If one binary differs from itself by 10 %, 5 % slower is noise, and 30 % is not."""
    recorded(script, factor=0.95)
    script.drift = 0.1
    found = against("before.json", 0)
    assert all(c["noise"] == pytest.approx(0.1, abs=0.01) for c in found)
    assert all(c["slower"] for c in against(recorded(script, factor=0.7), 1))


def test_kernels_that_fail_now_are_a_regression(spec: str, script: Script) -> None:
    """An implementation that was timed then and is wrong now has no time, and fails."""
    recorded(script)
    script.broken = {"tuned": WRONG}
    found = against("before.json", 1)
    assert {c["place"]["implementation"] for c in found if c["slower"]} == {"tuned"}
    assert all(WRONG.message in c["failure"] for c in found if c["slower"])


def test_losing_a_record_is_a_regression(spec: str, script: Script) -> None:
    """If a tuned record is lost, the default, which serves now, is compared with its time."""
    recorded(script)
    found = document("bench", "--spec", spec, "--no-db", "--quiet", "--against", "before.json", status=1)
    slower = [c for c in found["comparisons"] if c["slower"]]
    assert {c["place"]["implementation"] for c in slower} == {"tuned"}
    assert slower[0]["change"] == pytest.approx(1.0, abs=0.02)


def test_against_a_database(spec: str, script: Script) -> None:
    """A record's time is held against the tuned schedule, and its default's against the default."""
    sizes = RECORD.problem
    text = SPEC.replace("{batch: 66, seq: 256}", f"{{batch: {sizes.batch}, seq: {sizes.seq}}}")
    Path("timed.yaml").write_text(text, encoding="utf-8")
    timing = RECORD.timing
    assert timing is not None

    def ms(entry: Any) -> float:
        then = timing.tuned if entry.implementation.name == "tuned" else timing.default
        return then.median_ms / 3

    script.ms = ms
    found = bench("--against", "db")["comparisons"]
    assert [(c["place"]["implementation"], c["place"]["what"]) for c in found] == [
        ("default", "forward+backward"),
        ("tuned", "forward+backward"),
    ]
    script.ms = lambda entry: ms(entry) * 1.2
    assert all(c["slower"] for c in bench("--against", "db", status=1)["comparisons"])
    fast = Timing(*(Estimate(0.01, 0.01, 0.01),) * 2, 0.002, 0.008, 1000)
    for seed in range(8):  # whose ids are before and after the record's
        where = replace(RECORD.environment, driver=f"{seed}.0")
        old = replace(RECORD.provenance, kernel="0" * 12, seed=seed)
        Database(Path("db")).add([replace(RECORD, environment=where, provenance=old, timing=fast)])
    script.ms = ms
    assert not any(c["slower"] for c in bench("--against", "db")["comparisons"]), "kernels of before are held against"


def test_lines_of_a_database_that_are_no_records_are_named(spec: str, script: Script) -> None:
    """They are compared with nothing, which would look as if there were none."""
    sizes = RECORD.problem
    text = SPEC.replace("{batch: 66, seq: 256}", f"{{batch: {sizes.batch}, seq: {sizes.seq}}}")
    Path("timed.yaml").write_text(text, encoding="utf-8")
    (lines,) = Path("db").rglob("*.jsonl")
    with lines.open("a", encoding="utf-8") as stream:
        stream.write("torn\n")
    result = run("bench", "--spec", spec, "--no-db", "--quiet", "--against", "db", "--json")
    assert f"m2gen: warning: not used: {lines}:2: $ must be JSON" in result.stderr
    assert json.loads(result.stdout)["comparisons"]


def test_records_that_cannot_be_used(spec: str, script: Script) -> None:
    """Each is one line that says what is wrong and where; nothing is timed."""
    command = ("bench", "--spec", spec, "--quiet", "--against")
    line = fails(2, *command, str(recorded(script, device=H100)))
    assert line == f"m2gen: --against before.json must be of {environment().device}, got one of {H100}"
    Path("torn.json").write_text('{"environment"', encoding="utf-8")
    assert "torn.json: $ must be what `m2gen bench --json` prints" in fails(2, *command, "torn.json")
    found = json.loads(Path("before.json").read_text(encoding="utf-8"))
    found["rows"][1]["step"]["median_ms"] = -1
    Path("negative.json").write_text(json.dumps(found), encoding="utf-8")
    assert "negative.json: $.rows[1].step.median_ms must be greater than 0, got -1" in fails(
        2, *command, "negative.json"
    )
    assert "none.json must be readable" in fails(2, *command, "none.json")
    for name, what in (("cost", "sweeps"), ("layers", "whole layers"), ("ranks_2", "layers over ranks")):
        other = ROOT / "docs" / "data" / f"{name}_h200.json"
        line = fails(2, *command, str(other))
        assert line == f"m2gen: --against {other} must be a run of workloads, got one of {what}"
    Path("empty").mkdir()
    assert "must have records of NVIDIA H200, got none" in fails(2, *command, "empty")
    other = ("bench", "--spec", TINY, "--quiet", "--against", str(recorded(script)))
    assert "--against must have times of default or tuned on the spec's workloads, got none" in fails(2, *other)
    assert script.asked == []


# ---------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize("axis", list(Axis))
def test_points_of_a_sweep(axis: Axis) -> None:
    """Two decades or more on every axis, all valid variants, and the line through where cost should be linear."""
    points = sweep.points(axis, BASE, 132, 32)
    xs = [point.x for point in points]
    assert xs == sorted(set(xs))
    assert xs[-1] / xs[0] >= 100
    for point in points:
        heads = point.workload.variant.heads
        assert all(heads.total % count == 0 for count in heads.counts)
        assert (heads.q, heads.k) == (1, 1)
        programs = point.workload.batch * heads.total
        if axis in (Axis.BATCH, Axis.HEADS):
            assert point.x == programs
            assert point.fitted == (programs >= 8 * 132)
        assert axis is not Axis.ROWS or programs == 8 * 132, "a program for every place, whatever K is"
    fitted = [point.x for point in points if point.fitted]
    assert len(fitted) >= (4 if axis is Axis.ROWS else 5)
    assert axis is not Axis.ROWS or fitted[0] == 32, "one tile holds up to 32 rows"
    assert axis is Axis.ROWS or fitted[-1] / fitted[0] >= 100


def test_several_layers_of_a_spec() -> None:
    """The named layers are timed, in the spec's order; an unknown name is an error."""
    planned = pipeline.plan("h200.yaml", records=())
    found = pipeline.workloads(planned, pipeline.BenchRequest(("square_16", "m2rnn_410m")))
    assert [workload.layer for workload in found] == ["m2rnn_410m", "square_16"]
    assert len({workload.layer for workload in pipeline.workloads(planned, pipeline.BenchRequest())}) == 5
    with pytest.raises(UsageError, match=r"--layer must be among m2rnn_7b, .*, got 'square_17'"):
        pipeline.workloads(planned, pipeline.BenchRequest(("square", "square_17")))


def test_other_head_counts() -> None:
    """Groups keep their part as far as it divides, and what is a head of its own stays one for each."""
    grouped = make_variant(heads=(3, 12, 12, 4, 1))
    assert sweep.with_heads(grouped, 24).heads.counts == (6, 24, 24, 8, 1)
    assert sweep.with_heads(grouped, 4).heads.counts == (1, 4, 4, 1, 1)
    assert sweep.with_heads(make_variant(heads=(1, 1, 1, 1, 1)), 4).heads.counts == (4, 4, 4, 4, 4)


def test_the_line_through_times() -> None:
    """Exact times give their line; a bend shows as a deviation; two points are no evidence."""
    exact = sweep.fit([100, 1000, 10000], [0.2, 1.1, 10.1])
    assert exact is not None
    assert (exact.intercept_ms, exact.slope_ms) == (pytest.approx(0.1), pytest.approx(1e-3))
    assert exact.worst == pytest.approx(0, abs=1e-9)
    bent = sweep.fit([100, 1000, 10000], [0.2, 1.1, 20.0])
    assert bent is not None
    assert bent.worst > 0.2
    assert sweep.fit([1, 2], [1.0, 2.0]) is None


def test_a_percent_counts_as_much_at_either_end_of_a_line() -> None:
    """The sum of squares is of relative deviations, so that long calls do not outvote short ones."""
    xs, ms = np.array([100.0, 1000.0, 10000.0, 100000.0]), np.array([0.25, 1.0, 11.0, 95.0])
    found = sweep.fit(list(xs), list(ms))
    assert found is not None
    slope, intercept = np.polyfit(xs, ms, 1, w=1 / ms)
    assert (found.slope_ms, found.intercept_ms) == (pytest.approx(slope), pytest.approx(intercept))
    assert found.worst == pytest.approx(np.abs(ms / (intercept + slope * xs) - 1).max())
    assert found.at(500.0) == pytest.approx(intercept + 500 * slope)


def test_a_sweep(spec: str, script: Script) -> None:
    """The table over S and its lines, whose slope is the script's; only kernels are timed."""
    swept = bench("--sweep", "seq")["sweeps"][0]
    assert [point["x"] for point in swept["points"]] == [128 << i for i in range(8)]
    lines = {(line["implementation"], line["what"]): line for line in swept["lines"]}
    assert set(lines) == {(name, what) for name in ("default", "tuned") for what in ("forward", "forward+backward")}
    assert lines["default", "forward"]["slope_ms"] == pytest.approx(0.01 * 66, rel=2e-3)
    assert lines["tuned", "forward+backward"]["worst"] < 5e-3
    text = run("bench", "--spec", spec, "--db", "db", "--quiet", "--sweep", "rows").stdout
    assert "wide over rows" in text
    assert "worst deviation" in text


def test_failures_along_a_sweep(spec: str, script: Script) -> None:
    """A point that fails is listed, and the others are still shown."""
    script.broken = {"tuned": Failure(Reason.MEMORY, "80 GiB")}
    result = run("bench", "--spec", spec, "--db", "db", "--quiet", "--sweep", "seq")
    assert result.exit_code == 1
    assert "memory: 80 GiB" in result.stdout
    assert "wide over seq: forward, ms" in result.stdout


@pytest.mark.filterwarnings("error")
def test_sweeps_without_any_time_are_not_drawn(spec: str, script: Script) -> None:
    """The failures are shown and kept, and no empty picture is left; beside another sweep the panel stays empty."""
    script.broken = {"default": Failure(Reason.MEMORY, "80 GiB")}
    chosen = ("--only", "default", "--sweep", "seq", "--plot", "a.svg")
    result = run("bench", "--spec", spec, "--no-db", "--quiet", *chosen, "--out", "sweep.json")
    assert (result.exit_code, result.stderr) == (2, "m2gen: --plot must have times along an axis, got none\n")
    assert "memory: 80 GiB" in result.stdout
    assert not Path("a.svg").exists()
    content = json.loads(Path("sweep.json").read_text(encoding="utf-8"))
    Path("none.json").write_text(json.dumps({**content, "sweeps": []}), encoding="utf-8")
    for name in ("sweep.json", "none.json"):
        assert "--plot must have times" in run("bench", "--from", name, "--plot", "a.svg").stderr
    script.broken = {}
    content["sweeps"] += bench("--only", "default", "--sweep", "batch")["sweeps"]
    Path("both.json").write_text(json.dumps(content), encoding="utf-8")
    assert run("bench", "--from", "both.json", "--plot", "a.svg").stderr == ""


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_figure(spec: str, script: Script, suffix: str) -> None:
    """Sweeps side by side in one file, of the format that its name says."""
    run("bench", "--spec", spec, "--db", "db", "--quiet", "--sweep", "seq", "--sweep", "batch", "--plot", f"a{suffix}")
    content = Path(f"a{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_a_figure_needs_matplotlib(spec: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing library is an error before anything is timed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = fails(2, "bench", "--spec", spec, "--db", "db", "--sweep", "seq", "--plot", "a.svg")
    assert "pip install 'm2gen[plot]'" in line
    assert script.asked == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plot", "a.svg", "--against", "x"), "--plot must be given without --against"),
        (("--plot", "a.svg", "--only", "tuned"), "--plot must have times of m2gen's kernels beside"),
        (("--sweep", "seq", "--plot", "a.pdf"), "--plot must end in .png or .svg, got 'a.pdf'"),
        (("--sweep", "seq", "--against", "x"), "--against must be given without --sweep"),
        (
            ("--peer", "a.b:c", "--timing-only", "--against", "x"),
            "--against must be given without --peer, --timing-only",
        ),
        (("--peer", "nothing"), "--peer must be module:function, got 'nothing'"),
        (("--sweep", "time"), "--sweep"),
        (("--only", "best"), "--only"),
    ],
)
def test_requests_that_cannot_be_met(spec: str, script: Script, arguments: tuple[str, ...], message: str) -> None:
    """One line and status 2, before anything is timed."""
    result = run("bench", "--spec", spec, "--quiet", *arguments)
    assert result.exit_code == 2
    assert script.asked == []
    if result.stderr:  # what the parser refuses is printed by main()
        assert message in result.stderr


def test_a_document_reads_back(spec: str, script: Script, tmp_path: Path) -> None:
    """A printed document reads back to the last digit."""
    found = bench()
    (tmp_path / "a.json").write_text(json.dumps(found), encoding="utf-8")
    again = dump(load(tmp_path / "a.json"))
    assert json.loads(json.dumps(again)) == found


@pytest.mark.parametrize("data", [b"", b"\xff\xfe{}", b"null", b"[]", b"5", b"\xef\xbb\xbf{}", b"[" * 100_000])
def test_a_document_of_another_shape(spec: str, script: Script, data: bytes) -> None:
    """One line names the file, whatever is in it."""
    Path("other.json").write_bytes(data)
    line = fails(2, "bench", "--spec", spec, "--quiet", "--against", "other.json")
    assert line.startswith("m2gen: other.json: $ must be")


def interrupt(script: Script, monkeypatch: pytest.MonkeyPatch, when: Callable[[BenchWorkload], bool]) -> None:
    """Have Ctrl-C come at the first task of such a workload."""
    right = script.ask

    def ask(task: Any) -> Any:
        if when(task.entry.workload):
            raise KeyboardInterrupt
        return right(task)

    monkeypatch.setattr(script, "ask", ask)


def test_interrupted_runs_show_what_there_is(spec: str, script: Script, monkeypatch) -> None:
    """Ctrl-C in the second workload leaves the first one's rows."""
    interrupt(script, monkeypatch, lambda workload: workload.call is Call.DECODE)
    result = run("bench", "--spec", spec, "--db", "db", "--quiet")
    assert result.exit_code == 130
    assert "B66 S256" in result.stdout


def test_an_interrupted_sweep_shows_and_draws_what_there_is(spec: str, script: Script, monkeypatch) -> None:
    """Ctrl-C at the fourth length leaves the axis before it, and three points with the line through them."""
    interrupt(script, monkeypatch, lambda workload: workload.seq == 1024)
    sweeps = ("--sweep", "batch", "--sweep", "seq")
    result = run("bench", "--spec", spec, "--db", "db", "--quiet", *sweeps, "--plot", "a.svg")
    assert result.exit_code == 130
    assert "wide over batch" in result.stdout
    assert "wide over seq" in result.stdout
    assert "B66 S512" in result.stdout
    assert "B66 S1024" not in result.stdout
    assert Path("a.svg").read_bytes().startswith(b"<?xml")


def test_what_ended_a_sweep_is_said_before_that_it_cannot_be_drawn(spec: str, script: Script, monkeypatch) -> None:
    """An interruption stays one where the figure's folder has gone meanwhile, and the points are still shown."""
    folder = Path("gone")
    folder.mkdir()
    interrupt(script, monkeypatch, lambda workload: workload.seq == 512 and (folder.rmdir() or True))
    result = run("bench", "--spec", spec, "--db", "db", "--quiet", "--sweep", "seq", "--plot", "gone/a.svg")
    assert result.exit_code == 130
    assert "B66 S256" in result.stdout


def test_a_figure_that_cannot_be_written_is_refused_before_the_sweep(spec: str, script: Script, monkeypatch) -> None:
    """Nothing is timed for a folder that is not there."""
    interrupt(script, monkeypatch, lambda workload: True)
    line = fails(2, "bench", "--spec", spec, "--db", "db", "--quiet", "--sweep", "seq", "--plot", "nowhere/a.svg")
    assert "--plot nowhere/a.svg must be writable" in line


def test_packed_workloads_are_timed_by_kernels_alone(spec: str, script: Script) -> None:
    """Rows say that they are packed; loops of PyTorch have no offsets; lengths are the same on every machine."""
    Path(spec).write_text(SPEC.replace("seq: 256}", "seq: 256, packed: true}"), encoding="utf-8")
    found = bench("--decode", "0")["rows"]
    assert {row["implementation"] for row in found} <= {"default", "tuned", "portable"}
    assert all(row["packed"] for row in found)
    lengths = packed_problem(66, 256).lengths
    assert lengths is not None
    assert lengths == packed_problem(66, 256).lengths
    assert (len(lengths), min(lengths) >= 1, max(lengths) <= 256) == (66, True, True)


def test_tuned_kernels_that_fail_are_not_drawn_as_the_default(spec: str, script: Script) -> None:
    """A picture has no bar of tuned kernels where these have no times."""
    script.broken = {"tuned": WRONG}
    chosen = ("--only", "default", "--only", "tuned", "--only", "peer", "--peer", "a.b:c", "--decode", "0")
    bench(*chosen, "--out", "run.json", status=1)
    with pytest.raises(UsageError, match="--plot must have times of m2gen's kernels"):
        speed_groups(load(Path("run.json")))


def test_marks_of_peers_that_are_timed_only(spec: str, script: Script) -> None:
    """They stand in sweeps and in pictures, with the reason beside a sweep."""
    script.broken = {"a.b:c": WRONG}
    chosen = ("--only", "tuned", "--only", "default", "--only", "peer", "--peer", "a.b:c", "--timing-only")
    bench(*chosen, "--decode", "0", "--out", "run.json")
    (group,) = speed_groups(load(Path("run.json")))
    assert list(group.values) == ["m2gen, tuned", "c kernel (timing only)"]
    text = run("bench", "--spec", spec, "--db", "db", "--quiet", *chosen, "--sweep", "seq").stdout
    assert "c (timing only)" in text
    assert f"wrong: {WRONG.message}" in " ".join(text.split())


def test_sweeps_of_points_without_times(spec: str, script: Script) -> None:
    """Where tuning has no other schedule there is no row beside the default's; loops of PyTorch have no sweeps."""
    (swept,) = bench("--only", "tuned", "--only", "default", "--sweep", "rows")["sweeps"]
    assert {len(point["rows"]) for point in swept["points"]} == {1, 2}
    assert "--only must have kernels or peers for --sweep, got eager" in fails(
        2, "bench", "--spec", spec, "--db", "db", "--only", "eager", "--sweep", "seq"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "portable"), "got portable (the default schedules are portable ones)"),
        (
            ("--only", "eager", "--only", "portable", "--sweep", "seq"),
            "portable (the default schedules are portable ones)",
        ),
        (("--only", "peer"), "--only peer must come with a --peer"),
        (("--only", "default", "--only", "peer"), "--only peer must come with a --peer"),
        (("--only", "peer", "--sweep", "seq"), "--only peer must come with a --peer"),
        (("--only", "default", "--peer", "a.b:c"), "--peer must be given with --only peer, or without --only"),
    ],
)
def test_a_run_of_nothing_is_refused(spec: str, script: Script, options: tuple[str, ...], message: str) -> None:
    """An empty table would look as if everything asked for had been timed."""
    assert message in fails(2, "bench", "--spec", spec, "--no-db", "--quiet", *options)
    assert script.asked == []


def test_layers_that_would_be_left_out_are_refused(spec: str, script: Script) -> None:
    """Every layer that was asked for is timed, or the command says that it cannot be; a batch given twice is one."""
    other = "  {0}: {{head_dim: 16, state_expansion: 32, heads: {{q: 1, k: 1, v: 1, f: 1, w: 1}}, dtypes: fp32{1}}}\n"
    more = other.format("narrow", ", workloads: {batch: 1, seq: 8}") + other.format("bare", "")
    Path(spec).write_text(SPEC.replace("numerics", more + "numerics"), encoding="utf-8")
    command = ("bench", "--spec", spec, "--no-db", "--quiet", "--only", "default", "--layer", "narrow", "--layer")
    assert "bare must have workloads to be timed, got none" in fails(2, *command, "bare")
    assert "--sweep must be of one --layer, got narrow, wide" in fails(2, *command, "wide", "--sweep", "seq")
    assert script.asked == []
    chosen = ("--only", "default", "--layer", "narrow", "--decode", "8")
    assert bench(*chosen, "--sweep", "seq")["sweeps"][0]["layer"] == "narrow"
    assert len(bench(*chosen, "--decode", "8")["rows"]) == len(bench(*chosen)["rows"])


def test_loops_of_packed_workloads_are_nothing(spec: str, script: Script) -> None:
    """A spec whose every workload is packed has nothing for them."""
    Path(spec).write_text(SPEC.replace("seq: 256}", "seq: 256, packed: true}"), encoding="utf-8")
    line = fails(2, "bench", "--spec", spec, "--no-db", "--quiet", "--only", "eager", "--decode", "0")
    assert line.endswith("got eager (loops have no packed workloads)")


def test_tuned_by_itself_is_timed_whatever_it_is(spec: str, script: Script) -> None:
    """Without a record, too: what a pipeline records by ``--only tuned`` it can compare with, and with nothing else."""
    script.ms = lambda entry: 1.0  # both are the default schedule
    command = ("bench", "--spec", spec, "--no-db", "--quiet", "--decode", "4")
    found = document(*command, "--only", "tuned")
    assert {row["implementation"] for row in found["rows"]} == {"tuned"}
    assert {row["source"] for row in found["rows"]} == {"default"}
    Path("run.json").write_text(json.dumps(found), encoding="utf-8")
    for only in ((), ("--only", "tuned")):
        script.asked.clear()
        compared = document(*command, *only, "--against", "run.json")["comparisons"]
        assert [c["place"]["implementation"] for c in compared] == ["tuned"] * 10
        assert set(script.sampled()) == {"tuned" if only else "default"}
    line = fails(2, *command, "--only", "default", "--against", "run.json")
    assert line == "m2gen: --against must have times of default on the spec's workloads, got none"
    line = fails(2, *command, "--only", "eager", "--against", "run.json")
    assert line == "m2gen: --only must have default or tuned for --against, got eager"


def test_a_comparison_is_of_what_is_asked_for(spec: str, script: Script) -> None:
    """With ``--only`` a recorded time is held against its own kind alone."""
    recorded(script)
    for kind in ("default", "tuned"):
        script.asked.clear()
        assert {c["place"]["implementation"] for c in against("before.json", 0, "--only", kind)} == {kind}
        assert set(script.sampled()) == {kind}


def test_an_interrupted_comparison_shows_what_there_is(spec: str, script: Script, monkeypatch) -> None:
    """Ctrl-C in the second workload leaves the first one's times, as a table and as JSON."""
    recorded(script)
    interrupt(script, monkeypatch, lambda workload: workload.call is Call.DECODE)
    command = ("bench", "--spec", spec, "--db", "db", "--quiet", "--decode", "4", "--against", "before.json")
    shown = run(*command)
    assert shown.exit_code == 130
    assert "B66 S256" in shown.stdout
    assert "B4 token" not in shown.stdout
    assert len(document(*command, status=130)["comparisons"]) == 4


def test_the_file_of_a_sweep_is_its_json(spec: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the lines, and it is kept where nothing can be shown, as on a full disk."""
    chosen = ("--only", "default", "--sweep", "seq")
    found = bench(*chosen, "--out", "sweep.json")
    assert found["sweeps"][0]["lines"]
    assert json.loads(Path("sweep.json").read_text(encoding="utf-8")) == found

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    Path("sweep.json").unlink()
    monkeypatch.setattr(shown_sweeps, "print_json", full)
    result = run("bench", "--spec", spec, "--db", "db", "--quiet", *chosen, "--json", "--out", "sweep.json")
    assert result.exit_code == 1
    assert json.loads(Path("sweep.json").read_text(encoding="utf-8"))["sweeps"]


def test_a_run_is_kept_where_nothing_can_be_shown(spec: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of a GPU are not lost to a full disk behind the standard output."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shown, "print_tables", full)
    run("bench", "--spec", spec, "--db", "db", "--quiet", "--only", "default", "--decode", "0", "--out", "run.json")
    assert load(Path("run.json")).rows
