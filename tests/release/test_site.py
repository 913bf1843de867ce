"""The site: every page is on it, reference pages say what the program says, and it builds without a broken link."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from support import ROOT

from m2gen.cli.app import app
from m2gen.kernels.compile import load_module
from m2gen.spec import json_schema

NEEDED = ("mkdocs", "material", "mkdocstrings")
QUESTIONS = ("decode", "packed", "H100", "why is my record not used")


@pytest.fixture(scope="module")
def site_pages() -> Iterator[ModuleType]:
    """Return what mkdocs calls, which has Python look for modules beside it."""
    before = list(sys.path)
    yield load_module(ROOT / "tools" / "site_pages.py", "site_pages")
    sys.path[:] = before


def leaves(command: Any, name: str = "m2gen") -> dict[str, Any]:
    """Return every command that is no group, by what one types for it."""
    groups = getattr(command, "commands", None)
    if groups is None:
        return {name: command}
    return {key: leaf for child, inner in groups.items() for key, leaf in leaves(inner, f"{name} {child}").items()}


def test_every_command_and_option_is_listed(site_pages) -> None:
    """The page has a section for each command, in which each of its options is."""
    text = site_pages.site_reference.commands()
    sections = dict(re.findall(r"^## (m2gen .*?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    commands = leaves(typer.main.get_command(app))
    assert set(sections) == set(commands)
    for name, command in commands.items():
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                assert not option.startswith("--") or option in sections[name], f"{name} {option}"
        assert command.help.splitlines()[0] in sections[name]


def test_every_field_of_specs_is_listed(site_pages) -> None:
    """The page has a section for each definition of the schema, with a row for each of its fields."""
    text, schema = site_pages.site_reference.specs(), json_schema()
    for name, definition in {"Spec": schema, **schema["$defs"]}.items():
        section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert section, name
        for field in definition.get("properties", {}):
            assert f"| `{field}` |" in section, f"{name}.{field}"
        for value in definition.get("enum", ()):
            assert f'`"{value}"`' in section, f"{name} {value}"


def test_names_of_the_api_exist(site_pages) -> None:
    """What the page documents can be imported, and every name that is listed is there."""
    for module, names in site_pages.site_reference.API.values():
        found = importlib.import_module(module)
        for name in names or ():
            assert getattr(found, name).__doc__, f"{module}.{name}"


LINKS = {
    "docs/training.md": ("[a](../examples/train/hf_trainer.py)", "[a](files/examples/train/hf_trainer.py)"),
    "docs/how-to/new-gpu.md": ("[a](../../CONTRIBUTING.md#x)", "[a](../contributing.md#x)"),
    "docs/history/README.md": ("[a](../kernels.md#slots)", "[a](../kernels.md#slots)"),
    "CONTRIBUTING.md": ("[a](docs/design.md#4-architecture)", "[a](design.md#4-architecture)"),
    "examples/README.md": ("![a](char_lm.png) [b](hybrid_lm/README.md)", None),
    "CHANGELOG.md": ("[a](https://semver.org/) [b](examples/train)", "[a](https://semver.org/) b"),
}


@pytest.mark.parametrize("page", LINKS)
def test_links_lead_to_places_of_the_site(site_pages, page) -> None:
    """A link that leaves docs/ leads to where its target is on the site; others, and those of the web, stay."""
    text, expected = LINKS[page]
    expected = expected or "![a](../files/examples/char_lm.png) [b](hybrid_lm/README.md)"
    assert site_pages.rewritten(page, text) == expected


def test_pictures_follow_the_readers_choice(site_pages) -> None:
    """A picture in two versions is shown in that of the page, not of the system."""
    text = '<picture>\n  <source media="x" srcset="images/d.svg">\n  <img alt="a" src="images/l.svg">\n</picture>'
    assert site_pages.rewritten("docs/README.md", text) == (
        "![a](images/l.svg#only-light)\n![a](images/d.svg#only-dark)"
    )


def test_pictures_come_along(site_pages) -> None:
    """Both files of a picture outside docs/ are on the site."""
    text = '<picture>\n  <source media="x" srcset="../char_lm.png">\n  <img alt="a" src="compare.png">\n</picture>'
    found = site_pages.files_linked({"examples/hybrid_lm/README.md": text})
    assert found == {"examples/char_lm.png", "examples/hybrid_lm/compare.png"}


def test_every_page_is_in_the_navigation() -> None:
    """Each page of docs/ is named once in mkdocs.yml."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r"([\w./-]+\.md)$", text, re.MULTILINE)
    assert len(named) == len(set(named))
    assert {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} <= set(named)


def test_the_site_builds_strictly_and_answers_questions(tmp_path: Path) -> None:
    """No link is broken, and what a reader would search for is found; --quiet would count no warnings."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (pip install m2gen[docs])")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))
    texts = [f"{entry['title']} {entry['text']}".lower() for entry in index["docs"]]
    for question in QUESTIONS:
        assert any(question.lower() in text for text in texts), question
