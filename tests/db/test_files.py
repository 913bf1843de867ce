"""The database on disk: crashes, full disks, other writers, and lines that are no records lose nothing."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import H100, VARIANT, environment, failed, timing, winner
from support import ROOT, make_schedule

from m2gen.bucket import Bucket
from m2gen.db import (
    Database,
    Estimate,
    Record,
    encode,
    exchange,
    export_text,
    files,
    merged,
    read_export,
    read_other,
    write_export,
)
from m2gen.db.files import LOCK
from m2gen.device import TARGETS
from m2gen.errors import DatabaseError
from m2gen.schedule import default

RECORDS = (
    winner(),
    winner(Bucket.ONE, high=0.7),
    winner(where=environment(driver="580")),
    winner(where=environment(H100)),
    winner(where=environment("AMD Instinct MI300X", "gfx942"), schedule=make_schedule(tanh="exp")),
    failed(),
    failed(schedule=make_schedule()),
)


def tree(root: Path) -> dict[str, bytes]:
    """Return every file of a database but its lock."""
    paths = (path for path in root.rglob("*") if path.is_file() and path.name != LOCK)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def database(root: Path, records: Iterable[Record] = RECORDS) -> Database:
    """Return a database that holds ``records``."""
    made = Database(root)
    made.add(records)
    return made


def test_places(tmp_path: Path) -> None:
    """A record lies under its arch, device and variant, in a line of its own."""
    database(tmp_path)
    key = RECORDS[0].key.variant
    folders = ["gfx942/amd_instinct_mi300x", "sm_90/nvidia_h100_80gb_hbm3", "sm_90/nvidia_h200"]
    assert sorted(tree(tmp_path)) == [f"{folder}/{key}.jsonl" for folder in folders]
    text = (tmp_path / folders[-1] / f"{key}.jsonl").read_text(encoding="utf-8")
    assert sorted(text.splitlines()) == sorted(encode(r) for r in RECORDS if r.environment.device == "NVIDIA H200")


def test_the_order_of_writing_does_not_show(tmp_path: Path) -> None:
    """Records added one by one, in any order and again, give the same bytes."""
    database(tmp_path / "a")
    other = Database(tmp_path / "b")
    for record in (*reversed(RECORDS), *RECORDS):
        other.add([record])
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert set(other.records()) == set(RECORDS)


def test_winners_stand_before_failures(tmp_path: Path) -> None:
    """In a file, and of each then the smaller id; so a reader finds first what serves."""
    schedules = [make_schedule(interval=interval) for interval in (4, 8, 16, 32)]
    made = database(tmp_path, [*(failed(schedule=each) for each in schedules), *(winner(seq=n) for n in (1, 2, 3, 4))])
    read = files.read(tmp_path, files.place(winner())).records
    assert [record.failure is None for record in read] == 4 * [True] + 4 * [False]
    ids = [record.id for record in read]
    assert (ids[:4], ids[4:]) == (sorted(ids[:4]), sorted(ids[4:]))
    assert made.records() == read


def test_a_database_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """Reading makes nothing; a file in the database's place is an error."""
    assert Database(tmp_path / "none").records() == ()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(DatabaseError, match="file must be a folder"):
        Database(tmp_path / "file").records()
    with pytest.raises(DatabaseError, match="file must be writable"):
        Database(tmp_path / "file").add(RECORDS)


@pytest.mark.parametrize("place", [".", "sm_90", "sm_90/nvidia_h200"])
def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A build without its records would be another package, and nobody would know."""
    held = database(tmp_path)
    listed, access = Path.iterdir, os.access

    def closing(*folders: Path) -> None:
        def iterdir(self: Path) -> Iterator[Path]:
            if self in folders:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return listed(self)

        monkeypatch.setattr(Path, "iterdir", iterdir)
        monkeypatch.setattr(os, "access", lambda path, mode: path not in folders and access(path, mode))

    closing(tmp_path / place)
    with pytest.raises(DatabaseError, match=f"{tmp_path / place} must be readable: Permission denied"):
        held.records()
    (tmp_path / "lost+found").mkdir()
    closing(tmp_path / "lost+found")
    assert set(held.records()) == set(RECORDS)


def test_a_slot_keeps_the_preferred_record(tmp_path: Path) -> None:
    """One record for a key, environment and problem: the faster, whichever came first."""
    slow, fast = winner(high=0.9), winner(high=0.8)
    for name, (first, second) in {"a": (slow, fast), "b": (fast, slow)}.items():
        made = Database(tmp_path / name)
        assert made.add([first]).added == (first,)
        change = made.add([second])
        assert made.records() == (fast,)
        expected = ((fast,), (slow,), ()) if second is fast else ((), (), (slow,))
        assert (change.added, change.removed, change.refused) == expected
    assert made.add([fast]).refused == (fast,)


def test_removing(tmp_path: Path) -> None:
    """Records go by id, and files without any go with them."""
    made = database(tmp_path)
    assert made.remove([RECORDS[3].id, "no such id"]).removed == (RECORDS[3],)
    assert not (tmp_path / "sm_90" / "nvidia_h100_80gb_hbm3" / f"{RECORDS[3].key.variant}.jsonl").exists()
    assert set(made.records()) == set(RECORDS) - {RECORDS[3]}


def test_finding(tmp_path: Path) -> None:
    """A prefix will do where it names one record."""
    made = database(tmp_path)
    assert made.find(RECORDS[0].id[:7]) == RECORDS[0]
    for prefix in ("", "zz"):
        with pytest.raises(DatabaseError, match="must be that of one record"):
            made.find(prefix)
    with pytest.raises(DatabaseError, match="must be that of one record"):
        database(tmp_path / "one", RECORDS[:1]).find("")  # which a script may pass whose own search found nothing


BAD = {
    "torn": (b'{"environment": {"arch', "the file ends within a line; $ must be JSON"),
    "conflict": (b"<<<<<<< ours\n", "$ must be JSON"),
    "schema": (encode(winner(seed=9)).replace('"schema": 3', '"schema": 2').encode() + b"\n", "$.schema must be 3"),
    "edited": (encode(winner(seed=9)).replace('"seed": 9', '"seed": 8').encode() + b"\n", "$.id must be"),
    "latin": (b"\xff\xfe\n", "$ must be UTF-8"),
    "moved": (encode(winner(where=environment(H100))).encode() + b"\n", "$ must be in sm_90/nvidia_h100_80gb_hbm3/"),
}


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD.keys())
def test_a_line_that_is_no_record_stays_and_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    """The others are read; a rewrite keeps the line's bytes; only being asked to removes it."""
    path = tmp_path / files.place(RECORDS[0])
    made = database(tmp_path)
    path.write_bytes(path.read_bytes() + line)
    (fault,) = made.contents().faults
    number = len(path.read_bytes().splitlines())
    assert str(fault).startswith(f"{path}:{number}: {reason}")
    assert set(made.records()) == set(RECORDS)
    made.add([winner(seed=4, seq=128)])
    assert path.read_bytes().endswith(line)
    assert [f.reason for f in made.contents().faults] == [fault.reason]
    made.remove([record.id for record in made.records()])
    assert path.read_bytes() == line
    assert [f.raw for f in made.drop_faults()] == [line.removesuffix(b"\n")]
    assert not path.exists()


def lines(data: bytes) -> list[bytes]:
    """Return the lines that hold anything."""
    return [line for line in data.split(b"\n") if line.strip()]


@settings(max_examples=60)
@given(cut=st.integers(0, 10**6), junk=st.binary(max_size=12))
def test_no_damage_spreads(tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes) -> None:
    """Wherever a file is cut or overwritten, whole lines are read, and a write keeps every other byte."""
    root = tmp_path_factory.mktemp("damaged")
    made = database(root)
    path = root / files.place(RECORDS[0])
    whole = path.read_bytes()
    at = cut % len(whole)
    path.write_bytes(damaged := whole[:at] + junk)
    read = {encode(record).encode() for record in made.records()}
    assert {line for line in lines(damaged) if line in lines(whole)} <= read
    new = winner(seed=4, seq=128)
    made.add([new])
    assert sorted(lines(path.read_bytes())) == sorted([*lines(damaged), encode(new).encode()])


def test_a_full_disk(tmp_path: Path) -> None:
    """A file system that takes no more leaves every byte as it was, and says so."""
    made = database(tmp_path)
    before = tree(tmp_path)
    code = (
        "import resource, sys; from pathlib import Path; from m2gen.db import Database, read_export\n"
        "records = read_export(Path(sys.argv[2]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "Database(Path(sys.argv[1])).add(records)"
    )
    write_export(tmp_path.parent / "more.jsonl", [winner(seq=n) for n in (100, 200, 300)])
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path.parent / "more.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode
    assert f"{tmp_path} must be writable: File too large; nothing that was there is lost" in done.stderr
    assert tree(tmp_path) == before
    assert set(made.records()) == set(RECORDS)


@pytest.mark.parametrize("failing", ["mkstemp", "fsync", "replace"])
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Read-only or full at any step: an error in one line, no loss, no remains."""
    made = database(tmp_path)
    before = tree(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files.tempfile if failing == "mkstemp" else os, failing, fail)
    with pytest.raises(DatabaseError, match=r"must be writable: Read-only file system"):
        made.add([winner(seed=4, seq=128)])
    assert tree(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="names of descriptors are Linux's")
def test_a_loss_of_power_loses_no_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is on disk before it takes its name, and the folder that has the name after that."""
    made, done = database(tmp_path), list[tuple[str, str]]()
    path = tmp_path / files.place(RECORDS[0])
    fsync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(("synced", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(source: str, target: Path) -> None:
        done.append(("renamed", str(source)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    made.add([replace(RECORDS[0], problem=replace(RECORDS[0].problem, seq=77))])
    (_, staged), *rest = done
    assert Path(staged).parent == path.parent
    assert rest == [("renamed", staged), ("synced", str(path.parent))]


def test_reading_needs_no_lock(tmp_path: Path) -> None:
    """A database is read while somebody writes; a second writer waits, and says for whom."""
    made = database(tmp_path)
    with files.locked(tmp_path):
        assert set(made.records()) == set(RECORDS)
        code = "import sys; from pathlib import Path; from m2gen.db import files\n"
        code += "with files.locked(Path(sys.argv[1]), 0.1): pass"
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "must be free within 0.1 s, got a writer that holds .lock" in done.stderr


WRITE = """
import sys
from pathlib import Path
from dataclasses import replace
from m2gen.db import Database, Sizes, read_export
from steps import die_at
(record,) = read_export(Path(sys.argv[2]))
first, last, dies = map(int, sys.argv[3:])
database = Database(Path(sys.argv[1]))
for seq in range(first, last):
    if dies and seq == first + 1:
        die_at(dies)
    database.add([replace(record, problem=replace(record.problem, seq=seq))])
    print(seq, flush=True)
"""


def _writer(root: Path, first: int, last: int, dies: int = 0) -> subprocess.Popen[bytes]:
    """Start a process that adds records; after the first one it dies at its ``dies``-th call of the system, if any."""
    write_export(root.parent / "one.jsonl", [winner()])
    command = [sys.executable, "-c", WRITE, str(root), str(root.parent / "one.jsonl"), *map(str, (first, last, dies))]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "fakes")))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)


def test_two_writers_lose_no_record(tmp_path: Path) -> None:
    """Processes that add to one file at once have all their records in it."""
    root = tmp_path / "db"
    writers = [_writer(root, first, first + 25) for first in (1, 101)]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert {record.problem.seq for record in Database(root).records()} == {*range(1, 26), *range(101, 126)}


def test_a_kill_loses_nothing_that_was_added(tmp_path: Path) -> None:
    """Killed at any moment, a writer leaves every record it had added, and no lock that holds."""
    root, rng, first = tmp_path / "db", random.Random(0), 1
    for _ in range(6):
        process = _writer(root, first, first + 10_000, dies=rng.randint(1, 300))
        said = process.communicate()[0].split()
        assert process.returncode == -signal.SIGKILL
        first += len(said)
        contents = Database(root).contents()
        assert contents.faults == ()
        found = sorted(record.problem.seq for record in contents.records)
        assert found in ([*range(1, first)], [*range(1, first + 1)])
        first = found[-1] + 1
    place = root / files.place(winner())
    files.stage(place, b"half")
    editors = place.with_name(f".{place.name}.swp")
    editors.write_text("of an editor", encoding="utf-8")
    assert Database(root).add([winner(seq=99_999)]).added
    assert sorted(tree(root)) == sorted([str(files.place(winner())), str(editors.relative_to(root))])


POOL = st.builds(
    winner,
    st.sampled_from([Bucket.ONE, Bucket.FOUR]),
    high=st.sampled_from([0.7, 0.8, 0.9]),
    seed=st.integers(0, 3),
    schedule=st.sampled_from([make_schedule(), make_schedule(interval=8), make_schedule(interval=16, unroll=4)]),
)


@settings(max_examples=50)
@given(st.lists(POOL, max_size=8), st.lists(POOL, max_size=8), st.lists(POOL, max_size=8))
def test_merging_has_one_result(one: list[Record], two: list[Record], three: list[Record]) -> None:
    """Whoever merges whose records in whatever order, and however often, gets the same."""
    expected = merged([*one, *two, *three])
    assert merged([*three, *merged([*two, *one])]) == merged([*merged([*one, *three]), *two]) == expected
    assert merged(expected) == expected


def test_merging_databases_in_either_order(tmp_path: Path) -> None:
    """The files are the same, byte by byte."""
    mine = [winner(high=0.8), winner(Bucket.ONE), failed()]
    yours = [winner(high=0.7), winner(Bucket.TWO), failed(seed=1), winner(high=0.9, seq=128)]
    for name, (first, second) in {"a": (mine, yours), "b": (yours, mine)}.items():
        database(tmp_path / name, first)
        database(tmp_path / f"{name}2", second)
        Database(tmp_path / name).add(read_other(tmp_path / f"{name}2"))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert {r.timing.tuned.high_ms for r in Database(tmp_path / "a").records() if r.timing} == {0.7, 0.9}


def test_a_stale_record_gives_way(tmp_path: Path) -> None:
    """Kernels that are no longer rendered are never preferred, however fast they were."""
    old = replace(winner(high=0.1), provenance=replace(winner().provenance, kernel="0" * 12))
    assert merged([old, winner()]) == merged([winner(), old]) == (winner(),)


def test_a_faster_record_wins_whatever_its_default_took() -> None:
    """A default that became faster makes ratios worse: of one problem on one GPU, times compare."""
    before = winner(high=4.8)
    after = replace(winner(high=3.4), timing=timing(high=3.4, default=3.4))
    before = replace(before, timing=timing(high=4.8, default=5.0))
    assert before.timing is not None
    assert after.timing is not None
    assert before.timing.ratio < after.timing.ratio
    assert merged([before, after]) == merged([after, before]) == (after,)


def test_the_upper_end_of_the_interval_counts() -> None:
    """A median that is lower, with an interval that ends higher, is not known to be of the faster."""
    sure = winner(high=0.90)
    unsure = replace(winner(seed=1), timing=replace(timing(), tuned=Estimate(0.85, 0.80, 0.95)))
    assert sure.timing is not None
    assert sure.timing.tuned.median_ms > 0.85
    assert merged([sure, unsure]) == merged([unsure, sure]) == (sure,)


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    """A database of several users is written by each and read by all, unlike temporary files."""
    database(tmp_path)
    assert {path: stat.S_IMODE((tmp_path / path).stat().st_mode) for path in tree(tmp_path)} == dict.fromkeys(
        tree(tmp_path), 0o644
    )


def test_ties_go_to_the_default() -> None:
    """The default wins over a schedule that is as fast, since no tuning has to explain it."""
    first = winner()
    usual = winner(schedule=default(VARIANT, TARGETS["sm_90"], first.key.bucket))
    others = [winner(schedule=make_schedule(interval=interval)) for interval in (4, 8, 12, 20)]
    assert merged([*others, usual, first]) == (usual,)


def test_export_delete_import(tmp_path: Path) -> None:
    """All records as one file bring back the same bytes."""
    made = database(tmp_path / "db")
    before = tree(tmp_path / "db")
    write_export(tmp_path / "all.jsonl", made.records())
    assert (tmp_path / "all.jsonl").read_text(encoding="utf-8") == export_text(reversed(RECORDS))
    made.remove([record.id for record in made.records()])
    assert tree(tmp_path / "db") == {}
    assert len(made.add(read_export(tmp_path / "all.jsonl")).added) == len(RECORDS)
    assert tree(tmp_path / "db") == before


def test_an_export_goes_where_a_link_leads(tmp_path: Path) -> None:
    """A link stays one, and a file keeps its mode."""
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "all.jsonl"
    real.write_text("old", encoding="utf-8")
    real.chmod(0o600)
    (tmp_path / "link").symlink_to(real)
    write_export(tmp_path / "link", RECORDS)
    assert (tmp_path / "link").is_symlink()
    assert real.read_text(encoding="utf-8") == export_text(RECORDS)
    assert real.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["all.jsonl"]


def test_an_export_into_a_pipe(tmp_path: Path) -> None:
    """What is there and is no file is written to, and stays."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_export(tmp_path / "pipe", RECORDS[:1])
        assert os.read(reader, 2**16).decode() == export_text(RECORDS[:1])
    finally:
        os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is refused before anything is written, and a file that cannot be replaced keeps its content."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(DatabaseError, match="folder must be writable: Is a directory"):
        write_export(tmp_path / "folder", RECORDS)
    (tmp_path / "all.jsonl").write_text("mine", encoding="utf-8")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DatabaseError, match="must be writable: Permission denied"):
        write_export(tmp_path / "all.jsonl", RECORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "folder"]
    assert (tmp_path / "all.jsonl").read_text(encoding="utf-8") == "mine"


UNTRUSTED = {
    "empty": (b"\n", "must hold at least one record"),
    "repeated": (encode(winner()).encode() + b"\n" + encode(winner()).encode(), "each record must be there once"),
    "torn": (encode(winner()).encode() + b"\n" + encode(failed()).encode()[:-1], "x.jsonl:2: the file ends within"),
    "one of two": (b"{}\n" + encode(winner()).encode(), r"x.jsonl:1: \$.schema must be 3"),
    "many": (b"{}\n" * 50, "and 30 more"),
}


@pytest.mark.parametrize(("data", "message"), UNTRUSTED.values(), ids=UNTRUSTED.keys())
def test_an_untrusted_file_is_taken_whole_or_not_at_all(tmp_path: Path, data: bytes, message: str) -> None:
    """One line that is no record refuses the file."""
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(DatabaseError, match=message):
        read_export(tmp_path / "x.jsonl")


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    """Gigabytes are refused, not read."""
    with open(tmp_path / "x.jsonl", "wb") as stream:
        stream.truncate(2**33)
    with pytest.raises(DatabaseError, match="must take at most"):
        read_export(tmp_path / "x.jsonl")


@pytest.mark.parametrize("spare", [0, 1])
def test_a_file_may_be_as_large_as_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int) -> None:
    """One byte more than the most is too many."""
    write_export(tmp_path / "x.jsonl", RECORDS)
    monkeypatch.setattr(exchange, "MOST_BYTES", (tmp_path / "x.jsonl").stat().st_size - spare)
    with nullcontext() if not spare else pytest.raises(DatabaseError, match="must take at most"):
        assert set(read_export(tmp_path / "x.jsonl")) == set(RECORDS)


def test_exports_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    """Errors of the system are one line."""
    with pytest.raises(DatabaseError, match="must be readable"):
        read_export(tmp_path / "none")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(DatabaseError, match="must be writable"):
        write_export(tmp_path / "file" / "x.jsonl", RECORDS)
