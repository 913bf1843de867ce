"""A reader of the pages: the folders in which commands are typed, and what comes of them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import write_checkpoint
from command_line import run
from pages import blocks, site
from support import ROOT

CLONED = (
    "docs", "examples", "generated", "m2gen", "specs", "templates", "tools", "tuning_db",
    "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml",
)  # fmt: skip
"""What of the repository commands read and write."""
OWN = ("docs/tutorial.md", "docs/how-to/", "docs/models.md", "docs/package.md")
"""Pages whose commands are typed in a folder of the reader's, with an installed m2gen; those of others in a clone."""
SMALL = """schema: 1
name: h100
targets: [sm_90]
layers:
  m2rnn_7b: {head_dim: 16, state_expansion: 16, heads: {q: 1, k: 1, v: 4, f: 4, w: 4}, dtypes: [fp32]}
"""
"""A spec of the shipped one's name, whose layer runs in Triton's interpreter in milliseconds."""
EARLIER = {
    "before.json": "docs/data/speed_h200.json",
    "run.json": "docs/data/speed_h200.json",
    "two.json": "docs/data/ranks_2_h200.json",
    "layers.json": "docs/data/layers_h200.json",
}
"""Files that commands which need GPUs would have written before others read them."""
CHECKPOINT = "m2rnn-410m"
"""A published checkpoint's folder, which here holds a small one."""
ONE_CASE = " --case ragged"
"""What a verification is shortened to: all of it is run where a workflow's commands are."""
SHORTER = {
    "m2gen bench --spec tiny.yaml --layer grouped --gpus 4": (
        "m2gen bench --spec tiny.yaml --layer grouped --gpus 2 --form heads"
    ),
    "m2gen db learn docs/data/trials.jsonl OUT/*.log ~/.cache/m2gen/tune/*.log --trials docs/data/trials.jsonl "
    "--rule m2gen/schedule/learned.json": (
        "m2gen db learn docs/data/trials.jsonl --trials docs/data/trials.jsonl --rule m2gen/schedule/learned.json"
    ),
    "python -m tools.figures": "python -m tools.figures speed",
    "python tools/simulate_ranks.py --ranks 16 --out docs/data/ranks_16_cpus.json": (
        "python tools/simulate_ranks.py --ranks 2 --out ranks_2_cpus.json"
    ),
    "python tools/simulate_ranks.py --ranks 64 --out docs/data/ranks_64_cpus.json": (
        "python tools/simulate_ranks.py --ranks 2 --out ranks_2_cpus.json"
    ),
    "python examples/state_tracking/construct.py --length 65536": (
        "python examples/state_tracking/construct.py --length 64 --words 2 --backend reference"
    ),
    "python -m generated.h100 warm-up --device sm_90 --layer m2rnn_7b": (
        "python -m generated.h100 warm-up --device sm_90 --layer m2rnn_7b --use train --length 4096"
    ),
}
"""Commands that take minutes on two cores, and what is run of them."""
M2GEN = re.compile(r"(?:\.venv/bin/)?m2gen (\w+)")
PLAIN = re.compile(r"(?:\.venv/bin/)?m2gen [^|>&;*~$]*")
"""A command of m2gen that needs no shell, and so no process of its own."""


def shortened(command: str) -> str:
    """Return what is run of a command.

    Shipped specs are checked and verified by other tests, and a build's verification is run where the tutorial is
    followed. make says what it would do, since it would install what this Python has, and then do what tests do.
    """
    if command.startswith("make "):
        return command.replace("make ", "make --dry-run ")
    command = SHORTER.get(command, command)
    asked = M2GEN.match(command)
    if asked is None:
        return command
    if asked[1] == "build":
        return command if re.search("--check|--no-verify", command) else f"{command} --no-verify"
    if asked[1] in ("check", "verify"):
        command = re.sub(r"--spec (h100|tiny)\.yaml", "--spec toy.yaml", command)
    return command + ONE_CASE if asked[1] == "verify" else command


@dataclass(frozen=True)
class Said:
    """The exit status of a command, and what it printed."""

    status: int
    text: str


@dataclass(frozen=True)
class Reader:
    """Whoever follows pages, in a clone of the repository and in a folder of their own."""

    clone: Path
    own: Path
    said: dict[tuple[Path, str], Said] = field(default_factory=dict)
    """What came of each command by where it was run; one that several pages have is run once."""

    def folder(self, page: str) -> Path:
        """Return where a page's commands are typed."""
        return self.own if page.startswith(OWN) else self.clone

    def types(self, folder: Path, command: str) -> Said:
        """Run a command, or less of one that takes minutes."""
        command = shortened(command)
        if (folder, command) not in self.said:
            execute = _in_this_process if PLAIN.fullmatch(command) else _in_a_shell
            self.said[folder, command] = execute(folder, command)
        return self.said[folder, command]


def _in_this_process(folder: Path, command: str) -> Said:
    with chdir(folder):
        result = run(*shlex.split(command)[1:])
    return Said(result.exit_code, result.output)


def _in_a_shell(folder: Path, command: str) -> Said:
    """Run a line of a shell whose Python is this one; modules are those of the folder, if it has them."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**os.environ, "PATH": path, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    variables.pop("TRITON_INTERPRET", None)  # which readers set where a page says so
    line = ["bash", "-c", command]
    done = subprocess.run(line, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    return Said(done.returncode, done.stdout + done.stderr)


def settled(base: Path) -> Reader:
    """Return a reader who cloned the repository, did what the tutorial says, and has a small ``generated.h100``."""
    reader = Reader(base / "clone", base / "own")
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in CLONED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, reader.clone / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, reader.clone / name)
    (reader.clone / ".venv").symlink_to(sys.prefix)
    for name, source in EARLIER.items():
        shutil.copy(ROOT / source, reader.clone / name)
    reader.own.mkdir()
    for place in (reader.clone / "FOLDER", reader.clone / CHECKPOINT, reader.own / CHECKPOINT):
        write_checkpoint(place, "hybrid_nope")
    tutorial = next(block for block in blocks(site()["docs/tutorial.md"]) if block.file == "toy.yaml")
    (reader.clone / "toy.yaml").write_text(tutorial.text, encoding="utf-8")
    for name, text in (("toy", tutorial.text), ("small", SMALL)):
        (reader.own / f"{name}.yaml").write_text(text, encoding="utf-8")
        said = reader.types(reader.own, f"m2gen build --spec {name}.yaml --quiet")
        assert said.status == 0, said.text
    return reader
