"""Write figures in one style, light or dark, with the same bytes for the same numbers."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from m2gen.errors import UsageError, os_errors_as

FORMATS = (".png", ".svg")
PIXELS = 800
"""Width at which figures are meant to be read, where text is 9.5 points high and a point is 4/3 pixels."""


class Style(StrEnum):
    """The background that a figure is made for."""

    LIGHT = "light"
    DARK = "dark"


class Quantity(StrEnum):
    """What the bars of a run are."""

    TIME = "time"
    MEMORY = "memory"


@dataclass(frozen=True)
class Theme:
    """The colours of a style; the colour-blind can tell those of data apart, and in print their lightness differs."""

    page: str
    text: str
    muted: str
    grid: str
    data: tuple[str, ...]
    """Colours of curves; the first is m2gen's."""
    beside: tuple[str, ...]
    """Colours of other implementations."""


THEMES = {
    Style.LIGHT: Theme(
        "#ffffff",
        "#1f2328",
        "#59636e",
        "#e1e4e8",
        ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
        ("#b1b8c0", "#e69f00", "#009e73", "#cc79a7"),
    ),
    Style.DARK: Theme(
        "#0d1117",
        "#e6edf3",
        "#9198a1",
        "#2a313c",
        ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#0072b2"),
        ("#6e7681", "#e69f00", "#009e73", "#cc79a7"),
    ),
}


@dataclass(frozen=True)
class Plot:
    """A figure to be written: its file, its style, what it is of, and the files that its numbers are from."""

    path: Path
    style: Style = Style.LIGHT
    quantity: Quantity = Quantity.TIME
    sources: tuple[Path, ...] = ()

    @property
    def theme(self) -> Theme:
        """The colours of the style."""
        return THEMES[self.style]


def source_of(paths: Iterable[Path]) -> str:
    """Return what a figure says of the files that its numbers are from: names and the first digits of SHA-256."""
    return ", ".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" for path in paths)


def check_figure(path: Path) -> None:
    """Raise UsageError if no figure can be written to ``path``, before anything is timed."""
    if path.suffix not in FORMATS:
        raise UsageError(f"--plot must end in {' or '.join(FORMATS)}, got {str(path)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot must have matplotlib to draw with, got none: pip install 'm2gen[plot]'")


def write_figure(plot: Plot, title: str, draw: Callable[[Theme], Any]) -> None:
    """Write the figure that ``draw`` returns, whole or not at all; raises UsageError if the file cannot be written."""
    import matplotlib.style

    from m2gen.db.exchange import write_whole

    metadata: dict[str, str | None] = {"Title": title}
    if plot.path.suffix == ".svg":
        metadata["Date"] = None
    if plot.sources:
        metadata["Source"] = source_of(plot.sources)
    with matplotlib.style.context(["default", _settings(plot.theme)]):
        picture = io.BytesIO()
        draw(plot.theme).savefig(picture, format=plot.path.suffix.removeprefix("."), metadata=metadata)
    with os_errors_as(UsageError, f"--plot {plot.path} must be writable"):
        write_whole(plot.path, picture.getvalue())


def new_figure(inches_high: float, width: float = 1.0) -> Any:
    """Return an empty figure, ``width`` times as wide as a page."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width * PIXELS / 96, inches_high), layout="constrained")


def _settings(theme: Theme) -> dict[str, Any]:
    return {
        "font.size": 9.5,
        "figure.facecolor": theme.page,
        "savefig.facecolor": theme.page,
        "savefig.dpi": 192,
        "axes.facecolor": theme.page,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.text,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.grid,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "text.color": theme.text,
        "legend.frameon": False,
        "svg.fonttype": "path",
        "svg.hashsalt": "m2gen",
    }
