"""Builds that write to one place at the same time, that are killed there, and that others read meanwhile."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command_line import SPEC
from support import ROOT
from written import complete, files, on_disk

from m2gen.package import directory, owned

FAKES = ROOT / "tests" / "fakes"
PATHS = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(FAKES)!r}]\n"

WRITER = (
    PATHS
    + """
import os, time
from pathlib import Path
from types import SimpleNamespace
from written import files
from m2gen.package import directory
os.fsync = lambda handle: None  # what a disk keeps without power is not the question
folder, versions, rounds, readers = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), sys.argv[4:]
def until_read(seconds):  # the grace, on a machine of any speed: as long as imports take that are under way
    sizes = dict(zip(readers, map(os.path.getsize, readers)))
    while any(os.path.getsize(reader) == size for reader, size in sizes.items()):
        if any(os.path.exists(reader + ".ended") for reader in readers):
            break
        time.sleep(0.001)
directory.time = SimpleNamespace(sleep=until_read)
for attempt in range(rounds):
    directory.write(folder, files(versions[attempt % len(versions)]))
"""
)
READER = (
    PATHS
    + """
import atexit, importlib, os
from pathlib import Path
from written import MODULES
sys.path.insert(0, str(Path(sys.argv[1]).parent))
imports, seen, log = 0, set(), open(sys.argv[3], "ab", buffering=0)
atexit.register(Path(sys.argv[3] + ".ended").touch)
while imports < 20 or not os.path.exists(sys.argv[2]):
    for name in [name for name in sys.modules if name.split(".")[0] == "p"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    p = importlib.import_module("p")
    seen |= {module.VERSION for module in (p, p.layer, p.op, p.a, p.b)}
    missing = [path for path in MODULES if not os.path.exists(os.path.join(sys.argv[1], path))]
    assert not missing, missing
    imports += 1
    log.write(b".")
print(imports, *sorted(seen))
"""
)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process that runs some code."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[str]) -> str:
    """Check that a process ended well, and return its output."""
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out.strip()


@pytest.mark.parametrize(
    ("kind", "versions", "rounds"),
    [
        ("folder", ["1"], 50),
        ("link", ["1"], 50),
        ("repository", ["1"], 50),
        ("folder", ["1", "22", "333"], 6),
        ("repository", ["1", "22", "333"], 50),
    ],
    ids=["folder-same", "link-same", "repository-same", "folder-different", "repository-different"],
)
def test_builds_at_once_while_others_import(tmp_path: Path, kind: str, versions: list[str], rounds: int) -> None:
    """Four builds, many rounds each, end well; an import at any time finds every module, and no remains are left."""
    out, real, stop = tmp_path / "out", tmp_path / "out" / "p", tmp_path / "stop"
    out.mkdir()
    if kind == "link":
        real = tmp_path / "disk" / "real"
        directory.write(real, files(versions[0]))
        (out / "p").symlink_to(real)
    directory.write(out / "p", files(versions[0]))
    if kind == "repository":
        (real / ".git").mkdir()
        (real / ".git" / "HEAD").write_text("ref: refs/heads/main\n", encoding="utf-8")
    logs = [tmp_path / f"imports{reader}" for reader in range(2)]
    for log in logs:
        log.touch()
    readers = [python(READER, out / "p", stop, log) for log in logs]
    orders = [",".join([*versions[i % len(versions) :], *versions[: i % len(versions)]]) for i in range(4)]
    writers = [python(WRITER, out / "p", order, rounds, *logs) for order in orders]
    for writer in writers:
        ended(writer)
    stop.touch()
    for reader in readers:
        imports, *seen = ended(reader).split()
        assert int(imports) >= 20
        assert {*seen} <= {*versions}
    assert complete(real) in versions
    assert (out / "p").is_symlink() == (kind == "link")
    assert (real / ".git" / "HEAD").exists() == (kind == "repository")
    left = [path.name for folder in {out, real.parent, real} for path in folder.iterdir() if ".m2gen-" in path.name]
    assert left == []


def test_builds_at_once_of_a_package_that_is_not_there(tmp_path: Path) -> None:
    """The first of several builds makes the folder, and the others find it made, every time."""
    for attempt in range(6):
        writers = [python(WRITER, tmp_path / "deep" / str(attempt) / "p", version, 2) for version in ("1", "1", "22")]
        for writer in writers:
            ended(writer)
        assert complete(tmp_path / "deep" / str(attempt) / "p") in ("1", "22")
        assert [path.name for path in (tmp_path / "deep" / str(attempt)).iterdir()] == ["p"]


KILL = (
    PATHS
    + """
import itertools, json, os, signal
from pathlib import Path
from written import complete, files
from m2gen.package import directory

folder, kind, directory.GRACE = Path(sys.argv[1]), sys.argv[2], 0
if kind == "no exchange":
    directory.exchanged = lambda one, other: False
os.fsync = lambda handle: None
OLD, NEW = files("old", "kernels/gone.py"), files("new", "kernels/more.py")
TOUCH = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "ctypes.dlsym"}
known = set(OLD) | set(NEW)
states = {}
for moment in itertools.count():
    directory.write(folder, OLD)
    if kind == "repository":
        (folder / ".git").mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        events = iter(range(moment))
        def die(event, arguments):
            if event in TOUCH and next(events, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(die)
        directory.write(folder, NEW)
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if ".m2gen-" not in str(path)}
    assert present <= known and present >= set(OLD) & set(NEW) - {"MANIFEST.json"}, (moment, present)
    if kind == "folder":
        state = complete(folder)
        states[state] = states.get(state, 0) + 1
    directory.write(folder, files("next"))  # by a build of something else: what it finds is known to be m2gen's
    assert complete(folder) == "next", moment
    left = [str(p) for place in (folder, folder.parent) for p in place.iterdir() if ".m2gen-" in p.name]
    assert not left, (moment, left)
    if ended == 0:
        break
print(json.dumps([moment, states]))
"""
)


@pytest.mark.parametrize("kind", ["folder", "repository", "no exchange"])
def test_a_kill_at_any_moment(tmp_path: Path, kind: str) -> None:
    """Killed before any of its system calls, a build leaves the old package or the new, and the next one cleans up."""
    moments, states = json.loads(ended(python(KILL, tmp_path / "p", kind)))
    assert moments > 40
    if kind == "folder":
        assert set(states) == {"old", "new"}
        assert min(states.values()) > 5


COMMAND = """
import sys
import m2gen.pipeline
sys.modules["m2gen.pipeline.build"].check = lambda planned, progress: []  # compiling is tested elsewhere
from m2gen.cli import main
main()
"""


@pytest.mark.parametrize(("form", "suffix"), [("package", ""), ("hf-kernel", ""), ("wheel", ".whl")])
def test_commands_at_once(tmp_path: Path, form: str, suffix: str) -> None:
    """Ranks that build the same package all succeed, and it is whole, in every form."""
    (tmp_path / "one.yaml").write_text(SPEC, encoding="utf-8")
    options = ["--spec", str(tmp_path / "one.yaml"), "--out", str(tmp_path / "out"), "--no-verify", "--quiet"]
    ranks = [python(COMMAND, "build", *options, "--format", form) for _ in range(3)]
    (said,) = {ended(rank).split(":")[0] for rank in ranks}
    (made,) = (tmp_path / "out").iterdir()
    assert (str(made), made.suffix) == (said, suffix)
    if form == "wheel":
        with zipfile.ZipFile(made) as archive:
            assert archive.testzip() is None
            archive.extractall(tmp_path / "wheel")
            made = tmp_path / "wheel" / "one"
    assert set(on_disk(made)) == owned.listed_in(made)
    hashes = json.loads((made / owned.MANIFEST).read_text(encoding="utf-8"))["files"]
    assert {path: hashlib.sha256((made / path).read_bytes()).hexdigest()[:16] for path in hashes} == hashes
