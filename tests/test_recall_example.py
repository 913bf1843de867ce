"""The recall example: its tasks and its windowed attention against something independent, and its command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import ROOT
from torch.nn import functional as F

from m2gen.kernels.compile import load_module

EXAMPLES = ROOT / "examples"
LOCAL = ("decoder", "gated_delta", "tasks", "train")
"""Modules that the example finds beside it."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports the example's command, or one of the modules beside it."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "recall"), str(EXAMPLES), *sys.path])
    for name in LOCAL:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def imported(module: str = "run") -> ModuleType:
        return load_module(EXAMPLES / "recall" / f"{module}.py", f"example_recall_{module}")

    yield imported
    for name in LOCAL:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("length", [16, 33])
def test_answers_are_in_the_words(example, length) -> None:
    """A recall's answers follow their keys, each of which was said once before; a copy's are its first letters."""
    tasks = example("tasks")
    recall, copy = (tasks.Task(name, items=4, keys=6, values=5, noise=3) for name in ("recall", "copy"))
    first_value, first_key = 1 + 3, 1 + 3 + 5
    generator = torch.Generator().manual_seed(0)
    for word, answers in zip(*(x.tolist() for x in recall.draw(50, length, generator)), strict=True):
        body, queries = word[:-4], word[-4:]
        assert len(set(queries)) == 4
        assert sorted(x for x in body if x >= first_key) == sorted(queries)
        assert [body[body.index(key) + 1] - first_value for key in queries] == answers
        assert max(word) < recall.letters
    for word, answers in zip(*(x.tolist() for x in copy.draw(50, length, generator)), strict=True):
        assert [letter - first_value for letter in word[:4]] == answers
        assert word[-4:] == 4 * [tasks.CUE]
        assert all(1 <= letter < first_value for letter in word[4:-4])


@pytest.mark.parametrize("length", [3, 8, 21])
def test_windows_see_the_last_letters_alone(example, length) -> None:
    """Blocks give what attention with a mask of all pairs gives."""
    train = example("train")
    torch.manual_seed(0)
    window = train.Window(8, 2, 4)
    x = torch.randn(2, length, 8)
    q, k, v = window.qkv(x).unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)
    back = torch.arange(length)[:, None] - torch.arange(length)
    y = F.scaled_dot_product_attention(train.rotated(q), train.rotated(k), v, attn_mask=(back >= 0) & (back < 4))
    assert torch.allclose(window(x), window.out(y.transpose(1, 2).flatten(-2)), atol=1e-6)


def test_recall_smoke(example, monkeypatch, tmp_path: Path, capsys) -> None:
    """Every model trains and is judged; the table and the figure are there, and a second call runs nothing again."""
    run = example()

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", "--smoke", "--out", str(tmp_path), *arguments])
        run.main()
        return str(capsys.readouterr().out)

    table = command()
    cells = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[1] for row in cells] == 2 * ["m2rnn", "gated_deltanet", "window", "attention"]
    assert [row[3] for row in cells[:4]] == ["512", "32", "64", "all letters"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    outcome = json.loads((tmp_path / "recall_m2rnn_0.json").read_text(encoding="utf-8"))
    assert set(outcome["accuracy"]) == {"8", "20"}
    (tmp_path / "copy_window_0.json").unlink()
    assert "| copy | window |" not in command("--minutes", "-1")
    with pytest.raises(SystemExit, match="must have runs of this config, but has others: steps; give another --out"):
        command("--set", "steps=3")
