"""The larger examples: their data and models against something independent, and their commands at sizes of seconds."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from calls import distance
from layer import by_hand
from support import ROOT
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from m2gen.kernels.compile import load_module

EXAMPLES = ROOT / "examples"
LOCAL = (
    "decoder", "gated_delta", "words", "step", "train", "data", "model", "loop", "compare", "settings", "construct",
    "files", "report", "pictures",
)  # fmt: skip
"""Modules that the examples find beside them."""
DELTA = ("all Gated DeltaNet of flash-linear-attention", "all Gated DeltaNet")
"""Rows of the benchmark that a small model has not."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that imports an example's command, or one of the modules beside it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which one of them sets where nobody has
    for name in LOCAL:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def imported(folder: str, module: str = "run") -> ModuleType:
        for place in (EXAMPLES, EXAMPLES / folder, ROOT):
            sys.path.insert(0, str(place))
        return load_module(EXAMPLES / folder / f"{module}.py", f"example_{folder}_{module}")

    yield imported
    for name in LOCAL:
        sys.modules.pop(name, None)


def command(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run an example's command in this process."""
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    module.main()


def is_figure(place: Path) -> bool:
    """Say whether a file is a PNG image."""
    return place.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(("name", "order"), [("S3", 6), ("A4", 12), ("A5", 60), ("S5", 120)])
def test_products_of_words(example, name, order) -> None:
    """Answers are products of permutations, composed here one by one."""
    words = example("state_tracking", "words")
    group = words.group(name)
    assert group.order == order
    assert torch.equal(group.table[0], torch.arange(order))  # the identity
    assert all(sorted(row.tolist()) == list(range(order)) for row in group.table)
    degree = int(name[1:])
    elements = [p for p in permutations(range(degree)) if name[0] == "S" or words._even(p)]
    letters, answers = group.words(3, 11, torch.Generator().manual_seed(0))
    for row, products in zip(letters.tolist(), answers.tolist(), strict=True):
        so_far = tuple(range(degree))
        for letter, product in zip(row, products, strict=True):
            so_far = tuple(elements[letter][i] for i in so_far)
            assert elements[product] == so_far


@pytest.mark.parametrize("name", ["S3", "A5", "S5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"conv_width": None, "activation": None}])
def test_a_layer_of_written_weights_tracks_a_group(example, name, dtype, options) -> None:
    """One layer, as published or without convolution and SiLU, is right at every position of words of 600."""
    construct = example("state_tracking", "construct")
    tiny = load_module(EXAMPLES / "decoder.py", "example_decoder").package_of("generated.tiny")
    problem, (rows, columns, heads) = construct.group(name), construct.dims_of(name)
    layer = tiny.M2RNN(problem.order, rows, columns, dict.fromkeys("qkvfw", heads), backend="reference", **options)
    construct.construct(layer, name).to(dtype)
    letters, answers = problem.words(3, 600, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = layer(nn.functional.one_hot(letters, problem.order).to(dtype))
    assert torch.equal(found.argmax(-1), answers)


def test_the_first_letters_generate_the_group(example) -> None:
    """An alphabet has every element once, and every element is a product of its first two."""
    words = example("state_tracking", "words")
    problem = words.group("A5")
    for seed in range(5):
        letters = words.alphabet(problem, seed).tolist()
        assert sorted(letters) == list(range(60))
        assert problem.generated(letters[:2]) == 60
        assert problem.generated([0, letters[0]]) < 60


def test_answers_by_points(example) -> None:
    """The right permutation written out has no loss and is right; with one point elsewhere it is neither."""
    words = example("state_tracking", "words")
    said = words.Answers(words.group("A4"), points=4)
    answers = torch.arange(12)
    logits = 50.0 * nn.functional.one_hot(said.problem.images, 4).flatten(1)
    assert logits.shape[1] == said.classes
    assert said.losses(logits, answers).max() < 1e-6
    assert said.right(logits, answers).all()
    assert not said.right(logits.roll(1, -1), answers).any()
    assert not said.right(logits, answers.roll(1)).any()


def test_unknown_groups_and_settings_end_the_program(example, monkeypatch, tmp_path) -> None:
    """A name that is none is answered in one line."""
    run = example("state_tracking")
    with pytest.raises(SystemExit, match="groups must be S1 to S6"):
        sys.modules["words"].group("Z60")
    with pytest.raises(SystemExit, match="see width_"):
        command(run, monkeypatch, "--out", str(tmp_path), "--set", "width_=3")
    with pytest.raises(SystemExit, match="must be a generated package, got none"):
        command(run, monkeypatch, "--smoke", "--out", str(tmp_path), "--set", "package=generated.none")
    command(run, monkeypatch, "--smoke", "--out", str(tmp_path), "--set", "models=[gru]")  # no run has kept the folder


def test_the_linear_mixer_is_the_recurrence_without_tanh_and_weight(example) -> None:
    """The quadratic form agrees with the layer written out step by step, whose writes are k v^T alone."""
    example("state_tracking", "words")
    decoder = load_module(EXAMPLES / "decoder.py", "example_decoder")
    tiny = decoder.package_of("generated.tiny")
    torch.manual_seed(0)
    heads = {"q": 2, "k": 1, "v": 4, "f": 2, "w": 4, "g": 2}
    layer = tiny.M2RNN(8, 5, 3, heads, bias=True, backend="reference", dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(7, 8, dtype=torch.float64)
    expected = by_hand(layer, x, lambda state, weight, outer: outer)
    assert distance(decoder.Linear(layer)(x[None])[0], expected) < 1e-6  # the gate is computed in float32


def test_attention_is_causal_and_knows_only_distances(example) -> None:
    """A later token changes nothing before it, and one constant sequence looks the same everywhere."""
    example("state_tracking", "words")
    decoder = load_module(EXAMPLES / "decoder.py", "example_decoder")
    torch.manual_seed(0)
    attention = decoder.Attention(8, 2)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.allclose(attention(x)[:, :4], attention(changed)[:, :4], atol=1e-6)
    q, k = torch.randn(2, 1, 1, 1, 8)
    q, k = decoder.rotated(q.expand(1, 1, 9, 8)), decoder.rotated(k.expand(1, 1, 9, 8))
    scores = (q @ k.mT)[0, 0]
    assert torch.allclose(scores[3:, 3:], scores[:-3, :-3], atol=1e-5)


def test_state_tracking_smoke(example, monkeypatch, tmp_path, capsys) -> None:
    """Every model trains and is judged; the table and the figure are there, and a second call runs nothing again."""
    run = example("state_tracking")
    command(run, monkeypatch, "--smoke", "--out", str(tmp_path), "--set", "budget=1000000")
    table = capsys.readouterr().out
    assert [line.split(" | ")[1] for line in table.splitlines()[2:]] == ["m2rnn", "attention", "linear", "gru"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table
    assert is_figure(tmp_path / "curves.png")
    outcome = json.loads((tmp_path / "S3_m2rnn_0.json").read_text(encoding="utf-8"))
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    kept = json.loads((ROOT / "docs" / "data" / "state_tracking_h200.json").read_text(encoding="utf-8"))
    of_late = {"steps", "trained_to", "seconds"}  # since the runs that docs/data keeps
    assert (summary.keys(), summary["runs"][0].keys() - of_late) == (kept.keys(), kept["runs"][0].keys() - of_late)
    assert {name: summary["runs"][0][name] for name in ("steps", "trained_to")} == {
        name: outcome[name] for name in ("steps", "trained_to")
    }
    assert [(x["model"], x["seed"]) for x in summary["runs"]] == [
        (m, 0) for m in ("m2rnn", "attention", "linear", "gru")
    ]
    assert (outcome["steps"], outcome["words"], len(outcome["errors"])) == (2, 2, 5)
    (tmp_path / "S3_gru_0.json").unlink()
    command(run, monkeypatch, "--smoke", "--out", str(tmp_path), "--set", "budget=-1")
    assert "| S3 | gru |  |  |  | 0 of 1 (0 run) |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="must have runs of this config, but has others: steps; give another --out"):
        command(run, monkeypatch, "--smoke", "--out", str(tmp_path), "--set", "steps=3")


def test_state_tracking_folders_are_of_one_machine(example, monkeypatch, tmp_path) -> None:
    """Another GPU or torch adds no run, and shows finished ones as those of who made them."""
    run = example("state_tracking")
    smoke = ("--smoke", "--out", str(tmp_path), "--set", "models=[attention, gru]")

    def summary() -> dict[str, Any]:
        return dict(json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")))

    command(run, monkeypatch, *smoke)
    assert summary()["device"] == "CPU"
    assert shlex.split(summary()["command"]) == ["python", "examples/state_tracking/run.py", *smoke]
    kept = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (kept["device"], kept["torch"]) == ("CPU", torch.__version__)
    monkeypatch.setattr(run, "here", lambda: {"device": "another", "torch": "1.0"})
    command(run, monkeypatch, *smoke)
    assert summary()["device"] == "CPU"
    (tmp_path / "S3_gru_0.json").unlink()
    refusal = "must have runs of this config, but has others: device, torch; give another --out"
    with pytest.raises(SystemExit, match=refusal):
        command(run, monkeypatch, *smoke)
    del kept["device"], kept["torch"]  # as folders were before
    (tmp_path / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(SystemExit, match=refusal):
        command(run, monkeypatch, *smoke)
    command(run, monkeypatch, *smoke, "--set", "models=[attention]")
    assert summary()["device"] == "unknown device"


def test_generate_smoke(example, monkeypatch, tmp_path, capfd) -> None:
    """A spec, a package, a checkpoint and text come out, greedily the same text from what is there already."""
    run = example("generate")
    sizes = ("--smoke", "--steps", "2", "--tokens", "5", "--out", str(tmp_path), "--prompt", "def x")
    command(run, monkeypatch, *sizes)
    first = capfd.readouterr().out
    assert "trained 2 steps" in first
    assert re.search(r"--- reference: [\d,]+ tokens a second\ndef x", first)
    assert (tmp_path / "generate_example.yaml").exists()
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], len(config["sequence_mixer_blocks"])) == ("gpt_base", 2)
    weights = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    command(run, monkeypatch, *sizes)
    again = capfd.readouterr()
    assert "trained" not in again.out
    assert again.out.split("a second")[1] == first.split("a second")[1]
    assert "has a model that was trained before; it is not trained again (--steps ignored)\n" in again.err
    monkeypatch.setattr(run, "hf_of", lambda *_: pytest.fail("went on"))
    refusal = "checkpoint must have a model of these sizes, but has another hidden_size, .*; give another --out"
    with pytest.raises(SystemExit, match=refusal):
        command(run, monkeypatch, "--out", str(tmp_path))
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--steps", "-1", "--steps must be at least 1, got -1"),
        ("--steps", "0", "--steps must be at least 1, got 0"),
        ("--seconds", "-1", "--seconds must be at least 0, got -1.0"),
        ("--seconds", "nan", "--seconds must be at least 0, got nan"),
        ("--tokens", "0", "--tokens must be at least 1, got 0"),
        ("--prompt", "", "--prompt must have a letter, got none"),
    ],
)
def test_generate_refuses_what_would_never_end(example, monkeypatch, tmp_path, capsys, option, value, said) -> None:
    """Steps that are never reached, and texts that cannot begin, are refused before anything is built or trained."""
    run = example("generate")
    monkeypatch.setattr(run, "hf_of", lambda *_: pytest.fail("went on"))
    with pytest.raises(SystemExit, match="2"):
        command(run, monkeypatch, "--smoke", "--out", str(tmp_path / "out"), f"{option}={value}")
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_generate_trains_on_as_many_bytes_as_it_says(example, monkeypatch) -> None:
    """Each word is ``seq`` bytes long; what only shows that all works has a folder of its own."""
    run, seen = example("generate"), []

    class Model(nn.Linear):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            seen.append((input_ids.shape, labels.shape))
            return SimpleNamespace(loss=super().forward(input_ids[:, :1].float()).sum())

    run.train(Model(1, 1), run.SMOKE, 1, 0.0)
    assert seen == [((1, 8), (1, 8))]
    places = []
    for arguments in ((), ("--smoke",), ("--out", "here")):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        places.append(run.parsed().out)
    assert places == [EXAMPLES / "generate" / "results", EXAMPLES / "generate" / "results" / "smoke", Path("here")]


def test_a_short_word_problem_is_learned(example, tmp_path) -> None:
    """The loop, the curriculum and the judge together: a GRU learns S3 for words of the lengths it saw."""
    run = example("state_tracking")
    changes = {
        **run.SMOKE, "models": ["gru"], "width": 64, "lengths": [2, 4], "batch": 64, "steps": 400, "settle": 10,
        "evaluate": {"length": 4, "words": 64, "at_once": 64},
    }  # fmt: skip
    config = run.load(EXAMPLES / "state_tracking" / "config.yaml", changes)
    outcome = run.train(config, "gru", "S3", 0, None, torch.device("cpu"))
    assert outcome.trained_to == 4
    assert outcome.accuracy(0, 4) > 0.99


def test_a_run_ends_after_the_last_length_has_settled(example) -> None:
    """Longer words come as the last are known; then the learning rate falls, and the run ends before all its steps."""
    run = example("state_tracking")
    train = example("state_tracking", "train")
    changes = {**run.SMOKE, "lengths": [2, 3], "steps": 200, "settle": 30}
    config = train.load(EXAMPLES / "state_tracking" / "config.yaml", changes)

    class Known:
        """Stands for a model that is right about everything, and notes what it was asked for."""

        def __init__(self) -> None:
            self.loss = self.accuracy = torch.ones(())
            self.steps: list[tuple[int, float]] = []

        def step(self, length: int, rate: float) -> None:
            self.steps.append((length, rate))

    known, losses = Known(), []
    curriculum = train.Curriculum(config, 0)
    assert train.fit(known, curriculum, config, losses) == 50
    assert (curriculum.known_at, curriculum.longest) == ([10, 20], 3)
    assert {length for length, _ in known.steps[:10]} == {2}
    assert {length for length, _ in known.steps[10:]} == {2, 3}
    rates = [rate for _, rate in known.steps]
    assert (rates[0], rates[9]) == (1 / 50, 10 / 50)
    assert rates[19] == pytest.approx(20 / 50 * (2 / 3) ** 0.5)  # longer words have less
    assert rates[-1] < 2 / 30
    assert len(losses) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["m2rnn", "attention", "linear", "gru"])
def test_captured_steps_train_as_eager_ones(example, device, kind) -> None:
    """Steps of two alternating lengths have the losses of eager steps, up to what the order of atomics changes."""
    example("state_tracking")
    train = example("state_tracking", "train")
    losses = {}
    for graphs in (True, False):
        changes = {"batch": 16, "graphs": graphs}
        config = train.load(EXAMPLES / "state_tracking" / "config.yaml", changes)
        package = load_module(EXAMPLES / "decoder.py", "example_decoder").package_of(config.package)
        with train.own_stream(device):
            problem = train.group("S3").to(device)
            torch.manual_seed(0)
            model = train.make_model(config, kind, problem, package).to(device)
            stepper = train.Stepper(model, problem, config.recipe, torch.Generator(device).manual_seed(0))
            losses[graphs] = []
            for step in range(12):
                stepper.step((5, 9)[step % 2], 0.1)
                losses[graphs].append(stepper.loss.item())
        assert all((words.graph is not None) is graphs for words in stepper.words.values())
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_hybrid_lm_interrupted_and_resumed_has_the_same_losses(example, monkeypatch, tmp_path, capsys) -> None:
    """Killed between checkpoints, the same command goes on, says so, and ends with the losses of a run in one piece."""
    run = example("hybrid_lm")
    command(run, monkeypatch, "train", "--smoke", "--out", str(tmp_path / "whole"))
    said = capsys.readouterr()
    step = run.Trainer.step

    def interrupted(trainer: Any, *batch: Any) -> Any:
        if trainer.done == 3:
            raise KeyboardInterrupt
        return step(trainer, *batch)

    monkeypatch.setattr(run.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(run, monkeypatch, "train", "--smoke", "--out", str(tmp_path / "parts"))
    monkeypatch.setattr(run.Trainer, "step", step)
    command(run, monkeypatch, "train", "--smoke", "--out", str(tmp_path / "parts"))
    whole, parts = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "parts"))
    assert whole == parts
    losses = whole["losses"]
    assert len(losses) == 4
    assert said.out == f"loss {losses[0]:.4f} at step 1, {losses[3]:.4f} at step 4\n"
    saved = [re.escape(f"step {done}: loss {losses[done - 1]:.4f}, ") + r"[\d,]+ tokens/s\n" for done in (2, 4)]
    assert re.search("".join(saved), said.err)
    resumed = re.escape(f"going on at step 2 from {tmp_path / 'parts' / 'checkpoint.pt'}\n")
    assert re.search(saved[0] + resumed + saved[1], capsys.readouterr().err)
    assert is_figure(tmp_path / "parts" / "losses.png")
    with pytest.raises(SystemExit, match="has another width; choose another --out"):
        command(run, monkeypatch, "train", "--smoke", "--out", str(tmp_path / "parts"), "--set", "width=16")


def test_hybrid_lm_goes_on_with_its_text_alone(example, monkeypatch, tmp_path) -> None:
    """Files of the same names that have changed end the command, and losses of the comparison are trained again."""
    run, text = example("hybrid_lm"), tmp_path / "text.py"
    smoke = ("train", "--smoke", "--out", str(tmp_path / "out"), "--set", f"text=[{text}]")
    text.write_bytes(b"a = 1\n" * 50)
    command(run, monkeypatch, *smoke)
    results = (tmp_path / "out" / "losses.json").read_bytes()
    expected = hashlib.sha256(text.read_bytes()).hexdigest()[:16]
    assert json.loads(results)["sha256_of_text"] == expected
    config = run.load(EXAMPLES / "hybrid_lm" / "config.yaml", {"text": [str(text)], "package": "generated.tiny"})
    kept = run.compare.Kept(tmp_path / "runs")
    assert kept.run("kernels", config, lambda: [1.0]) == [1.0]
    assert kept.run("kernels", config, lambda: pytest.fail("ran again")) == [1.0]
    text.write_bytes(b"a = 2\n" * 50)
    with pytest.raises(SystemExit, match=r"checkpoint.pt .* has another sha256_of_text; choose another --out"):
        command(run, monkeypatch, *smoke)
    assert (tmp_path / "out" / "losses.json").read_bytes() == results
    assert kept.run("kernels", config, lambda: [2.0]) == [2.0]


def test_hybrid_lm_on_the_reference_backend_has_the_same_losses(example, monkeypatch, tmp_path) -> None:
    """Kernels and the eager reference train alike, up to rounding."""
    run = example("hybrid_lm")
    losses = []
    for backend in ("kernels", "reference"):
        out = tmp_path / backend
        command(run, monkeypatch, "train", "--smoke", "--out", str(out), "--set", f"backend={backend}")
        losses.append(json.loads((out / "losses.json").read_text(encoding="utf-8"))["losses"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(("how", "graphs"), [(True, 1), ("blocks", 3)])
@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_hybrid_lm_compiled_has_the_same_losses(example, monkeypatch, backend, how, graphs) -> None:
    """Under autocast the model is one graph, or one for each kind of block, forward and backward, for every seed."""
    run = example("hybrid_lm")
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch.compiler.reset()
    changes = {**run.SMOKE, "dtype": "bf16", "backend": backend, "mixers": ["attention", "m2rnn", "linear", "m2rnn"]}
    config = run.load(EXAMPLES / "hybrid_lm" / "config.yaml", changes)
    text = run.data.read(config.text)
    for seed in (0, 1):
        losses = []
        for compiled in (how, False):
            trainer = run.Trainer(replace(config, seed=seed, compile=compiled), torch.device("cpu"))
            losses.append(torch.stack([trainer.step(*run.data.batch(text, 1, 4, seed, step)) for step in (0, 1)]))
        assert torch.allclose(*losses, rtol=0, atol=2**-8)
    assert counter.frame_count == graphs
    torch.compiler.reset()


def test_hybrid_lm_compare_smoke(example, monkeypatch, tmp_path, capsys) -> None:
    """Every run trains, one of them goes on in another process, and the table says that all is as it should be."""
    run = example("hybrid_lm")
    command(run, monkeypatch, "compare", "--smoke", "--out", str(tmp_path))
    assert not torch.are_deterministic_algorithms_enabled()
    report = capsys.readouterr().out
    assert (tmp_path / "compare.md").read_text(encoding="utf-8") == report
    assert is_figure(tmp_path / "compare.png")
    verdicts = (
        "within seed noise of the reference",
        "as low at the end as the reference",
        "the same losses after an interruption",
    )
    assert report.endswith("".join(f"{verdict}: yes\n" for verdict in verdicts))
    losses = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["losses"]
    assert losses["whole"] == losses["resumed"]
    assert losses["kernels"]["1"] == pytest.approx(losses["reference"]["1"], abs=1e-4)
    assert losses["kernels"]["0"] != losses["kernels"]["1"]


def test_hybrid_lm_compare_goes_on(example, monkeypatch, tmp_path, capsys) -> None:
    """A finished run is not run again, unless its file is torn or is of other facts."""
    run = example("hybrid_lm")
    config = run.load(EXAMPLES / "hybrid_lm" / "config.yaml", {})
    again = [[1.0, 0.1], [2.0], [3.0]]
    monkeypatch.setattr(run.compare, "kernels_of", lambda config: "0" * 12)
    kept = run.compare.Kept(tmp_path / "runs")
    assert kept.run("kernels, seed 0", config, lambda: again[0]) == again[0]
    assert kept.run("kernels, seed 0", config, lambda: pytest.fail("ran again")) == again[0]
    (path,) = (tmp_path / "runs").iterdir()
    assert str(path) in capsys.readouterr().err
    path.write_text(path.read_text()[:40])
    assert kept.run("kernels, seed 0", config, lambda: again[1]) == again[1]
    monkeypatch.setattr(run.compare, "kernels_of", lambda config: "1" * 12)
    assert kept.run("kernels, seed 0", config, lambda: again[2]) == again[2]


@pytest.mark.parametrize(
    ("kernels", "resumed", "verdict"),
    [
        ([2.0, 1.0], [2.0, 1.0], None),
        ([2.0, 1.5], [2.0, 1.0], "reference: NO"),
        ([2.0, math.nan], [2.0, 1.0], "reference: NO"),
        ([2.0, 1.0], [2.0, 1.0 + 1e-7], "interruption: NO"),
    ],
)
def test_hybrid_lm_compare_says_no(example, monkeypatch, tmp_path, capsys, kernels, resumed, verdict) -> None:
    """Curves further apart than seeds, or a resumed run that differs in the last bits, fail the command."""
    run = example("hybrid_lm")
    curves = {0: [2.0, 1.0], 1: [2.1, 1.1]}
    outcome = run.compare.Outcome({0: kernels, 1: [2.1, 1.1]}, curves, kernels, [2.0, 1.0], resumed)
    monkeypatch.setattr(run.compare, "measured", lambda config, kept: outcome)
    arguments = ("compare", "--smoke", "--out", str(tmp_path))
    if verdict is None:
        command(run, monkeypatch, *arguments)
    else:
        with pytest.raises(SystemExit, match="1"):
            command(run, monkeypatch, *arguments)
        assert verdict in capsys.readouterr().out


def curves_of(offset: float, seeds: int = 3, steps: int = 200) -> dict[str, dict[int, list[float]]]:
    """Return losses of a reference whose batches differ by far more than the noise of kernels ``offset`` above it."""
    draw = random.Random(0)
    fall = [1.6 + 2.0 * 0.98**step for step in range(steps)]
    reference = {seed: [loss + draw.gauss(0, 0.12) for loss in fall] for seed in range(seeds)}
    kernels = {seed: [loss + draw.gauss(offset, 0.012) for loss in reference[seed]] for seed in reference}
    again = [loss + draw.gauss(0, 0.012) for loss in kernels[0]]
    return {"kernels": kernels, "reference": reference, "again": again, "whole": [], "resumed": []}


@pytest.mark.parametrize(
    ("offset", "alike"), [(0.0, True), (0.08, False), (-0.08, False), (0.03, False), (math.nan, False)]
)
def test_hybrid_lm_compare_sees_a_loss_that_is_higher_everywhere(example, offset, alike) -> None:
    """A backend that is worse by less than batches differ is found out on equal batches, by sign and at the end."""
    outcome = example("hybrid_lm").compare.Outcome(**curves_of(offset))
    assert outcome.trains_alike is not math.isnan(offset)  # step by step, batches hide it
    assert outcome.ends_alike is alike


def test_hybrid_lm_compare_allows_what_one_seed_does_twice(example) -> None:
    """Differences of rounding alone, and those that two runs of the kernels have as well, fail nobody."""
    compare = example("hybrid_lm").compare
    reference = {0: [1.0, 1.0], 1: [2.0, 2.0]}

    def alike(offset: float, again: float) -> bool:
        kernels = {seed: [loss + offset for loss in losses] for seed, losses in reference.items()}
        return compare.Outcome(kernels, reference, [1.0 + offset + again] * 2, [], []).ends_alike

    assert (alike(1e-6, 0.0), alike(0.01, 0.0), alike(0.01, 0.011), alike(0.01, 0.009)) == (True, False, True, False)


def test_hybrid_lm_compare_says_of_the_page_what_it_would_of_its_runs(example) -> None:
    """The difference of the means on the page and its interval are those beside them, and the verdict is yes."""
    compare = example("hybrid_lm").compare
    text = (EXAMPLES / "hybrid_lm" / "README.md").read_text(encoding="utf-8")

    def recorded(name: str) -> dict[int, list[float]]:
        (row,) = re.findall(rf"^\| {name}, seeds 0, 1, 2 \| (.*) \|$", text, re.MULTILINE)
        return {seed: [float(mean)] for seed, mean in enumerate(row.split(", "))}

    kernels = recorded("kernels")
    outcome = compare.Outcome(kernels, recorded("reference"), kernels[0], [], [])
    assert outcome.ends_alike
    found = outcome.at_the_end
    shown = f"| kernels less reference, mean over seeds, 95 % interval | {found.mean:+.4f} ± {found.half:.4f} |"
    assert shown in text
    worse = compare.Outcome({seed: [loss + 0.08] for seed, [loss] in kernels.items()}, outcome.reference, [0.0], [], [])
    assert not replace(worse, again=worse.kernels[0]).ends_alike


def test_groups_of_parameters(example) -> None:
    """Gates, D, norms and biases have no weight decay; every parameter that trains is in one group."""
    example("hybrid_lm", "data")
    decoder = load_module(EXAMPLES / "decoder.py", "example_decoder")
    tiny = decoder.package_of("generated.tiny")
    mixers = [tiny.M2RNN.from_variant("base", 8, bias=True), decoder.Attention(8, 2)]
    model = decoder.Decoder(mixers, 8, 4, 4)
    decayed, free = (group["params"] for group in decoder.groups_of(model, 0.1))
    assert len(decayed) + len(free) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    layer = model.blocks[0].mixer
    own = {id(p) for p in (layer.decay_gate.A_log, layer.decay_gate.dt_bias, layer.D, layer.g_norm.weight)}
    assert own <= {id(p) for p in free}
    assert all(p.dim() > 1 for p in decayed)
    assert {"head.weight", "blocks.0.mixer.state_weight"} <= {names[id(p)] for p in decayed}
    assert isinstance(model.blocks[1].mixer, nn.Module)


def test_hybrid_lm_bench_names_what_it_cannot_time(example, monkeypatch, tmp_path, capsys) -> None:
    """Without flash-linear-attention its rows say so, and all others are timed at every length."""
    run = example("hybrid_lm")
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(run, "milliseconds", lambda call, repeats: 2.0)
    for module in (run, run.compare):
        monkeypatch.setattr(module, "device_at_hand", lambda: torch.device("cpu"))
    bench = "bench={lengths: [4, 8], tokens: 16, steps: 1, compile: false}"
    command(run, monkeypatch, "bench", "--smoke", "--out", str(tmp_path), "--set", bench, "--timing-only")
    report = capsys.readouterr().out
    assert (tmp_path / "bench.md").read_text(encoding="utf-8") == report
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith(("| 4 ", "| 8 "))]
    assert [row[1] for row in rows] == 2 * ["attention", "one M2RNN layer", "all M2RNN", *DELTA]
    assert [row[2] for row in rows[:3]] == 3 * ["8,000"]
    assert rows[4][2].startswith("not timed: width must be a multiple of 256 for gated_deltanet, got 8")
    assert rows[3][2].startswith("not timed: gated_deltanet_fla must have flash-linear-attention installed")


@pytest.mark.parametrize(
    "command",
    [
        ("char_lm.py", "--redraw", "absent"),
        ("state_tracking/run.py", "--config", "absent"),
        ("recall/run.py", "--config", "absent"),
        ("hybrid_lm/hybrids.py", "--report", "absent"),
    ],
    ids=lambda command: command[0],
)
def test_a_file_that_is_not_there_is_one_line(command: tuple[str, ...], tmp_path: Path) -> None:
    """Whoever mistypes a path reads which, and no traceback."""
    place = str(ROOT / "examples" / command[0])
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, place, *command[1:]], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "absent must be readable and writable: No such file" in done.stderr
    assert "Traceback" not in done.stderr
