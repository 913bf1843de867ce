"""The command ``m2gen db learn``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m2gen.cli.files import check_output, write_output
from m2gen.cli.options import DebugOption, JsonOption, reporting

EPILOG = (
    "Journals of searches are Optuna's, *.log in the user's cache below tune/. The shipped rule is of "
    "docs/data/trials.jsonl, which with --trials takes in further journals."
)


def learn(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Journals of searches, or files of --trials.")],
    rule: Annotated[Path | None, typer.Option("--rule", help="Write the rule to this file.")] = None,
    trials: Annotated[
        Path | None,
        typer.Option("--trials", help="Write all trials to this file, which FILE... may have."),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Learn the rule for default schedules from trials, and show how it does on workloads that are left out."""
    from m2gen.cli.show.learn import show_learned
    from m2gen.errors import TuneError
    from m2gen.tune.learn import judged, rules_of, text_of
    from m2gen.tune.lessons import FEWEST, read, written

    with reporting(debug):
        for option, path in (("--trials", trials), ("--rule", rule)):
            check_output(option, path)
        lessons = read(files)
        if not lessons:
            raise TuneError(f"FILE... must have a workload of which {FEWEST} trials for training passed, got none")
        found = judged(lessons)
        texts = {("--trials", trials): written(lessons), ("--rule", rule): text_of(rules_of(lessons))}
        for (option, path), text in texts.items():
            if path is not None:
                write_output(option, path, text, TuneError)
        show_learned(found, as_json=json)
