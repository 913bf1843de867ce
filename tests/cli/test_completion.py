"""Shell completion: what Tab offers, in every shell, at the price of no heavy import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from records import H100, VARIANT, environment, winner
from typer.testing import CliRunner

from m2gen.cli.app import app
from m2gen.db import Database

SPEC = """schema: 1
name: mine
targets: sm_90
layers:
  first: {head_dim: 16, state_expansion: 16, heads: {q: 1, k: 1, v: 1, f: 1, w: 1}, dtypes: fp32}
  second: {head_dim: 32, state_expansion: 16, heads: {q: 1, k: 1, v: 1, f: 1, w: 1}, dtypes: fp32}
"""
ONE, OTHER = winner(), winner(where=environment(H100))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that has a spec, one that cannot be read, and a database of two GPUs."""
    monkeypatch.chdir(tmp_path)
    Path("specs").mkdir()
    Path("specs/mine.yaml").write_text(SPEC, encoding="utf-8")
    Path("torn.yaml").write_text("layers: [", encoding="utf-8")
    Database(Path("db")).add([ONE, OTHER])
    return tmp_path


def offered(line: str) -> list[str]:
    """Return the completions that bash gets for the last word of a line."""
    words = line.split(" ")
    env = {"_M2GEN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    result = CliRunner().invoke(app, [], prog_name="m2gen", env=env)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout.split()


OFFERS = {
    "commands": ("m2gen ", ["info", "spec", "build", "check", "verify", "tune", "bench", "db", "version"]),
    "subcommands": ("m2gen db re", ["replay"]),
    "options": ("m2gen check --ta", ["--target"]),
    "choices": ("m2gen bench --sweep ", ["seq", "batch", "heads", "rows"]),
    "a spec of the working directory": ("m2gen build --spec mi", ["mi300x.yaml", "mine.yaml"]),
    "a spec by its path": ("m2gen build --spec specs/m", ["specs/mine.yaml"]),
    "layers": ("m2gen tune --spec mine.yaml --layer ", ["first", "second"]),
    "a layer": ("m2gen bench --spec mine.yaml --layer s", ["second"]),
    "layers of no spec": ("m2gen tune --layer ", []),
    "layers of a spec that cannot be read": ("m2gen tune --spec torn.yaml --layer ", []),
    "layers of a spec that is not there": ("m2gen tune --spec absent.yaml --layer ", []),
    "variants": (
        "m2gen verify --spec mine.yaml --variant k16_v16",
        ["k16_v16_q1_k1_v1_f1_w1_fp32_carry_approx"],
    ),
    "targets": ("m2gen check --spec mine.yaml --target gfx", ["gfx90a", "gfx942"]),
    "another target": ("m2gen check --target gfx942,gfx9", ["gfx942,gfx90a"]),
    "records": (f"m2gen db replay --db db {ONE.id[:6]}", [ONE.id]),
    "records of no database": ("m2gen db show --db absent ", []),
    "what db why is about": ("m2gen db why --spec mine.yaml --db db ", ["first", "second", VARIANT.key]),
    "devices": ("m2gen db why x --db db --device ", ["nvidia_h100_80gb_hbm3", "nvidia_h200"]),
}


@pytest.mark.parametrize(("line", "expected"), OFFERS.values(), ids=OFFERS.keys())
def test_what_tab_offers(line: str, expected: list[str]) -> None:
    """Values that m2gen knows are offered, those that begin as what is typed; nothing where there are none."""
    assert offered(line) == expected


def test_shipped_specs_are_offered_from_anywhere() -> None:
    """Completion offers shipped specs, since commands find them."""
    assert "h200.yaml" in offered("m2gen build --spec h")


def test_records_are_offered_with_what_they_are_of() -> None:
    """Shells that show descriptions say the GPU and the variant of an id."""
    env = {"_M2GEN_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "m2gen db show --db db "}
    shown = CliRunner().invoke(app, [], prog_name="m2gen", env=env).stdout
    for record, device in ((ONE, "nvidia_h200"), (OTHER, "nvidia_h100_80gb_hbm3")):
        assert f'"{record.id}":"{device} {VARIANT.key}"' in shown


SHELLS = {
    "bash": {"COMP_WORDS": "m2gen bench --spec mine.yaml --layer s", "COMP_CWORD": "5"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "m2gen bench --spec mine.yaml --layer s"},
    "fish": {
        "_TYPER_COMPLETE_ARGS": "m2gen bench --spec mine.yaml --layer s",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    },
}
LIGHT = """
import sys
sys.argv = ["m2gen"]
from m2gen.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "triton", "jinja2", "numpy", "optuna", "sqlalchemy"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(("shell", "asked"), SHELLS.items(), ids=SHELLS.keys())
def test_completion_imports_nothing_heavy(shell: str, asked: dict[str, str]) -> None:
    """Tab is answered by reading a spec or a few lines of records, in every shell."""
    env = {**os.environ, "_M2GEN_COMPLETE": f"complete_{shell}", **asked}
    done = subprocess.run([sys.executable, "-c", LIGHT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "second" in done.stdout
    assert "first" not in done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_shown_and_installed(here: Path, shell: str) -> None:
    """``--show-completion`` prints a script for the shell, which ``--install-completion`` puts where it is read."""
    env = {**os.environ, "HOME": str(here), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    code = "import sys; sys.argv[0] = 'm2gen'; from m2gen.cli import main; main()"
    shown, installed = (
        subprocess.run([sys.executable, "-c", code, option, shell], env=env, capture_output=True, text=True, check=True)
        for option in ("--show-completion", "--install-completion")
    )
    assert f"_M2GEN_COMPLETE=complete_{shell}" in shown.stdout
    assert "completion installed in" in installed.stdout
    scripts = [path.read_text(encoding="utf-8") for path in here.rglob("*m2gen*") if path.is_file()]
    assert any(shown.stdout.strip() in script for script in scripts)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash to complete in")
def test_bash_completes(here: Path) -> None:
    """The script that is shown does it in a real shell."""
    command = here / "bin" / "m2gen"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom m2gen.cli import main\n\nmain()\n", encoding="utf-8")
    command.chmod(0o755)
    script = """
    eval "$(m2gen --show-completion bash)"
    COMP_WORDS=(m2gen tune --spec mine.yaml --layer f) COMP_CWORD=5
    _m2gen_completion m2gen
    echo "${COMPREPLY[@]}"
    """
    path = f"{command.parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["first"], done.stderr
