"""Standard streams that are closed, full, narrow, or have a reader that has seen enough."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import TINY, fails
from support import ROOT

from m2gen import pipeline

FULL = Path("/dev/full")
COMMANDS = {
    "help": ("--help",),
    "help of a command": ("db", "why", "--help"),
    "version": ("version",),
    "schema": ("spec", "schema"),
    "documents": ("db", "list", "--json"),
    "tables": ("db", "list"),
    "info": ("info",),
    "info as a document": ("info", "--json"),
    "progress": ("check", "--spec", TINY, "--target", "sm_90", "--json"),
}
EVERY = pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())


def command(
    *arguments: str, prepare: Callable[[], None] | None = None, **streams: object
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, whose output is buffered as a shell's is."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    environment |= {"PYTHONIOENCODING": str(streams.pop("encoding"))} if "encoding" in streams else {}
    call = [sys.executable, "-m", "m2gen", *arguments]
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        call, env=environment, preexec_fn=prepare, text=True, check=False, **{"stderr": subprocess.PIPE, **streams}
    )


@pytest.fixture
def gone() -> Iterator[int]:
    """Return a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@EVERY
def test_a_reader_that_is_gone_ends_a_command_quietly(arguments: tuple[str, ...], gone: int) -> None:
    """The status is that of a program which the signal of a broken pipe ends; a traceback helps nobody."""
    done = command(*arguments, stdout=gone)
    said = [line for line in done.stderr.splitlines() if not line.startswith("compile ")]
    assert (done.returncode, said) == (141, [])


def test_a_reader_of_everything_that_is_gone(gone: int) -> None:
    """Progress and errors have no reader either."""
    for arguments in (COMMANDS["progress"], ("check", "--spec", "absent.yaml"), ("nonsense",)):
        assert command(*arguments, stdout=gone, stderr=gone).returncode == 141


def test_head_of_info() -> None:
    """A command as people type it ends quietly."""
    call = f"'{sys.executable}' -m m2gen info | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", call], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "m2gen\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_ends_in_a_way_of_its_own(shell: str, gone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completion ends with status 0, and like every command if the reader is gone."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    for stdout, status in ((subprocess.PIPE, 0), (gone, 141)):
        done = command("--show-completion", shell, stdout=stdout)
        assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which Linux has")
@EVERY
def test_a_full_disk_is_one_line(arguments: tuple[str, ...]) -> None:
    """Output that is lost is a failure."""
    with FULL.open("w") as full:
        done = command(*arguments, stdout=full)
    said = [line for line in done.stderr.splitlines() if not line.startswith("compile ")]
    assert done.returncode == 1
    assert len(said) == 1
    assert said[0].startswith("m2gen: ")
    assert said[0].endswith("No space left on device")
    assert "unexpected" not in said[0]


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream(closed: int) -> None:
    """A command does its work without it; what one stream is for does not go to another."""
    streams = {} if closed == 1 else {"stdout": subprocess.PIPE}
    done = command(*COMMANDS["progress"], prepare=lambda: os.close(closed), **streams)
    assert done.returncode == 0
    assert all(line.startswith("compile ") for line in done.stderr.splitlines())
    if closed != 1:
        assert len({kernel["variant"] for kernel in json.loads(done.stdout)["kernels"]}) == 3


NUMBERS = """
import os, sys
for number in range(3):
    os.close(number)
sys.stdin = sys.stdout = sys.stderr = None
from m2gen.cli.streams import open_streams
open_streams()
print("nobody reads this", file=sys.stderr)
sys.exit(os.open(sys.argv[1], os.O_WRONLY))
"""


def test_no_file_takes_a_closed_streams_number(tmp_path: Path) -> None:
    """If a file took the number, the output of a compiler could be written into a record."""
    (tmp_path / "record").write_text("mine", encoding="utf-8")
    call = [sys.executable, "-c", NUMBERS, str(tmp_path / "record")]
    done = subprocess.run(call, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode >= 3
    assert (tmp_path / "record").read_text(encoding="utf-8") == "mine"


def test_an_encoding_that_lacks_letters() -> None:
    """Unencodable letters are escaped, and nothing fails."""
    done = command("--help", encoding="ascii", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"M\xb2RNN" in done.stdout


def test_a_broken_pipe_to_somebody_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a reader of what is printed may go without a word."""

    def broken(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(pipeline, "verify", broken)
    assert fails(1, "verify", "--spec", TINY, "--quiet") == "m2gen: [Errno 32] Broken pipe"
