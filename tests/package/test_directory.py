"""A build replaces the files that m2gen's own manifest lists, and no others."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from written import MANIFEST, complete, files, on_disk

from m2gen.errors import PlaceError
from m2gen.package import directory, owned, place

OTHERS = r"must be absent, empty or a generated package, got what m2gen did not write: "


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no reader, since there is none."""
    monkeypatch.setattr(directory, "GRACE", 0)


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return the node, time and content of every file below a folder."""
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns, path.read_bytes()) for path in paths}


def refused(folder: Path, *names: str) -> None:
    """Check that a build is refused in one line that names the given files, and changes nothing."""
    before = state(folder)
    with pytest.raises(PlaceError, match=OTHERS) as caught:
        directory.write(folder, files("newer"))
    with pytest.raises(PlaceError, match=OTHERS):
        directory.check_place(folder, files("newer"))
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in names)
    assert "move that elsewhere, or build into another --out" in str(caught.value)
    assert state(folder) == before
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a package that was written."""
    directory.write(tmp_path / "p", files("old"))
    return tmp_path / "p"


def test_writing_replaces_what_the_old_manifest_lists(package: Path) -> None:
    """Files that the new package does not have are gone, edited ones are as they should be, and nothing lies about."""
    directory.write(package, files("with more", "kernels/gone.py", "deep/er/gone.py"))
    (package / "op.py").write_text("edited", encoding="utf-8")
    directory.write(package, files("new"))
    assert on_disk(package) == {path: text.encode() for path, text in files("new").items()}
    assert sorted(path.name for path in package.iterdir() if path.is_dir()) == ["kernels"]
    assert [path.name for path in package.parent.iterdir()] == ["p"]


@pytest.mark.parametrize("name", ["notes.txt", "kernels/mine.py", "deep/er/mine", ".gitignore", "op.py.bak", "a.pyc"])
def test_a_users_file_is_refused_by_name(package: Path, name: str) -> None:
    """One file that the manifest does not list keeps a build away, wherever it is."""
    (package / name).parent.mkdir(parents=True, exist_ok=True)
    (package / name).write_text("mine", encoding="utf-8")
    refused(package, name)
    directory.check_place(package.parent / "q", files("newer"))


def test_many_files_are_counted(package: Path) -> None:
    """The first few are named, and a name that would break the line is escaped."""
    for i in range(40):
        (package / f"mine{i:02}\n").write_text("mine", encoding="utf-8")
    refused(package, "'mine00\\n', 'mine01\\n', 'mine02\\n' and 37 more")


@pytest.mark.parametrize("kind", ["empty folder", "link to a folder", "link to nothing", "repository within"])
def test_whatever_is_no_file_is_refused_too(package: Path, kind: str) -> None:
    """Folders and links are somebody's as files are, and a link is not followed."""
    mine = package / "kernels" / "mine"
    elsewhere = package.parent / "elsewhere"
    elsewhere.mkdir()
    match kind:
        case "empty folder":
            mine.mkdir()
        case "link to a folder":
            mine.symlink_to(elsewhere)
        case "link to nothing":
            mine.symlink_to(package.parent / "nothing")
        case _:
            mine = package / "kernels" / ".git"
            mine.mkdir()
    with pytest.raises(PlaceError, match=OTHERS + f"kernels/{mine.name}"):
        directory.write(package, files("newer"))
    assert complete(package) == "old"
    assert os.path.lexists(mine)


NOT_MANIFESTS = {
    "empty": b"",
    "no object": b"[]",
    "nothing": b"{}",
    "cut off": files("old")[MANIFEST].encode()[:-20],
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "no version": json.dumps({"name": "p", "files": {"a": "0" * 16}}).encode(),
    "no files": json.dumps({"name": "p", "m2gen": "0.1.0", "files": {}}).encode(),
    "a list": json.dumps({"name": "p", "m2gen": "0.1.0", "files": ["op.py"]}).encode(),
    "no hashes": json.dumps({"name": "p", "m2gen": "0.1.0", "files": {"op.py": "yes", "layer.py": 1}}).encode(),
    **{
        f"of {path!r}": json.dumps(
            {"name": "p", "m2gen": "0.1.0", "files": {"op.py": "0" * 16, path: "0" * 16}}
        ).encode()
        for path in (
            "../victim",
            "kernels/../../victim",
            "/etc/victim",
            ".git/config",
            "kernels/.git/HEAD",
            ".",
            "a//b",
            "a\0b",
        )
    },
    "of another tool": json.dumps({"name": "p", "version": "1.0", "files": {"op.py": "0" * 16}}).encode(),
}


@pytest.mark.parametrize("content", NOT_MANIFESTS.values(), ids=NOT_MANIFESTS)
def test_a_folder_with_a_file_of_the_manifests_name_is_somebodys(package: Path, content: bytes) -> None:
    """The content of a manifest decides, not its existence."""
    (package / MANIFEST).write_bytes(content)
    refused(package, MANIFEST)


@pytest.mark.parametrize("name", [MANIFEST, "build.toml", "op.py"])
def test_a_folder_that_m2gen_never_made_is_refused(tmp_path: Path, name: str) -> None:
    """A project of somebody's keeps its files, whatever one of them is called."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / name).write_text("[general]\nname = 'mine'\n", encoding="utf-8")
    (tmp_path / "p" / "main.py").write_text("mine", encoding="utf-8")
    refused(tmp_path / "p", name, "main.py")


def test_files_that_are_what_would_be_written_may_be_replaced(package: Path) -> None:
    """A package whose manifest was lost is taken over as long as no file differs."""
    (package / MANIFEST).unlink()
    directory.write(package, files("old"))
    assert complete(package) == "old"
    (package / MANIFEST).unlink()
    refused(package, "__init__.py")


@pytest.mark.parametrize("place", ["p", "deep/er/p"])
def test_absent_and_empty_folders_are_filled(tmp_path: Path, place: str) -> None:
    """Nothing has to be made for a build."""
    directory.write(tmp_path / "a" / place, files("new"))
    (tmp_path / "b" / place).mkdir(parents=True)
    directory.write(tmp_path / "b" / place, files("new"))
    assert complete(tmp_path / "a" / place) == complete(tmp_path / "b" / place) == "new"


def test_bytecode_goes_with_its_modules(package: Path) -> None:
    """Python's caches are nobody's work, also those that are being written; anything else beside them is."""
    for name in ("__pycache__/op.cpython-311.pyc", "kernels/__pycache__/a.cpython-311.pyc.139815"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_bytes(b"bytecode")
    assert directory.diff(package, files("old")) == []
    directory.write(package, files("new"))
    assert not list(package.rglob("*.pyc*"))
    (package / "__pycache__").mkdir()
    directory.write(package, files("newest"))
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "notes.txt").write_text("mine", encoding="utf-8")
    refused(package, "__pycache__/notes.txt")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_repository_stays(package: Path, kind: str) -> None:
    """The package is replaced around .git, which a build neither moves nor reads, whether or not it is a folder."""
    git = package / ".git"
    if kind == "folder":
        (git / "objects" / "empty").mkdir(parents=True)
        (git / "HEAD").write_text("ref: refs/heads/main\n", encoding="utf-8")
        (git / "op.py").write_text("mine", encoding="utf-8")
    else:
        git.write_text("gitdir: ../elsewhere\n", encoding="utf-8")
    nodes = {str(path): path.stat().st_ino for path in (git, *git.rglob("*"))}
    directory.write(package, files("with more", "kernels/gone.py", "deep/er/gone.py"))
    assert complete(package) == "with more"
    directory.write(package, files("new"))
    assert nodes == {str(path): path.stat().st_ino for path in (git, *git.rglob("*"))}
    assert complete(package) == "new"
    assert sorted(path.name for path in package.iterdir() if path.is_dir() and path != git) == ["kernels"]


@pytest.mark.parametrize("name", ["../../victim", "../victim", ".git/config", "{}/victim"])
def test_a_manifest_removes_nothing_outside_its_folder(tmp_path: Path, name: str) -> None:
    """Whoever wrote the manifest: a build whose folder has a repository refuses it, and removes nothing."""
    package = tmp_path / "out" / "p"
    path = name.format(tmp_path)
    victims = [tmp_path / "victim", tmp_path / "out" / "victim", package / ".git" / "config"]
    for victim in victims:
        victim.parent.mkdir(parents=True, exist_ok=True)
        victim.write_text("mine", encoding="utf-8")
    manifest = {"name": "p", "m2gen": "0.3.0", "files": {path: "0" * 16}}
    (package / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(PlaceError, match=OTHERS):
        directory.write(package, files("new"))
    assert all(victim.read_text(encoding="utf-8") == "mine" for victim in victims)


def test_a_listed_link_leads_no_file_elsewhere(package: Path) -> None:
    """A folder's link that the manifest lists goes before files are written, and what it leads to stays."""
    (package / ".git").mkdir()
    (package / "kernels").rename(package.parent / "elsewhere")
    (package / "kernels").symlink_to("../elsewhere")
    before = on_disk(package.parent / "elsewhere")
    manifest = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"]["kernels"] = "0" * 16
    (package / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    directory.write(package, files("new"))
    assert complete(package) == "new"
    assert not (package / "kernels").is_symlink()
    assert on_disk(package.parent / "elsewhere") == before


@pytest.mark.parametrize("present", [True, False])
def test_a_link_is_followed_and_stays(tmp_path: Path, present: bool) -> None:
    """A package folder that is a link is written where it leads, and a link to a link as well."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    if present:
        directory.write(tmp_path / "disk" / "real", files("old"))
    (tmp_path / "disk" / "link").symlink_to("real")
    (tmp_path / "out" / "p").symlink_to(tmp_path / "disk" / "link")
    directory.write(tmp_path / "out" / "p", files("new"))
    assert (tmp_path / "out" / "p").is_symlink()
    assert (tmp_path / "disk" / "link").is_symlink()
    assert complete(tmp_path / "disk" / "real") == "new"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name[0] == ".") == []
    (tmp_path / "disk" / "real" / "mine").write_text("mine", encoding="utf-8")
    refused(tmp_path / "out" / "p", "out/p", "mine")


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    """A file in the package's place and a link to itself are errors in one line, and stay."""
    (tmp_path / "p").write_text("mine", encoding="utf-8")
    (tmp_path / "q").symlink_to("q")
    for name, got in (("p", "a file"), ("q", "a link to itself")):
        with pytest.raises(PlaceError, match=f"{name} must be a folder, got {got}"):
            directory.write(tmp_path / name, files("new"))
    assert (tmp_path / "p").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "q").is_symlink()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """Folders that not even root can make are one line that names them, and the user's status."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to("nowhere")
    wrong = {
        tmp_path / "file" / "p": f"--out {tmp_path}/file must be writable as a folder, got a file",
        tmp_path / "file" / "deep" / "p": "p must be writable: Not a directory",
        tmp_path / "link" / "p": f"got a link to {tmp_path}/nowhere, which does not exist",
        Path("/proc/m2gen/p"): "/proc/m2gen/p must be writable: ",
    }
    for folder, line in wrong.items():
        with pytest.raises(PlaceError) as caught:
            directory.write(folder, files("new"))
        assert line in str(caught.value)
        assert caught.value.exit_status == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_what_is_there_already_is_not_written(package: Path) -> None:
    """The same package again changes no node and no time, and needs no place that can be written."""
    before, folder = state(package), package.parent.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "write_file", None)
        directory.write(package, files("old"))
    assert state(package) == before
    assert package.parent.stat().st_mtime_ns == folder


def test_a_folder_keeps_its_mode(package: Path) -> None:
    """Whoever could enter a package can still."""
    package.chmod(0o2750)
    directory.write(package, files("new"))
    assert stat.S_IMODE(package.stat().st_mode) == 0o2750


def test_a_failure_half_way_leaves_the_old_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after the first file leaves what was there, and no remains."""
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlaceError, match="No space left on device"):
        directory.write(package, files("new"))
    assert complete(package) == "old"
    assert [path.name for path in package.parent.iterdir()] == ["p"]


def test_a_file_that_comes_in_the_last_moment_is_not_lost(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is put into a package while it is being replaced is found before anything is removed."""

    def late(one: Path, other: Path) -> bool:
        if not (package / "mine").exists() and complete(package) == "old":
            (package / "mine").write_text("mine", encoding="utf-8")
        return place.exchanged(one, other)

    monkeypatch.setattr(directory, "exchanged", late)
    with pytest.raises(PlaceError, match=OTHERS + "mine;"):
        directory.write(package, files("new"))
    assert (package / "mine").read_text(encoding="utf-8") == "mine"
    (package / "mine").unlink()
    assert complete(package) == "old"
    assert [path.name for path in package.parent.iterdir()] == ["p"]


@pytest.mark.parametrize("lock", [True, False])
def test_where_names_cannot_be_exchanged(package: Path, monkeypatch: pytest.MonkeyPatch, lock: bool) -> None:
    """File systems without that, and without locks, get the same packages and refuse the same."""
    monkeypatch.setattr(directory, "exchanged", lambda one, other: False)
    if not lock:
        monkeypatch.setattr(place, "_flocked", lambda handle: False)
    directory.write(package, files("with more", "kernels/gone.py", "deep/er/gone.py"))
    directory.write(package, files("new"))
    assert on_disk(package) == {path: text.encode() for path, text in files("new").items()}
    assert sorted(path.name for path in package.iterdir() if path.is_dir()) == ["kernels"]
    (package / "mine").write_text("mine", encoding="utf-8")
    refused(package, "mine")


def test_a_folder_that_can_be_written_in_one_that_cannot(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to be made beside a package that is there."""
    make = Path.mkdir

    def only_within(path: Path, *arguments: object, **options: object) -> None:
        if path.parent == package.parent and path != package:
            raise PermissionError(13, "Permission denied")
        make(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", only_within)
    directory.write(package, files("new"))
    assert complete(package) == "new"


def test_builds_that_mix_without_a_lock_are_told(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a lock, files are written again after another build wrote them, and in the end this is an error."""
    monkeypatch.setattr(directory, "exchanged", lambda one, other: False)
    writes: list[int] = []
    once = directory._update_once

    def interfere(real: Path, contents: dict[str, bytes]) -> None:
        once(real, contents)
        if len(writes) < rounds:
            (real / "op.py").write_text("another build's", encoding="utf-8")
        writes.append(1)

    monkeypatch.setattr(directory, "_update_once", interfere)
    rounds = 1
    directory.write(package, files("new"))
    assert complete(package) == "new"
    rounds = 100
    with pytest.raises(PlaceError, match="must be left to one build at a time"):
        directory.write(package, files("newer"))


def test_what_killed_builds_left_is_cleaned(package: Path) -> None:
    """By its name and its content: empty, cut off in the manifest or after it, or a whole package; no other."""
    parent, new = package.parent, files("new")
    empty, cut, later, whole, inside = (parent / owned.staging_name("p") for _ in range(5))
    empty.mkdir()
    cut.mkdir()
    (cut / MANIFEST).write_text(new[MANIFEST][:50], encoding="utf-8")
    later.mkdir()
    (later / MANIFEST).write_text(new[MANIFEST], encoding="utf-8")
    (later / "op.py").write_text("VERS", encoding="utf-8")
    directory.write(whole, new)
    directory.write(inside, new)
    directory.write(inside / owned.staging_name(), new)
    directory.write(package / owned.staging_name(), new)
    (parent / ".m.m2gen-0123456789abcdef").mkdir()  # on its way to another name
    kept = parent / owned.staging_name("p")
    kept.mkdir()
    (kept / "mine").write_text("mine", encoding="utf-8")
    directory.write(package, new)
    assert complete(package) == "new"
    assert sorted(path.name for path in parent.iterdir()) == sorted([".m.m2gen-0123456789abcdef", kept.name, "p"])


def test_imports_of_the_writer_are_light() -> None:
    """Ranks that only write need no torch."""
    code = (
        "import sys; from m2gen.package import directory; assert not {'torch', 'triton', 'jinja2'} & set(sys.modules)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


@pytest.mark.parametrize("name", [".GIT/config", "kernels/.git/config", "kernels/.Git/config"])
def test_a_repository_of_any_case_is_no_manifests(package: Path, name: str) -> None:
    """File systems that ignore case have one folder of such names, and a module's folder may be a repository."""
    (package / name).parent.mkdir(parents=True, exist_ok=True)
    (package / name).write_text("mine", encoding="utf-8")
    manifest = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][name] = "0" * 16
    (package / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(PlaceError, match=OTHERS):
        directory.write(package, files("new"))
    assert (package / name).read_text(encoding="utf-8") == "mine"


def test_a_manifest_that_is_a_link_owns_nothing(tmp_path: Path) -> None:
    """A link to another package's manifest makes none of m2gen's of a user's folder, whose files stay."""
    directory.write(tmp_path / "other", files("old"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / MANIFEST).symlink_to(tmp_path / "other" / MANIFEST)
    (mine / "op.py").write_text("mine", encoding="utf-8")
    refused(mine, MANIFEST, "op.py")
    assert (mine / MANIFEST).is_symlink()


def test_a_link_to_the_right_content_is_not_replaced(package: Path) -> None:
    """A user's link is not the file that it leads to: where no manifest lists it, it is refused and stays."""
    content = (package / "op.py").read_text(encoding="utf-8")
    (package.parent / "elsewhere.py").write_text(content, encoding="utf-8")
    (package / MANIFEST).unlink()
    (package / "op.py").unlink()
    (package / "op.py").symlink_to(package.parent / "elsewhere.py")
    with pytest.raises(PlaceError, match=OTHERS + r"op\.py;"):
        directory.write(package, files("old"))
    assert (package / "op.py").is_symlink()


@pytest.mark.parametrize("beside", [False, True])
def test_a_folder_of_a_leftovers_name_may_hold_something_else(package: Path, beside: bool) -> None:
    """It stays with all its files, and within a package it is what keeps a build away."""
    kept = package.parent / owned.staging_name("p") if beside else package / owned.staging_name()
    kept.mkdir()
    contents = {"mine.txt": b"mine", MANIFEST: b"{}"}
    for name, data in contents.items():
        (kept / name).write_bytes(data)
    if beside:
        directory.write(package, files("new"))
        assert complete(package) == "new"
    else:
        with pytest.raises(PlaceError, match=OTHERS + re.escape(kept.name)):
            directory.write(package, files("new"))
    assert on_disk(kept) == contents


def test_the_package_and_its_manifest_come_last(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files are replaced one by one, a manifest of both comes first; what imports the others follows them."""
    (package / ".git").mkdir()
    targets: list[str] = []
    move = directory._move

    def noted(staging: Path, real: Path, path: str, data: bytes) -> None:
        targets.append(path)
        move(staging, real, path, data)

    monkeypatch.setattr(directory, "_move", noted)
    directory.write(package, files("new"))
    assert (targets[0], targets[-2:]) == (MANIFEST, ["__init__.py", MANIFEST])
    assert sorted(targets[1:-2]) == sorted(files("new").keys() - {MANIFEST, "__init__.py"})


def test_what_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    """A place below a file, or in a folder that cannot be written."""
    (tmp_path / "file").touch()
    with pytest.raises(PlaceError, match=r"must be writable: Not a directory, .*file"):
        directory.check_place(tmp_path / "file" / "x" / "wb", {"a.py": ""})


WRITTEN_TWICE = """
import json, sys
from pathlib import Path
from m2gen.package import directory
from m2gen.package.owned import hashes
folder = Path(sys.argv[1])
for text in ("1", "2"):
    files = {"sub/a.py": text, "__init__.py": ""}
    manifest = {"name": "x", "m2gen": "1", "files": hashes(files)}
    directory.write(folder, {**files, "MANIFEST.json": json.dumps(manifest)})
    for path in (folder, folder / "sub"):
        path.chmod(0o555)
"""


def test_a_write_protected_package_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its place is exchanged, and the old one's files are removed, by whoever owns them."""
    root = os.geteuid() == 0
    if root and shutil.which("setpriv") is None:
        pytest.skip("root writes to protected folders, and there is no setpriv to run without that")
    without = "-dac_override,-dac_read_search"
    drop = ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}"] if root else []
    subprocess.run([*drop, sys.executable, "-c", WRITTEN_TWICE, str(tmp_path / "x")], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
