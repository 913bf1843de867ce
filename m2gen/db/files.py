"""Records on disk: ``<arch>/<device>/<variant>.jsonl``, read without a lock, and replaced in one step under one."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from filelock import FileLock, Timeout

from m2gen.db.fields import ARCHES
from m2gen.db.record import NotARecord, Record, decode, encode
from m2gen.errors import DatabaseError, os_errors_as

ARCH = re.compile(ARCHES)
LOCK = ".lock"
LOCK_SECONDS = 60.0
"""Longest that a writer waits for another, which holds the lock while it writes a few files."""
UNHARMED = "; nothing that was there is lost"


@dataclass(frozen=True)
class Fault:
    """A line that is not a record: it is not used, but kept."""

    path: Path
    line: int
    reason: str
    raw: bytes
    torn: bool = False
    """Whether the file ends within the line, as after a copy or download that broke off."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {'the file ends within a line; ' if self.torn else ''}{self.reason}"


@dataclass(frozen=True)
class Contents:
    """The records and the faulty lines of a file or a database."""

    records: tuple[Record, ...] = ()
    faults: tuple[Fault, ...] = ()


def slug(device: str) -> str:
    """Return a product name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def place(record: Record) -> PurePosixPath:
    """Return a record's file relative to the database."""
    environment = record.environment
    return PurePosixPath(environment.arch, slug(environment.device), f"{record.key.variant}.jsonl")


def order(record: Record) -> tuple[object, ...]:
    """Return the sort key of records in a file: objective, bucket and policy, winners first, then the id."""
    key = record.key
    return (key.objective, key.bucket.place, key.policy, record.failure is not None, record.id)


def text_of(records: Iterable[Record]) -> str:
    """Return the lines of records, each once, sorted by ``order``."""
    return "".join(encode(record) + "\n" for record in sorted(set(records), key=order))


def parse(data: bytes, path: Path, fits: Callable[[Record], bool] = lambda record: True) -> Contents:
    """Return the records in a file's content, and the lines that are not records or do not belong there (``fits``)."""
    records: dict[Record, None] = {}
    faults: list[Fault] = []
    lines = data.split(b"\n")
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            record = decode(raw.decode())
            if not fits(record):
                raise NotARecord(f"$ must be in {place(record)}, where records of its variant and device are")
            records[record] = None
        except (NotARecord, UnicodeDecodeError) as error:
            reason = str(error) if isinstance(error, NotARecord) else "$ must be UTF-8"
            faults.append(Fault(path, number, reason, raw, torn=number == len(lines)))
    return Contents(tuple(records), tuple(faults))


def read(root: Path, name: PurePosixPath) -> Contents:
    """Return the contents of one file of a database, empty if it is missing; raises DatabaseError."""
    path = root / name
    with os_errors_as(DatabaseError, f"{path} must be readable"), suppress(FileNotFoundError):
        return parse(path.read_bytes(), path, lambda record: place(record) == name)
    return Contents()


def names(root: Path) -> list[PurePosixPath]:
    """Return the files of a database, sorted; raises DatabaseError if ``root`` is no folder.

    A folder that cannot be read is an error, not an empty one, unless its name is no arch's, such as lost+found.
    """
    if root.exists() and not root.is_dir():
        raise DatabaseError(f"{root} must be a folder, got a file")
    arches = [path for path in _inside(root) if ARCH.fullmatch(path.name) or os.access(path, os.R_OK | os.X_OK)]
    devices = [path for arch in arches for path in _inside(arch)]
    found = [path for device in devices for path in _inside(device) if path.name.endswith(".jsonl")]
    return sorted(PurePosixPath(path.relative_to(root).as_posix()) for path in found)


def _inside(folder: Path) -> list[Path]:
    """Return what is in a folder, nothing if it is a file or missing; raises DatabaseError if it cannot be read."""
    with os_errors_as(DatabaseError, f"{folder} must be readable"), suppress(FileNotFoundError, NotADirectoryError):
        return list(folder.iterdir())
    return []


@contextmanager
def locked(root: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock that excludes other writers, which the system drops if the process dies; raises DatabaseError."""
    with os_errors_as(DatabaseError, f"{root} must be writable", UNHARMED):
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / LOCK, timeout=seconds)
        try:
            lock.acquire()
        except Timeout as error:
            raise DatabaseError(f"{root} must be free within {seconds:g} s, got a writer that holds {LOCK}") from error
    try:
        yield
    finally:
        lock.release()


def replace(root: Path, contents: Mapping[PurePosixPath, Contents]) -> None:
    """Write files, with faulty lines as they were, and remove those without contents; the caller holds the lock.

    Everything is on disk under temporary names before the first file is replaced, so that a full disk changes nothing;
    each file is replaced in one step. Raises DatabaseError.
    """
    staged: list[tuple[str, Path]] = []
    try:
        with os_errors_as(DatabaseError, f"{root} must be writable", UNHARMED):
            for name, content in contents.items():
                for left in (root / name).parent.glob(f"{_staging_prefix(name)}*"):  # left by a killed writer
                    left.unlink()
                if content.records or content.faults:
                    staged.append((stage(root / name, _bytes_of(content)), root / name))
            while staged:
                os.replace(*staged[0])
                staged.pop(0)
            for name, content in contents.items():
                if not content.records and not content.faults:
                    (root / name).unlink(missing_ok=True)
                _sync_folder((root / name).parent)
    finally:
        for temporary, _ in staged:
            with suppress(OSError):
                os.unlink(temporary)


def _bytes_of(content: Contents) -> bytes:
    """Return a file's bytes: records, then the lines that are not records, a torn one last and without an end."""
    faults = sorted(content.faults, key=lambda fault: fault.torn)
    lines = b"".join(fault.raw + (b"" if fault.torn else b"\n") for fault in faults)
    return text_of(content.records).encode() + lines


def _staging_prefix(path: PurePath) -> str:
    """Return the prefix of temporary names for a file, which no editor uses."""
    return f".{path.name}.m2gen-"


def stage(path: Path, data: bytes) -> str:
    """Write and sync ``data`` under a temporary name beside ``path``; return that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_staging_prefix(path))
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return name


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames survive a loss of power, if the file system supports that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
