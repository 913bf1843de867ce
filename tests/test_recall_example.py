"""The recall example: its tasks and its windowed attention against something independent, and its command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from support import ROOT
from torch.nn import functional as F

from m2gen.kernels.compile import load_module

EXAMPLES = ROOT / "examples"
RUNS = ROOT / "docs" / "data" / "recall_h200.json"
"""All runs of the example's config, as one GPU made them."""
LOCAL = ("curves", "decoder", "files", "gated_delta", "outcomes", "pictures", "settings", "tasks", "train")
"""Modules that the example finds beside it."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports the example's command, or one of the modules beside it."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "recall"), str(EXAMPLES), *sys.path])
    for name in LOCAL:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def imported(module: str = "run") -> ModuleType:
        return load_module(EXAMPLES / "recall" / f"{module}.py", f"example_recall_{module}")

    yield imported
    for name in LOCAL:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("length", [16, 33])
def test_answers_are_in_the_words(example, length) -> None:
    """A recall's answers follow their keys, each of which was said once before; a copy's are its first letters."""
    tasks = example("tasks")
    recall, copy = (tasks.Task(name, items=4, keys=6, values=5, noise=3) for name in ("recall", "copy"))
    first_value, first_key = 1 + 3, 1 + 3 + 5
    generator = torch.Generator().manual_seed(0)
    for word, answers in zip(*(x.tolist() for x in recall.draw(50, length, generator)), strict=True):
        body, queries = word[:-4], word[-4:]
        assert len(set(queries)) == 4
        assert sorted(x for x in body if x >= first_key) == sorted(queries)
        assert [body[body.index(key) + 1] - first_value for key in queries] == answers
        assert max(word) < recall.letters
    for word, answers in zip(*(x.tolist() for x in copy.draw(50, length, generator)), strict=True):
        assert [letter - first_value for letter in word[:4]] == answers
        assert word[-4:] == 4 * [tasks.CUE]
        assert all(1 <= letter < first_value for letter in word[4:-4])


@pytest.mark.parametrize("length", [3, 8, 21])
def test_windows_see_the_last_letters_alone(example, length) -> None:
    """Blocks give what attention with a mask of all pairs gives."""
    train = example("train")
    torch.manual_seed(0)
    window = train.Window(8, 2, 4)
    x = torch.randn(2, length, 8)
    q, k, v = window.qkv(x).unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)
    back = torch.arange(length)[:, None] - torch.arange(length)
    y = F.scaled_dot_product_attention(train.rotated(q), train.rotated(k), v, attn_mask=(back >= 0) & (back < 4))
    assert torch.allclose(window(x), window.out(y.transpose(1, 2).flatten(-2)), atol=1e-6)


def test_guesses_of_a_words_values(example) -> None:
    """Who answers each question with the value of one of the word's places is right as often as the table says."""
    run = example()
    config = run.load(EXAMPLES / "recall" / "config.yaml", {})
    generator = torch.Generator().manual_seed(0)
    for name in config.tasks:
        _, answers = config.task(name).draw(20_000, 64, generator)
        places = torch.randint(config.items, answers.shape, generator=generator)
        share = (answers.gather(1, places) == answers).double().mean().item()
        assert share == pytest.approx(run.curves.by_chance(config), abs=2e-3)


def command(run: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    run.main()


def test_recall_smoke(example, monkeypatch, tmp_path: Path, capsys) -> None:
    """Every model trains and is judged; table, figures and one file of all runs are there.

    A call with nothing left runs nothing again and needs no package, and one without minutes shows what there is.
    """
    run = example()
    smoke = ("--smoke", "--out", str(tmp_path))
    command(run, monkeypatch, *smoke)
    table = capsys.readouterr().out
    models = ["M²RNN", "Gated DeltaNet", "attention to a window of 4", "attention"]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [row[0] for row in cells[2:6]] == models
    assert [row[2] for row in cells[2:6]] == ["512", "32", "64", "all letters"]
    assert [row for row in cells[6:] if row[1] == models[0]] == [[f"{x}, letters", *models] for x in ("recall", "copy")]
    assert [row[0] for row in cells if row[0] in ("8", "20")] == 2 * ["8", "20"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table
    for name in ("recall.svg", "recall-dark.svg"):
        assert (tmp_path / name).read_text(encoding="utf-8").startswith("<?xml")
    kept = (tmp_path / "recall.json").read_text(encoding="utf-8")
    data = json.loads(kept)
    assert (data["device"], data["torch"]) == (run.outcomes.here().device, torch.__version__)
    assert data["config"]["evaluate"]["lengths"] == [8, 20]
    kinds = ("m2rnn", "gated_deltanet", "window", "attention")
    assert [(x["task"], x["model"]) for x in data["runs"]] == [(x, kind) for x in ("recall", "copy") for kind in kinds]
    for outcome in data["runs"]:
        place = tmp_path / f"{outcome['task']}_{outcome['model']}_0.json"
        assert json.loads(place.read_text(encoding="utf-8")) == outcome
        assert set(outcome["accuracy"]) == {"8", "20"}

    monkeypatch.setattr(run, "package_of", lambda name: pytest.fail(f"{name} is asked for"))
    monkeypatch.setattr(run.outcomes, "here", lambda: run.outcomes.Machine("another", "1.0"))
    command(run, monkeypatch, *smoke)
    assert capsys.readouterr().out == table
    assert (tmp_path / "recall.json").read_text(encoding="utf-8") == kept


def test_a_folder_is_of_one_config_and_machine(example, monkeypatch, tmp_path: Path, capsys) -> None:
    """Runs that are left are not made with another config or by another machine; without minutes, none is made."""
    run = example()
    smoke = ("--smoke", "--out", str(tmp_path), "--set", "models=[window, attention]", "--set", "tasks=[copy]")
    command(run, monkeypatch, *smoke)
    (tmp_path / "copy_window_0.json").unlink()
    capsys.readouterr()
    command(run, monkeypatch, *smoke, "--minutes", "-1")
    said = capsys.readouterr()
    assert "the minutes are over" in said.err
    assert "| copy, letters | attention |\n" in said.out
    with pytest.raises(SystemExit, match="must have runs of this config, but has others: steps; give another --out"):
        command(run, monkeypatch, *smoke, "--set", "steps=3")
    monkeypatch.setattr(run.outcomes, "here", lambda: run.outcomes.Machine("another", torch.__version__))
    with pytest.raises(SystemExit, match="must have runs of this config, but has others: device; give another --out"):
        command(run, monkeypatch, *smoke)
    older = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del older["device"], older["torch"]
    (tmp_path / "config.json").write_text(json.dumps(older), encoding="utf-8")
    command(run, monkeypatch, *smoke, "--set", "models=[attention]")
    assert capsys.readouterr().out.startswith("unknown device, torch unknown, fp32; 2 steps")
    (tmp_path / "copy_attention_0.json").unlink()  # a folder without runs is of no config yet
    command(run, monkeypatch, *smoke, "--set", "steps=3")
    assert capsys.readouterr().out.startswith(f"another, torch {torch.__version__}, fp32; 3 steps")


def test_the_page_is_of_the_committed_runs(example, monkeypatch, tmp_path: Path) -> None:
    """The command on the page makes its table and figures again, byte for byte, from all runs of the config."""
    run = example()
    page = tmp_path / "README.md"
    shutil.copy(EXAMPLES / "recall" / "README.md", page)
    command(run, monkeypatch, "--report", str(RUNS), "--readme", str(page))
    assert page.read_text(encoding="utf-8") == (EXAMPLES / "recall" / "README.md").read_text(encoding="utf-8")
    results = run.outcomes.read(RUNS)
    assert results.config == run.load(EXAMPLES / "recall" / "config.yaml", {})
    assert [(x.task, x.model, x.seed) for x in results.runs] == list(run.outcomes.in_order(results.config))
    for name in ("recall.svg", "recall-dark.svg"):
        committed = (EXAMPLES / "recall" / name).read_text(encoding="utf-8")
        made_by = re.search(r"Matplotlib v([\d.]+)", committed)
        assert made_by is not None
        if made_by[1] != matplotlib.__version__:
            pytest.skip(f"drawn by matplotlib {made_by[1]}, whose glyphs and numbers another version writes anew")
        assert (tmp_path / name).read_text(encoding="utf-8") == committed


def test_the_page_has_the_calls_before(example) -> None:
    """What each call came to at the longest words, from the committed runs of all; they are of one config."""
    run = example()
    page = (EXAMPLES / "recall" / "README.md").read_text(encoding="utf-8")
    now, kept = (
        json.loads(path.read_text(encoding="utf-8")) for path in (RUNS, RUNS.with_name("recall_earlier_h200.json"))
    )
    assert kept["config"] == now["config"]
    for call in [*kept["calls"], now | {"day": "2026-12-01"}]:
        at = {
            (task, model): [x["accuracy"] for x in call["runs"] if (x["task"], x["model"]) == (task, model)]
            for task in ("recall", "copy")
            for model in ("m2rnn", "gated_deltanet")
        }
        cells = [call["day"]]
        cells += [run.curves.span([100 * x["16384"] for x in at["recall", m]], 1) for m in ("m2rnn", "gated_deltanet")]
        for model in ("m2rnn", "gated_deltanet"):
            learned = [x for x in at["copy", model] if x["1024"] >= 0.999]
            cells.append(", ".join(f"{100 * x['16384']:.1f}" for x in learned))
        assert f"| {' | '.join(cells)} |" in page


def test_the_figure_has_every_run(example, monkeypatch, tmp_path: Path) -> None:
    """Each run is a line through its own shares, and no text leaves the page or lies on another."""
    run, drawn = example(), []

    def save(figure: Any, path: Path, **_: Any) -> None:
        drawn.append(figure)
        path.touch()

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    results = run.outcomes.read(RUNS)
    assert run.curves.draw(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recall-dark.svg", "recall.svg"]
    assert len(drawn) == 2
    for figure in drawn:
        for task, axes in zip(results.config.tasks, figure.axes, strict=True):
            assert axes.get_title() == task
            lines = [list(line.get_ydata()) for line in axes.lines if line.get_marker() != "None"]
            assert lines == [[100 * x for x in run.accuracy.values()] for run in results.runs if run.task == task]
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        (legend,) = figure.legends
        texts = [*legend.get_texts(), *(x for axes in figure.axes for x in words_of(axes))]
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
        for box in boxes:
            assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)] == []


def words_of(axes: Any) -> list[Any]:
    """Return the texts of a panel."""
    shown = axes.get_yticklabels() if axes.get_ylabel() else []
    return [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *shown]


def test_files_that_are_no_runs_are_refused(example, monkeypatch, tmp_path: Path) -> None:
    """The error names the file, what it must be and what is wrong with it; --readme alone, and a page without marks."""
    run, data, place = example(), json.loads(RUNS.read_text(encoding="utf-8")), tmp_path / "bad.json"
    first = data["runs"][0]
    wrong = {
        "Expecting value": "no JSON",
        "TypeError": "[]",
        "'config'": "{}",
        "'device'": {name: value for name, value in data.items() if name != "device"},
        "of none": {**data, "runs": []},
        "'seed'": {**data, "runs": [{"task": "recall", "model": "m2rnn"}]},
        r"\('recall', 'm2rnn', 9\)": {**data, "runs": [{**first, "seed": 9}]},
        "'512'": {**data, "runs": [{**first, "accuracy": {"256": 1.0}}]},
        "shares that are none at 256": {**data, "runs": [{**first, "accuracy": {**first["accuracy"], "256": 100.0}}]},
    }
    for said, content in wrong.items():
        place.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        with pytest.raises(SystemExit, match=f"bad.json must be a recall.json of finished runs, got .*{said}"):
            command(run, monkeypatch, "--report", str(place), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    page = tmp_path / "page.md"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(
        SystemExit, match=r"page\.md must have <!-- recall: begin --> and, below it, <!-- recall: end -->"
    ):
        command(run, monkeypatch, "--report", str(RUNS), "--readme", str(page))
    assert list(tmp_path.glob("*.svg")) == []
    with pytest.raises(SystemExit, match="2"):
        command(run, monkeypatch, "--readme", str(page))


def test_a_report_needs_no_package(tmp_path: Path) -> None:
    """A process of its own makes table and figures, and imports nothing that is generated."""
    asked = ["run.py", "--report", str(RUNS), "--out", str(tmp_path / "out")]
    code = (
        f"import runpy, sys; sys.argv = {asked}\n"
        f"runpy.run_path({str(EXAMPLES / 'recall' / 'run.py')!r}, run_name='__main__')\n"
        "sys.exit('generated' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["recall-dark.svg", "recall.svg", "table.md"]
