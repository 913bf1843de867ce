"""Pictures: drawn from committed measurements, light and dark, shown on pages, and never older than their numbers."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from support import ROOT

from m2gen.bench.kinds import Axis
from m2gen.bench.layers.document import load_layers
from m2gen.cli.show import bars, layer_plot
from m2gen.cli.show.figure import THEMES, Plot, Quantity, Style
from tools import figures

PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
SHOWN = re.compile(
    r'<picture>\s*<source [^>]*dark\)" srcset="([^"]+)">\s*<img alt="([^"]+)" src="([^"]+)">\s*</picture>'
)
EVERY = [(name, style) for name in figures.PICTURES for style in Style]


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def data(name: str) -> Any:
    return json.loads(text(figures.DATA / name))


def test_pictures_are_of_the_files_as_they_are(tmp_path: Path) -> None:
    """A picture that is missing, or whose file has changed since, is named; no picture is without its numbers."""
    assert figures.outdated() == []
    assert {path.name for path in figures.IMAGES.iterdir()} == {figures.place(*each).name for each in EVERY}
    for path in figures.IMAGES.iterdir():
        shutil.copy(path, tmp_path)
    changed = tmp_path / "memory.svg"
    changed.write_text(re.sub(r"(speed_h200.json )\w{4}", r"\g<1>0000", text(changed)), encoding="utf-8")
    (tmp_path / "search-dark.svg").unlink()
    assert figures.outdated(tmp_path) == ["memory.svg", "search-dark.svg"]
    assert figures.main(["--check", "--out", str(tmp_path)]) == 1
    assert figures.main(["--check"]) == 0


@pytest.mark.parametrize("name", figures.PICTURES)
def test_the_command_makes_the_committed_pictures(name: str, tmp_path: Path) -> None:
    """The same numbers give the same bytes, and the two styles differ in their colours alone."""
    assert figures.main([name, "--out", str(tmp_path)]) == 0
    light, dark = (text(figures.place(name, style, tmp_path)) for style in Style)
    assert THEMES[Style.LIGHT].page in light
    assert THEMES[Style.DARK].page in dark
    assert re.sub(r"#\w{6}", "", light).count("<path") == re.sub(r"#\w{6}", "", dark).count("<path")
    committed = text(figures.place(name, Style.LIGHT))
    source = figures.SOURCE.search(light)
    assert source is not None
    assert source[1].startswith(f"{figures.PICTURES[name].data[0]} ")
    made_by = re.search(r"Matplotlib v([\d.]+)", committed)
    assert made_by is not None
    if made_by[1] != matplotlib.__version__:
        pytest.skip(f"drawn by matplotlib {made_by[1]}, whose glyphs and numbers another version writes anew")
    assert light == committed
    assert dark == text(figures.place(name, Style.DARK))


@pytest.mark.parametrize("name", figures.PICTURES)
def test_every_picture_is_shown_in_both_styles(name: str) -> None:
    """Some page has it, with the dark one for dark pages, and says in words what is on it."""
    found = []
    for page in PAGES:
        for dark, words, light in SHOWN.findall(text(page)):
            if (page.parent / light).resolve() == figures.place(name, Style.LIGHT):
                assert (page.parent / dark).resolve() == figures.place(name, Style.DARK)
                assert len(words.split()) > 5
                found.append(page)
    assert found, name


def test_words_of_the_speed_picture_are_its_numbers() -> None:
    """Where pages say how many times as fast, they say the least and the largest factor on the picture."""
    times: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in data("speed_h200.json")["rows"]:
        both = [row["forward"]["median_ms"], row["step"]["median_ms"]]
        times.setdefault((row["layer"], row["seq"]), {})[row["implementation"]] = both
    factors = []
    for by in times.values():
        ours, others = by.get("tuned", by["default"]), by["tools.published_kernel:published"]
        factors += [other / our for our, other in zip(ours, others, strict=True)]
    said = [
        words for page in PAGES for _, words, light in SHOWN.findall(text(page)) if light.endswith("images/speed.svg")
    ]
    assert said
    for words in said:
        assert f"{min(factors):.1f} to {max(factors):.1f} times as fast" in words


@pytest.mark.parametrize(("name", "style"), EVERY)
def test_text_stays_within_the_picture(
    name: str, style: Style, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the size that it is read at, no text leaves the page."""
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    picture = figures.PICTURES[name]
    picture.draw(Plot(tmp_path / "a.svg", style, picture.quantity, picture.sources))
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    width, height = figure.get_size_inches()
    boxes = [figure.get_tightbbox(figure.canvas.get_renderer())]
    boxes += [legend.get_window_extent().transformed(figure.dpi_scale_trans.inverted()) for legend in figure.legends]
    for box in boxes:
        assert -0.02 <= box.x0 < box.x1 <= width + 0.02
        assert -0.02 <= box.y0 < box.y1 <= height + 0.02


def test_costs_are_those_of_the_page() -> None:
    """The sweep in docs/data/ has the numbers that the table of how cost grows prints, and no other."""
    table = text(ROOT / "docs" / "benchmarks.md").partition("### How cost grows")[2]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    printed: dict[Axis, list[tuple[int, str, str]]] = {axis: [] for axis in Axis}
    for row in (row for row in cells if len(row) == 8 and row[4].isdigit()):
        if row[0]:
            printed[Axis.SEQ].append((int(row[0]), row[1], row[2]))
        printed[Axis.BATCH].append((int(row[4]), row[5], row[6]))
        if row[7]:
            printed[Axis.HEADS].append((int(row[4]), *row[7].removesuffix(" ms").split(", ")))
    k, forward, both = (next(row for row in cells if row[0].startswith(n)) for n in ("rows K", "forward ms", "both ms"))
    printed[Axis.ROWS] += [(int(x), f, b) for x, f, b in zip(k[1:9], forward[1:9], both[1:9], strict=True)]
    for sweep in data("cost_h200.json")["sweeps"]:
        found = [(point["x"], point["rows"][0]) for point in sweep["points"]]
        said = printed.pop(Axis(sweep["axis"]))
        assert [x for x, _ in found] == [x for x, _, _ in said]
        for (_, row), (_, *words) in zip(found, said, strict=True):
            for word, call in zip(words, ("forward", "step"), strict=True):
                assert f"{row[call]['median_ms']:.{len(word.partition('.')[2])}f}" == word
    assert not printed


def test_state_tracking_is_that_of_the_example() -> None:
    """The runs in docs/data/ are those of the example's table, seed by seed."""
    rows = re.findall(
        r"^\| (\w+) \| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| ", text(ROOT / "examples/state_tracking/README.md"), re.M
    )
    runs = data("state_tracking_h200.json")["runs"]
    assert len(rows) * 3 == len(runs) > 0
    for group, model, seen, asked, right in rows:
        found = [run for run in runs if (run["group"], run["model"]) == (group, model)]
        assert ", ".join(f"{100 * run['accuracy_seen']:.2f}" for run in found) == seen
        assert ", ".join(f"{100 * run['accuracy_asked']:.2f}" for run in found) == asked
        assert ", ".join(str(run["right_to"]) for run in found) == right


def test_state_tracking_without_some_runs(tmp_path: Path) -> None:
    """A mixer whose runs of a group the budget left out has no dot there."""
    found = data("state_tracking_h200.json")
    found["runs"] = [run for run in found["runs"] if (run["group"], run["model"]) != ("S5", "gru")]
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    plot = Plot(tmp_path / "drawn.svg", Style.LIGHT, Quantity.TIME, (path,))
    figures.state_tracking(plot)
    assert plot.path.is_file()


def test_layers_are_bars_of_their_medians() -> None:
    """Each bar is as long as the number of the file; what was not timed says so."""
    document = load_layers(figures.DATA / "layers_published_h200.json")
    assert document is not None
    groups = layer_plot.layer_groups(document)
    (seven, _) = groups
    assert (seven.name, seven.size) == ("m2rnn_7b, hidden 1536", "4 × 4096 tokens")
    rows = {
        (row["name"], row["call"]): row
        for row in data("layers_published_h200.json")["layer_rows"]
        if row["layer"] == "m2rnn_7b"
    }
    attention, token = rows["attention", "sequence"], rows["attention", "decode"]
    assert seven.values["attention"] == (
        attention["forward"]["median_ms"],
        attention["step"]["median_ms"],
        attention["extra_bytes"] / 1e9,
        1e3 * token["forward"]["median_ms"],
    )
    assert list(seven.values) == ["m2gen", "published kernel in m2gen's layer", "attention"]
    assert seven.values["published kernel in m2gen's layer"][3] is None
    panels = [bars.FORWARD, bars.STEP, bars.MEMORY, bars.FORWARD]
    (*_, last) = bars.bars_figure(groups, panels, "a title", THEMES[Style.LIGHT]).axes
    assert [each.get_text() for each in last.texts].count("not timed") == 2
    beside = load_layers(figures.DATA / "layers_h200.json")
    assert beside is not None
    groups = layer_plot.layer_groups(beside)
    assert [group.size for group in groups] == ["4 × 4096 tokens", "1 × 16384 tokens", "8 × 4096 tokens"]
    assert all(list(group.values) == ["m2gen", "attention", "Gated DeltaNet (timing only)"] for group in groups)
    alone = replace(groups[0], values={k: v for k, v in groups[0].values.items() if k != "attention"})
    assert alone.compared(1, bars.STEP) == "1.6× as fast"
    assert alone.compared(2, bars.MEMORY) == "118% as much"


def test_a_searchs_best_so_far_only_falls() -> None:
    """The line of each panel ends at the best of the journal's trials, and the dots are the trials that passed."""
    figure = figures._searches_figure(figures.PICTURES["search"].sources, "a title", THEMES[Style.LIGHT])
    for axes, journal in zip(figure.axes, figures.PICTURES["search"].sources, strict=True):
        passed = [trial.median_ms for trial in figures.recorded(journal) if trial.median_ms]
        (best,) = (line for line in axes.lines if line.get_label() == "best so far")
        assert all(later <= before for before, later in pairwise(best.get_ydata()))
        assert best.get_ydata()[-1] == min(passed)
        assert sorted(ms for line in axes.lines if line.get_marker() == "o" for ms in line.get_ydata()) == sorted(
            passed
        )


def test_unknown_pictures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The error names those that there are."""
    with pytest.raises(SystemExit):
        figures.main(["sped"])
    assert "NAME must be among speed, memory, layers" in capsys.readouterr().err
