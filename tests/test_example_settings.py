"""What examples' commands are told: changes of a config that make no sense are answered in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from m2gen.kernels.compile import load_module

EXAMPLES = ROOT / "examples"
REFUSED = [
    ("hybrid_lm/hybrids.py", "sizes=3", "--set sizes must be a mapping, got 3"),
    ("hybrid_lm/hybrids.py", "sizes={11M: 3}", "hybrids.yaml and --set must give values of the kinds"),
    ("hybrid_lm/hybrids.py", "steps", "--set must be KEY=VALUE, got 'steps'"),
    ("hybrid_lm/hybrids.py", "learning_rate=3e-3", "--set learning_rate must be a number, got '3e-3'"),
    ("hybrid_lm/run.py train", "compare={seeds: 3}", "config.yaml and --set must give values of the kinds"),
    ("hybrid_lm/run.py train", "mixers=m2rnn", "--set mixers must be a list, got 'm2rnn'"),
    ("recall/run.py", "evaluate=3", "--set evaluate must be a mapping, got 3"),
    ("recall/run.py", "lengths=[", "--set lengths must be YAML, got '['"),
    ("hybrid_lm/run.py train", "steps=", "--set: steps must be an integer from 1 on, got None"),
    ("hybrid_lm/run.py train", "seq=-1", "--set: seq must be an integer from 1 on, got -1"),
    ("hybrid_lm/run.py train", "deterministic=maybe", "--set: deterministic must be true or false, got 'maybe'"),
    ("hybrid_lm/run.py train", "mixers=[]", "--set: mixers must have entries, got none"),
    ("hybrid_lm/run.py train", "compare={seeds: [x], seq: 4, steps: 4}", "--set: compare.seeds must be an integer"),
    ("hybrid_lm/hybrids.py", "text={limit: 9, validation: 0}", "--set: text.validation must be an integer from 1 on"),
    ("recall/run.py", "steps=2.5", "--set: steps must be an integer from 1 on, got 2.5"),
    ("recall/run.py", "tasks=[]", "--set: tasks must have entries, got none"),
    ("recall/run.py", "dtype=fp16", "dtype must be bf16 or fp32, got 'fp16'"),
    ("recall/run.py", "evaluate={lengths: [8], words: 0, tokens: 4}", "--set: evaluate.words must be an integer from"),
    ("state_tracking/run.py", "lengths=8", "--set lengths must be a list, got 8"),
    ("state_tracking/run.py", "steps=true", "--set steps must be a number, got True"),
    ("state_tracking/run.py", "steps=0", "got ValueError: steps must be at least 1, got 0"),
    ("state_tracking/run.py", "lengths=[]", "got ValueError: lengths must be at least 1, got 0"),
    ("state_tracking/run.py", "evaluate={length: 5, words: 2, at_once: 0}", "at_once must be at least 1, got 0"),
    ("state_tracking/run.py", "groups=[S3, S9]", "groups must be S1 to S6 or A1 to A6, got 'S9'"),
    ("state_tracking/run.py", "models=[gru, lstm]", "models must be of m2rnn, attention, linear, gru"),
    ("state_tracking/run.py", "heads=3", "width must be a multiple of 6 for 3 heads, got 8"),
    ("state_tracking/run.py", "forget=0.0", "forget must be between 0 and 1, or null, got 0.0"),
]


def refusal(command: str, given: str, folder: Path) -> str:
    """Return the one line with which a command refuses a setting."""
    name, *options = command.split()
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options, "--smoke", "--out", str(folder / "out"), "--set", given],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(("command", "given", "said"), REFUSED)
def test_values_of_no_sense_are_one_line(command: str, given: str, said: str, tmp_path: Path) -> None:
    """The line says which value, what it must be and what it is; no folder is made."""
    assert said in refusal(command, given, tmp_path)
    assert not (tmp_path / "out").exists()


MODELS = [
    ("hybrid_lm/run.py train", "layer=nope", "M2RNN: name must be a layer (base, grouped)"),
    ("hybrid_lm/run.py train", "backend=eager", "M2RNN: backend must be kernels or reference, got 'eager'"),
    ("hybrid_lm/run.py train", "width=9", "width must be a multiple of 4, two channels of 2 heads, got 9"),
    ("hybrid_lm/run.py train", "mixers=[gated_deltanet]", "width must be a multiple of 256 for gated_deltanet, got 8"),
    ("recall/run.py", "layer=nope", "M2RNN: name must be a layer (base, grouped)"),
    ("state_tracking/run.py", "layer=nope", "M2RNN: name must be a layer (base, grouped)"),
]


@pytest.mark.parametrize(("command", "given", "said"), MODELS)
def test_models_that_cannot_be_made_are_one_line(command: str, given: str, said: str, tmp_path: Path) -> None:
    """What a package or a mixer does not take ends the command without a traceback."""
    assert refusal(command, given, tmp_path).startswith(said)


def test_values_that_configs_may_have_are_taken(tmp_path: Path) -> None:
    """None stands for what a number or a list may be left out for; files that hold something else are named."""
    settings = load_module(EXAMPLES / "settings.py", "example_settings")
    place = tmp_path / "config.yaml"
    place.write_text("{forget: 0.5, compile: true, stages: null, steps: 3}", encoding="utf-8")
    known = {"forget", "compile", "stages", "steps"}
    changes = settings.changes_of(["forget=null", "compile=blocks", "stages=[[2, 2]]", "steps=4"])
    expected = {"forget": None, "compile": "blocks", "stages": [[2, 2]], "steps": 4}
    assert settings.merged(place, changes, known) == changes == expected
    for text, said in (("[]", "must be a mapping, got"), ("{", "must be YAML: ")):
        place.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=rf"config.yaml {said}"):
            settings.merged(place, {}, known)


@pytest.mark.parametrize(("command", "said"), [
    (("construct.py", "--package", "generated.tiny", "--groups", "S3"), "M2RNN: no kernels for K=1, V=9, heads q: 2"),
    (("construct.py", "--words", "0"), "--length and --words must be at least 1, got 65536 and 0"),
])  # fmt: skip
def test_layers_that_a_package_has_not_are_one_line(command: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """What the package says of it is the message."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "state_tracking" / command[0]), *command[1:]], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
