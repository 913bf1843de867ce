"""Time to the first results of a package in a new process: with nothing compiled, after a warm-up, and brought along.

    python tools/cold_start.py generated/h100 --layer m2rnn_7b

It needs a GPU and the package, which is copied to a temporary folder together with caches of Triton's that begin empty.
A package that was built with ``--compiled`` has one more row, in which its kernels come with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STAGES = ("import torch", "open GPU", "import package", "forward", "backward", "decode", "train again")
FIRST = ("forward", "backward", "decode")

CHILD = """
import importlib, json, sys, time
folder, name, layer, batch, length, hidden = json.loads(sys.argv[1])
sys.path.insert(0, folder)
times, last = [], time.perf_counter()
def lap():
    global last
    if "torch" in sys.modules and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    now = time.perf_counter()
    times.append(now - last)
    last = now
import torch
lap()
linear = torch.nn.Linear(hidden, hidden, device="cuda", dtype=torch.bfloat16)
x = torch.randn(batch, length, hidden, device="cuda", dtype=torch.bfloat16)
linear(x).square().sum().backward()  # so that the GPU's libraries are loaded
lap()
package = importlib.import_module(name)
mixer = package.M2RNN.from_variant(layer, hidden, device="cuda", dtype=torch.bfloat16)
cache = mixer.allocate_cache(batch)
lap()
y = mixer(x)
lap()
y.backward(torch.ones_like(y))
lap()
with torch.no_grad():
    mixer(x[:, :1], cache)
lap()
mixer(x).square().sum().backward()
lap()
print(json.dumps(times))
"""


def new_process(folder: Path, cache: Path, options: argparse.Namespace) -> list[float]:
    """Return the seconds of each stage in a new process."""
    facts = [str(folder), options.package.name, options.layer, options.batch, options.length, options.hidden]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", CHILD, json.dumps(facts)]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def warm_up(folder: Path, cache: Path, options: argparse.Namespace) -> str:
    """Run the package's warm-up for all calls of the layer; return what it says, with the seconds that it took."""
    command = [sys.executable, "-m", options.package.name, "warm-up", "--layer", options.layer]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return f"{done.stdout.strip()}, in {time.perf_counter() - start:.1f} s"


def shown(name: str, times: list[float]) -> None:
    """Print a row: seconds of each stage, and of the first forward, backward and decoding together."""
    first = sum(times[STAGES.index(stage)] for stage in FIRST)
    print(f"{name:34}" + "".join(f"{seconds:>16.3f}" for seconds in (*times, first)), flush=True)


def copied(package: Path, folder: Path, *left_out: str) -> Path:
    """Copy a package below ``folder``, and return that."""
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", *left_out))
    return folder


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=lambda text: Path(text).resolve(), help="folder of a generated package")
    parser.add_argument("--layer", required=True, help="a layer of its spec, or the key of a variant, in bf16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1536, help="width of the layer")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Print a table with a row for each state of the cache, each measured in a process of its own."""
    options: Any = options_of(arguments)
    with tempfile.TemporaryDirectory(prefix="cold-start-") as place:
        root = Path(place)
        plain = copied(options.package, root / "plain", "compiled")
        new_process(plain, root / "unused", options)  # files of torch and the driver are in memory thereafter
        print(f"{'seconds':34}" + "".join(f"{stage:>16}" for stage in (*STAGES, "first results")))
        shown("nothing compiled", new_process(plain, root / "empty", options))
        shown("the same cache, a new process", new_process(plain, root / "empty", options))
        said = warm_up(plain, root / "warm", options)
        shown("after a warm-up", new_process(plain, root / "warm", options))
        if (options.package / "compiled").is_dir():
            equipped = copied(options.package, root / "equipped")
            shown("brought along", new_process(equipped, root / "brought", options))
            shown("brought along, a new process", new_process(equipped, root / "brought", options))
    print(said)


if __name__ == "__main__":
    main()
