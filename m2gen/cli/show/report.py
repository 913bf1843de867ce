"""Progress for people, JSON and JUnit documents for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from m2gen.cli.files import write_output


@dataclass(frozen=True)
class Display:
    """The output options of a command."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False


class TerminalProgress:
    """Shows a bar with the current item on a terminal, a line for each item elsewhere, and nothing if quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._stage, self._total, self._count = "", 0, 0

    def start(self, stage: str, total: int) -> None:
        self._stage, self._total, self._count = stage, total, 0
        if self._quiet or not total or not self._console.is_terminal:
            return
        columns = (TextColumn("{task.fields[stage]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, TextColumn("{task.description}"), console=self._console, transient=True)
        self._bar.add_task("", total=total, stage=stage)
        self._bar.start()

    def advance(self, item: str) -> None:
        self._count += 1
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, description=item)
        elif not self._quiet:
            print(f"{self._stage} {self._count}/{self._total} {item}", file=sys.stderr)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, default=str))


def junit(title: str, reports: Sequence[Any], reproduce: Sequence[str]) -> str:
    """Return a JUnit document with a suite for each feature, and a test case for each variant and case.

    A failure names every tensor over its budget, an error the exception; both have the command that reproduces it.
    """
    root = ElementTree.Element("testsuites", {"name": title, **_counts(reports)})
    for feature in dict.fromkeys(report.feature for report in reports):
        having = [(r, command) for r, command in zip(reports, reproduce, strict=True) if r.feature == feature]
        suite = ElementTree.SubElement(root, "testsuite", {"name": str(feature), **_counts([r for r, _ in having])})
        for report, command in having:
            _junit_case(suite, report, command)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _counts(reports: Sequence[Any]) -> dict[str, str]:
    broken = sum(bool(report.failure) for report in reports)
    failures = sum(not report.passed for report in reports) - broken
    seconds = f"{sum(report.seconds for report in reports):.3f}"
    return {"tests": str(len(reports)), "failures": str(failures), "errors": str(broken), "time": seconds}


def _junit_case(suite: ElementTree.Element, report: Any, command: str) -> None:
    attributes = {"classname": report.variant, "name": report.case, "time": f"{report.seconds:.3f}"}
    case = ElementTree.SubElement(suite, "testcase", attributes)
    facts = {"feature": report.feature, "dtype": report.dtype, "seed": report.seed, "reproduce": command}
    properties = ElementTree.SubElement(case, "properties")
    for name, value in facts.items():
        ElementTree.SubElement(properties, "property", {"name": name, "value": str(value)})
    over = "; ".join(f"{result.tensor} {result.verdict}" for result in report.results if not result.passed)
    for kind, text in (("error", report.failure), ("failure", over)):
        if text:
            ElementTree.SubElement(case, kind, {"message": text}).text = f"{text}\nreproduce: {command}"


def write_json(value: Any, path: Path) -> None:
    """Write one JSON document whole or not at all; raises UsageError if the file cannot be written."""
    write_output("--out", path, json.dumps(value, indent=1, default=str) + "\n")
