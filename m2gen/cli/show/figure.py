"""Figures as files: one look for all of them, light or dark, and the same bytes for the same numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from m2gen.errors import UsageError

FORMATS = (".png", ".svg")
PIXELS = 800
"""Width at which figures are meant to be read: text is 9.5 points high there, a point 4/3 pixels."""


class Style(StrEnum):
    """What a figure is to be seen on."""

    LIGHT = "light"
    DARK = "dark"


@dataclass(frozen=True)
class Theme:
    """The colours of a style; those of data are told apart by the colour-blind, and by their lightness in print."""

    page: str
    text: str
    muted: str
    grid: str
    data: tuple[str, ...]
    """The first for m2gen."""
    beside: tuple[str, ...]
    """For what it is compared with."""


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


def check_figure(path: Path) -> None:
    """Raise UsageError for a file that no figure can be drawn into, before anything is timed."""
    if path.suffix not in FORMATS:
        raise UsageError(f"--plot must end in {' or '.join(FORMATS)}, got {str(path)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot must have matplotlib to draw with, got none: pip install 'm2gen[plot]'")


def write_figure(path: Path, theme: Theme, title: str, draw: Callable[[], Any]) -> None:
    """Write the figure that ``draw`` returns; raises UsageError where the file cannot be written."""
    import matplotlib.style

    metadata = {"Title": title, "Date": None} if path.suffix == ".svg" else {"Title": title}
    with matplotlib.style.context(["default", _settings(theme)]):
        figure = draw()
        try:
            figure.savefig(path, metadata=metadata)
        except OSError as error:
            raise UsageError(f"--plot {path} must be writable: {error.strerror or error}") from error


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
