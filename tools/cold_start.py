"""Seconds from a new process' start to its first results on a GPU: with nothing compiled, warmed up, brought along.

    python tools/cold_start.py [generated/h100 [m2rnn_7b]]

Each row is a process of its own on a temporary copy and cache: when stages were over, and what Triton compiled in it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import copytree, ignore_patterns

CHILD = """
import importlib, sys, time, torch, triton
begun, name, layer, stages, compiled = float(sys.argv[1]), *sys.argv[2:], {}, []
triton.knobs.compilation.listener = lambda *, metadata, cache_hit, **_: cache_hit or compiled.append(metadata["name"])
done = lambda stage: (torch.cuda.synchronize(), stages.update({stage: round(time.time() - begun, 2)}))
stages["torch"] = round(time.time() - begun, 2)
x = torch.randn(4, 4096, 1536, device="cuda", dtype=torch.bfloat16)
y = torch.nn.Linear(1536, 1536, device="cuda", dtype=torch.bfloat16)(x)
y.backward(torch.ones_like(y))  # loads libraries, and what torch imports for a first backward
done("GPU")
sys.path.insert(0, ".")
mixer = importlib.import_module(name).M2RNN.from_variant(layer, 1536, device="cuda", dtype=torch.bfloat16)
done("package")
for use in ("", " again"):
    y = mixer(x); done("forward" + use)
    y.backward(torch.ones_like(y)); done("backward" + use)
print(stages, "compiled:", compiled)
"""


def ran(folder: Path, cache: Path, *arguments: str) -> str:
    """Return what Python prints in a folder, with a cache of Triton's; a failure ends the program after its error."""
    kept = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=kept, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments[:3])} must end with status 0, got {done.returncode}")
    return done.stdout


def main(package: str = "generated/h100", layer: str = "m2rnn_7b") -> None:
    """Print a row for each state of the cache."""
    if not Path(package).is_dir():
        sys.exit(f"{package} must be the folder of a package, got none; m2gen build makes one")
    with tempfile.TemporaryDirectory(prefix="cold-start-") as place:
        root, name = Path(place), Path(package).name
        copytree(package, root / name, ignore=ignore_patterns("compiled", "__pycache__"))
        warm_up = ["-m", name, "warm-up", *f"--layer {layer} --use train --operands layer --length 4096".split()]
        for row in ("not timed: disk", "nothing compiled", "nothing compiled, again", "warmed up", "brought along"):
            start, cache = time.time(), root / row.removesuffix(", again")
            if row == "warmed up":
                print(ran(root, cache, *warm_up).strip(), f"in {time.time() - start:.1f} s")
            entries = ran(root, root / "warmed up", *warm_up, "--entries") if row == "brought along" else ""
            for path, text in json.loads(entries or "{}").items():
                (root / name / path).parent.mkdir(parents=True, exist_ok=True)
                (root / name / path).write_text(text)
            print(f"{row:24}", ran(root, cache, "-c", CHILD, str(time.time()), name, layer).strip(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
