"""The picture of a run: the committed numbers, to the last digit, and the committed file, to the last byte."""

from __future__ import annotations

import json
import re
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from command_line import document, fails, run
from support import ROOT

from m2gen.bench.document import Document, load
from m2gen.bench.kinds import Axis, Kind
from m2gen.cli.show import bars, plot, speed, sweep
from m2gen.cli.show.figure import THEMES, Quantity, Style
from m2gen.errors import UsageError

NUMBERS = ROOT / "docs" / "data" / "speed_h200.json"
PICTURES = {
    Style.LIGHT: ROOT / "docs" / "images" / "speed.svg",
    Style.DARK: ROOT / "docs" / "images" / "speed-dark.svg",
}
PEER = "tools.published_kernel:published"


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Callable[[list[Any]], list[Any]]], Path]:
    """Return a function that writes the committed run with other rows."""

    def write(change: Callable[[list[Any]], list[Any]]) -> Path:
        content = json.loads(NUMBERS.read_text(encoding="utf-8"))
        content["rows"] = change(content["rows"])
        (tmp_path / "run.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path / "run.json"

    return write


def medians() -> dict[tuple[str, str, int], dict[str, list[float]]]:
    """Return the times of the committed file by workload and implementation, read without m2gen's reader.

    A search's schedule that is the default has no times of its own.
    """
    found: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for row in json.loads(NUMBERS.read_text(encoding="utf-8"))["rows"]:
        where = (row["layer"], f"{row['batch']} × {row['seq']} tokens", row["seq"])
        times = [row["forward"]["median_ms"], row["step"]["median_ms"]]
        found.setdefault(where, {})[row["implementation"]] = times
    return {where: {"tuned": both.get("tuned", both["default"]), PEER: both[PEER]} for where, both in found.items()}


def tuned_rows(rows: list[Any]) -> list[Any]:
    """Return rows without those of default schedules beside which there are tuned ones."""
    tuned = {(row["layer"], row["seq"]) for row in rows if row["implementation"] == "tuned"}
    return [row for row in rows if row["implementation"] != "default" or (row["layer"], row["seq"]) not in tuned]


def drawn(groups: list[bars.Group], title: str = "a title") -> Any:
    """Return the figure of groups."""
    return bars.bars_figure(groups, speed.PANELS[Quantity.TIME], title, THEMES[Style.LIGHT])


def test_the_bars_are_the_committed_numbers() -> None:
    """Each bar is as long as the median that it stands for, with its time and m2gen's factor behind it."""
    figure = drawn(speed.speed_groups(load(NUMBERS)))
    expected = medians()
    assert len(expected) == 5
    for call, axes in enumerate(figure.axes):
        bars = {container.get_label(): [bar.get_width() for bar in container] for container in axes.containers}
        assert bars == {
            "m2gen, tuned": [both["tuned"][call] for both in expected.values()],
            "published kernel (timing only)": [both[PEER][call] for both in expected.values()],
        }
        texts = [text.get_text() for text in axes.texts]
        factors = [f"{both[PEER][call] / both['tuned'][call]:.1f}× as fast" for both in expected.values()]
        assert [text for text in texts if "fast" in text] == factors
        times = {f"{ms[call]:#.3g} ms" for both in expected.values() for ms in both.values()}
        assert {text for text in texts if "ms" in text} == times
        assert axes.get_xlim()[0] == 0
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"{layer} bf16\n{size}" for layer, size, _ in expected]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Forward", "Forward and backward"]


@pytest.mark.parametrize("style", Style)
def test_the_committed_picture_is_what_the_command_makes(style: Style, tmp_path: Path) -> None:
    """The README shows what the committed numbers give, by the command that its page names."""
    committed = PICTURES[style].read_bytes()
    made_by = re.search(rb"Matplotlib v([\d.]+)", committed)
    assert made_by is not None
    if made_by[1].decode() != matplotlib.__version__:
        pytest.skip(f"drawn by matplotlib {made_by[1].decode()}, whose glyphs and numbers another version writes anew")
    path = tmp_path / "speed.svg"
    result = run("bench", "--from", str(NUMBERS), "--plot", str(path), "--style", style)
    assert result.exit_code == 0, result.output
    assert path.read_bytes() == committed
    assert b"<dc:date>" not in committed


def test_what_cannot_be_compared_is_named(edited: Any) -> None:
    """A workload that only one side has a time of is not drawn, and it is said that it is not."""
    result = run("bench", "--from", str(NUMBERS))
    assert result.stderr == ""
    path = edited(
        lambda rows: [row for row in rows if row["layer"] != "square_16" or row["implementation"] == "default"]
    )
    result = run("bench", "--from", str(path), "--plot", "speed.png", "--layer", "square_16")
    assert result.exit_code == 2
    assert "m2gen: --plot must have times of m2gen's kernels beside those of another" in result.stderr
    assert not Path("speed.png").exists()


def test_text_stays_within_the_picture() -> None:
    """At the size that it is read at, no text leaves the page, and none is on another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    title = speed.speed_title(load(NUMBERS), groups := speed.speed_groups(load(NUMBERS)))
    figure = drawn(groups, title)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = figure.bbox
    texts = [*figure.texts, *figure.legends[0].get_texts()]
    texts += [text for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels(), axes.xaxis.label)]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) > 20
    for place, box in enumerate(boxes):
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, texts[place].get_text()
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, texts[place].get_text()
        for other in boxes[:place]:
            assert not box.overlaps(other), texts[place].get_text()


def test_default_kernels_where_they_are_what_is_tuned(edited: Any) -> None:
    """A package that is the default's is not timed twice: its times are those of m2gen."""
    path = edited(
        lambda rows: [
            {**row, "implementation": row["implementation"].replace("tuned", "default")} for row in tuned_rows(rows)
        ]
    )
    groups = speed.speed_groups(load(path))
    assert [group.values["m2gen, tuned"] for group in groups] == [tuple(both["tuned"]) for both in medians().values()]


def test_tuned_beside_default_without_a_peer(edited: Any) -> None:
    """A run of m2gen's own kernels shows what tuning gains."""
    path = edited(lambda rows: [row for row in rows if row["implementation"] != PEER])
    groups = speed.speed_groups(load(path))
    assert all(list(group.values) == ["m2gen, tuned", "m2gen, default schedule"] for group in groups)
    rows = json.loads(NUMBERS.read_text(encoding="utf-8"))["rows"]
    tuned = [row["layer"] for row in rows if row["implementation"] == "tuned"]
    assert [group.name.split()[0] for group in groups] == tuned


def test_several_peers_are_bars_of_their_own(edited: Any) -> None:
    """Loops of PyTorch, which are timed on fewer steps, and decoding are not among them."""

    def change(rows: list[Any]) -> list[Any]:
        peer = next(row for row in rows if row["implementation"] == PEER)
        others = [{**peer, "implementation": name} for name in ("fla:scan", "eager", "compiled")]
        return [*rows, *others, {**rows[0], "call": "decode", "seq": 1, "steps": 1, "step": None}]

    first, *others = speed.speed_groups(load(edited(change)))
    assert list(first.values) == ["m2gen, tuned", "published kernel (timing only)", "scan kernel (timing only)"]
    assert all(list(group.values) == ["m2gen, tuned", "published kernel (timing only)"] for group in others)
    (axes, _) = drawn([first, *others]).axes
    assert len(axes.containers) == 3
    assert "other implementations" in speed.speed_title(load(NUMBERS), [first, *others])


def test_failures_are_not_drawn(edited: Any) -> None:
    """An implementation that failed its check has no bar, and so no factor."""

    def change(rows: list[Any]) -> list[Any]:
        broken = {"failure": "wrong: dq", "forward": None, "step": None}
        return [row if row["implementation"] == PEER else {**row, **broken} for row in rows]

    with pytest.raises(UsageError, match="must have times of m2gen's kernels beside those of another implementation"):
        speed.speed_groups(load(edited(change)))


@pytest.mark.parametrize(
    ("kinds", "peers", "fits"),
    [
        (tuple(Kind), {}, True),
        ((Kind.TUNED, Kind.PEER), {"published": "a:b"}, True),
        ((Kind.TUNED, Kind.PEER), {}, False),
        ((Kind.TUNED,), {"published": "a:b"}, False),
        ((Kind.TUNED, Kind.DEFAULT), {}, True),
    ],
)
def test_a_run_that_could_not_be_drawn_is_refused(kinds: tuple[Kind, ...], peers: dict[str, str], fits: bool) -> None:
    """The error comes before minutes are spent on timing."""
    if fits:
        speed.check_comparable(kinds, peers)
    else:
        with pytest.raises(UsageError, match="--plot must have times"):
            speed.check_comparable(kinds, peers)


def test_documents_that_say_contender_are_read(edited) -> None:
    """Older documents call an implementation a contender."""
    path = edited(lambda rows: [{"contender": row.pop("implementation"), **row} for row in rows])
    assert load(path) == load(NUMBERS)


def test_an_earlier_run_is_shown_as_it_was() -> None:
    """``--from`` prints the tables and the document of the run, of all layers or of some."""
    found = document("bench", "--from", str(NUMBERS))
    assert found == json.loads(NUMBERS.read_text(encoding="utf-8"))
    rows = document("bench", "--from", str(NUMBERS), "--layer", "square")["rows"]
    assert [row["layer"] for row in rows] == ["square"] * 3
    text = run("bench", "--from", str(NUMBERS)).stdout
    assert "m2rnn_410m bf16, B8 S4096" in text
    assert "mma, 64 rows, 2 warps, 7 segments " in text
    assert "exact c7c2c2c406e9" in text


def test_a_run_of_an_earlier_version_is_shown(tmp_path: Path) -> None:
    """Schedules that are named otherwise by now have the names that they had."""
    earlier = tmp_path / "earlier.json"
    text = NUMBERS.read_text(encoding="utf-8").replace("mma_f64x2u8a_b64x2c8atx_i8_s7_ptx", "f64x2_ptx_explicit")
    earlier.write_text(text, encoding="utf-8")
    shown = run("bench", "--from", str(earlier)).stdout
    assert "f64x2_ptx_explicit" in shown
    assert "mma, 16/64 rows, 2/4 warps " in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "bench must be given either --spec, to time its workloads, or --from, to show an earlier run"),
        (("--from", str(NUMBERS), "--spec", "h200.yaml"), "bench must be given either --spec"),
        (("--from", str(NUMBERS), "--sweep", "seq", "--only", "tuned"), "--from must be given without --sweep, --only"),
        (("--from", str(NUMBERS), "--layer", "none"), "--layer must be among m2rnn_7b, m2rnn_410m, square"),
        (("--from", "absent.json"), "absent.json must be readable"),
        (("--from", str(NUMBERS), "--plot", "a.pdf"), "--plot must end in .png or .svg, got 'a.pdf'"),
        (("--from", str(ROOT / "pyproject.toml")), "$ must be what `m2gen bench --json` prints"),
    ],
)
def test_what_cannot_be_shown(options: tuple[str, ...], message: str) -> None:
    """The error is one line with status 2."""
    assert message in fails(2, "bench", *options)


def sweeps() -> sweep.SweepDocument:
    """Return a sweep whose times are those of the committed run."""
    document = load(NUMBERS)
    rows = [row for row in document.rows if row.layer == "m2rnn_7b" and row.seq == 4096]
    points = tuple(sweep.CurvePoint(x, True, tuple(rows)) for x in (128, 256, 512))
    return sweep.SweepDocument(document.environment, (sweep.Sweep(Axis.SEQ, "m2rnn_7b", points),))


def test_sweeps_of_an_earlier_run(tmp_path: Path) -> None:
    """Their document reads back, and is shown and drawn without a GPU."""
    before = sweep.sweeps_document(sweeps())
    path, picture = tmp_path / "sweeps.json", tmp_path / "cost.svg"
    path.write_text(json.dumps(before), encoding="utf-8")
    assert document("bench", "--from", str(path)) == json.loads(json.dumps(before))
    result = run("bench", "--from", str(path), "--plot", str(picture), "--style", "dark")
    assert "m2rnn_7b over seq: both, ms" in result.stdout
    assert picture.read_bytes().startswith(b"<?xml")
    before["sweeps"][0]["points"][0]["x"] = "far"
    path.write_text(json.dumps(before), encoding="utf-8")
    assert "sweeps.json: $.sweeps[0].points[0].x must" in fails(2, "bench", "--from", str(path))


def test_memory_in_place_of_time(tmp_path: Path) -> None:
    """``--quantity memory`` draws gigabytes and m2gen's part of them; what has no such picture says so."""
    groups = speed.speed_groups(load(NUMBERS), Quantity.MEMORY)
    rows = json.loads(NUMBERS.read_text(encoding="utf-8"))["rows"]
    first = {
        row["implementation"]: row["extra_bytes"] for row in rows if row["layer"] == "m2rnn_7b" and row["batch"] == 4
    }
    assert groups[0].values == {
        "m2gen, tuned": (first["default"] / 1e9,),
        "published kernel (timing only)": (first[PEER] / 1e9,),
    }
    assert groups[0].compared(0, bars.MEMORY) == f"{first['default'] / first[PEER]:.0%} as much"
    arguments = ("--plot", str(tmp_path / "a.svg"), "--quantity", "memory")
    assert run("bench", "--from", str(NUMBERS), *arguments).exit_code == 0
    (tmp_path / "sweeps.json").write_text(json.dumps(sweep.sweeps_document(sweeps())), encoding="utf-8")
    line = fails(2, "bench", "--from", str(tmp_path / "sweeps.json"), *arguments)
    assert "--quantity must be time for sweeps, got memory" in line
    layers = NUMBERS.with_name("layers_h200.json")
    assert "--quantity must be time for a run of layers" in fails(2, "bench", "--from", str(layers), *arguments)


def test_curves_are_the_times() -> None:
    """Each curve goes through the medians of its implementation, at each place of the axis."""
    (axes,) = plot.sweeps_figure(sweeps().sweeps, "a title", THEMES[Style.LIGHT]).axes
    found = {
        container.get_label().partition("; ")[0]: list(container.lines[0].get_ydata()) for container in axes.containers
    }
    rows = json.loads(NUMBERS.read_text(encoding="utf-8"))["rows"]
    by = {row["implementation"]: row for row in rows if (row["layer"], row["seq"]) == ("m2rnn_7b", 4096)}
    assert found["default, forward"] == [by["default"]["forward"]["median_ms"]] * 3
    assert found["published (timing only), forward+backward"] == [by[PEER]["step"]["median_ms"]] * 3


def test_both_styles_can_be_told_apart_in_print() -> None:
    """m2gen's bars differ from those beside them by their lightness, not by their hue alone."""

    def lightness(color: str) -> float:
        channels = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    for theme in THEMES.values():
        light, dark = sorted((lightness(theme.data[0]), lightness(theme.beside[0])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 1.9
        for color in (theme.text, theme.muted, theme.data[0]):
            ends = sorted((lightness(color), lightness(theme.page)), reverse=True)
            assert (ends[0] + 0.05) / (ends[1] + 0.05) > 4.5, "text can be read"
    assert isinstance(load(NUMBERS), Document)


DAMAGED: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "variant": (
        "speed_h200.json",
        lambda run: run["rows"][0].update(variant="nonsense"),
        "$.rows[0].variant must be the key of a variant, got 'nonsense'",
    ),
    "times": (
        "speed_h200.json",
        lambda run: run["rows"][1].update(forward=None),
        "$.rows[1].forward must have times where failure is empty, got null",
    ),
    "intervals": (
        "speed_h200.json",
        lambda run: run["rows"][1]["forward"].update(high_ms=1e-3),
        "$.rows[1].forward must have low_ms <= median_ms <= high_ms, got {",
    ),
    "intervals of a sweep": (
        "cost_h200.json",
        lambda run: run["sweeps"][1]["points"][2]["rows"][0]["step"].update(low_ms=1e9),
        "$.sweeps[1].points[2].rows[0].step must have low_ms <= median_ms <= high_ms, got {",
    ),
    "times of layers": (
        "layers_h200.json",
        lambda run: run["layer_rows"][0].update(forward=None),
        "$.layer_rows[0].forward must have times where failure is empty, got null",
    ),
    "dtype": (
        "ranks_2_h200.json",
        lambda run: run["cases"][0]["shape"].update(dtype="fp8"),
        "$.cases[0].shape.dtype must be among bf16, fp16, fp32, got 'fp8'",
    ),
    "heads": (
        "ranks_2_h200.json",
        lambda run: run["cases"][1]["shape"].update(heads={}),
        "$.cases[1].shape.heads must have a count of q, k, v, f, w, g, got {}",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_run_says_what_is_wrong(
    name: str, damage: Callable[[Any], object], message: str, tmp_path: Path
) -> None:
    """In one line, with the place in the file."""
    content = json.loads(NUMBERS.with_name(name).read_text(encoding="utf-8"))
    damage(content)
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert message in fails(2, "bench", "--from", str(tmp_path / name))


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """A full disk leaves the picture from before."""
    picture = tmp_path / "a.svg"
    picture.write_text("from before", encoding="utf-8")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        line = fails(2, "bench", "--from", str(NUMBERS), "--json", "--plot", str(picture))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line == f"m2gen: --plot {picture} must be writable: File too large"
    assert picture.read_text(encoding="utf-8") == "from before"
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize("name", ["speed_h200.json", "cost_h200.json", "layers_h200.json", "ranks_2_h200.json"])
def test_a_run_that_comes_by_a_pipe(name: str) -> None:
    """It can be read once, as that of ``--from <(gunzip -c run.json.gz)``."""
    path = NUMBERS.with_name(name)
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        given = f"/dev/fd/{writer.stdout.fileno()}"
        assert run("bench", "--from", given).stdout == run("bench", "--from", str(path)).stdout != ""


def test_a_run_over_ranks_that_has_no_rows_yet(tmp_path: Path) -> None:
    """It was ended before the first, and is shown as it is."""
    content = json.loads(NUMBERS.with_name("ranks_2_h200.json").read_text(encoding="utf-8"))
    (tmp_path / "begun.json").write_text(json.dumps({**content, "rows": []}), encoding="utf-8")
    assert run("bench", "--from", str(tmp_path / "begun.json")).exit_code == 0
