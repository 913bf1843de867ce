"""Show the progress of a search of ``m2gen tune``."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from m2gen.cli.show.report import Display
from m2gen.schedule import AnySchedule
from m2gen.tune.log import SearchProgress
from m2gen.tune.trial import Trial

DEFAULT = "default"
"""Origin of the trial that others are compared with."""


class TerminalWatcher:
    """Shows a bar with the best so far on a terminal, a line for each trial elsewhere, and nothing if quiet."""

    def __init__(self, display: Display) -> None:
        self._display, self._quiet = display, display.quiet or display.as_json
        self._console = Console(stderr=True)
        self._default: AnySchedule | None = None
        self._bar: Bar | None = None
        if self._console.is_terminal and not self._quiet:
            self._bar = bar(self._console)
            self._bar.add_task("", total=None, stage="")
            self._bar.start()

    def stage(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], stage=text, description="")
        elif not self._quiet:
            print(f"tune {text}", file=sys.stderr, flush=True)

    def trial(self, trial: Trial, progress: SearchProgress) -> None:
        if trial.origin == DEFAULT:
            self._default = trial.schedule
        if self._bar is not None:
            text = progress_text(progress)
            self._bar.update(self._bar.task_ids[0], description=text, completed=progress.done, total=progress.most)
        elif not self._quiet:
            found = f"{trial.failure.reason}: {trial.failure.message}" if trial.failure else f"{trial.median_ms:.3f} ms"
            words = trial.schedule.describe(self._default)
            words += f" {trial.schedule.slug}" if self._display.verbose else ""
            where = f"tune {progress.done}/{progress.most}"
            line = f"{where} {words} ({trial.origin}) {found}; {progress_text(progress)}"
            print(line, file=sys.stderr, flush=True)

    def details(self, text: str) -> None:
        if self._display.debug and text:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def bar(console: Console) -> Bar:
    """Return the progress bar of a search."""
    columns = (TextColumn("{task.fields[stage]}", markup=False), BarColumn(6), MofNCompleteColumn())
    return Bar(*columns, TextColumn("{task.description}", markup=False), console=console)


def progress_text(progress: SearchProgress) -> str:
    """Return the best so far, its speed-up over the default, the failures and the time left as one line."""
    parts = []
    if progress.best is not None and progress.best.median_ms is not None:
        speed = f" ({progress.default_ms / progress.best.median_ms:.2f}x)" if progress.default_ms else ""
        parts.append(f"best {progress.best.median_ms:.3f} ms{speed}")
    failed = sum(progress.failures.values())
    parts += [f"{failed} failed"] if failed else []
    left = time.strftime("%M:%S", time.gmtime(progress.seconds_left))
    return ", ".join([*parts, f"{left} left"])
