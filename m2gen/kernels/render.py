"""Render kernels from templates: a pure function, so the same lowering gives the same bytes on any machine."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from m2gen.kernels.arguments import arguments
from m2gen.kernels.definitions import constants, layouts_of
from m2gen.kernels.launch_plan import launch_plan
from m2gen.kernels.literals import literal
from m2gen.kernels.lowering import Direction, Lowering

TRITON = re.compile(r"(?<![\w.])tl\.")
"""Triton's language in templates that all families share."""


@cache
def templates_dir() -> Path:
    """Return the templates' directory: beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).resolve().parents[1]
    inside = here / "templates"
    return inside if inside.is_dir() else here.parent / "templates"


@cache
def template_hash() -> str:
    """Return 12 hex digits that change when any template does."""
    digest = hashlib.sha256()
    for path in sorted(templates_dir().rglob("*.j2")):
        name = path.relative_to(templates_dir()).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_dir()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render_template(template: str, /, **values: Any) -> str:
    """Render one template of ``templates/`` with exactly the names it uses."""
    return _environment().get_template(template).render(**values)


def _parameters(k: Lowering, direction: Direction) -> list[str]:
    """Return the kernel's parameter list, a few to a line."""
    lines: list[str] = []
    for argument in arguments(k, direction):
        text = f"{argument.name}: tl.constexpr," if argument.flag else f"{argument.name},"
        if lines and len(lines[-1]) + len(text) < 105 and argument.flag == ("constexpr" in lines[-1]):
            lines[-1] += " " + text
        else:
            lines.append(text)
    return lines


def render_kernel(k: Lowering, provenance: str = "") -> str:
    """Return the module of one variant run by one schedule: kernels, and how they are launched."""
    title = f"M2RNN kernels for {k.variant.key}, schedule {k.schedule.slug}."
    text = render_template(
        "kernels/module.py.j2",
        k=k,
        title=title,
        provenance=provenance,
        constants=constants(k),
        layouts=layouts_of(k),
        parameters={str(direction): _parameters(k, direction) for direction in Direction},
        launch=literal(launch_plan(k)._asdict()),
    )
    return TRITON.sub("gl.", text) if k.gluon else text
