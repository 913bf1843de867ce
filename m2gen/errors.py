"""One exception class per kind of user error, each with the exit status that the command line returns for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MOST_LISTED = 20
"""Maximum number of problems or names that a message lists; the rest are counted."""


def listed(lines: Iterable[str]) -> list[str]:
    """Return the first ``MOST_LISTED`` lines, and one that says how many more there are."""
    every = list(lines)
    more = len(every) - MOST_LISTED
    return every if more <= 0 else [*every[:MOST_LISTED], f"and {more} more"]


def among(names: Iterable[str]) -> str:
    """Return ``among a, b, c``, with only the first of many names."""
    return f"among {', '.join(listed(names))}"


class M2genError(Exception):
    """A failure that is reported without a traceback: one line for each problem, the first ones of many."""

    exit_status = 1

    def __str__(self) -> str:
        return "\n".join(listed(super().__str__().splitlines()))


class UsageError(M2genError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_status = 2


class SpecError(M2genError):
    """A spec cannot be used; ``problems`` lists every reason as ``location must ..., got ...``."""

    exit_status = 2

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class ScheduleError(M2genError):
    """A schedule is not valid for its variant or its device."""


class CompileError(M2genError):
    """A generated kernel does not compile, or its compiled form cannot be read."""


class RanksError(M2genError):
    """A rank of a run over several failed, died or hung, and so the run did."""


class VerifyError(M2genError):
    """Generated kernels disagree with the float64 reference."""


class EmitError(M2genError):
    """A package could not be written, or the one on disk is not what the sources render."""


class PlaceError(EmitError):
    """The output path cannot be written, or holds files that m2gen did not write."""

    exit_status = 2


class CacheError(M2genError):
    """The user's cache cannot be written, and the command needs files there."""

    exit_status = 2


class DatabaseError(M2genError):
    """The tuning database cannot be read or written, or is asked for a record that it does not have."""

    exit_status = 2


class TuneError(M2genError):
    """A search cannot begin or go on; what it found so far is kept."""


@contextmanager
def os_errors_as(kind: type[M2genError], contract: str, advice: str = "") -> Iterator[None]:
    """Raise a ``kind`` with ``<contract>: <reason><advice>``, as ``a.json must be writable``, for every OSError."""
    try:
        yield
    except OSError as error:
        raise kind(f"{contract}: {error.strerror or error}{advice}") from error
