"""Pages of the site that are not in docs/: what mkdocs calls while it builds (``make docs``).

Reference pages are made from the program, the schema and the docstrings. Pages and files of the repository that others
link to come along, and every link that leaves docs/ is turned to where its target is on the site.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import site_reference  # noqa: E402  (lies beside this file, which mkdocs loads by its path)

OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    **{
        path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "examples").rglob("README.md"))
    },
}
"""Pages outside docs/, by their path in the repository, with their path on the site."""
FILES = "files"
"""Folder of the site with files of the repository that are no pages."""
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#]+)(#[^)\s]*)?\)")
LAST_FOUND = ("history/", "changelog.md")
"""Pages that the search lists after others: what they name has its own page, as it is now."""
PICTURE = re.compile(r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img alt="([^"]*)" src="([^"]+)">\s*</picture>')


def place(path: str) -> str:
    """Return where a file of the repository is on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return OUTSIDE.get(path, f"{FILES}/{path}")


def linked(page: str, target: str) -> str:
    """Return the path in the repository of what a page links to; a folder is its README, if it has one."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    readme = posixpath.join(path, "README.md")
    return readme if (ROOT / readme).is_file() else path


def rewritten(page: str, text: str) -> str:
    """Return the text of a page whose links to files of the repository lead to where these are on the site.

    Links to folders without a page become plain text. Pictures for dark and light pages follow the reader's choice.
    """

    def link(found: re.Match[str]) -> str:
        shown, target, fragment = found[1], found[2], found[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = linked(page, target)
        if (ROOT / path).is_dir():
            return shown.strip("[]")
        return f"{shown}({posixpath.relpath(place(path), posixpath.dirname(place(page)) or '.')}{fragment})"

    return LINK.sub(link, with_images(text))


def with_images(text: str) -> str:
    """Return text whose pictures are two images, of which the site shows one."""
    return PICTURE.sub(r"![\2](\3#only-light)\n![\2](\1#only-dark)", text)


def files_linked(pages: dict[str, str]) -> set[str]:
    """Return the files, by their path in the repository, that pages link to and that are neither pages nor in docs/."""
    found = {
        linked(page, target)
        for page, text in pages.items()
        for _, target, _ in LINK.findall(with_images(text))
        if "://" not in target
    }
    return {path for path in found if not path.startswith("docs/") and path not in OUTSIDE and (ROOT / path).is_file()}


def on_files(files: Any, config: Any) -> Any:
    """Add the reference pages, the pages outside docs/, and the files that pages link to."""
    from mkdocs.structure.files import File

    for path, text in site_reference.pages().items():
        files.append(File.generated(config, path, content=text))
    pages = {path: (ROOT / path).read_text(encoding="utf-8") for path in OUTSIDE}
    for path, text in pages.items():
        files.append(File.generated(config, OUTSIDE[path], content=rewritten(path, text)))
    docs = {f"docs/{path.relative_to(ROOT / 'docs').as_posix()}": path for path in (ROOT / "docs").rglob("*.md")}
    pages |= {name: path.read_text(encoding="utf-8") for name, path in docs.items()}
    for path in sorted(files_linked(pages)):
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page of docs/ that leave it; those of other pages were turned as they were added."""
    if page.file.src_uri.startswith(LAST_FOUND):
        page.meta.setdefault("search", {"boost": 0.1})
    name = f"docs/{page.file.src_uri}"
    return rewritten(name, markdown) if (ROOT / name).is_file() else markdown
