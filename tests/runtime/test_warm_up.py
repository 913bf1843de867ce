"""A warm-up leaves what launches look for in Triton's cache, and packages may bring it along."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from assembler import NEVER_ENDS, Assembler
from support import make_variant

from m2gen.device import PORTABLE, TARGETS
from m2gen.package import emit
from m2gen.schedule import default
from m2gen.variant import BuiltVariant

NAME = "warmed"
NOWHERE = Path(__file__).resolve().parents[1] / "fakes" / "launched_nowhere.py"
CALLS = [
    ["train", "layer", "", 64],
    ["train", "layer", "", 37],
    ["train", "layer", "int32", 11],
    ["infer", "layer", "", 9],
    ["infer", "layer", "", 128],
    ["infer", "layer", "int64", 50],
    ["decode", "layer", "", 1],
    ["train", "operator", "", 4097],
    ["train", "operator", "int32", 3],
    ["infer", "operator", "", 2],
    ["infer", "operator", "int64", 64],
    ["decode", "operator", "", 1],
]
"""use, operands, offsets and steps of calls, of other lengths than a warm-up's."""
DECODE = [["decode", "operator", "", 1]]


def package() -> emit.Package:
    """Return a package of one variant for an H100, whose gate's strides are multiples of 16 for some lengths only."""
    variant = make_variant(dtype="bf16", tanh="approx")
    built = BuiltVariant(variant, ("base",))
    choices = [emit.Choice(built, device, default(variant, device)) for device in (PORTABLE, TARGETS["sm_90"])]
    return emit.package(emit.Origin(NAME, f"{NAME}.yaml", "0" * 12), choices)


def written(folder: Path) -> Path:
    """Write the package below a folder, and return that."""
    for path, text in package().files.items():
        (folder / NAME / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / NAME / path).write_text(text, encoding="utf-8")
    return folder


def python(cache: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user without a GPU would, with a cache of Triton's in ``cache``."""
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**known, "TRITON_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def warm_up(cache: Path, folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the warm-up of the package in a folder."""
    options = ("--device", "sm_90", "--processes", "2", *options)
    return python(cache, "-m", NAME, "warm-up", *options, cwd=folder, **environment)


def launches(cache: Path, folder: Path, calls: list[list[Any]]) -> dict[str, list[str]]:
    """Make calls of the package in a folder; return names of kernels that were found, and those that were compiled."""
    done = python(cache, str(NOWHERE), str(folder), NAME, json.dumps(calls), cwd=cache.parent)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    assert found.pop("package") == str(folder / NAME)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the package."""
    return written(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Return a cache of Triton's that a warm-up filled."""
    cache = tmp_path_factory.mktemp("cache") / "triton"
    done = warm_up(cache, folder)
    assert done.returncode == 0, done.stderr
    assert " kernels compiled for sm_90, 0 found in Triton's cache" in done.stdout
    return cache


@pytest.fixture(scope="module")
def entries(cache: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the files of compiled kernels that the package may bring along."""
    done = warm_up(cache, folder, "--entries")
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture
def equipped(folder: Path, entries: dict[str, str], tmp_path: Path) -> Path:
    """Return a folder with a package that brings its kernels along."""
    shutil.copytree(folder, tmp_path / "equipped")
    for path, text in entries.items():
        (tmp_path / "equipped" / NAME / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "equipped" / NAME / path).write_text(text, encoding="utf-8")
    return tmp_path / "equipped"


def test_launches_find_everything(cache: Path, folder: Path) -> None:
    """Whatever a model calls, of whatever length, Triton looks for what the warm-up compiled, and compiles nothing."""
    found = launches(cache, folder, CALLS)
    assert found["compiled"] == []
    own = [f"{name}{side}" for name in ("convolve", "decay", "finish") for side in ("", "_backward")]
    assert set(found["found"]) == {f"m2rnn_{name}_kernel" for name in ("forward", "backward", "step", "decode", *own)}


def test_the_order_of_calls_does_not_matter(cache: Path, folder: Path) -> None:
    """Kernels that share functions have the names that they have alone, whichever comes first."""
    decode, infer, train = (next(call for call in CALLS if call[0] == use) for use in ("decode", "infer", "train"))
    for calls in ([decode], [infer, decode], [train, decode, infer]):
        assert launches(cache, folder, calls)["compiled"] == []


def test_every_kernel_has_products_and_sums_fused(folder: Path, tmp_path: Path) -> None:
    """Those of the layer around the recurrence, too, though Triton fuses none unasked, as from 3.10 on."""
    done = warm_up(tmp_path / "triton", folder, "--use", "decode", TRITON_DEFAULT_FP_FUSION="0")
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "triton").glob("*/m2rnn_*.json")}
    assert {"m2rnn_step_kernel", "m2rnn_decode_kernel"} <= set(found)
    assert [name for name, facts in found.items() if not facts["enable_fp_fusion"]] == []


def test_under_autocast(cache: Path, folder: Path, tmp_path: Path) -> None:
    """Parameters in float32 are other kernels, of the recurrence and around it; a warm-up of these alone finds them."""
    done = warm_up(tmp_path / "triton", folder, "--use", "train", "--operands", "autocast")
    assert done.returncode == 0, done.stderr
    calls = [["train", "autocast", "", 40], ["train", "autocast", "int32", 700]]
    assert launches(tmp_path / "triton", folder, calls)["compiled"] == []
    assert "m2rnn_convolve_kernel" in launches(cache, folder, calls[:1])["compiled"]


def test_without_a_warm_up_launches_compile(folder: Path, tmp_path: Path) -> None:
    """The calls above would notice: a cache that is empty has nothing to find."""
    assert launches(tmp_path / "triton", folder, DECODE) == {"found": [], "compiled": ["m2rnn_step_kernel"]}


def test_a_second_warm_up_compiles_nothing(cache: Path, folder: Path) -> None:
    """It looks for the same kernels and finds them; fewer calls have fewer."""
    done = warm_up(cache, folder)
    assert f"{NAME}: 0 kernels compiled for sm_90, " in done.stdout
    done = warm_up(cache, folder, "--use", "decode", "--operands", "operator")
    assert done.stdout == f"{NAME}: 0 kernels compiled for sm_90, 1 found in Triton's cache\n"


def test_what_a_package_brings_along_is_found(equipped: Path, tmp_path: Path) -> None:
    """With an empty cache nothing is compiled, in two processes at once, and then without the package's files."""
    script = [str(NOWHERE), str(equipped), NAME, json.dumps(CALLS)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *script]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert json.loads(process.communicate()[0])["compiled"] == []
        assert process.returncode == 0
    shutil.rmtree(equipped / NAME / "compiled")
    assert launches(tmp_path / "triton", equipped, CALLS)["compiled"] == []


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _altered(path: Path) -> None:
    """Change what is packed, so that all but the hash is in order."""
    entry = json.loads(path.read_text(encoding="utf-8"))
    (binary,) = (name for name in entry if name.endswith(".cubin"))
    data = bytearray(zlib.decompress(base64.b64decode(entry[binary]["data"])))
    data[len(data) // 2] ^= 1
    entry[binary]["data"] = base64.b64encode(zlib.compress(bytes(data))).decode()
    path.write_text(json.dumps(entry), encoding="utf-8")


def _shorter(path: Path) -> None:
    """Leave a part of the binary out."""
    entry = json.loads(path.read_text(encoding="utf-8"))
    for packed in entry.values():
        packed["data"] = packed["data"][: len(packed["data"]) // 8 * 4]
    path.write_text(json.dumps(entry), encoding="utf-8")


def _of_another_triton(path: Path) -> None:
    root = path.parents[2]
    root.rename(root.with_name("triton-3.0.0"))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [_truncated, _altered, _shorter, _of_another_triton, _empty])
def test_what_is_not_whole_is_compiled(harm: Any, equipped: Path, tmp_path: Path) -> None:
    """A file that is cut off or altered, or of another Triton, is as if it were not there."""
    for path in list((equipped / NAME / "compiled").rglob("m2rnn_step_kernel-*.json")):
        if path.exists():
            harm(path)
    assert launches(tmp_path / "triton", equipped, DECODE) == {"found": [], "compiled": ["m2rnn_step_kernel"]}


def test_a_folder_that_may_not_be_read_brings_nothing(equipped: Path, tmp_path: Path) -> None:
    """An install that the user has no access to is no error of a call; one that is for reading alone is not written."""
    folder = equipped / NAME / "compiled"
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for path in (*files, folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert launches(tmp_path / "triton", equipped, DECODE) == {"found": ["m2rnn_step_kernel"], "compiled": []}
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for path in (*files, folder):
        path.chmod(0o755)
    (tmp_path / "refusing.py").write_text(REFUSING, encoding="utf-8")
    calls = [str(tmp_path / "refusing.py"), str(equipped), NAME, json.dumps(DECODE)]
    done = python(tmp_path / "other", *calls, cwd=tmp_path, PYTHONPATH=str(NOWHERE.parent))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compiled"] == ["m2rnn_step_kernel"]


REFUSING = """
import pathlib, sys
import launched_nowhere
is_dir = pathlib.Path.is_dir
def refuse(path):
    if path.name == "compiled":
        raise PermissionError(13, "Permission denied", str(path))
    return is_dir(path)
pathlib.Path.is_dir = refuse
launched_nowhere.main(*sys.argv[1:])
"""


def test_a_cache_of_the_users_own_class_is_filled_by_its_methods(equipped: Path, tmp_path: Path) -> None:
    """Triton is asked for its cache, whatever that is; one that refuses leaves Triton to compile."""
    (tmp_path / "own.py").write_text(OWN_CACHE, encoding="utf-8")
    for refuses, expected in (("", ["m2rnn_step_kernel"]), ("1", [])):
        calls = [str(NOWHERE), str(equipped), NAME, json.dumps(DECODE)]
        own = {"TRITON_CACHE_MANAGER": "own:Own", "REFUSES": refuses, "PYTHONPATH": str(tmp_path)}
        done = python(tmp_path / f"triton{refuses}", *calls, cwd=tmp_path, **own)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["found"] == expected


OWN_CACHE = """
import inspect, os
from triton.runtime.cache import FileCacheManager
class Own(FileCacheManager):
    def put(self, data, filename, binary=True):
        if os.environ["REFUSES"] and any(frame.function == "provide" for frame in inspect.stack()):
            raise PermissionError("no")
        return super().put(data, filename, binary)
"""


def test_what_is_brought_along_names_no_path(folder: Path, tmp_path: Path) -> None:
    """The same package gives the same bytes from any folder and any cache."""
    there = written(tmp_path / "some" / "where")
    every = []
    for number, place in enumerate((folder, there)):
        done = warm_up(tmp_path / f"triton{number}", place, "--entries", "--use", "decode", "--operands", "operator")
        assert done.returncode == 0, done.stderr
        every.append(json.loads(done.stdout))
    assert every[0] == every[1]
    ((_, text),) = every[0].items()
    for packed in json.loads(text).values():
        data = zlib.decompress(base64.b64decode(packed["data"]))
        assert str(folder).encode() not in data
        assert b"/site-packages/" not in data


def test_a_kernel_that_cannot_be_compiled_is_named(folder: Path, tmp_path: Path) -> None:
    """The exit status is 1; the message says which kernel, and the assembler's complaint."""
    options = ("--use", "decode", "--operands", "operator")
    done = warm_up(tmp_path / "triton", folder, *options, PTXAS_OPTIONS="--no-such-option")
    assert done.returncode == 1
    assert f"{NAME}: warm_up: kernels must compile, got\n" in done.stderr
    assert "forward to decode: PTXASError: " in done.stderr


OUT_OF_TIME = """
import sys, threading
import warmed.crew
from warmed.__main__ import main
began = open(sys.argv[1])
class Timer(threading.Thread):
    def __init__(self, seconds, function):
        super().__init__(daemon=True)
        self.function, self.cancelled = function, threading.Event()
    def run(self):
        while not self.cancelled.wait(0.01):
            if began.readline():
                return self.function()
    def cancel(self):
        self.cancelled.set()
warmed.crew.threading.Timer = Timer
sys.exit(main(sys.argv[2:]))
"""
"""A warm-up by whose clock the time is over as soon as an assembler has begun."""


def test_an_assembler_that_never_ends_is_each_kernels_error(folder: Path, tmp_path: Path) -> None:
    """It is ended when the time is over; other kernels have their turn, and the exit status is 1."""
    assembler = Assembler(tmp_path / "assembler", NEVER_ENDS)
    options = ("warm-up", "--device", "sm_90", "--processes", "1", "--use", "decode")
    arguments = ("-c", OUT_OF_TIME, str(assembler.began), *options)
    done = python(tmp_path / "triton", *arguments, cwd=folder, **assembler.environment)
    assert done.returncode == 1, done.stderr
    first, around, forward = done.stderr.splitlines()
    assert first == f"{NAME}: warm_up: kernels must compile, got"
    assert around.endswith(" around to decode: took longer than 600 s")
    assert forward.endswith(" forward to decode: took longer than 600 s")
    assert assembler.calls() == 2
    assembler.wait()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", "other"), "layers must be of base or keys of variants, got 'other'"),
        (("--device", "sm_90", "--length", "-1"), "lengths must be at least 1, got -1"),
        (("--device", "sm_x"), "arch must be one such as sm_90 or gfx942, got 'sm_x'"),
        (("--device", "sm_9"), "arch must be one such as sm_90 or gfx942, got 'sm_9'"),
        (("--device", "sm_900"), "arch must be one such as sm_90 or gfx942, got 'sm_900'"),
        (("--device", "gfx9"), "arch must be one such as sm_90 or gfx942, got 'gfx9'"),
        (("--device", "cuda"), "device must be an arch such as sm_90 where there is no GPU, got 'cuda'"),
        (("--device", "cpu"), "device must be a GPU, or an arch such as sm_90, got 'cpu'"),
    ],
)
def test_what_is_no_use_is_said(options: tuple[str, ...], message: str, folder: Path, tmp_path: Path) -> None:
    """The exit status is 2, and nothing is compiled."""
    done = warm_up(tmp_path / "triton", folder, *options, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "triton").exists()


def test_no_processes_are_an_error_of_the_command(cache: Path, folder: Path) -> None:
    """The usage names the module as it was called."""
    done = warm_up(cache, folder, "--processes", "0")
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: python -m {NAME} ")
    assert done.stderr.splitlines()[-1].endswith("--processes must be at least 1, got 0")


FUNCTION = """
import torch
from warmed import warm_up
from warmed.warming import Calls
if __name__ == "__main__":
    print(warm_up("sm_90", layers=["base"], dtypes=[torch.bfloat16], calls=Calls(uses=["decode"]), processes=1))
    for wrong in (dict(dtypes=[torch.float16]), dict(calls=Calls(uses=["training"]))):
        try:
            warm_up("sm_90", **wrong)
        except ValueError as error:
            print(error)
"""


def test_the_function(cache: Path, folder: Path) -> None:
    """It takes layers, dtypes and calls, and says how many kernels there were; a program needs no guard for it."""
    done = python(cache, "-c", FUNCTION, cwd=folder)
    assert done.stdout.splitlines() == [
        "WarmedUp(compiled=0, found=3)",
        "warm_up: dtypes must be those of built variants, got torch.float16",
        "warm_up: calls must be of train, train_states, infer, decode, got 'training'",
    ], done.stderr
