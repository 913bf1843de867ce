"""The user's cache on machines that are not as they should be: no home, no room, no right to write, other people's."""

from __future__ import annotations

import os
import pwd
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import SPEC, TINY, document, fails, outcome
from support import ROOT, make_schedule, make_variant

import m2gen.pipeline
from m2gen import cache
from m2gen.cache import load_result, materialise, store_result
from m2gen.device import TARGETS
from m2gen.errors import CacheError
from m2gen.kernels import compile
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.resources import Resources
from m2gen.spec import Objective
from m2gen.tune import precompile
from m2gen.tune.space import Subject
from m2gen.tune.trial import Compiled, CompileTask

TAKEN = Resources(64, 0, 1024, 9000)


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be a user whom the system does not know, without a home; return the folder of temporary files."""

    def unknown(uid: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "M2GEN_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


@pytest.mark.parametrize("home", [None, "", "relative", "{file}", "{file}/below", "/dev/null"])
@pytest.mark.parametrize("named", [None, "relative"])
def test_without_a_home_the_cache_is_among_temporary_files(
    home: str | None, named: str | None, nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No HOME, none that can be written, or none that is a place: a folder of this user's, for Triton's files, too."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    if home is not None:
        monkeypatch.setenv("HOME", home.format(file=tmp_path / "file"))
    if named is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    folder = nobody / f"m2gen-{os.getuid()}"
    assert cache.cache_dir() == cache.cache_dir() == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "M2GEN_CACHE_DIR" in cache.shortcoming()
    assert materialise("kind", {"a.py": "1"}).is_relative_to(folder)
    cache.provide_for_triton()
    if home != "" or not os.access("/", os.W_OK):  # Triton takes an empty HOME for the root
        assert os.environ.pop("TRITON_CACHE_DIR") == str(folder / "triton")


def test_the_folder_is_where_linux_has_caches(nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier versions cached is found: the folder is that of the XDG specification, relative names ignored."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_dir() == tmp_path / "home" / ".cache" / "m2gen"


def test_a_home_is_used(nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own folders come first, and Triton keeps its own; what is set explicitly is left alone."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_dir() == tmp_path / "home" / ".cache" / "m2gen"
    assert cache.shortcoming() == ""
    cache.provide_for_triton()
    assert "TRITON_CACHE_DIR" not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "xdg" / "m2gen"
    monkeypatch.setenv("M2GEN_CACHE_DIR", str(tmp_path / "named"))
    assert cache.cache_dir() == tmp_path / "named"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("M2GEN_CACHE_DIR", "relative")
    assert cache.cache_dir() == tmp_path / "relative"
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        with monkeypatch.context() as patch:
            patch.delenv("HOME")
            patch.setenv(name, "/set/by/the/user")
            cache.provide_for_triton()
            assert os.environ.get("TRITON_CACHE_DIR") in (None, "/set/by/the/user")
    assert list(nobody.iterdir()) == []


@pytest.mark.parametrize("theirs", ["open", "link", "file", "owner", "none"])
def test_somebody_elses_folder_is_not_imported_from(
    theirs: str, nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among temporary files anybody may make anything; generated modules come from a folder of this user's alone."""
    folder = nobody / f"m2gen-{os.getuid()}"
    if theirs == "open":
        folder.mkdir()
        folder.chmod(0o777)
    elif theirs == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif theirs == "file":
        folder.write_text("", encoding="utf-8")
    elif theirs == "owner":
        folder.mkdir(mode=0o700)
        somebody_else = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: somebody_else)
        folder.rename(nobody / f"m2gen-{os.getuid()}")
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(CacheError, match=r"must .*M2GEN_CACHE_DIR may name another folder"):
        materialise("kind", {"a.py": "1"})
    assert load_result("kind", "key", Resources) is None
    store_result("kind", "key", TAKEN)
    assert "M2GEN_CACHE_DIR" in fails(2, "verify", "--spec", TINY, "--quiet")
    cache.provide_for_triton()
    assert "TRITON_CACHE_DIR" not in os.environ


UNKNOWN_USER = """
import os, pwd, tempfile
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
"""


def _command(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder of its own, as a user without a home whom the system does not know."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "sitecustomize.py").write_text(UNKNOWN_USER, encoding="utf-8")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "one.yaml").write_text(SPEC, encoding="utf-8")
    (tmp_path / "tmp").mkdir()
    unset = ("HOME", "XDG_CACHE_HOME", "M2GEN_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME", "USER", "LOGNAME")
    known = {name: value for name, value in os.environ.items() if name not in unset}
    path = os.pathsep.join((str(tmp_path / "lib"), str(ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "m2gen", *arguments],
        cwd=tmp_path / "here",
        env={**known, "PYTHONPATH": path, "TMPDIR": str(tmp_path / "tmp"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_whole_command_without_a_home(tmp_path: Path) -> None:
    """Kernels compile in processes of their own, whose Triton has a place for them, too; nothing is left beside it."""
    done = _command(tmp_path, "check", "--spec", "one.yaml", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "tmp" / f"m2gen-{os.getuid()}"
    assert {path.name for path in folder.iterdir()} == {"resources", "sources", "triton"}
    assert list((folder / "triton").iterdir())
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["one.yaml"]


COMMANDS = {
    "check": ("check", "--spec", TINY, "--target", "sm_90"),
    "build": ("build", "--spec", TINY, "--no-verify"),
    "verify": ("verify", "--spec", TINY, "--case", "steps_1"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_cache_that_cannot_be_written(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says which folder, why, and which variable names another, as does what `info` lists as missing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    monkeypatch.setenv("M2GEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    line = fails(2, *command, "--quiet")
    assert line.startswith(f"m2gen: {tmp_path}/file/cache/")
    assert line.endswith("must be writable: Not a directory; M2GEN_CACHE_DIR may name another folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "cache that can be written (M2GEN_CACHE_DIR may name another folder)" in document("info")["missing"]


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files simulates a full disk: a real failure to write, in the process that compiles."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    (tmp_path / "one.yaml").write_text(SPEC, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "m2gen", "check", "--spec", "one.yaml", "--quiet"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "M2GEN_CACHE_DIR": str(tmp_path / "cache")},
        preexec_fn=limited,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "must be writable: File too large; M2GEN_CACHE_DIR may name another folder" in line
    assert not list(tmp_path.rglob("*.py")), "no part of a file is left for a module"


def test_triton_s_full_disk_is_no_compilers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of Triton to write its cache says nothing about the kernel."""
    import triton

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/cache/triton/x")

    monkeypatch.setattr(triton, "compile", full)
    job = compile.Job(Lowering(make_variant(), make_schedule()), Direction.FORWARD, TARGETS["sm_90"])
    with pytest.raises(CacheError, match="No space left on device: '/cache/triton/x'; TRITON_CACHE_DIR may name"):
        compile.compile_kernel(job)


SHAPES = {
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "number": b"7",
    "text": b'"x"',
    "empty": b"",
    "torn": b'{"registers":64,"spill_bytes":0,"shar',
    "not UTF-8": b"\xff\xfe{}",
    "other types": b'{"registers":"64","spill_bytes":0,"shared_bytes":1024,"code_bytes":9000}',
    "bool": b'{"registers":true,"spill_bytes":0,"shared_bytes":1024,"code_bytes":9000}',
    "more": b'{"registers":64,"spill_bytes":0,"shared_bytes":1024,"code_bytes":9000,"more":1}',
    "fewer": b'{"registers":64}',
    "deep": b"[" * 100_000,
    "cases": b'{"cases":"all"}',
    "defaults": b'{"binary":"x"}',
}


def _spoil(root: Path, kind: str, data: bytes | None) -> int:
    """Replace every entry of a kind by ``data``, or by a folder, and return how many there are."""
    entries = list((root / kind).glob("*.json"))
    for entry in entries:
        entry.unlink()
        if data is None:
            (entry / "inside").mkdir(parents=True)
        else:
            entry.write_bytes(data)
    return len(entries)


@pytest.mark.parametrize("data", [*SHAPES.values(), None], ids=[*SHAPES, "a folder"])
def test_an_entry_of_another_shape_is_none(data: bytes | None, cache_dir: Path) -> None:
    """It is computed again, and written if possible."""
    store_result("resources", "key", TAKEN)
    assert load_result("resources", "key", Resources) == TAKEN
    assert load_result("resources", "key", Compiled) is None
    assert _spoil(cache_dir, "resources", data) == 1
    assert load_result("resources", "key", Resources) is None
    store_result("resources", "key", TAKEN)
    assert load_result("resources", "key", Resources) == (None if data is None else TAKEN)


@pytest.mark.parametrize("data", [*SHAPES.values(), None], ids=[*SHAPES, "a folder"])
def test_readers_of_the_cache_make_again_what_they_cannot_read(
    data: bytes | None, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resources of kernels, candidates of a search, and above all packages that are said to be verified."""
    counts = {"resources": 0, "precompiled": 0, "verified": 0}

    def compiled(groups: list[list[compile.Job]], *_: object) -> list[tuple[compile.Job, Resources]]:
        counts["resources"] += len(groups)
        return [(job, TAKEN) for group in groups for job in group]

    def tried(task: CompileTask) -> Compiled:
        counts["precompiled"] += 1
        return Compiled(100, 0, 1024, "binary", seconds=1.0)

    def verified(*_: object) -> object:
        counts["verified"] += 1
        return outcome(1e-4)

    build, check = sys.modules["m2gen.pipeline.build"], sys.modules["m2gen.pipeline.check"]
    monkeypatch.setattr(check, "run_isolated", compiled)
    monkeypatch.setattr(precompile, "_compile", tried)
    monkeypatch.setattr(build, "verify", verified)
    planned = build_plan()
    subject = Subject(make_variant(), TARGETS["sm_90"], Objective.TRAIN, 2, 64)
    job = compile.Job(Lowering(make_variant(), make_schedule()), Direction.FORWARD, TARGETS["sm_90"])
    readers: dict[str, Callable[[], object]] = {
        "resources": lambda: check.compile_all([job], 1),
        "precompiled": lambda: precompile.precompile(CompileTask(subject, make_schedule())),
        "verified": lambda: build._verified_once(planned, rendered, None),
    }
    rendered = build.render(planned)
    for kind, read in readers.items():
        first = read()
        assert (read(), counts[kind]) == (first, 1), "kept"
        assert _spoil(cache_dir, kind, data) == 1
        assert (read(), counts[kind]) == (first, 2), "made again"


def build_plan() -> m2gen.pipeline.Plan:
    """Return the plan of the smallest spec."""
    return m2gen.pipeline.plan(TINY, records=())


@pytest.mark.parametrize("data", [b"", b"\xff", b"a = 2\n"])
def test_a_file_that_is_not_what_it_should_be_is_written_again(data: bytes, cache_dir: Path) -> None:
    """Modules are imported from it, so it must have every byte."""
    folder = materialise("sources", {"kernel.py": "a = 1\n"})
    (folder / "kernel.py").write_bytes(data)
    assert materialise("sources", {"kernel.py": "a = 1\n"}) == folder
    assert (folder / "kernel.py").read_bytes() == b"a = 1\n"


def test_a_folder_in_a_files_place_is_named(cache_dir: Path) -> None:
    """A folder that is not m2gen's stays."""
    folder = materialise("sources", {"kernel.py": "a = 1\n"})
    (folder / "kernel.py").unlink()
    (folder / "kernel.py" / "mine").mkdir(parents=True)
    with pytest.raises(CacheError, match=f"{folder} must be writable: .*; M2GEN_CACHE_DIR may name another folder"):
        materialise("sources", {"kernel.py": "a = 1\n"})
    assert (folder / "kernel.py" / "mine").is_dir()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), CacheError("x must be writable")])
def test_a_full_disk_is_no_candidates_failure(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk stops the search while a candidate compiles or runs: a failure would be recorded for good."""
    from m2gen.tune import gpu
    from m2gen.tune.trial import Step, Task

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(precompile, "_compile", full)
    monkeypatch.setattr(gpu, "_serve", full)
    subject = Subject(make_variant(), TARGETS["sm_90"], Objective.TRAIN, 3, 64)
    found = [
        precompile.precompile(CompileTask(subject, make_schedule())),
        gpu.serve(Task(subject, make_schedule(), Step.SCREEN)),
    ]
    for each in found:
        assert (each.failure, each.stopped) == (None, str(error))
        assert "Traceback" in each.details


def test_failures_can_be_recorded_whatever_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record's text is ASCII, and a message may have a user's name in it."""
    from m2gen.tune import gpu
    from m2gen.tune.study import decode_trial, encode_trial
    from m2gen.tune.trial import Step, Task, Trial

    def broken(*_: object) -> None:
        raise RuntimeError("no such file: /home/josé/\x1b[0m")

    monkeypatch.setattr(precompile, "_compile", broken)
    monkeypatch.setattr(gpu, "_serve", broken)
    subject = replace(Subject(make_variant(), TARGETS["sm_90"], Objective.TRAIN, 4, 64))
    task = Task(subject, make_schedule(), Step.SCREEN)
    for failure in (precompile.precompile(CompileTask(subject, make_schedule())).failure, gpu.serve(task).failure):
        trial = Trial(make_schedule(), "search", failure=failure)
        assert decode_trial(encode_trial(trial)) == trial
