"""The lock of a GPU: one process at a time, of any user, and none after its process is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock
from support import ROOT

from m2gen.errors import TuneError
from m2gen.measure import lock

HOLD = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from m2gen.measure import lock
with lock.exclusive("gpu-1"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of temporary files that is this test's alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_another_process_is_named_until_it_is_killed(folder: Path) -> None:
    """While it lives the GPU is its, however often others ask; a kill frees it."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(TuneError, match=f"must use gpu-1: process {other.pid} does"), lock.exclusive("gpu-1"):
                pass
        with lock.exclusive("gpu-2"):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with lock.exclusive("gpu-1"):
            assert (folder / "m2gen-gpu-1.lock").read_text(encoding="utf-8") == f"{os.getpid()}\n"


def gone() -> int:
    """Return the id of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.mark.parametrize("last", [True, False], ids=["one before", "first"])
def test_an_owner_that_has_not_written_yet_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """Right after it has the lock the file has the last owner, or nothing; neither is who has it."""
    path = folder / "m2gen-gpu-1.lock"
    path.write_text(f"{gone()}\n" if last else "", encoding="utf-8")
    waits = iter((lambda: None, lambda: path.write_text(f"{os.getpid()}\n", encoding="utf-8")))
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: next(waits)())
    with (
        FileLock(path),
        pytest.raises(TuneError, match=f"must use gpu-1: process {os.getpid()} does"),
        lock.exclusive("gpu-1"),
    ):
        pass


@pytest.mark.parametrize("says", ["", "gone", "9" * 30])
def test_an_owner_that_never_writes_is_unknown(folder: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """No process is named that cannot have the lock."""
    path = folder / "m2gen-gpu-1.lock"
    path.write_text(says.replace("gone", str(gone())), encoding="utf-8")
    monkeypatch.setattr(lock, "POLL_SECONDS", 0)
    with FileLock(path), pytest.raises(TuneError, match="process unknown does"), lock.exclusive("gpu-1"):
        pass


def test_the_file_is_everybodys(folder: Path) -> None:
    """Whatever this user's mask is, another user can ask for the same GPU."""
    before = os.umask(0o077)
    try:
        with lock.exclusive("gpu-1"):
            assert (folder / "m2gen-gpu-1.lock").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_the_file_of_another_user_is_no_obstacle(folder: Path) -> None:
    """In /tmp it stays after the first user of a machine has used the GPU; then another user does."""
    folder.chmod(0o1777)
    path = folder / "m2gen-gpu-1.lock"
    path.write_text("another user's process", encoding="utf-8")
    path.chmod(0o666)
    try:
        os.chown(path, 65534, 65534)
    except OSError as error:
        pytest.skip(f"this system has no other user to give a file to: {error.strerror}")
    with lock.exclusive("gpu-1"):
        assert path.read_text(encoding="utf-8") == f"{os.getpid()}\n"
        with pytest.raises(TuneError, match=f"process {os.getpid()} does"), lock.exclusive("gpu-1"):
            pass
    with lock.exclusive("gpu-1"):
        pass


def test_a_link_in_place_of_the_file_is_not_followed(folder: Path) -> None:
    """Whoever put it there would have another file overwritten."""
    (folder / "mine").write_text("kept", encoding="utf-8")
    (folder / "m2gen-gpu-1.lock").symlink_to(folder / "mine")
    with pytest.raises(TuneError, match="must be writable"), lock.exclusive("gpu-1"):
        pass
    assert (folder / "mine").read_text(encoding="utf-8") == "kept"


def test_an_error_frees_the_gpu(folder: Path) -> None:
    """A search that fails leaves nothing behind that the next would wait for."""
    with pytest.raises(ZeroDivisionError), lock.exclusive("gpu-1"):
        raise ZeroDivisionError
    with lock.exclusive("gpu-1"):
        pass


def test_a_file_that_cannot_be_written_is_named(folder: Path) -> None:
    """Something else of the lock's name is one line that has its path."""
    (folder / "m2gen-gpu-1.lock").mkdir()
    with pytest.raises(TuneError, match=r"m2gen-gpu-1\.lock must be writable"), lock.exclusive("gpu-1"):
        pass


@pytest.mark.parametrize(
    ("error", "runs"), [(None, True), (PermissionError, True), (ProcessLookupError, False), (OverflowError, False)]
)
def test_a_process_of_another_user_runs(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None, runs: bool
) -> None:
    """Whom no signal may be sent to is there; a number that no process has is nobody's."""

    def kill(pid: int, signal: int) -> None:
        assert (pid, signal) == (77, 0)
        if error is not None:
            raise error

    monkeypatch.setattr(os, "kill", kill)
    assert lock.alive(77) is runs
