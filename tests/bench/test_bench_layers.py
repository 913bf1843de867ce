"""``m2gen bench --layers`` on a scripted timer: who is timed, what is said of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command_line import document, fails, run
from records import environment
from scripted import DEVICE, WRONG
from support import ROOT

from m2gen import pipeline
from m2gen.bench.kinds import TimerStep
from m2gen.bench.layers.breakdown import KernelTime
from m2gen.bench.layers.document import LayerDocument, dump_layers, load_layers
from m2gen.bench.layers.entries import LayerContext, LayerResult, LayerTask
from m2gen.bench.side_by_side import ROUNDS
from m2gen.db import Failure
from m2gen.kernels.compile import load_module
from m2gen.spec import json_schema, parse_spec, spec_hash

SPEC = """schema: 1
name: timed
targets: sm_90
layers:
  wide:
    head_dim: 16
    state_expansion: 16
    heads: {q: 1, k: 1, v: 2, f: 2, w: 2}
    dtypes: bf16
    workloads: [{batch: 4, seq: 256}, {batch: 1, seq: 512}]
    hidden: 64
  bare: {head_dim: 16, state_expansion: 16, heads: {q: 1, k: 1, v: 1, f: 1, w: 1}, dtypes: bf16, workloads: {batch: 1, seq: 8}}
"""  # noqa: E501
KERNELS = (
    KernelTime("m2rnn_backward_kernel", 2.0, 1.0),
    KernelTime("nvjet_tst_128x256", 1.0, 3.0),
    KernelTime("triton_poi_fused_add_0", 0.5, 4.0),
)
MS = {"m2gen eager": 4.0, "m2gen compiled": 3.0, "attention": 2.0}


@dataclass
class Script:
    """A timer whose layers take what ``MS`` says, else 8 ms, and whose steps take three times a forward.

    A graph takes twice a forward; that of ``attention`` cannot be captured.
    """

    broken: dict[str, Failure] = field(default_factory=dict)
    asked: list[LayerTask] = field(default_factory=list)

    def ask(self, task: LayerTask) -> LayerResult:
        """Do one step as the script says."""
        self.asked.append(task)
        layer, decodes = task.entry.layer, task.entry.workload.call.decodes
        found = self.broken.get(layer.name)
        if task.step is TimerStep.ADMIT:
            passed = found is not None and layer.timing_only
            return LayerResult(
                extra_bytes=2 * 10**9, traffic=48 * 10**6 if decodes else 0, kernels=KERNELS,
                versions=(("torch", "2.11"), ("triton", "3.6.0")),
                failure=None if passed else found, unverified=str(found) if passed else "",
                uncaptured="it waits for the host" if layer.name == "attention" and not decodes else "",
            )  # fmt: skip
        ms = MS.get(layer.name, 8.0)
        if decodes:
            return LayerResult((ms / 100,) * 4)
        return LayerResult((ms,) * 4, (3 * ms,) * 4, () if layer.name == "attention" else (2 * ms,) * 4)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    """Return the script of the timer that the command line finds, beside a spec."""
    made = Script()

    @contextmanager
    def given(command: str) -> Iterator[LayerContext]:
        yield LayerContext(DEVICE, environment(), "gpu-scripted", "scripted:0", made)

    monkeypatch.setattr(pipeline, "this_layer_context", given)
    monkeypatch.chdir(tmp_path)
    Path("timed.yaml").write_text(SPEC, encoding="utf-8")
    return made


COMMAND = ("bench", "--spec", "timed.yaml", "--no-db", "--quiet", "--layers")
PEERS = ("--peer", "a.b:scan", "--peer-layer", "c.d:layer")


def bench(*arguments: str, status: int = 0) -> Any:
    """Return the rows of a run."""
    return document(*COMMAND, *arguments, status=status)["layer_rows"]


def test_everyone_side_by_side(script: Script) -> None:
    """m2gen's, an operator in it, attention and a peer's layer are timed in rounds on workloads, and on a token."""
    rows = bench(*PEERS)
    names = ["m2gen eager", "m2gen compiled", "a.b:scan in m2gen's layer", "attention", "c.d:layer"]
    assert [row["name"] for row in rows] == 3 * names
    sizes = dict.fromkeys((row["call"], row["batch"], row["seq"], row["hidden"]) for row in rows)
    assert list(sizes) == [("sequence", 4, 256, 64), ("sequence", 1, 512, 64), ("decode", 64, 256, 64)]
    sampled = [task.entry.layer.name for task in script.asked if task.step is TimerStep.SAMPLE]
    rounds = [sampled[5 * i : 5 * i + 5] for i in range(3 * ROUNDS)]
    assert all(sorted(each) == sorted(names) for each in rounds)
    first, token, other = rows[0], rows[10], rows[3]
    assert (first["forward"]["median_ms"], first["step"]["median_ms"], first["floor_ms"]) == (4.0, 12.0, None)
    assert (first["captured"]["median_ms"], first["uncaptured"], token["captured"]) == (8.0, "", None)
    assert (other["captured"], other["uncaptured"]) == (None, "it waits for the host")
    assert first["parts_ms"] == {"recurrence": 2.0, "projections": 1.0, "rest": 0.5}
    assert token["floor_ms"] == pytest.approx(0.01), "48 MB at 4.8 TB/s"
    assert token["step"] is None


def test_the_tables(script: Script) -> None:
    """Times, parts, a token beside its bound, and versions; what is timing only and what failed says why."""
    script.broken = {"c.d:layer": WRONG, "attention": WRONG}
    text = " ".join(run(*COMMAND, *PEERS, "--timing-only").stdout.split())
    for words in (
        "wide, hidden 64, B4 S256 m2gen eager 4.000 ±0.0% 12.000 ±0.0% 8.000 ±0.0% 2.000",
        "m2gen compiled 2.000 1.000 0.500 8 9.000",
        "wide, hidden 64, B64 token after 256 m2gen eager 40.0 ±0.0% 10.0 4.00x",
        "c.d:layer (timing only) 8.000",
        "torch 2.11, triton 3.6.0",
        "a step that waits for no host, as a CUDA graph",
        f"Failed layer why wide, hidden 64, B4 S256 attention {WRONG}",
    ):
        assert words in text, text


@pytest.mark.parametrize(("name", "status"), [("m2gen compiled", 1), ("attention", 0)])
def test_failures(script: Script, name: str, status: int) -> None:
    """A layer that fails has no times; the exit status is that of m2gen's own layers."""
    script.broken = {name: WRONG}
    (row,) = (row for row in bench("--decode", "0", status=status)[:3] if row["name"] == name)
    assert (row["step"], row["failure"]) == (None, str(WRONG))


def test_out_and_from(script: Script) -> None:
    """``--out`` keeps what ``--json`` prints, which ``--from`` reads and shows without a GPU."""
    rows = bench("--layer-kind", "eager", "--out", "run.json")
    assert json.loads(Path("run.json").read_text(encoding="utf-8"))["layer_rows"] == rows
    assert document("bench", "--from", "run.json")["layer_rows"] == rows
    assert "What a step is made of" in run("bench", "--from", "run.json", "--layer", "wide").stdout
    assert "--layer must be among wide" in fails(2, "bench", "--from", "run.json", "--layer", "other")
    message = "--plot must have times of m2gen's layer beside those of another, got none"
    assert message in fails(2, "bench", "--from", "run.json", "--plot", "a.svg")
    bench("--layer-kind", "eager", "--layer-kind", "attention", "--decode", "0", "--out", "two.json")
    assert run("bench", "--from", "two.json", "--plot", "a.svg").exit_code == 0
    assert b"m2gen" in Path("a.svg").read_bytes()


def test_what_is_refused(script: Script) -> None:
    """Options of operators, and layers without a width, are errors before anything is timed."""
    assert "--layers must be given without --only, --sweep" in fails(2, *COMMAND, "--only", "default", "--sweep", "seq")
    assert "--peer-layer must be given with --layers" in fails(2, *COMMAND[:-1], "--peer-layer", "a:b")
    assert "--peer-layer must be module:function, got 'a'" in fails(2, *COMMAND, "--peer-layer", "a")
    assert "$.layers.bare must have hidden for its layer" in fails(2, *COMMAND, "--layer", "bare")
    for kind, option in (("operator", "--peer"), ("peer", "--peer-layer")):
        line = fails(2, *COMMAND, "--layer-kind", "eager", "--layer-kind", kind)
        assert f"--layer-kind {kind} must come with a {option}, or an installed package that has one" in line
        line = fails(2, *COMMAND, "--layer-kind", "eager", option, "a.b:c")
        assert f"{option} must be given with --layer-kind {kind}, or without --layer-kind, got a.b:c" in line
    packed = SPEC.replace("workloads: {batch: 1, seq: 8}", "hidden: 8, workloads: {batch: 1, seq: 8, packed: true}")
    Path("timed.yaml").write_text(packed, encoding="utf-8")
    line = fails(2, *COMMAND, "--layer", "wide", "--layer", "bare")
    assert "$.layers.bare must have unpacked workloads for its layer to be timed, got none" in line
    Path("timed.yaml").write_text(SPEC.replace("    hidden: 64\n", ""), encoding="utf-8")
    assert "the spec must have layers with hidden" in fails(2, *COMMAND)
    assert not script.asked


def test_hidden_of_a_spec() -> None:
    """It is a positive integer that the JSON schema knows; a spec without it has the hash that it had before."""
    assert "hidden" in json_schema()["$defs"]["Layer"]["properties"]
    with pytest.raises(Exception, match=r"hidden must be an integer from 1"):
        parse_spec(SPEC.replace("hidden: 64", "hidden: 0"), "a.yaml")
    plain = parse_spec(SPEC.replace("    hidden: 64\n", ""), "a.yaml")
    assert spec_hash(plain) != spec_hash(parse_spec(SPEC, "a.yaml"))
    tiny = (ROOT / "generated" / "tiny" / "MANIFEST.json").read_text(encoding="utf-8")
    assert spec_hash(parse_spec((ROOT / "specs" / "tiny.yaml").read_text(encoding="utf-8"), "tiny.yaml")) in tiny


def test_the_page_is_written_from_a_run(script: Script) -> None:
    """The tool writes tables between its marks, the same again; with an earlier run, its times stand before."""
    bench(*PEERS, "--out", "run.json")
    tool = load_module(ROOT / "tools" / "layer_tables.py", "layer_tables")
    page = Path("page.md")
    page.write_text(f"# Page\n\n{tool.BEGIN}\n{tool.END}\n\nEnd.\n", encoding="utf-8")
    tool.main(["run.json", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Page\n")
    assert text.endswith("\nEnd.\n")
    assert "| layer | forward | step | step as a graph | extra memory |" in text
    assert "| m2gen eager | 4.000 ms | 12.000 ms | 8.000 ms | 2.000 GB | 2.000 | 1.000 | 0.500 |" in text
    assert "| attention | 2.000 ms | 6.000 ms | not captured | 2.000 GB |" in text
    tool.main(["run.json", str(page)])
    assert page.read_text(encoding="utf-8") == text
    earlier = load_layers(Path("run.json"))
    assert earlier is not None
    Path("before.json").write_text(
        json.dumps(dump_layers(LayerDocument(earlier.environment, earlier.layer_rows[:1])), default=str),
        encoding="utf-8",
    )
    tool.main(["run.json", str(page), "--before", "before.json"])
    assert "Before" in page.read_text(encoding="utf-8")


def test_the_committed_page_is_of_its_run() -> None:
    """The page's tables are those that the tool writes from the run beside it."""
    tool = load_module(ROOT / "tools" / "layer_tables.py", "layer_tables")
    run_file, page = ROOT / "docs" / "data" / "layers_h200.json", ROOT / "docs" / "model-step.md"
    apart = [ROOT / "docs" / "data" / "layers_published_h200.json"]
    text = page.read_text(encoding="utf-8")
    assert "On another machine" in text
    assert tool.written(text, run_file, None, apart) == text


def test_packed_workloads_are_no_layers(script: Script) -> None:
    """Layers are timed on sequences of one length; a layer with packed workloads alone has none."""
    Path("timed.yaml").write_text(SPEC.replace("seq: 256}", "seq: 256, packed: true}"), encoding="utf-8")
    assert {(row["batch"], row["seq"]) for row in bench("--decode", "0")} == {(1, 512)}
    packed = SPEC.replace("seq: 256}", "seq: 256, packed: true}").replace("seq: 512}", "seq: 512, packed: true}")
    Path("timed.yaml").write_text(packed, encoding="utf-8")
    assert "hidden and unpacked workloads" in fails(2, *COMMAND)
