"""Figures for light and for dark pages, with matplotlib, which may be missing: what examples share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from files import store

INK = {"": ("#1f2328", "#d0d7de"), "-dark": ("#e6edf3", "#3d444d")}
"""Colours of text and of lines, by what a file's name ends with."""
INKED = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")


def light_and_dark(folder: Path, name: str, figure: Callable[[str], Any]) -> bool:
    """Write ``name.svg`` and ``name-dark.svg``, and return whether that could be done.

    ``figure`` takes the colour of lines and returns a figure. The same numbers give the same bytes.
    """
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is missing (pip install -e '.[examples]')", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for ending, (ink, faint) in INK.items():
        colours = {**dict.fromkeys(INKED, ink), "axes.edgecolor": faint, "svg.hashsalt": name}
        with matplotlib.rc_context(colours):
            drawn = figure(faint)
            store(folder / f"{name}{ending}.svg", partial(_save, drawn))
            pyplot.close(drawn)
    return True


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def picture(name: str, said: str) -> str:
    """Return the HTML of both files, beside which ``said`` stands for who sees no picture."""
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">\n'
        f'  <img alt="{said}" src="{name}.svg">\n</picture>'
    )
