"""Say in one line what the parser found wrong with a command, as other errors do: place, contract, value."""

from __future__ import annotations

import re
from typing import Any

_CHOICES = re.compile(r"is not one of (.*?)\.?$")
_LIMIT = re.compile(r"Input should (be .*?)(?:, unable to .*)?$")


def said(error: Any) -> str:
    """Return the message of an error of the parser, with the command whose help says more; empty if it has none."""
    message: str = _contract(error) or error.format_message()
    if not message:  # the help was printed instead
        return ""
    command = getattr(getattr(error, "ctx", None), "command_path", None) or "m2gen"
    return f"{message} (see `{command} --help`)"


def _contract(error: Any) -> str | None:
    """Return what a value of an option must be; None where the parser does not say which value it refused."""
    details = getattr(error.__cause__ or error.__context__, "errors", None)
    options = getattr(getattr(error, "param", None), "opts", ())
    if details is None or not options:
        return None
    (detail, *_) = details()
    if choices := _CHOICES.search(detail["msg"]):
        contract = f"be among {choices[1].replace(chr(39), '')}"
    elif limit := _LIMIT.match(detail["msg"]):
        contract = limit[1]
    else:
        return None
    return f"{max(options, key=len)} must {contract}, got {detail['input']!r}"
