"""What type checkers say of packages: right uses pass ``mypy --strict``, and wrong ones do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, SCHEDULES, build_package, make_variant

from m2gen.package.directory import write

MODEL = '''
"""A model of one layer, a recurrence, and its decoding."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from typed import M2RNN, M2RNNCache, VariantNotBuiltError, m2rnn, m2rnn_step, m2rnn_steps
from typed.compat import m2rnn as published
from typed.parallel import HeadParallelM2RNN, M2RNNContext, M2RNNHeads, exchange_over_ranks, scan_over_ranks


class Model(nn.Module):
    """A mixer in a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = M2RNN.from_variant("layer", width, conv_width=4)
        self.other = M2RNN(width, 16, 16, {"q": 1, "k": 1, "v": 2, "f": 2, "w": 2}, clip=None, backend="reference")

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, S, width)."""
        try:
            return x + self.mixer.forward(x) + self.mixer.state_weight.sum()
        except VariantNotBuiltError:
            return self.other.forward(x)

    def begin(self, batch: int) -> M2RNNCache:
        """Return an empty cache."""
        return self.mixer.allocate_cache(batch, dtype=torch.bfloat16)

    def scanned(self, x: Tensor) -> Tensor:
        """Return the states after x, as one."""
        _, conv, state = self.mixer.scan(x)
        return conv.sum() + state.sum()


def steps(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor) -> Tensor:
    """Run a prompt, and decode a token after it."""
    y, state = m2rnn(q, k, v, weight, forget, clip=1.0)
    last, state = m2rnn_step(q[:, 0], k[:, 0], v[:, 0], weight, forget[:, 0], state)
    _, nothing = m2rnn(q, k, v, weight, forget, output_final_state=False)
    assert nothing is None
    other, _ = published(q, k, v, weight, forget, gradient_clipping=1.0)
    return y[:, 0] + last + other[:, 0] + state.sum()


def by_slots(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor, pool: Tensor, slots: Tensor) -> Tensor:
    """Run prompts from a pool of states, then a token and its drafts."""
    y, pool = m2rnn(q, k, v, weight, forget, pool=pool, indices=slots, has_initial_state=slots > 0, rounding_seed=1)
    drafts, pool = m2rnn_steps(q, k, v, weight, forget, pool, indices=slots[:, None], accepted=slots, out_indices=slots)
    last, pool = m2rnn_step(q[:, 0], k[:, 0], v[:, 0], weight, forget[:, 0], pool, indices=slots)
    return y + drafts + last[:, None] + pool.sum()


def over_ranks(model: Model, x: Tensor) -> Tensor:
    """Run long sequences."""
    y: Tensor = exchange_over_ranks(model.mixer, x) + scan_over_ranks(model.mixer, x, micro_batches=2)
    return y


def parallelised(model: Model, mesh: DeviceMesh) -> nn.Module:
    """Shard the heads of a model's layer, and its tokens over the same ranks."""
    parallelize_module(model, mesh, {"other": M2RNNContext()})
    return parallelize_module(model, mesh, {"mixer": M2RNNHeads(sequence_parallel=True)})


def whole(sharded: HeadParallelM2RNN, x: Tensor) -> dict[str, Tensor]:
    """Return the parameters of a layer over ranks, which also scans."""
    assert scan_over_ranks(sharded, x).shape == x.shape
    return sharded.gathered_state_dict()
'''
WRONG = '''
"""Calls of which some are errors."""

import torch
from torch import Tensor

from typed import M2RNN, m2rnn, m2rnn_step


def wrong(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor) -> None:
    """Call with what is wrong."""
    y, _ = m2rnn("q", k, v, weight, forget)  # wrong
    m2rnn(q, k, v, weight, forget, backend="cuda")  # wrong
    m2rnn_step(q, k, v, weight, forget)  # wrong
    _, state = m2rnn(q, k, v, weight, forget, output_final_state=False)
    state.sum()  # wrong
    M2RNN("8", 16, 16, {})  # wrong
    M2RNN(8, 16, 16, {}).forward(8)  # wrong
'''


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what mypy says of both files, where it finds a package beside them."""
    folder = tmp_path_factory.mktemp("user")
    package = build_package("typed", [make_variant()], SCHEDULES["one_level_atomic"])
    write(folder / "typed", package.files)
    (folder / "model.py").write_text(MODEL.lstrip(), encoding="utf-8")
    (folder / "wrong.py").write_text(WRONG.lstrip(), encoding="utf-8")
    # The project's settings, which are strict, and its cache, where `make types` left torch: it takes a minute else.
    shared = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *shared, "model.py", "wrong.py"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MYPY")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout


def test_right_uses_pass_strict_checks(said: str) -> None:
    """A model that uses the operator, the layer and ranks is right, and so are the modules of the package."""
    assert [line for line in said.splitlines() if not line.startswith("wrong.py")] == []


def test_wrong_uses_do_not(said: str) -> None:
    """A string for a tensor, a backend that is none, a missing argument: each line is an error."""
    lines = {int(line) for line in re.findall(r"^wrong\.py:(\d+): error:", said, re.MULTILINE)}
    assert lines == {i for i, line in enumerate(WRONG.lstrip().splitlines(), 1) if line.endswith("# wrong")}, said


def test_a_package_says_that_it_has_types(tmp_path: Path) -> None:
    """Installed, it is checked only where it has a marker."""
    package = build_package("typed", [make_variant()], SCHEDULES["one_level_atomic"])
    assert package.files["py.typed"] == ""
