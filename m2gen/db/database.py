"""The database as a whole: its contents, and the few ways to change it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from m2gen.db import files
from m2gen.db.files import Contents, Fault
from m2gen.db.rank import preference_in_slot, slot
from m2gen.db.record import Record, encode
from m2gen.errors import DatabaseError, listed

_Edit = Callable[[PurePosixPath, tuple[Record, ...]], tuple[Record, ...]]
_Pair = tuple[set[Record], set[Record]]
_NOTHING: _Pair = (set(), set())


@dataclass(frozen=True)
class Change:
    """The result of a write: records that are new, that were replaced or removed, and that were not taken."""

    added: tuple[Record, ...] = ()
    removed: tuple[Record, ...] = ()
    refused: tuple[Record, ...] = ()
    """Records whose slot already has a preferred one, or this very one."""


def merged(records: Iterable[Record]) -> tuple[Record, ...]:
    """Return the preferred record of each slot (``rank.slot``, ``rank.preference_in_slot``), whatever their order."""
    best: dict[Hashable, Record] = {}
    for record in records:
        held = best.get(slot(record))
        if held is None or preference_in_slot(record) < preference_in_slot(held):
            best[slot(record)] = record
    return tuple(sorted(best.values(), key=lambda record: (str(files.place(record)), files.order(record))))


@dataclass(frozen=True)
class Database:
    """A folder of records; a missing one is empty."""

    root: Path

    def contents(self, arch: str | None = None, variant: str | None = None) -> Contents:
        """Return the records in order of files, of one arch or variant if given, and the lines that are not records."""
        records: list[Record] = []
        faults: list[Fault] = []
        for name in files.names(self.root):
            if arch in (None, name.parts[0]) and variant in (None, name.stem):
                content = files.read(self.root, name)
                records += sorted(content.records, key=files.order)
                faults += content.faults
        return Contents(tuple(records), tuple(faults))

    def records(self) -> tuple[Record, ...]:
        """Return every record that can be read, in order of files."""
        return self.contents().records

    def find(self, prefix: str) -> Record:
        """Return the record whose id begins with ``prefix``; raises DatabaseError unless there is exactly one."""
        found = {record.id: record for record in self.records() if record.id.startswith(prefix)}
        if len(found) != 1 or not prefix:
            given = ", ".join(listed(found)) or "no record"
            raise DatabaseError(f"{self.root}: an id must be that of one record, got {prefix!r} of {given}")
        return found.popitem()[1]

    def add(self, records: Iterable[Record]) -> Change:
        """Add records; of each slot the preferred record stays. Records of other writers are kept.

        Raises DatabaseError if a record is not valid or the folder cannot be written. Then nothing has changed, or, if
        the disk failed between two files, each file is either old or new.
        """
        given: dict[PurePosixPath, list[Record]] = {}
        for record in dict.fromkeys(records):
            encode(record)  # refuses what could not be read again
            given.setdefault(files.place(record), []).append(record)

        def change(name: PurePosixPath, held: tuple[Record, ...]) -> tuple[Record, ...]:
            slots = {slot(record) for record in given[name]}
            touched = [record for record in held if slot(record) in slots]
            others = [record for record in held if slot(record) not in slots]
            return (*others, *merged([*touched, *given[name]]))

        before, after = self._rewrite(given, change) if given else _NOTHING
        wanted = [record for group in given.values() for record in group]
        new = {record for record in wanted if record in after and record not in before}
        return Change(
            tuple(record for record in wanted if record in new),
            tuple(before - after),
            tuple(record for record in wanted if record not in new),
        )

    def remove(self, ids: Iterable[str]) -> Change:
        """Remove records by their whole ids; a missing one is no error."""
        unwanted = set(ids)
        having = {files.place(record) for record in self.records() if record.id in unwanted}

        def change(name: PurePosixPath, held: tuple[Record, ...]) -> tuple[Record, ...]:
            return tuple(record for record in held if record.id not in unwanted)

        before, after = self._rewrite(having, change) if having else _NOTHING
        return Change(removed=tuple(sorted(before - after, key=files.order)))

    def drop_faults(self) -> tuple[Fault, ...]:
        """Remove the lines that are not records, and return them."""
        faults = self.contents().faults
        having = dict.fromkeys(PurePosixPath(fault.path.relative_to(self.root).as_posix()) for fault in faults)
        if having:
            self._rewrite(having, lambda name, held: held, keep_faults=False)
        return faults

    def _rewrite(self, names: Iterable[PurePosixPath], change: _Edit, *, keep_faults: bool = True) -> _Pair:
        """Replace the records of files by the result of ``change``, under the lock; return those before and after."""
        with files.locked(self.root):
            held = {name: files.read(self.root, name) for name in names}
            made = {
                name: Contents(change(name, content.records), content.faults if keep_faults else ())
                for name, content in held.items()
            }
            files.replace(self.root, {name: made[name] for name in made if made[name] != held[name]})
        return _all(held.values()), _all(made.values())


def _all(contents: Iterable[Contents]) -> set[Record]:
    return {record for content in contents for record in content.records}
