"""The command ``m2gen db learn``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m2gen.cli.options import DebugOption, JsonOption, reporting

EPILOG = (
    "Journals of searches are in the user's cache, below tune/. The shipped rule is of docs/data/trials.jsonl, which "
    "with --trials takes in further journals."
)


def learn(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Journals of searches, or files of --trials.")],
    rule: Annotated[Path | None, typer.Option("--rule", help="Write the rule to this file.")] = None,
    trials: Annotated[Path | None, typer.Option("--trials", help="Write all trials to this compact file.")] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Learn the rule for default schedules from trials, and show how it does on workloads that are left out."""
    from m2gen.cli.show.learn import show_learned
    from m2gen.tune.learn import judged, rules_of, text_of
    from m2gen.tune.lessons import read, written

    with reporting(debug):
        lessons = read(files)
        if trials is not None:
            trials.write_text(written(lessons), encoding="utf-8")
        if rule is not None:
            rule.write_text(text_of(rules_of(lessons)), encoding="utf-8")
        show_learned(judged(lessons), as_json=json)
