"""The command line: exit statuses, one-line errors, and documents that parse."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from command_line import KEY, SPEC, TINY, document, fails, outcome, row, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

from m2gen import __version__, pipeline
from m2gen.cli import main
from m2gen.cli.show import build
from m2gen.cli.show import info as shown_info
from m2gen.cli.verify import LARGEST_SEED
from m2gen.device import TARGETS
from m2gen.kernels.resources import Resources
from m2gen.measure import context
from m2gen.verify import TensorResult


def test_the_installed_command_and_the_module_are_the_same() -> None:
    """``python -m m2gen`` runs the command line, with its exit statuses and without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "m2gen", "build", "--spec", "absent.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_version() -> None:
    """The version is that of the package."""
    assert run("version").stdout == run("--version").stdout == f"m2gen {__version__}\n"


@pytest.mark.parametrize("command", ["build", "check", "verify", "bench"])
def test_a_spec_that_is_not_there(command: str) -> None:
    """Every command that takes a spec says which it did not find."""
    assert "absent.yaml" in fails(2, command, "--spec", "absent.yaml")


@pytest.mark.parametrize("command", [["build"], ["check"], ["verify"], ["spec", "show"]], ids=" ".join)
def test_a_wrong_spec_is_one_line_a_problem(spec: Path, command: list[str]) -> None:
    """Each problem of a spec is a line that begins with its place, and nothing is written."""
    spec.write_text(SPEC.replace("head_dim: 16", "head_dim: 0").replace("q: 1, k: 1", "q: 2, k: 3"), encoding="utf-8")
    result = run(*command, "--spec", "one.yaml")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 2
    assert all(line.startswith("one.yaml: $.layers.base.") for line in result.stderr.splitlines())
    assert not (spec.parent / "generated").exists()


@pytest.mark.parametrize("more", [(), ("--json",), ("--debug",)], ids=" ".join)
@pytest.mark.parametrize("command", [("check",), ("spec", "show"), ("build", "--no-verify")], ids=" ".join)
def test_a_grid_of_mistakes_prints_the_first(command: tuple[str, ...], more: tuple[str, ...], spec: Path) -> None:
    """Twenty problems and how many more there are, whatever else is asked for; never a megabyte."""
    values = ", ".join(str(-n) for n in range(1, 2001))
    spec.write_text(SPEC.replace("head_dim: 16", f"head_dim: [{values}]"), encoding="utf-8")
    result = run(*command, "--spec", "one.yaml", *more)
    assert result.stdout == ""
    lines = (str(result.exception) if more == ("--debug",) else result.stderr).splitlines()
    assert len(lines) == 21
    assert all(line.startswith(f"one.yaml: $.layers.base.head_dim[{i}] must be") for i, line in enumerate(lines[:20]))
    assert lines[20] == "and 1980 more"


def test_names_that_there_are_many_of(spec: Path) -> None:
    """An unknown layer is told the first ones that there are."""
    base = SPEC.splitlines()[-1]
    layers = "\n".join(base.replace("base", f"layer{n}") for n in range(500))
    spec.write_text(SPEC.replace(base, layers), encoding="utf-8")
    line = fails(2, "db", "why", "none", "--spec", "one.yaml")
    assert "LAYER must be among layer0, layer1, " in line
    assert line.endswith("layer19, and 480 more, or a variant, got 'none'")


def test_many_failures_are_listed_in_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Kernels that cannot launch and tensors over budget: twenty lines, and how many more; documents have all."""
    rows = [row("too many registers")] * 50
    assert build.show_check(rows, as_json=False, quiet=True) == 1
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines), lines[-1]) == (21, "m2gen: and 30 more")
    monkeypatch.setattr(pipeline, "verify", lambda *_: outcome(*[2e-3] * 50))
    result = run("verify", "--spec", TINY, "--quiet")
    assert (len(result.stderr.splitlines()), result.stderr.splitlines()[-1]) == (21, "m2gen: and 30 more")
    (case,) = document("verify", "--spec", TINY, status=1)["cases"]
    assert len(case["results"]) == 50


def test_debug_shows_the_traceback() -> None:
    """With --debug an error shows where it came from."""
    command = [sys.executable, "-m", "m2gen", "check", "--spec", "absent.yaml", "--debug"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Traceback (most recent call last)" in done.stderr
    assert "SpecError" in done.stderr


def test_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a command with the status that shells expect, in one line."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "verify", interrupt)
    assert "interrupted" in fails(130, "verify", "--spec", TINY)


UNKNOWN = {
    "target": (("check", "--target", "sm_1"), "--target must be among sm_80"),
    "variant": (("verify", "--variant", "k1"), f"--variant must be among {KEY}"),
    "case": (("verify", "--case", "none"), "--case must be among ragged"),
    "feature": (("verify", "--feature", "packed", "--feature", "none"), "--feature must be among recurrence, packed"),
    "layer": (("bench", "--layer", "none"), "must"),
}


@pytest.mark.parametrize(("command", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_names_list_the_known(command: tuple[str, ...], message: str) -> None:
    """A target, variant, case or layer that does not exist is told which do."""
    line = fails(2, command[0], "--spec", TINY, "--quiet", *command[1:])
    assert message in line
    assert line.startswith("m2gen: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_bench_needs_a_gpu() -> None:
    """Without a GPU, timing is refused rather than done in the interpreter."""
    assert "GPU" in fails(2, "bench", "--spec", TINY)


def test_an_unknown_option() -> None:
    """A mistyped option is a usage error."""
    assert run("check", "--spec", TINY, "--targets", "sm_90").exit_code == 2


def test_spec_show_and_schema() -> None:
    """The variants and the schema come as documents."""
    shown = document("spec", "show", "--spec", TINY)
    assert shown["variants"][0]["variant"] == KEY
    assert [variant["layers"] for variant in shown["variants"]] == [["base"], ["base"], ["grouped"]]
    table = run("spec", "show", "--spec", TINY).stdout
    assert "base fp32     16  16  1 1 2 2 2" in table
    assert KEY not in table
    assert KEY in run("spec", "show", "--spec", TINY, "--verbose").stdout
    assert "layers" in json.loads(run("spec", "schema").stdout)["properties"]


def test_info() -> None:
    """The device, versions and folders come as a table and as a document."""
    facts = document("info")
    assert facts["versions"]["m2gen"] == __version__
    assert facts["targets"] == list(TARGETS)
    assert (facts["device"] is not None) == torch.cuda.is_available()
    assert facts["versions"]["torch"] in run("info").stdout


def test_info_is_what_a_report_of_a_fault_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every dependency has its version, the GPU its driver, and variables that change the result are there."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    monkeypatch.setenv("TRITON_HOME", "/elsewhere")
    device = replace(H100, name="NVIDIA H100")
    monkeypatch.setattr(shown_info, "detect", lambda: device)
    monkeypatch.setattr(context, "driver", lambda: "999.1")
    facts = document("info")
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    assert set(map(canonicalize_name, facts["versions"])) == {"m2gen", "python", *names}
    assert facts["device"]["name"] == "NVIDIA H100"
    assert facts["toolchain"]["driver"] == "999.1"
    assert facts["variables"]["TRITON_HOME"] == "/elsewhere"
    assert facts["folders"].keys() == {"specs", "templates", "tuning_db", "cache"}
    assert "999.1" in run("info").stdout


def test_check_gives_the_resources_of_every_kernel() -> None:
    """Every kernel of the tiny spec compiles for an H100, and takes what the compiler says."""
    kernels = document("check", "--spec", TINY, "--target", "sm_90", "--quiet")["kernels"]
    assert len({kernel["variant"] for kernel in kernels}) == 3
    modules = {(kernel["variant"], kernel["schedule"]) for kernel in kernels}
    names = [(*module, name) for module in modules for name in ("forward", "backward", "step")]
    assert sorted((each["variant"], each["schedule"], each["kernel"]) for each in kernels) == sorted(names)
    for kernel in kernels:
        assert kernel["target"] == "sm_90"
        assert kernel["problems"] == []
        assert 16 <= kernel["resources"]["registers"] <= 255
        assert kernel["resources"]["code_bytes"] > 1000
        assert 0 <= kernel["resources"]["shared_bytes"] <= 227 * 1024


H100 = TARGETS["sm_90"]
TAKEN = {
    "fits": (Resources(255, 64, 227 * 1024, 9000), 4, ()),
    "shared": (Resources(64, 0, 227 * 1024 + 1, 9000), 4, ("shared memory must be at most 232448 bytes, got 232449",)),
    "registers": (Resources(256, 0, 0, 9000), 4, ("registers must be at most 255 a thread, got 256",)),
    "register_file": (Resources(255, 0, 0, 9000), 16, ("registers must be at most 65536 a program, got 130560",)),
}


@pytest.mark.parametrize(("taken", "warps", "reasons"), TAKEN.values(), ids=TAKEN.keys())
def test_kernels_that_cannot_launch_are_told_why(taken, warps, reasons) -> None:
    """Shared memory, registers a thread and registers a program have limits."""
    assert taken.limits(H100, warps) == reasons


@pytest.mark.parametrize("as_json", [False, True])
def test_a_kernel_that_cannot_launch_fails_the_check(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    """One kernel over a limit is exit status 1 and, beside the table, one line on standard error."""
    assert build.show_check([row()], as_json=as_json, quiet=False) == 0
    assert build.show_check([row(), row("too many registers")], as_json=as_json, quiet=False) == 1
    lines = ["m2gen: base fp32 forward on sm_90: too many registers"]
    assert capsys.readouterr().err.splitlines() == ([] if as_json else lines)


AGAIN = f"m2gen verify --spec tiny.yaml --variant {KEY} --case ragged --seed 7"


def test_a_failing_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor over budget is exit status 1, and everywhere named with error, budget and how to see it again."""
    monkeypatch.setattr(pipeline, "verify", lambda *_: outcome(1e-4, 2e-3, float("nan")))
    result = run("verify", "--spec", TINY, "--junit", str(tmp_path / "report.xml"), "--quiet")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    expected = f"m2gen: base fp32 ragged: t1 must be within 1.00e-03, got 2.00e-03; reproduce: {AGAIN}"
    assert lines == [expected, expected.replace("t1", "t2").replace("2.00e-03", "nan")]
    assert result.stdout.splitlines() == ["1 case, 3 tensors, 2 over budget, 0 without results, 0.5 s"]
    (case,) = ElementTree.parse(tmp_path / "report.xml").iter("testcase")
    failure = case.find("failure")
    assert (case.get("classname"), case.get("name"), case.get("time")) == (KEY, "ragged", "0.250")
    assert failure is not None
    assert "t1 must be within 1.00e-03, got 2.00e-03" in str(failure.get("message"))
    assert AGAIN in str(failure.text)
    (case,) = document("verify", "--spec", TINY, "--quiet", status=1)["cases"]
    assert (case["passed"], case["reproduce"], case["feature"]) == (False, AGAIN, "recurrence")
    assert [result["error"] for result in case["results"]] == [1e-4, 2e-3, "nan"]


def test_a_document_has_no_number_that_json_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of a reference that overflows is a string, as are such errors: JSON has neither infinities nor NaN."""
    found = outcome(math.inf, 1e-4)
    (report,) = found.reports
    results = (*report.results, TensorResult("t2", 1e-4, math.inf), TensorResult("t3", 1e-4, math.nan))
    found = replace(found, reports=(replace(report, results=results),))
    monkeypatch.setattr(pipeline, "verify", lambda *_: found)
    result = run("verify", "--spec", TINY, "--json")
    (case,) = json.loads(result.stdout, parse_constant=pytest.fail)["cases"]
    assert [x["error"] for x in case["results"]] == ["inf", 1e-4, 1e-4, 1e-4]
    assert [x["budget"] for x in case["results"]] == [1e-3, 1e-3, "inf", "nan"]


def test_a_case_that_broke_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case without results is exit status 1 and an error, apart from the tensors that are over budget."""
    monkeypatch.setattr(pipeline, "verify", lambda *_: outcome(failure="its process ended with SIGSEGV"))
    result = run("verify", "--spec", TINY, "--junit", str(tmp_path / "report.xml"))
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"m2gen: base fp32 ragged: its process ended with SIGSEGV; reproduce: {AGAIN}",
    ]
    assert "1 FAILED" in result.stdout
    suite = ElementTree.parse(tmp_path / "report.xml").find("testsuite")
    assert suite is not None
    counts = (suite.get("name"), suite.get("tests"), suite.get("failures"), suite.get("errors"))
    assert counts == ("recurrence", "1", "0", "1")
    assert suite.find("testcase/error") is not None
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert properties == {"feature": "recurrence", "dtype": "fp32", "seed": "7", "reproduce": AGAIN}


def test_verify_prints_a_line_a_feature_and_a_line_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables name each feature's and each tensor's worst case."""
    monkeypatch.setattr(pipeline, "verify", lambda *_: outcome(1e-4, 5e-4))
    lines = [line.split() for line in run("verify", "--spec", TINY).stdout.splitlines()]
    assert ["recurrence", "1", "0.2", "ok", "50%:", "t1", "of", "ragged,", "base", "fp32"] in lines
    assert ["t0", "1.00e-04", "1.00e-03", "10%", "ragged", "base", "fp32"] in lines
    assert not any(KEY in line for line in lines)
    assert KEY in run("verify", "--spec", TINY, "--verbose").stdout


@pytest.mark.parametrize("options", [(), ("--full", "--spec", TINY), ("--full", "--quick")], ids=" ".join)
def test_verify_takes_a_spec_or_everything(options: tuple[str, ...]) -> None:
    """The command verifies either a spec or the full matrix."""
    assert "must be given --spec" in fails(2, "verify", *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the matrix on")
@pytest.mark.parametrize("options", [("--no-db",), ("--db", "db")], ids=" ".join)
def test_the_full_matrix_takes_no_database(options: tuple[str, ...]) -> None:
    """What would be ignored is an error."""
    assert "--db and --no-db must be given with --spec" in fails(2, "verify", "--full", *options)


def test_the_full_matrix_needs_a_gpu() -> None:
    """Without a GPU, the full matrix is refused rather than thinned out."""
    assert "--full must run on a machine whose GPU torch can use, got none" in fails(2, "verify", "--full")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("verify", "--spec", ""), "$ must be a spec file"),
        (("build", "--check", "--spec", ""), "$ must be a spec file"),
        (("check", "--spec", TINY, "--target", ""), "--target must be among"),
        (("tune", "--spec", TINY, "--dry-run", "--target", ""), "must be among"),
        (("tune", "--spec", TINY, "--dry-run", "--storage", ""), "--storage must be the URL of a database, got ''"),
    ],
)
def test_empty_options_are_not_as_if_not_given(command: tuple[str, ...], said: str) -> None:
    """A variable of a shell that is not set does not have the command do something else."""
    assert said in fails(2, *command)


def test_an_interrupt_while_modules_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands load what they need before they could report anything, and that takes a second."""

    class Loading(ModuleType):
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "m2gen.cli.show.info", Loading("m2gen.cli.show.info"))
    assert fails(130, "info") == "m2gen: interrupted"


def test_a_dry_run_takes_no_option_of_searches(tmp_path: Path) -> None:
    """A report of searches that never ran would not be written, and nobody would be told."""
    page = tmp_path / "page.html"
    given = ("tune", "--spec", TINY, "--dry-run", "--target", "sm_90", "--report", str(page), "--fresh")
    assert "--dry-run searches nothing, and takes no --report, --fresh" in fails(2, *given)
    assert not page.exists()


def test_seeds_that_cannot_be_used() -> None:
    """What torch's generators do not take is an error of the command line; what they take is none."""
    for command in ("verify", "tune", "bench"):
        result = run(command, "--spec", TINY, "--seed", str(2**64))
        assert result.exit_code == 2
        assert "--seed" in result.stderr
    torch.Generator().manual_seed(LARGEST_SEED + 2**20)
    torch.Generator().manual_seed(-(2**63))


@pytest.mark.parametrize("columns", ["0", "00"])
def test_a_width_of_nothing_is_none(columns: str) -> None:
    """Help and tables are there, whatever a terminal that has no size yet says."""
    for command in (["--help"], ["spec", "show", "--spec", TINY]):
        done = subprocess.run(
            [sys.executable, "-m", "m2gen", *command],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": columns},
            capture_output=True,
            text=True,
            check=True,
        )
        assert len(done.stdout.splitlines()) > 3


def test_verify_one_case_in_the_interpreter(spec: Path) -> None:
    """A real verification of one case passes, and its documents agree."""
    arguments = ("verify", "--spec", "one.yaml", "--case", "steps_1", "--seed", "3", "--quiet")
    outcome = document(*arguments, "--junit", "report.xml")
    (case,) = outcome["cases"]
    assert outcome["passed"]
    assert (case["case"], case["seed"]) == ("steps_1", 3)
    assert {result["tensor"] for result in case["results"]} == {"y", "state", "dq", "dk", "dv", "dweight", "dforget"}
    suite = ElementTree.parse(spec.parent / "report.xml").find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("1", "0")


def test_verify_two_features_in_the_interpreter(spec: Path) -> None:
    """All cases of the features that are asked for, and no others."""
    outcome = document("verify", "--spec", "one.yaml", "--feature", "drop_in", "--feature", "states", "--quiet")
    assert outcome["passed"]
    assert {case["feature"] for case in outcome["cases"]} == {"drop_in", "states"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "bench --spec x --quantity mem",
            "--quantity must be among time, memory, got 'mem' (see `m2gen bench --help`)",
        ),
        ("bench --spec x --gpus 0", "--gpus must be greater than or equal to 2, got '0'"),
        ("tune --spec x --trials many", "--trials must be a valid integer, got 'many'"),
        ("db show", "Missing argument 'ID'. (see `m2gen db show --help`)"),
        ("bench --spce x", "No such option: --spce"),
        ("benhc", "No such command 'benhc'. Did you mean 'bench'? (see `m2gen --help`)"),
    ],
)
def test_what_the_parser_refuses_is_said_as_other_errors(command, message, monkeypatch, capsys) -> None:
    """The option, what it must be, the value that came, and whose help has more: one line, and exit status 2."""
    monkeypatch.setattr(sys, "argv", ["m2gen", *command.split()])
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # else `python -m pytest` is the name
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"m2gen: {message}")
    assert said.count("\n") == 1


def test_full_verification_with_a_database_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a database that is typed is refused; the matrix has no use for one."""
    monkeypatch.setenv("M2GEN_TUNING_DB", "/nowhere")
    assert "--db" not in fails(2, "verify", "--full", "--case", "none")
    assert "--db and --no-db must be given with --spec" in fails(2, "verify", "--full", "--db", "/nowhere")


def test_ctrl_c_while_m2gen_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends as it does later: in one line, with the status of a signal."""

    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "m2gen.cli.app", Interrupted("m2gen.cli.app"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "m2gen: interrupted\n"


def test_sigterm_is_an_interruption() -> None:
    """What batch systems send before they end a job ends a command as Ctrl-C does, whatever it is at."""
    command = [sys.executable, "-m", "m2gen", "verify", "--spec", TINY, "--feature", "recurrence"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            first = process.stderr.readline()  # progress: it is at work
            process.terminate()
            out, err = process.communicate(timeout=1800)
        finally:
            process.kill()
    assert process.returncode == 130, first + err
    assert out == ""
    assert err.splitlines()[-1] == "m2gen: interrupted"
    assert "Traceback" not in err


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_commands_leave_signals_as_they_were(monkeypatch: pytest.MonkeyPatch, before: signal.Handlers) -> None:
    """A handler is there while a command runs, and only where nobody has said otherwise."""
    seen = []

    class Noted(ModuleType):
        def main(self) -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setitem(sys.modules, "m2gen.cli.app", Noted("m2gen.cli.app"))
    was = signal.signal(signal.SIGTERM, before)
    try:
        main()
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, was)
    assert seen == [signal.default_int_handler if before is signal.SIG_DFL else before]
