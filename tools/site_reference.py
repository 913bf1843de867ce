"""Reference pages of the site: commands from the program, specs from their JSON schema, and the names of the API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer

from m2gen.cli.app import app
from m2gen.spec import json_schema

API = {
    "The operator": ("m2gen.runtime.op", ("m2rnn", "m2rnn_step")),
    "The layer": ("m2gen.runtime.layer", ("M2RNN",)),
    "Several ranks": ("m2gen.runtime.parallel", None),
    "The published operator's signature": ("m2gen.runtime.compat", ("m2rnn",)),
    "Groups of parameters": ("m2gen.runtime.optimizer", ("parameter_groups",)),
    "The published block's configuration": ("m2gen.runtime.block_config", None),
}
"""Sections of the API's page: a module of the runtime, and its names, or None for all that it exports."""


def pages() -> dict[str, str]:
    """Return the text of every reference page by its path on the site."""
    return {"reference/commands.md": commands(), "reference/specs.md": specs(), "reference/api.md": api()}


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", r"\|")


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n"


def commands() -> str:
    """Return the page of all commands, from what ``--help`` prints."""
    root: Any = typer.main.get_command(app)
    parts = [
        "# Every command and option\n",
        "This page is made from the program. [Commands](../commands.md) says what each is for, and what exit statuses "
        "and variables mean.\n",
    ]
    return "\n".join([*parts, *_sections(root, "m2gen")])


def _sections(command: Any, name: str) -> Iterator[str]:
    groups = getattr(command, "commands", None)
    if groups is None:
        yield from _command(command, name)
        return
    for child in command.list_commands(None):
        yield from _sections(groups[child], f"{name} {child}")


def _command(command: Any, name: str) -> Iterator[str]:
    """Yield the section of one command, with the rows that its help has."""
    context = command.context_class(command, info_name=name)
    yield f"## {name}\n"
    yield f"{command.help}\n"
    yield f"`{' '.join([name, *command.collect_usage_pieces(context)])}`\n"
    rows = [found for parameter in command.get_params(context) if (found := parameter.get_help_record(context))]
    yield _table(("argument or option", "meaning"), [(f"`{names}`", said) for names, said in rows])
    said, _, examples = (command.epilog or "").partition("Examples:\n")
    yield f"{said}\n"
    if examples:
        typed = [f"$ {line.strip()}" for line in examples.splitlines()]
        yield "\n".join(["Examples:\n", "```console", *typed, "```\n"])


def specs() -> str:
    """Return the page of a spec's fields, from the JSON schema."""
    schema = json_schema()
    parts = [
        "# Schema of specs\n",
        "This page is made from the JSON schema, which `m2gen spec schema` prints for editors; "
        "[specs](../specs.md) says what the fields mean together.\n",
        "## Spec\n",
        _object(schema),
    ]
    for name, definition in sorted(schema.get("$defs", {}).items()):
        parts += [f"## {name}\n", f"{definition.get('description', '')}\n"]
        parts.append(_object(definition) if "properties" in definition else f"{_type(definition)}\n")
    return "\n".join(parts)


def _object(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows: list[tuple[object, ...]] = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else f"`{json.dumps(field['default'])}`" if "default" in field else ""
        rows.append((f"`{name}`", _type(field), default, field.get("description", "")))
    return _table(("field", "values", "default", "meaning"), rows)


def _type(field: dict[str, Any]) -> str:
    """Say in words and links which values a field takes."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    for kind in ("anyOf", "oneOf", "allOf"):
        if kind in field:
            return " or ".join(dict.fromkeys(map(_type, field[kind])))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    values = [*field.get("patternProperties", {}).values(), field.get("additionalProperties")]
    if field.get("type") == "object" and isinstance(values[0], dict):
        return f"mapping of names to {_type(values[0])}"
    limits = [f"{field['minimum']} or more"] if "minimum" in field else []
    limits += [f"at most {field['maximum']}"] if "maximum" in field else []
    limits += [f"as `{field['pattern']}`"] if "pattern" in field else []
    return ", ".join([str(field.get("type", "any")), *limits])


def api() -> str:
    """Return the page of what packages offer, whose text mkdocstrings takes from docstrings."""
    parts = [
        "# Python API of a package\n",
        "A generated package holds these modules as they are, so `m2gen.runtime` below stands for `generated.<name>`. "
        "[Using a package](../package.md) shows them at work.\n",
    ]
    for title, (module, names) in API.items():
        parts.append(f"## {title}\n")
        for name in names or ("",):
            parts += [f"::: {f'{module}.{name}' if name else module}", "    options:", "      heading_level: 3", ""]
    return "\n".join(parts)
