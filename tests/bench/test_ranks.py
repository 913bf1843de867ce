"""Layers over ranks: what is planned, how ranks end together, and the whole command on CPUs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, document, fails, run
from ranks import FOREVER as PATIENCE
from support import ROOT, make_variant

from m2gen import pipeline
from m2gen.bench.ranks import check, launch
from m2gen.bench.ranks.entries import HYBRID, Link, RankCase, RankDocument, RankJob, RankRow, Shape, write
from m2gen.bench.ranks.forecast import MeasuredLayer, OneGpu, forecast, token_us
from m2gen.bench.ranks.kinds import Form, Mixing
from m2gen.bench.ranks.launch import CPU, LOOPBACK, failure, run_ranks, worker_command, write_error
from m2gen.bench.ranks.model import model_bytes, predicted_ms, traffic
from m2gen.bench.ranks.pulse import pid_of
from m2gen.cli.show.report import TerminalProgress
from m2gen.errors import RanksError, TuneError, UsageError
from m2gen.pipeline import RanksRequest
from m2gen.pipeline import ranks as several
from m2gen.pipeline.ranks import fitting

QUIET = TerminalProgress(quiet=True)
SEVEN = Shape("m2rnn_7b", 1536, 64, 16, {"q": 1, "k": 1, "v": 132, "f": 132, "w": 132, "g": 132}, "bf16")


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give ranks of this machine, however busy it is, an hour before they are taken to hang."""
    monkeypatch.setattr("m2gen.pipeline.ranks.QUIET_SECONDS", float(PATIENCE))


def planned(ranks: int, *, cuda: bool, spec: str = TINY, layer: str | None = "base") -> RankJob:
    """Return the job of one layer, or of those that are chosen without one."""
    return pipeline.ranks_job(pipeline.plan(spec, None, ()), requested(ranks, layer), (), cuda=cuda)


def requested(ranks: int, layer: str | None, **options: Any) -> RanksRequest:
    """Return a request of one layer, or of those that are chosen without one."""
    return RanksRequest(ranks, () if layer is None else (layer,), **options)


def cases_of(spec: str, request: RanksRequest) -> list[tuple[str, str, int, int]]:
    """Return what GPUs are to do: layers, forms, sequences and tokens."""
    cases = pipeline.ranks_cases(pipeline.plan(spec, None, ()), request, cuda=True)
    return [(case.shape.name, str(case.form), case.batch, case.seq) for case in cases]


def test_a_job_has_the_layers_of_models_and_their_shares() -> None:
    """Published layers have their models' widths and sizes, and the package has kernels for every rank's heads."""
    job = planned(4, cuda=True, spec="h200.yaml", layer=None)
    sizes = {(c.shape.name, c.shape.hidden_size, c.form, c.batch, c.seq) for c in job.cases}
    assert ("m2rnn_7b", 1536, Form.HEADS_TOKENS, 8, 4096) in sizes
    assert ("m2rnn_410m", 1024, Form.EXCHANGE, 8, 8192) in sizes
    assert ("m2rnn_7b", 1536, Form.MESH, 1, 262144) in sizes
    assert ("m2rnn_410m_hybrid", 1024, Form.FSDP, 32, 4096) in sizes
    assert {name for name, *_ in sizes} == {"m2rnn_7b", "m2rnn_410m", "m2rnn_410m_hybrid"}
    built = (Path(job.package) / "built.py").read_text(encoding="utf-8")
    for heads in (132, 66, 33, 84, 42, 21):
        assert f"k64_v16_q1_k1_v{heads}_f{heads}_w{heads}_bf16" in built


def test_lengths_are_of_forms_that_exchange_tokens() -> None:
    """Lengths are of one sequence each, in the forms that exchange its tokens, beside one rank; sizes are of all."""
    assert cases_of("h200.yaml", requested(4, "m2rnn_7b", lengths=(64, 128))) == [
        ("m2rnn_7b", form, 1, seq) for seq in (64, 128) for form in ("one", "exchange", "mesh")
    ]
    only = requested(2, "m2rnn_7b", lengths=(64,), sizes=((3, 32),), forms=(Form.EXCHANGE, Form.FSDP))
    assert cases_of("h200.yaml", only) == [
        ("m2rnn_7b", "one", 3, 32),
        ("m2rnn_7b", "exchange", 3, 32),
        ("m2rnn_7b", "one", 1, 64),
        ("m2rnn_7b", "exchange", 1, 64),
        ("m2rnn_7b_hybrid", "one", 3, 32),
        ("m2rnn_7b_hybrid", "fsdp", 6, 32),
    ]


@pytest.mark.parametrize(
    ("counts", "ranks", "fitted"),
    [
        ((1, 1, 132, 132, 132), 4, (1, 1, 132, 132, 132)),
        ((1, 1, 132, 132, 132), 8, (1, 1, 136, 136, 136)),
        ((2, 1, 4, 4, 2), 8, (2, 1, 8, 8, 2)),
        ((3, 1, 6, 6, 2), 4, (4, 1, 8, 8, 2)),
        ((6, 1, 18, 18, 18), 4, (6, 1, 18, 18, 18)),  # 8 would not divide 20
    ],
)
def test_heads_are_rounded_up_to_what_ranks_share(counts: tuple[int, ...], ranks: int, fitted: tuple[int, ...]) -> None:
    """Layers get the fewest heads more with which ranks can share them out, where there are such."""
    found = fitting(make_variant(heads=counts), ranks)
    assert found.heads.counts == fitted
    assert {name for name, *_ in cases_of("h200.yaml", requested(8, "m2rnn_7b"))} == {
        "m2rnn_7b_136_heads",
        "m2rnn_7b_136_heads_hybrid",
    }


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are GPUs where there are enough, CPUs where there are none, and nothing in between."""
    for count, expected in ((0, False), (2, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert pipeline.has_gpus(2) is expected
    with pytest.raises(UsageError, match="--gpus must be at most the 2 that torch sees, got 3"):
        pipeline.has_gpus(3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}.__getitem__)
    assert not pipeline.has_gpus(8)
    with pytest.raises(UsageError, match=r"--gpus must be at most 8 on the CPUs of this host, .* 0\.5 GiB, got 9"):
        pipeline.has_gpus(9)


@pytest.mark.parametrize(
    ("forms", "options"),
    [((Form.ONE,), {}), ((Form.MESH,), {}), ((Form.FSDP,), {"lengths": (64,)}), ((Form.HEADS,), {"lengths": (64,)})],
)
def test_forms_of_which_nothing_runs(forms: tuple[Form, ...], options: dict[str, Any]) -> None:
    """One rank alone, a mesh of two ranks, and forms that take no single sequence are errors, not a run of nothing."""
    with pytest.raises(UsageError, match=rf"--form must be among .*exchange.*, got {forms[0]}$"):
        cases_of(TINY, requested(2, "base", forms=forms, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "8x4096"), "--size must be given with --gpus"),
        (("--form", "heads"), "--form must be given with --gpus"),
        (("--tokens", "64"), "--tokens must be given with --gpus"),
        (("--gpus", "2", "--size", "8"), "--size must be sequences x tokens, as 8x4096, got '8'"),
        (("--gpus", "2", "--sweep", "seq"), "--gpus must be given without --sweep"),
        (("--gpus", "2", "--plot", "a.svg"), "--gpus must be given without --plot"),
    ],
)
def test_options_that_do_not_fit(options: tuple[str, ...], message: str) -> None:
    """Options that say nothing about layers over ranks are refused."""
    assert message in fails(2, "bench", "--spec", TINY, *options)


def test_earlier_results_are_shown_and_not_run_on_ranks() -> None:
    """Ranks beside the file of an earlier run are refused: none would be started."""
    message = "--from must be given without --gpus: nothing is timed"
    assert message in fails(2, "bench", "--from", str(ROOT / "docs" / "data" / "ranks_2_h200.json"), "--gpus", "4")


# ------------------------------------------------------------------------------------------------------------ ranks

FOREVER = "import time; time.sleep(1e6)"
ENDINGS = {
    "status": ("import sys; print('out of luck'); sys.exit(3)", "rank 1 of 2 ended with status 3: out of luck"),
    "signal": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "rank 1 of 2 ended with SIGKILL"),
    "fault": (
        "import ctypes, faulthandler; faulthandler.enable(); print('so far', flush=True); ctypes.string_at(0)",
        r'rank 1 of 2 ended with SIGSEGV: so far; it was in ".*/ctypes/__init__\.py", line \d+ in string_at$',
    ),
    "error": (
        "import sys; open('error1.json', 'w').write('{\"at\": 1, \"error\": \"ValueError: no\"}'); sys.exit(1)",
        "rank 1 of 2 failed: ValueError: no",
    ),
}


def ranks(folder: Path, *programs: str) -> list[list[str]]:
    """Return commands of ranks, which write their process ids into the folder first."""
    start = "import os; os.chdir({!r}); print(os.getpid(), file=open('new.{}', 'w')); "
    start += "os.replace('new.{}', 'pid.{}'); {}"
    return [[sys.executable, "-c", start.format(str(folder), i, i, i, text)] for i, text in enumerate(programs)]


def gone(folder: Path, rank: int) -> bool:
    """Return whether a rank's process has ended."""
    try:
        os.kill(int((folder / f"pid.{rank}").read_text(encoding="utf-8")), 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_rank_that_dies_ends_the_others(tmp_path: Path, ending: str) -> None:
    """However a rank ends, the others end with it, and one error says which it was and why."""
    program, message = ENDINGS[ending]
    wait = "import time\nwhile not os.path.exists('pid.0'): time.sleep(0.01)\n"
    commands = ranks(tmp_path, FOREVER, f"exec({wait + program!r})")
    with pytest.raises(RanksError, match=message):
        list(run_ranks(commands, tmp_path, {}, PATIENCE))
    assert gone(tmp_path, 0)


class Ending:
    """A process that is seen to end after some looks, right before which it may speak."""

    def __init__(self, folder: Path, rank: int, status: int, says: str = "", looks: int = 0) -> None:
        self.returncode: int | None = None
        self._speak = partial(write_error, folder, rank, says) if says else lambda: None
        self._status, self._looks = status, looks

    def poll(self) -> int | None:
        """Return the status once it was looked at so often."""
        if self.returncode is None and self._looks == 0:
            self._speak()
            self.returncode = self._status
        self._looks -= 1
        return self.returncode


FUTURE = 1 << 33
"""A date, in seconds, that no run sees."""
CLOSED = "RuntimeError: connection closed by peer"
FIRST = {
    "spoke while it was looked at": ([(1, "ValueError: no")], "rank 0 of 1 failed: ValueError: no"),
    "killed, and seen late": ([(1, CLOSED), (-signal.SIGKILL, "", 3)], "rank 1 of 2 ended with SIGKILL"),
    "killed, after one that aborts": ([(-signal.SIGABRT,), (-signal.SIGKILL, "", 3)], "rank 1 of 2 ended with SIGKILL"),
    "aborts, before one speaks": ([(-signal.SIGABRT,), (1, CLOSED, 1)], "rank 0 of 2 ended with SIGABRT"),
    "aborts, since one spoke": (
        [(1, "ValueError: no"), (-signal.SIGABRT, "", 1)],
        "rank 0 of 2 failed: ValueError: no",
    ),
    "silent": ([(1, CLOSED), (3,)], "rank 1 of 2 ended with status 3"),
    "runs on": ([(1, "ValueError: no"), (1, CLOSED, 1), (0, "", -1)], "rank 0 of 3 failed: ValueError: no"),
}


@pytest.mark.parametrize("case", FIRST)
def test_the_first_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Whoever was killed is named, though others speak of that, and are seen to end, before."""
    monkeypatch.setattr(launch, "POLL_SECONDS", 0)
    endings, message = FIRST[case]
    processes = [Ending(tmp_path, rank, *ending) for rank, ending in enumerate(endings)]
    assert failure(processes, tmp_path).startswith(message)


def test_of_ranks_that_speak_the_first_is_named(tmp_path: Path) -> None:
    """Their own clock says who was first, though their files may have the same date."""
    for rank in (1, 0):
        write_error(tmp_path, rank, "ValueError: no" if rank == 1 else CLOSED)
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    assert failure([Ending(tmp_path, rank, 1) for rank in range(2)], tmp_path) == "rank 1 of 2 failed: ValueError: no"


FULL_DISK = """
import threading, time
from pathlib import Path
from m2gen.bench.ranks import worker

def full(*_: object) -> None:
    raise OSError(28, "No space left on device")

worker.write_error = full
threading.Thread(target=time.sleep, args=(1e6,)).start()  # as of a backend, for which an interpreter that ends waits
worker.main(Path({!r}), 0)
"""


def test_a_rank_that_cannot_say_why_ends(tmp_path: Path) -> None:
    """A rank whose error there is no room for ends with a status, rather than waits in the interpreter's last steps."""
    command = [sys.executable, "-c", FULL_DISK.format(str(tmp_path))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert found.returncode == 1
    assert "job.json" in found.stderr


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    """Ranks that write no results for too long are ended, and named."""
    with pytest.raises(RanksError, match=r"within 0\.5 s, got none of rank 0, 1"):
        list(run_ranks(ranks(tmp_path, FOREVER, FOREVER), tmp_path, {}, quiet_seconds=0.5))
    assert all(gone(tmp_path, rank) for rank in range(2) if (tmp_path / f"pid.{rank}").exists())


def test_what_hanging_ranks_do_is_said(tmp_path: Path) -> None:
    """Ranks that wait for each other say where they are, and one that is stopped is told from the others."""
    for rank in range(4):
        path = tmp_path / f"pulse{rank}.json"
        path.write_text(json.dumps({"pid": 1, "doing": f"times {rank == 1}"}))
        os.utime(path, (0, 0) if rank == 3 else (FUTURE, FUTURE))
    with pytest.raises(RanksError) as raised:
        list(run_ranks(ranks(tmp_path, *[FOREVER] * 4), tmp_path, {}, quiet_seconds=0.5))
    said = "got none of rank 0, 1, 2, 3; rank 0, 2: times False; rank 1: times True; rank 3: does not run, after: times"
    assert said in str(raised.value)


def test_a_killed_rank_among_collectives_ends_the_others(tmp_path: Path) -> None:
    """A rank that is killed while others wait for it over gloo is the one error, and nothing is left running."""
    job = planned(4, cuda=False)
    job = replace(job, cases=job.cases[:1] * 1000)  # so that it does not end by itself
    write(tmp_path / "job.json", job)
    commands = [worker_command(tmp_path, rank) for rank in range(4)]
    running = run_ranks(commands, tmp_path, {**LOOPBACK, **CPU}, job.quiet_seconds)
    while not (tmp_path / "results.json").is_file():
        next(running)
    os.kill(pid_of(tmp_path, 2), signal.SIGKILL)
    with pytest.raises(RanksError) as raised:
        list(running)
    assert str(raised.value).startswith("rank 2 of 4 ended with SIGKILL")
    for rank in range(4):
        with pytest.raises(ProcessLookupError):
            os.kill(pid_of(tmp_path, rank), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which tells a process that its parent has ended")
def test_a_rank_whose_launcher_has_gone_begins_nothing(tmp_path: Path) -> None:
    """A launcher that is killed before its ranks have imported torch, which takes seconds, leaves none of them."""
    (tmp_path / "torch.py").write_text("open('imported', 'w').close()", encoding="utf-8")
    *command, _ = worker_command(tmp_path, 0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run([*command, "0"], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["torch.py"]


def test_what_ends_a_run_ends_its_ranks(tmp_path: Path) -> None:
    """An interruption of the run ends every rank."""
    running = run_ranks(ranks(tmp_path, FOREVER, FOREVER), tmp_path, {}, PATIENCE)
    while not all((tmp_path / f"pid.{rank}").exists() for rank in range(2)):
        next(running)
    running.close()
    assert all(gone(tmp_path, rank) for rank in range(2))


# ------------------------------------------------------------------------------------------------------ whole runs


def check_rows(found: dict[str, Any], cases: Sequence[RankCase], ranks: int) -> None:
    """Every row agrees with one rank, has times, and sends what the model says."""
    assert found["backend"] == "gloo"
    assert [row["form"] for row in found["rows"]] == [case.form for case in cases]
    for row, case in zip(found["rows"], cases, strict=True):
        assert (row["failure"], row["unfit"]) == ("", "")
        assert 0 < row["worst"] <= 1
        assert row["step_ms"] > 0
        assert (row["efficiency"] is None) == (case.form is Form.ONE)
        if case.form is Form.PIPELINE:
            continue
        expected = traffic(case, ranks, fused=False)
        assert row["collectives"] == expected.collectives, case.form
        assert row["sent_bytes"] == pytest.approx(expected.sent, abs=expected.collectives), case.form
        assert (row["predicted_ms"] is None) == (case.form is Form.ONE)


def test_the_command_on_cpus(tmp_path: Path) -> None:
    """Every form agrees with one rank, and sends what the model says; the document is shown again as a table."""
    found = document("bench", "--spec", TINY, "--layer", "grouped", "--gpus", "2", "--form", "heads", "--form",
                     "heads_tokens", "--form", "exchange", "--form", "pipeline", "--quiet")  # fmt: skip
    check_rows(found, [case for case in planned(2, cuda=False, layer="grouped").cases if not case.shape.blocks], 2)
    path = tmp_path / "two.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    shown = run("bench", "--from", str(path)).stdout
    assert "2 ranks over gloo on CPU" in shown
    assert "tokens, exchanged" in shown
    assert "--plot must be of workloads or sweeps" in fails(2, "bench", "--from", str(path), "--plot", "a.svg")


def test_steps_as_graphs_are_what_is_compared(tmp_path: Path) -> None:
    """Efficiency is of captured steps where both are, else of called ones; what cannot be captured says why."""
    path = tmp_path / "two.json"
    shape = Shape("base", 32, 16, 16, dict.fromkeys("qkvfwg", 4), "fp32")
    cases = [RankCase(shape, form, 8, 64) for form in (Form.ONE, Form.HEADS, Form.HEADS_TOKENS)]
    one = RankRow("base", Form.ONE, 8, 64, 1, step_ms=12.0, captured_ms=10.0, recurrence_ms=6.0)
    heads = RankRow("base", Form.HEADS, 8, 64, 2, step_ms=9.0, captured_ms=6.25, recurrence_ms=3.0)
    outside = replace(heads, form=Form.HEADS_TOKENS, step_ms=8.0, captured_ms=None, uncaptured="it asks the host")
    write(path, RankDocument(None, "gloo", Link(1.0, 0.1), tuple(cases), (one, heads, outside)))
    rows = document("bench", "--from", str(path))["rows"]
    assert [row["efficiency"] for row in rows] == [None, pytest.approx(0.8), pytest.approx(12 / 16)]
    shown = " ".join(run("bench", "--from", str(path)).stdout.split())
    assert "heads, tokens outside is not captured: it asks the host" in shown


def test_four_ranks_on_cpus(tmp_path: Path) -> None:
    """A mesh of two dims and FSDP agree with one rank, and send what the model says; the file has what is printed."""
    path = tmp_path / "four.json"
    shown = run("bench", "--spec", TINY, "--layer", "base", "--gpus", "4", "--form", "mesh", "--form", "fsdp",
                "--out", str(path), "--quiet").stdout  # fmt: skip
    cases = [case for case in planned(4, cuda=False).cases if case.form in (Form.MESH, Form.FSDP) or case.seq == 8]
    found = json.loads(path.read_text(encoding="utf-8"))
    forms = ("one", "mesh", "one", "fsdp")
    check_rows(found, [next(c for c in cases if (c.form, bool(c.shape.blocks)) == (form, i > 1))
                       for i, form in enumerate(forms)], 4)  # fmt: skip
    assert [row["layer"] for row in found["rows"]] == ["base_4_heads"] * 2 + ["base_4_heads_hybrid"] * 2
    assert "mesh 2 x 2" in shown
    assert "B1 a rank S8" in shown


def test_what_a_model_rounds_is_a_draw() -> None:
    """Budgets of ranks count what the very model that they split rounds, which shuffled ones need not magnify alike."""
    heads = {"q": 2, "k": 1, "v": 4, "f": 4, "w": 2, "g": 4}
    shape = Shape("hybrid", 32, 9, 9, heads, "fp32", HYBRID)
    case = RankCase(shape, Form.ONE, 1, 8)
    make = partial(check.make_model, import_module("generated.tiny"), shape, False, 0)
    found = check.expected(make, case, 2, packed=False)
    model, x = make(), found.x.clone().requires_grad_()
    named = dict(model.named_parameters())
    y = model(x)
    gradients = torch.autograd.grad(y, [x, *named.values()], found.weights)
    given = {"y": y.detach(), **dict(zip(("dx", *named), gradients, strict=True))}
    assert given.keys() == found.exact.keys()
    for name, value in given.items():
        exact = found.exact[name]
        assert 2 * ((value - exact).norm() / exact.norm()).item() < found.budgets[name], name


def test_another_shape_is_infinitely_wrong() -> None:
    """What torch would spread over the exact result is not taken for it."""
    assert check._distance(torch.ones(1), torch.ones(3)) == float("inf")
    assert check._distance(torch.ones(3), torch.ones(3)) == 0


WRONG = {
    "exchange.py": ("mixed, f = torch.split(rows,", "mixed, f = torch.split(1.01 * rows,", Form.EXCHANGE),
    "products.py": ("return scattered(F.linear(x,", "return scattered(F.linear(1.01 * x,", Form.HEADS_TOKENS),
}


@pytest.mark.parametrize("module", WRONG)
def test_wrong_results_are_not_timed(tmp_path: Path, module: str) -> None:
    """A form whose results or gradients are not one rank's has no times, and says which tensor is wrong."""
    right, wrong, form = WRONG[module]
    job = planned(2, cuda=False)
    package = tmp_path / "package"
    shutil.copytree(job.package, package, ignore=shutil.ignore_patterns("__pycache__"))  # others may write it now
    path = package / "parallel" / module
    text = path.read_text(encoding="utf-8")
    assert right in text
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    cases = tuple(case for case in job.cases if case.form is form)
    (*_, last) = pipeline.over_ranks(replace(job, package=str(package), cases=cases), QUIET)
    (row,) = last.rows
    assert "must be within its budget, got " in row.failure
    assert row.step_ms is None


def test_forms_that_do_not_fit() -> None:
    """Heads that three ranks cannot share, and tokens that they cannot, are results that say so."""
    job = planned(3, cuda=False)
    two = replace(job.cases[1].shape, heads=dict.fromkeys("vfwg", 2) | {"q": 1, "k": 1})
    cases = (replace(job.cases[1], shape=two, seq=6), replace(job.cases[3], seq=7), replace(job.cases[-1], batch=4))
    (*_, last) = pipeline.over_ranks(replace(job, cases=cases), QUIET)
    heads, tokens, sequences = (row.unfit for row in last.rows)
    assert sequences == "4 sequences must be divided by 3 ranks"
    assert heads == "M2RNN: heads of v must divide, or be divided by, 3 ranks, got 2"
    assert tokens == "7 tokens of a sequence must be divided by 3 ranks"


# ------------------------------------------------------------------------------------------------------- the model


def row_of(form: Form, ranks: int, **times: float) -> RankRow:
    """Return a row of the 7B layer."""
    return RankRow("m2rnn_7b", form, 8, 4096, ranks, **times)


def test_forecasts_by_hand() -> None:
    """A forecast has the recurrence of the heads of an SM, a measured layer's rest, and what the form sends."""
    points = ((1.0, 0.4), (4.0, 0.8), (5.0, 1.0))
    assert [token_us(x, points) for x in (0.1, 1.0, 2.5, 5.0, 10.0)] == pytest.approx([0.4, 0.4, 0.6, 1.0, 2.0])
    layer = MeasuredLayer(132, 1536, 4, 4096, 2.0, 5.0, 0.8 * 4.096, 1.0, 1 << 30)
    attention = MeasuredLayer(0, 1536, 4, 4096, 1.0, 3.0, 1.0, 1.0, 1 << 29)
    known = OneGpu({"m2rnn_7b": layer}, {"m2rnn_7b": attention}, points, 132)
    link = Link(100.0, 0.0)
    case = RankCase(SEVEN, Form.EXCHANGE, 4, 8192)
    found = forecast(case, 2, known, link)
    assert found.one_ms == pytest.approx(10.0)
    sends = traffic(case, 2, fused=True).sent / 100e9 * 1e3
    rest = (10.0 - 0.8 * 8.192) / 2
    there, back = 2320, 66 * 16  # columns of a rank's heads, and those of a forward product whose time they take
    products = [2 / 3 * rest / 3 * columns / (there + back) for columns in (there, back)]
    each = [columns * 4 * 8192 * 2 / 2 / 100e6 for columns in (there, back)]  # of an exchange, at 10^8 bytes a ms
    behind = [0.75 * products[0], 0.5 * products[1], 1.75 * products[1], 1.0 * products[0]]
    assert all(time > product for time, product in zip(each[:1] + each[1:] * 2 + each[:1], behind, strict=True))
    assert found.step_ms == pytest.approx(8192 * token_us(2.0, points) / 1e3 + rest + sends - sum(behind))
    assert found.efficiency == pytest.approx(10.0 / 2 / found.step_ms)
    assert found.communication_ms == pytest.approx(sends)
    hybrid = replace(SEVEN, name="m2rnn_7b_hybrid", blocks=(Mixing.M2RNN, Mixing.ATTENTION))
    columns = 2 * 64 + 3 * 132 * 16 + 132  # of the layer's projections, which take 1 ms
    mlp = 2 * 4 * 1536 / columns
    alone = forecast(RankCase(hybrid, Form.FSDP, 32, 4096), 8, known, Link(1e9, 0.0))
    assert alone.one_ms == pytest.approx(5.0 + 3.0 + 2 * mlp)
    assert alone.step_ms == pytest.approx(alone.one_ms, rel=1e-6)
    assert alone.efficiency == pytest.approx(1.0, rel=1e-6)
    more = {name: 136 if count == 132 else count for name, count in hybrid.heads.items()}
    plain = replace(hybrid, heads=more, blocks=(Mixing.ATTENTION,) * 2)
    rounded = forecast(RankCase(plain, Form.FSDP, 32, 4096), 8, known, Link(1e9, 0.0))
    assert rounded.one_ms == pytest.approx(2 * 3.0 + 2 * mlp), "however many heads other layers have"
    slow = forecast(RankCase(hybrid, Form.FSDP, 32, 4096), 8, known, Link(1e-3, 0.0))
    each = 7 / 8 * model_bytes(hybrid) / 2 / 1e3  # of a block, at 10^3 bytes a millisecond
    forward = (2.0 + 1.0 + 2 * mlp / 3) / 2
    assert slow.step_ms == pytest.approx(alone.one_ms + 2 * each + 3 * each - alone.one_ms / 2, rel=1e-3)
    assert forward < each


def test_the_model_by_hand() -> None:
    """Predictions are sums that can be done by hand."""
    one = row_of(Form.ONE, 1, step_ms=10.0, recurrence_ms=6.0)
    link = Link(100.0, 0.0)
    exchange = RankCase(SEVEN, Form.EXCHANGE, 8, 4096)
    there, back = (1 + 1) * 64 + 66 * 16 + 66, 66 * 16
    parameters = 1536 * (2 * 64 + 3 * 132 * 16 + 132) + 4 * (2 * 64 + 132 * 16) + 132 * 256 + 2 * 132 * 16
    sent = 2 * (there + back) * 8 * 4096 * 2 / 2 + 2 / 2 * (2 * parameters + 8 * 132)
    assert traffic(exchange, 2, fused=False).sent == pytest.approx(sent)
    gates = 66 * 16 + 14  # and zeros up to 2320 columns
    assert traffic(exchange, 2, fused=True).sent == pytest.approx(sent + 2 * gates * 8 * 4096 * 2 / 2)
    assert [traffic(replace(exchange, batch=batch), 2, fused=True).collectives for batch in (1, 8, 16, 17)] == [
        6, 8, 8, 6
    ]  # fmt: skip
    assert traffic(exchange, 2, fused=False).collectives == 6
    wide = replace(exchange, shape=replace(SEVEN, dtype="fp32"))
    assert traffic(wide, 2, fused=False).collectives == 5, "gradients of one dtype are one sum"
    expected = 4.0 / 2 + 3.2 + sent / 100e9 * 1e3
    assert predicted_ms(exchange, row_of(Form.EXCHANGE, 2, recurrence_ms=3.2), one, link, fused=False) == pytest.approx(
        expected
    )
    pipeline_case = RankCase(SEVEN, Form.PIPELINE, 8, 4096)
    sends = traffic(pipeline_case, 2, fused=True).sent / 100e9 * 1e3
    handed = predicted_ms(pipeline_case, row_of(Form.PIPELINE, 2, recurrence_ms=1.5), one, link, fused=True)
    assert handed == pytest.approx(3 * (4.0 / 2 / 2 + 1.5) + sends)
    assert predicted_ms(exchange, row_of(Form.EXCHANGE, 2), one, link, fused=True) is None


def test_memory_by_hand() -> None:
    """A rank keeps what its tokens and heads need, parameters with their gradients, and x and y with theirs."""
    layer = MeasuredLayer(132, 1536, 4, 4096, 2.0, 5.0, 3.0, 1.0, 1 << 30)
    known = OneGpu({"m2rnn_7b": layer}, {"m2rnn_7b": replace(layer, extra_bytes=1 << 29)}, ((1.0, 0.5),), 132)

    def memory(shape: Shape, form: Form, ranks: int) -> float:
        return forecast(RankCase(shape, form, 8, 8192), ranks, known, Link(100.0, 0.0)).memory

    def parameters(heads: int) -> int:
        mixed = 2 * 64 + heads * 16
        wide = 1536 * (mixed + 2 * heads * 16 + heads) + 4 * mixed + heads * 256 + 2 * heads * 16
        return 2 * wide + 8 * heads

    kept, ends = (1 << 30) * 4 / 2, 4 * 8 * 8192 * 1536 * 2  # of two ranks, and of all tokens
    assert memory(SEVEN, Form.EXCHANGE, 2) == pytest.approx(kept + 2 * parameters(132) + ends / 2)
    assert memory(SEVEN, Form.HEADS, 2) == pytest.approx(kept + 2 * parameters(66) + ends)
    assert memory(SEVEN, Form.HEADS_TOKENS, 2) == pytest.approx(kept + 2 * parameters(66) + ends / 2)
    assert memory(SEVEN, Form.MESH, 4) == pytest.approx(kept / 2 + 2 * parameters(66) + ends / 2)
    hybrid = replace(SEVEN, blocks=(Mixing.M2RNN, Mixing.ATTENTION))
    inner = 2 * 4 * 1536 * 2 * 8 * 8192 / 2  # of an MLP, before its activation and after it
    held = 2 * model_bytes(hybrid) / 2
    assert memory(hybrid, Form.FSDP, 2) == pytest.approx(1.5 * kept + 2 * inner + held + ends / 2)


def test_every_collective_has_its_latency() -> None:
    """A link that takes half a millisecond for each adds that to a step as often as something is sent."""
    quick, slow = Link(100.0, 0.0), Link(100.0, 0.5)
    one = row_of(Form.ONE, 1, step_ms=10.0, forward_ms=4.0, recurrence_ms=6.0)
    for form, collectives in ((Form.HEADS, 3), (Form.HEADS_TOKENS, 6), (Form.EXCHANGE, 6), (Form.PIPELINE, 4)):
        case, row = RankCase(SEVEN, form, 8, 4096), row_of(form, 2, recurrence_ms=3.0)
        shared = 2 if form in (Form.HEADS, Form.HEADS_TOKENS) else 0  # rows of q and k, and what convolves them
        times = [predicted_ms(case, row, one, link, fused=False) for link in (quick, slow)]
        assert times[1] - times[0] == pytest.approx(0.5 * (collectives + shared)), form
    hybrid = replace(SEVEN, blocks=(Mixing.M2RNN, Mixing.ATTENTION, Mixing.ATTENTION))
    case, row = RankCase(hybrid, Form.FSDP, 8, 4096), row_of(Form.FSDP, 2)
    times = [predicted_ms(case, row, one, Link(1.0, latency), fused=False) for latency in (0.0, 0.5)]
    assert times[1] - times[0] == pytest.approx(0.5 * (2 + 2 * 3)), "a gather first, two and a scatter in each block"


def test_a_block_hides_what_is_sent_while_it_runs() -> None:
    """FSDP gathers a block while one runs forwards, and backwards gathers one and scatters another one's gradients."""
    hybrid = replace(SEVEN, blocks=(Mixing.M2RNN,) * 4)
    case, row = RankCase(hybrid, Form.FSDP, 8, 4096), row_of(Form.FSDP, 2)
    one = row_of(Form.ONE, 1, step_ms=20.0, forward_ms=8.0)  # 2 ms of each block forwards, 3 ms backwards
    block = model_bytes(hybrid) / 2 / 4
    for each, beyond in ((1.0, 0.0), (1.75, 0.5), (2.5, 2.5)):
        found = predicted_ms(case, row, one, Link(block / each / 1e6, 0.0), fused=True)
        assert found == pytest.approx(20.0 + 2 * each + 3 * beyond)


def test_a_forecast_of_more_heads_has_wider_projections() -> None:
    """What is no recurrence grows with the heads of a layer that is like the measured one."""
    layer = MeasuredLayer(132, 1536, 4, 4096, 2.0, 5.0, 3.0, 1.0, 1 << 30)
    known = OneGpu({"m2rnn_7b": layer}, {"m2rnn_7b": layer}, ((1.0, 0.5), (8.0, 4.0)), 132)
    heads = {name: 2 * count if count == 132 else count for name, count in SEVEN.heads.items()}
    found = forecast(RankCase(replace(SEVEN, heads=heads), Form.EXCHANGE, 2, 4096), 2, known, Link(1e9, 0.0))
    assert found.one_ms == pytest.approx(4096 * 2.0 / 1e3 + (5.0 - 3.0) / 2 * 2)


def test_ranks_on_gpus_exclude_other_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU has its lock, as for a tuner or a benchmark, before any rank starts."""
    held: list[str] = []

    @contextmanager
    def exclusive(gpu: str) -> Iterator[None]:
        held.append(gpu)
        if gpu == "gpu-1":
            raise TuneError("one tuner or benchmark at a time must use gpu-1")
        yield

    monkeypatch.setattr(several.lock, "exclusive", exclusive)
    monkeypatch.setattr(several, "gpu_name", lambda index: f"gpu-{index}")
    monkeypatch.setattr(several, "run_ranks", lambda *_: pytest.fail("a rank was started"))
    job = planned(2, cuda=True, spec="h200.yaml", layer="m2rnn_7b")
    with pytest.raises(TuneError, match="must use gpu-1"):
        list(several.over_ranks(job, TerminalProgress(quiet=True)))
    assert held == ["gpu-0", "gpu-1"]


def test_results_before_a_failure_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks had written when one of them failed is given before the error, however soon after it that was."""
    job = planned(2, cuda=False)
    rows = (RankRow(job.cases[0].shape.name, Form.ONE, 1, 8, 1),)

    def failing(commands: object, folder: Path, *_: object) -> Iterator[None]:
        write(folder / "results.json", RankDocument(None, "gloo", Link(1.0, 1.0), job.cases, rows))
        raise RanksError("rank 1 of 2 failed")
        yield

    monkeypatch.setattr(several, "run_ranks", failing)
    found: list[RankDocument] = []
    with pytest.raises(RanksError, match="rank 1 of 2 failed"):
        found.extend(several.over_ranks(job, QUIET))
    assert [document.rows for document in found] == [rows]


def test_layers_of_an_earlier_run() -> None:
    """``--from`` shows those that are asked for, and says which there are."""
    earlier = str(ROOT / "docs" / "data" / "ranks_2_h200.json")
    text = run("bench", "--from", earlier, "--layer", "m2rnn_410m").stdout
    assert "m2rnn_410m bf16, hidden 1024" in text
    assert "m2rnn_7b" not in text
    line = fails(2, "bench", "--from", earlier, "--layer", "nosuch")
    assert "--layer must be among m2rnn_7b, m2rnn_410m, got 'nosuch'" in line
