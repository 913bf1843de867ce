"""What examples write: whole files, whoever writes beside them, in folders of one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support import ROOT

from m2gen.kernels.compile import load_module

EXAMPLES = ROOT / "examples"
COMMANDS = (
    "hybrid_lm/run.py train", "hybrid_lm/hybrids.py", "recall/run.py", "state_tracking/run.py",
    "generate/run.py", "state_tracking/learn.py --minutes 0",
)  # fmt: skip
"""Commands that keep runs or checkpoints in ``--out``."""
HOLDER = """
import sys
from pathlib import Path
from files import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
"""A program that has a folder to itself until its input ends."""


@pytest.fixture
def files() -> ModuleType:
    """Return what examples share to write files."""
    return load_module(EXAMPLES / "files.py", "example_files")


@pytest.fixture
def held(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Return a process that has ``tmp_path / "out"`` to itself."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=EXAMPLES, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("out", ["file", "file/below"])
@pytest.mark.parametrize("command", [*COMMANDS, "serve/run.py"])
def test_an_out_that_is_no_folder_is_one_line(command: str, out: str, tmp_path: Path) -> None:
    """The line names what stands in the way."""
    (tmp_path / "file").touch()
    name, *options = command.split()
    smoke = () if "--minutes" in options else ("--smoke",)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options, *smoke, "--out", str(tmp_path / out)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"{tmp_path / 'file'}" in done.stderr
    assert "must be readable and writable: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--out", "file/below.png"), "file must be readable and writable: "),
        (("--text", "bytes"), "--text bytes must be UTF-8: "),
        (("--redraw", "file"), "--redraw file must be the JSON of an earlier run, got JSONDecodeError"),
    ],
)
def test_files_of_the_character_model_are_looked_at_first(options: tuple[str, str], said: str, tmp_path: Path) -> None:
    """What cannot be read or written is said in one line, before the steps whose curves would be lost."""
    (tmp_path / "file").touch()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "char_lm.py"), *options, "--steps", "1000000", "--backend", "reference"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("no reason")])
def test_errors_without_a_file_are_one_line(files, error: OSError) -> None:
    """A disk that is full has no name in its error; others have words alone."""
    said = f"files must be readable and writable: {error.strerror or error}"
    with pytest.raises(SystemExit, match=said), files.reachable():
        raise error


def test_two_writers_of_one_file(files, tmp_path) -> None:
    """One that writes while another does, as two processes may, takes nothing from it: the last to end has its way."""
    place = tmp_path / "losses.json"

    def slow(path: Path) -> None:
        path.write_text("slow", encoding="utf-8")
        files.write_text("fast", place)
        assert place.read_text(encoding="utf-8") == "fast"

    files.store(place, slow)
    assert place.read_text(encoding="utf-8") == "slow"
    assert [path.name for path in tmp_path.iterdir()] == ["losses.json"]
    mask = os.umask(0o027)
    try:
        files.write_json({}, place)
    finally:
        os.umask(mask)
    assert place.stat().st_mode & 0o777 == 0o640  # as of any file that a program writes


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_what_was_there(files, tmp_path, error) -> None:
    """The file of before stays, and nothing beside it."""
    place = tmp_path / "checkpoint.pt"
    files.write_text("before", place)

    def fails(path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        raise error

    with pytest.raises(error):
        files.store(place, fails)
    assert place.read_text(encoding="utf-8") == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_is_free_once_its_process_has_ended(files, held, tmp_path) -> None:
    """While it lives another is told its number; after it was killed, others have the folder, one after the other."""
    folder = tmp_path / "out"
    refusal = rf"out must be used by one process at a time, got one that process {held.pid} uses"
    with pytest.raises(SystemExit, match=refusal), files.alone(folder):
        pytest.fail("two processes have one folder")
    held.kill()
    held.wait()
    for _ in range(2):
        with files.alone(folder):
            assert (folder / ".lock").read_text(encoding="ascii") == f"{os.getpid()}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_leave_a_folder_in_use_alone(held, tmp_path, command) -> None:
    """Two that would train the same runs at once do not: the second ends in one line, and has written nothing."""
    name, *options = command.split()
    smoke = [] if "--minutes" in options else ["--smoke"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options, *smoke, "--out", str(tmp_path / "out")], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert (
        done.stderr
        == f"{tmp_path / 'out'} must be used by one process at a time, got one that process {held.pid} uses\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
