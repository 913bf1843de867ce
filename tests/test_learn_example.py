"""Training on words without end: the tracker against the package's layer, streams against the table, the command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from support import ROOT
from torch import nn

from m2gen.kernels.compile import load_module

EXAMPLE = ROOT / "examples" / "state_tracking"
LOCAL = (
    "asked",
    "construct",
    "decoder",
    "files",
    "gated_delta",
    "learn",
    "learned",
    "settings",
    "step",
    "streams",
    "tracker",
    "words",
)
"""Modules that the example finds beside it."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports the example's command, or one of the modules beside it."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), str(EXAMPLE.parent), *sys.path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in LOCAL:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def imported(module: str = "learn") -> ModuleType:
        return load_module(EXAMPLE / f"{module}.py", f"example_learn_{module}")

    yield imported
    for name in LOCAL:
        sys.modules.pop(name, None)


def tracker_of(learn: ModuleType, **changes: Any) -> tuple[Any, Any, Any]:
    """Return the small run of changed settings, its answers and its untrained model."""
    config = yaml.safe_load((EXAMPLE / "learn.yaml").read_text(encoding="utf-8"))
    small = {"group": "A4", "heads": 2, "columns": 5, "streams": 6, "segment": 3, "letters": [2, 0]}
    run = learn.Run("small", {}, config["defaults"] | small | changes, 0)
    problem = learn.group(run.settings["group"])
    points = learn.points_of(problem.name) if run.settings["answers"] == "points" else 0
    said = learn.Answers(problem, points)
    torch.manual_seed(0)
    layers = learn.layers_of(run, said, learn.package_of("generated.tiny"), "reference")
    return run, said, learn.Tracker(layers, said.classes, run.settings["repeats"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "rmsnorm", "residual": True, "answers": "element", "heads_apart": False},
        {"layers": 3, "repeats": 2},
        {"weights": "automaton", "layers": 2},
        {"weights": "identity", "repeats": 3},
    ],
)
def test_the_recurrence_on_a_cpu_is_the_layers(example, options) -> None:
    """Logits, the state after them and the gradients of both are those of the layers' own scans.

    Each layer takes the letter and what those before it say, as often as it is repeated.
    """
    _, said, model = tracker_of(example(), **options)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    layers, repeats = model.layers, model.repeats
    letters, state = torch.randint(12, (4, 7)), torch.randn(4, 2 * len(layers), 1, 5).double()
    x, after = torch.eye(12).double()[letters.repeat_interleave(repeats, 1)], []
    for i, layer in enumerate(layers):
        layer.clip = None
        y, _, last = layer.scan(x, None, state[:, 2 * i : 2 * i + 2])
        x = x + y
        after.append(last)
    expected = y[:, repeats - 1 :: repeats, : said.classes], torch.cat(after, 1)
    weights = [torch.randn_like(x) for x in expected]

    def gradients(results: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        total = sum((x * weight).sum() for x, weight in zip(results, weights, strict=True))
        return torch.autograd.grad(total, list(model.parameters()))

    found = model(letters, state)
    for one, other in zip((*found, *gradients(found)), (*expected, *gradients(expected)), strict=True):
        assert torch.allclose(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("answers", ["points", "element"])
def test_heads_begin_apart(example, answers) -> None:
    """Each head alone moves logits by where elements take its point, and the first logits are no constant."""
    _, said, model = tracker_of(example(), answers=answers)
    out = model.layers[-1].output_projection.weight.detach().unflatten(1, (2, 5))[: said.classes]
    for head in range(2):
        if answers == "points":
            used = torch.arange(said.classes) // 4 == head
            assert out[used, head].abs().min() > 0
            assert not out[~used, head].any()
        else:
            places = said.problem.images[:, head]
            assert all(
                torch.equal(out[i, head], out[j, head]) == bool(places[i] == places[j])
                for i, j in torch.cartesian_prod(torch.arange(12), torch.arange(12)).tolist()
            )


@pytest.mark.parametrize(("weights", "identical"), [("identity", True), ("rotation", False)])
def test_state_weights_begin_as_they_are_told_to(example, weights, identical) -> None:
    """Times ``gain``: the identity, which leaves a state, or a rotation of each head, which keeps its size."""
    model = tracker_of(example(), weights=weights, gain=0.5)[2]
    for weight in model.layers[0].state_weight.detach():
        assert torch.allclose(weight @ weight.mT, 0.25 * torch.eye(len(weight)), atol=1e-6)
        assert torch.equal(weight, 0.5 * torch.eye(len(weight))) is identical


def test_gates_forget_what_they_are_told_to(example) -> None:
    """Whatever the letter, a layer's forget gates begin at the number of the settings."""
    for forget in (1e-4, 0.3):
        _, _, model = tracker_of(example(), forget=forget)
        found = model.layers[0].decay_gate(torch.zeros(2))
        assert found.tolist() == pytest.approx([forget] * 2, rel=1e-3)


@pytest.mark.parametrize("other", [{"conv1d": nn.Identity()}, {"activation": "silu"}, {"state_expansion": 2}])
def test_a_tracker_is_of_layers_that_it_can_write_out(example, other) -> None:
    """Convolutions, activations and more rows than one are refused, of any of its layers."""
    plain = {"conv1d": None, "activation": None, "state_expansion": 1}
    layers = [SimpleNamespace(**plain), SimpleNamespace(**plain | other)]
    with pytest.raises(ValueError, match="a tracker's layers must have state_expansion=1, conv_width=None"):
        example("tracker").Tracker(layers, 3)


def automaton(example: Any, **changes: Any) -> tuple[Any, Any, Any]:
    """Return a run, its answers and a model that begins as an automaton, with letters that are written, not random."""
    options = {"columns": 16, "weights": "automaton", "gain": 8.0, "spread": 0.0, "forget": 1e-9}
    run, said, model = tracker_of(example(), **options, **changes)
    (layer,), construct = model.layers, example("construct")
    elements = construct.elements_of("A4")
    levels = torch.stack([construct.letter_levels(elements, point, 4) for point in range(2)], 1)
    values = layer.input_projection.bias[4:36].unflatten(0, (2, 16))
    layer.input_projection.weight.data[4:36] = (levels - values).flatten(1).mT
    places = torch.tensor([[float(m == place) for _, m in construct.pairs(4)] for place in range(4)])
    out = layer.output_projection.weight.data.zero_().unflatten(1, (2, 16))
    for head in range(2):
        out[4 * head : 4 * head + 4, head] = places
    return run, said, model


def test_an_automatons_layer_lacks_only_what_letters_do(example) -> None:
    """A layer that begins as an automaton tracks the group once its letters are written."""
    _, said, model = automaton(example)
    letters, answers = said.problem.words(3, 300, torch.Generator().manual_seed(0))
    assert said.right(model(letters, model.first(3))[0], answers).all()


def test_words_are_judged_from_their_first_letters_to_their_last(example) -> None:
    """A model that tracks the group has no word wrong at any place of long words, and one that forgets has."""
    _, said, model = automaton(example)
    judge = example("streams").judge
    assert judge(model, said, 3, 200) == 200 * [0]
    model.layers[0].state_weight.data.zero_()
    found = judge(model, said, 30, 200)
    assert min(found[1:]) > 0
    assert max(found) <= 30


def test_one_wrong_answer_ends_a_stream(example) -> None:
    """Wherever it is in a step's letters; streams whose answers are all right go on."""
    learn = example()
    run, said, model = automaton(example, sure=0.5, restart=0.0)
    model.layers[0].output_projection.weight.data *= 20  # so that it is sure
    streams = learn.Streams(model, said, run.plan, 0)
    drawn = streams._draw

    def spoiled() -> tuple[torch.Tensor, torch.Tensor]:
        letters, answers = drawn()
        answers = answers.clone()
        for stream in range(3):
            answers[stream, stream] = (answers[stream, stream] + 1) % 12
        return letters, answers

    streams.step(0.0, 0)
    assert not streams.lost.any()
    streams._draw = spoiled
    streams.step(0.0, 0)
    assert streams.lost.tolist() == [True, True, True, False, False, False]


def test_streams_end_as_often_as_they_are_told(example) -> None:
    """With a probability of 1 every stream begins anew in each step, whatever was answered."""
    learn = example()
    run, said, model = tracker_of(learn, restart=1.0, sure=0.0)
    streams = learn.Streams(model, said, run.plan, 0)
    for _ in range(3):
        streams.step(0.0, 0)
    assert streams.ages.tolist() == 6 * [3.0]
    letters, answers = streams._draw()
    assert not streams.state.any()
    assert torch.equal(answers[:, 0], letters[:, 0])


def test_gradients_are_clipped(example) -> None:
    """What an optimizer's step takes is no longer than the plan says, all parameters together."""
    learn = example()
    run, said, model = tracker_of(learn, clip=1e-3)
    streams = learn.Streams(model, said, run.plan, 0)
    streams.step(0.0, 0)
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    assert norms.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_there_are_no_more_letters_than_elements(example) -> None:
    """A stage of more letters than the group has is one of all."""
    learn = example()
    run, said, model = tracker_of(learn)
    streams = learn.Streams(model, said, run.plan, 0)
    for asked, letters in ((99, 12), (12, 12), (5, 5), (0, 12)):
        streams.step(0.0, asked)
        assert streams.letters.item() == letters


def test_streams_go_on_until_the_model_errs(example) -> None:
    """A state is that of all the letters since the stream began, and streams that were lost begin with no state."""
    learn = example()
    run, said, model = tracker_of(learn, learning_rate=0.0, restart=0.0, sure=1e-9)
    streams, words = learn.Streams(model, said, run.plan, 0), list[torch.Tensor]()
    drawn = streams._draw

    def noted() -> tuple[torch.Tensor, torch.Tensor]:
        letters, answers = drawn()
        words.append(letters)
        return letters, answers

    streams._draw = noted
    for _ in range(3):
        streams.step(0.0, 0)
    word = torch.cat(words, 1)
    product = said.problem.table.new_zeros(len(word))
    for letter in word.unbind(1):
        product = said.problem.table[product, letter]
    assert torch.equal(streams.product, product)
    assert torch.allclose(streams.state, model(word, model.first(len(word)))[1], atol=1e-6)
    streams.lost[:2] = True
    streams.step(0.0, 0)
    assert torch.allclose(streams.state[:2], model(words[-1][:2], model.first(2))[1], atol=1e-6)
    assert streams.ages.tolist() == [3.0, 3.0, 12.0, 12.0, 12.0, 12.0]


def test_streams_that_the_model_does_not_know_are_lost(example) -> None:
    """A model that is sure of a wrong answer loses every stream; one that need not be sure loses none."""
    learn = example()
    for sure, lost in ((0.5, True), (0.0, False)):
        run, said, model = tracker_of(learn, sure=sure, restart=0.0)
        nn.init.zeros_(model.layers[0].output_projection.weight)  # all places are as probable
        streams = learn.Streams(model, said, run.plan, 0)
        streams.step(0.0, 0)
        assert streams.lost.tolist() == 6 * [lost]


def test_gates_that_are_kept_stay_as_they_began(example) -> None:
    """A step changes v, the state weight and the output projection; q, k and both gates only where they are learnt."""
    learn = example()
    for kept in (True, False):
        run, said, model = tracker_of(learn)
        (layer,) = model.layers
        if kept:
            example("tracker").keep_gates(layer)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        streams = learn.Streams(model, said, run.plan, 0)
        for _ in range(2):  # no state yet has a gradient for f in the first
            streams.step(1e-2, 0)
        same = {name for name, value in layer.state_dict().items() if torch.equal(value, before[name])}
        assert same == ({"decay_gate.A_log", "decay_gate.dt_bias"} if kept else set())
        rows = (layer.input_projection.weight != before["input_projection.weight"]).any(1)
        assert rows[4:14].all()
        assert rows[:4].any() == rows[16:].any() == (not kept)


def test_what_weight_decay_is_for(example) -> None:
    """Steps without gradients shrink state weights and output projections, and input projections if asked to."""
    learn = example()
    for inputs in (False, True):
        run, said, model = tracker_of(learn, weight_decay=0.5, decay_inputs=inputs, layers=2)
        streams = learn.Streams(model, said, run.plan, 0)
        before = {name: value.clone() for name, value in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        streams.rate.fill_(0.1)
        streams.optimizer.step()
        shrunk = ("state_weight", "output_projection.weight", *(["input_projection.weight"] if inputs else []))
        for name, value in model.named_parameters():
            assert torch.allclose(value, (0.95 if name.endswith(shrunk) else 1.0) * before[name]), name


def test_noise_is_added_to_gradients_that_train(example) -> None:
    """A gradient has normal numbers of that size added before it is clipped, and none where gates are kept."""
    learn = example()
    tracker = example("tracker")
    gradients = {}
    for size in (0.0, 0.5):
        *_, model = tracker_of(learn)
        (layer,) = model.layers
        if size:
            tracker.add_noise(layer, size)
        tracker.keep_gates(layer)
        letters = torch.randint(12, (4, 7), generator=torch.Generator().manual_seed(0))
        model(letters, model.first(4))[0].square().sum().backward()
        gradients[size] = {name: p.grad for name, p in layer.named_parameters()}
    added = {name: value - gradients[0.0][name] for name, value in gradients[0.5].items()}
    assert 0.4 < added["state_weight"].std() < 0.6
    rows = added["input_projection.weight"].abs().sum(1) > 0
    assert rows[4:14].all()
    assert not rows[:4].any()
    assert not rows[14:].any()
    assert not added["decay_gate.dt_bias"].any()


def test_stages_are_known_in_turn(example) -> None:
    """Letters come once the last are known; after all of them, the learning rate falls for ``settle`` steps."""
    learn = example()
    run, *_ = tracker_of(learn, letters=[2, 3, 0], known=0.9, settled=0.99, settle=100, learning_rate=1.0)
    streams = example("streams")
    progress = streams.Progress(run.plan, [], 1000)
    seen = []
    for step, accuracy in ((10, 0.8), (20, 0.95), (30, 0.91), (40, 0.98), (50, 0.995)):
        progress.see(step, accuracy)
        seen.append(progress.letters)
    assert seen == [2, 3, 0, 0, 0]
    assert (progress.known_at, progress.end) == ([20, 30, 50], 150)
    assert [progress.rate(step) for step in (49, 100, 149)] == [1.0, 0.5, 0.02]
    late = streams.Progress(run.plan, [20, 30], 120)
    late.see(50, 1.0)
    assert (late.known_at, late.end) == ([20, 30, 50], 120)  # it falls already


def test_letters_are_known_by_the_mean_of_the_last_steps(example) -> None:
    """One step of ten that is all right is a tenth; each ten are looked at by themselves."""
    learn, streams = example(), example("streams")
    run, *_ = tracker_of(learn, letters=[2, 0], known=0.9, settled=0.9, steps=40, settle=5, learning_rate=1.0)
    right = [*9 * [0.0], 1.0, *10 * [0.85], *9 * [1.0], 0.5, *15 * [0.5]]
    asked: list[tuple[float, int]] = []

    def step(rate: float, letters: int) -> None:
        scripted.accuracy.fill_(right[len(asked)])
        asked.append((rate, letters))

    scripted = SimpleNamespace(plan=run.plan, accuracy=torch.zeros(()), ages=torch.zeros(1), step=step)
    assert streams.fit(scripted, lambda line: None) == ([30], 45)
    assert [letters for _, letters in asked] == 30 * [2] + 15 * [0]
    assert [rate for rate, _ in asked][-5:] == pytest.approx([1 * 41 / 50, 0.8, 0.6, 0.4, 0.2])


def test_the_pages_have_what_was_measured(example) -> None:
    """The example's page has the tables of the committed runs: whole recipes, each of learn.yaml's in one of both.

    Files are older than some settings, which were then as the defaults are.
    """
    learn = example()
    config = yaml.safe_load((EXAMPLE / "learn.yaml").read_text(encoding="utf-8"))
    page = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    every, shown = example("asked").runs_of(config, set()), set[str]()
    for name in ("learn_cpu", "learn_h200"):
        rows = json.loads((ROOT / "docs" / "data" / f"{name}.json").read_text(encoding="utf-8"))["runs"]
        recipes = {row["recipe"] for row in rows}
        runs = [run for run in every if run.recipe in recipes]
        assert [(row["recipe"], row["seed"]) for row in rows] == [(run.recipe, run.seed) for run in runs]
        assert [config["defaults"] | row["settings"] for row in rows] == [run.settings for run in runs]
        assert learn.table(runs, rows) in page
        shown |= recipes
    assert shown == {run.recipe for run in every}


def test_the_pages_have_what_longer_words_came_to() -> None:
    """Every layer of the recipes' other seeds was asked, and where one errs the pages say from where."""
    rows = json.loads((ROOT / "docs" / "data" / "learn_longer_cpu.json").read_text(encoding="utf-8"))["runs"]
    trained = json.loads((ROOT / "docs" / "data" / "learn_cpu.json").read_text(encoding="utf-8"))["runs"]
    again = [(row["recipe"], row["seed"]) for row in trained if row["recipe"].endswith("_again")]
    asked = [row for row in rows if row["recipe"].endswith("_again")]
    assert [(row["recipe"], row["seed"]) for row in asked] == again
    assert len(again) == 9
    erring = [row for row in asked if row["perfect_to"] < row["length"]]
    assert {(row["recipe"], row["seed"]) for row in erring} == {("s5_decay_again", 3), ("s5_decay_again", 5)}
    for page in (EXAMPLE / "README.md", ROOT / "docs" / "claims.md"):
        text = " ".join(page.read_text(encoding="utf-8").split())
        assert f"words of {asked[0]['length']:,}" in text
        assert " and ".join(f"{row['perfect_to']:,}" for row in erring) in text
        assert " and ".join(f"{100 * row['accuracy']:.2f}" for row in erring) in text


def test_the_page_has_what_published_initial_values_do() -> None:
    """The example's page has the accuracies and positions of the committed runs with published initial values."""
    kept = json.loads((ROOT / "docs" / "data" / "state_tracking_published_h200.json").read_text(encoding="utf-8"))
    page = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    for number, call in enumerate(kept["calls"], 1):
        for group in ("S3", "A5", "S5"):
            runs = [run for run in call["runs"] if run["group"] == group]
            assert [run["seed"] for run in runs] == [0, 1, 2]
            seen = ", ".join(f"{100 * run['accuracy_seen']:.2f}" for run in runs)
            asked = ", ".join(f"{100 * run['accuracy_asked']:.2f}" for run in runs)
            right = [run["right_to"] for run in runs]
            cells = group, number, seen, asked, ", ".join(map(str, right)), f"{right.count(call['asked'])} of 3"
            assert f"| {' | '.join(map(str, cells))} |" in page


def parity_of_two_seeds() -> dict[str, Any]:
    """Return a config of one recipe, by which nearly every seed learns S2 in seconds."""
    config = yaml.safe_load((EXAMPLE / "learn.yaml").read_text(encoding="utf-8"))
    small = {
        "group": "S2", "heads": 1, "columns": 16, "letters": [0], "streams": 32, "steps": 400, "settle": 600,
    }  # fmt: skip
    return config | {
        "package": "generated.tiny", "evaluate": {"words": 4, "length": 40}, "defaults": config["defaults"] | small,
        "recipes": [{"name": "parity", "seeds": [0, 1]}],
    }  # fmt: skip


def test_several_runs_at_a_time(tmp_path) -> None:
    """Runs side by side are those of one after the other, but for seconds; what is there is not run again."""
    config = parity_of_two_seeds()
    config["defaults"] |= {"steps": 20, "settle": 20}
    place = tmp_path / "learn.yaml"
    place.write_text(yaml.safe_dump(config), encoding="utf-8")

    def learnt(folder: str, *options: str) -> tuple[list[dict[str, Any]], str]:
        command = [sys.executable, str(EXAMPLE / "learn.py"), "--config", str(place), "--out", str(tmp_path / folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--device", "cpu", *options], capture_output=True, text=True, timeout=1800, env=environment
        )
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / folder / "summary.json").read_text(encoding="utf-8"))["runs"]
        return [row | {"seconds": None} for row in rows], done.stderr

    assert "2 runs are left" in learnt("both", "--jobs", "2", "--minutes", "0")[1]
    rows, _ = learnt("both", "--jobs", "2")
    assert [row["seed"] for row in rows] == [0, 1]
    assert rows == learnt("one")[0]
    assert learnt("both", "--jobs", "2") == (rows, "")


def test_jobs_end_with_their_command(tmp_path) -> None:
    """Killed, it leaves no process that trains on in a folder that another may have by then."""
    config = parity_of_two_seeds()
    config["defaults"] |= {"steps": 10**6, "settle": 10**6}
    place = tmp_path / "learn.yaml"
    place.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, str(EXAMPLE / "learn.py"), "--config", str(place), "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [*command, "--device", "cpu", "--jobs", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        try:
            assert "parity_" in process.stderr.readline()  # a line on the way of one that trains
            process.kill()
            process.communicate(timeout=1800)  # until all that have its stderr are gone
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert not list((tmp_path / "out").glob("*.json"))


def test_jobs_are_of_a_cpu(example, monkeypatch, capsys) -> None:
    """Runs side by side on a GPU, none at a time, or on a GPU that is not there, are refused."""
    learn = example()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, message in (
        (["--jobs", "2", "--device", "cuda"], "--jobs must be 1 with --device cuda, got 2"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--device", "cuda"], "--device must be cpu where torch sees no GPU, got cuda"),
    ):
        monkeypatch.setattr(sys, "argv", ["learn.py", *options])
        with pytest.raises(SystemExit, match="2"):
            learn.main()
        assert message in capsys.readouterr().err


def test_runs_of_two_devices_are_kept_apart(example, monkeypatch, tmp_path, capsys) -> None:
    """A folder takes no runs beside those of another device; the table of finished ones is made anywhere."""
    learn = example()
    config = parity_of_two_seeds() | {"evaluate": {"words": 256, "length": 2048}}
    place, out = tmp_path / "learn.yaml", tmp_path / "out"
    place.write_text(yaml.safe_dump(config), encoding="utf-8")
    out.mkdir()
    monkeypatch.setattr(sys, "argv", ["learn.py", "--config", str(place), "--out", str(out)])
    measured = json.loads((ROOT / "docs" / "data" / "learn_h200.json").read_text(encoding="utf-8"))["runs"][0]
    for run in example("asked").runs_of(config, set()):
        row = measured | {"recipe": run.recipe, "seed": run.seed, "settings": run.settings}
        (out / f"{run.name}.json").write_text(json.dumps(row), encoding="utf-8")
    learn.main()
    assert "| 2 of 2 |" in capsys.readouterr().out
    (out / "parity_1.json").unlink()
    with pytest.raises(SystemExit, match=r"must have runs of CPU, .*, but has those of NVIDIA H200; give another"):
        learn.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    learn.main()
    assert "(1 not run) |" in capsys.readouterr().out


def test_parity_is_learnt_and_kept(example, monkeypatch, tmp_path, capsys) -> None:
    """The command trains until words of 40 are right, keeps the weights, and trains nothing again.

    Sums that another CPU rounds otherwise may keep one of two seeds from it.
    """
    learn = example()
    config = parity_of_two_seeds()
    place = tmp_path / "learn.yaml"
    place.write_text(yaml.safe_dump(config), encoding="utf-8")
    arguments = ["learn.py", "--config", str(place), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    learn.main()
    text = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["runs"]
    right, best = [row["perfect_to"] for row in rows], max(rows, key=lambda row: row["perfect_to"])
    assert best["perfect_to"] == 40
    perfect = right.count(40)
    assert text.splitlines()[-1].endswith(f"| {right[0]}, {right[1]} | {perfect} of 2 |")
    monkeypatch.setattr(learn, "train", None)
    learn.main()
    assert capsys.readouterr().out == text
    assert json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["runs"] == rows
    assert {row["torch"] for row in rows} == {torch.__version__}  # of who made the runs, whoever writes the summary
    run = example("asked").runs_of(config, set())[0]
    said = learn.Answers(learn.group("S2"), 1)
    (layer,) = learn.layers_of(run, said, learn.package_of("generated.tiny"), "reference")
    layer.load_state_dict(torch.load(tmp_path / "out" / f"parity_{best['seed']}.pt")[0])
    letters, answers = said.problem.words(3, 60, torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = layer(torch.eye(2)[letters])  # the package's layer by itself
    assert said.right(logits[..., : said.classes], answers).all()
    asked_longer = [*arguments, "--length", "70", "--words", "3"]
    monkeypatch.setattr(sys, "argv", asked_longer)
    longer = example("longer")
    longer.main()
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "longer.json").read_text(encoding="utf-8"))["runs"]
    assert [(row["seed"], row["words"], row["length"]) for row in found] == [(0, 3, 70), (1, 3, 70)]
    assert found[best["seed"]] | {"accuracy": 1.0, "perfect_to": 70} == found[best["seed"]]
    assert text.splitlines()[-1].startswith("| parity | 0, 1 | 3 | 70 | ")
    assert (tmp_path / "out" / "longer.md").read_text(encoding="utf-8") == text
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"none must be a folder of learn\.py's runs"):
        longer.main()
    config["recipes"] = [{"name": "parity", "seeds": [0, 1, 2]}, {"name": "later", "steps": 300, "seeds": [0, 1]}]
    place.write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [*arguments, "--minutes", "0"])
    learn.main()
    said = capsys.readouterr()
    assert said.err == "the minutes are over, 3 runs are left; the same command goes on\n"
    ends = [line.rsplit(" | ", 1)[1] for line in said.out.splitlines()[2:]]
    assert ends == [f"{perfect} of 2 (1 not run) |", "0 of 0 (2 not run) |"]  # what was not run has not failed
    older = json.loads((tmp_path / "out" / "parity_0.json").read_text(encoding="utf-8"))
    del older["settings"]["decay_inputs"]  # as if that had come later
    (tmp_path / "out" / "parity_0.json").write_text(json.dumps(older), encoding="utf-8")
    learn.main()
    assert f"{perfect} of 2 (1 not run) |" in capsys.readouterr().out
    config["recipes"][0]["decay_inputs"] = True
    place.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(SystemExit, match="must be of parity's settings"):
        learn.main()
    del config["recipes"][0]["decay_inputs"]
    config["evaluate"]["words"] = 5
    place.write_text(yaml.safe_dump(config), encoding="utf-8")
    refusal = r"parity_0.json must be judged on 5 words of 40, but is on 4 words of 40; give another --out"
    with pytest.raises(SystemExit, match=refusal):
        learn.main()
    config["defaults"]["columns"] = 9
    place.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(SystemExit, match="must be of parity's settings"):
        learn.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--recipes", "none"])
    with pytest.raises(SystemExit, match="--recipes must be of later, parity, got none"):
        learn.main()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"recipies": []}, "must give defaults, evaluate, package, recipes; see recipies"),
    "evaluate": ({"evaluate": {"words": 4, "length": 40, "at_once": 1}}, "evaluate must give length, words; see at_on"),
    "recipes": ({"recipes": {"name": "a"}}, "must give values of the kinds that this command has, got TypeError"),
    "seeds": ({"recipes": [{"name": "a"}]}, "must give values of the kinds that this command has, got KeyError"),
    "twice": ({"recipes": 2 * [{"name": "a", "seeds": [0]}]}, "recipes must have a name each, got a more than once"),
    "answers": ({"recipes": [{"name": "a", "seeds": [0], "answers": "elements"}]}, "got 'elements'"),
    "weights": (
        {"recipes": [{"name": "a", "seeds": [0], "weights": "random"}]},
        "weights must be of rotation, identity, automat",
    ),
    "layers": ({"recipes": [{"name": "a", "seeds": [0], "layers": 0}]}, "layers must be at least 1, got 0"),
    "segment": ({"recipes": [{"name": "a", "seeds": [0], "segment": 0}]}, "segment must be at least 1, got 0"),
    "forget": ({"recipes": [{"name": "a", "seeds": [0], "forget": 1.0}]}, "forget must be between 0 and 1, got 1.0"),
    "letters": ({"recipes": [{"name": "a", "seeds": [0], "letters": []}]}, "letters must have a stage, got none"),
    "length": ({"evaluate": {"words": 4}}, "evaluate must give length, words; see length"),
    "group": ({"recipes": [{"name": "a", "seeds": [0], "group": "Z9"}]}, "groups must be S1 to S6"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_configs_of_no_sense_end_the_command_before_it_trains(example, monkeypatch, tmp_path, changes, said) -> None:
    """What a run would fail with after its training, or would take for something else, is said at once."""
    learn, place = example(), tmp_path / "learn.yaml"
    place.write_text(yaml.safe_dump(parity_of_two_seeds() | changes), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["learn.py", "--config", str(place), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=said):
        learn.main()
    assert not (tmp_path / "out").exists()


def test_a_layer_that_cannot_be_is_one_line(example, monkeypatch, tmp_path) -> None:
    """What the package says of its options, or of dims that are not built, names the run."""
    learn, place = example(), tmp_path / "learn.yaml"
    recipes = [{"name": "a", "seeds": [3], "norm": "batch"}]
    place.write_text(yaml.safe_dump(parity_of_two_seeds() | {"recipes": recipes}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["learn.py", "--config", str(place), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="a_3: M2RNN: norm must be"):
        learn.main()
