"""The snippets of examples/train: each trains, its loss falls, and it goes on with the losses of one run."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import models_package, small_config
from support import ROOT

from m2gen.kernels.compile import load_module

EXAMPLES = ROOT / "examples" / "train"
STEPS, HALF = 24, 12
NO_LIGHTNING = "lightning is not installed"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the name of the package that the snippets train with."""
    return models_package(tmp_path_factory.mktemp("train_examples")).__name__


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a snippet."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "documents", raising=False)
    yield lambda name: load_module(EXAMPLES / f"{name}.py", f"example_train_{name}")
    for name in [name for name in sys.modules if name in ("documents", "files") or name.startswith("example_train_")]:
        del sys.modules[name]  # of one import, or a snippet's documents would be of the test before


def model_of(package: str, backend: str = "reference") -> Any:
    """Return the snippets' model at sizes of seconds."""
    config = small_config("hybrid_rope")
    return importlib.import_module("documents").small_model(package, backend, **{**config, "vocab_size": 256})


def falls(losses: list[float]) -> bool:
    """Whether the last losses are less than the first."""
    return sum(losses[-4:]) < 0.97 * sum(losses[:4])


def test_batches_are_packed(example) -> None:
    """Documents lie one after the other, no label is of the document before, and the copy of offsets is an array."""
    documents: ModuleType = importlib.import_module("documents")
    rows = documents.documents(20)
    batch = documents.Packed()(rows[:3])
    lengths = [len(row["input_ids"]) for row in rows[:3]]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seqlens_cpu"].tolist() == ends.tolist()
    assert torch.equal(batch["input_ids"][0], torch.cat([row["input_ids"] for row in rows[:3]]))
    assert batch["labels"][0, ends[:-1]].eq(-100).all()
    assert not isinstance(batch["cu_seqlens_cpu"], torch.Tensor)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_plain_loop(example, package, tmp_path, mixed) -> None:
    """Stopped half way and started again, it has the losses of a run in one piece."""
    plain = example("plain_loop")
    options = plain.Options(learning_rate=1e-2, mixed=mixed)
    whole = plain.train(model_of(package), package, tmp_path / "whole", STEPS, options)
    assert len(whole) == STEPS
    assert falls(whole)
    first = plain.train(model_of(package), package, tmp_path / "parts", HALF, options)
    second = plain.train(model_of(package), package, tmp_path / "parts", STEPS, options)
    assert first + second == whole
    assert plain.train(model_of(package), package, tmp_path / "parts", STEPS, options) == []


def test_the_plain_loop_killed(example, package, tmp_path, monkeypatch) -> None:
    """Ended in the middle, also of writing a checkpoint, it goes on from the last one that was written whole."""
    plain, texts = example("plain_loop"), importlib.import_module("documents")
    options, parts = plain.Options(learning_rate=1e-2, save_every=4), tmp_path / "parts"
    whole = plain.train(model_of(package), package, tmp_path / "whole", HALF, options)

    def killed_at(last: int) -> Any:
        return lambda number: pytest.fail("killed") if number == last else texts.batch_of(number)

    def torn(saved: Any, place: Any) -> None:
        Path(place).write_bytes(b"half of it")
        raise OSError("No space left on device")

    def done() -> int:
        return int(torch.load(parts / "checkpoint.pt", weights_only=True)["done"])

    with monkeypatch.context() as patch:
        patch.setattr(plain, "batch_of", killed_at(6))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            plain.train(model_of(package), package, parts, HALF, options)
    assert done() == 4
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(OSError, match="No space left"):
            plain.train(model_of(package), package, parts, HALF, options)
    assert (done(), [path.name for path in parts.iterdir()]) == (4, ["checkpoint.pt"])
    assert plain.train(model_of(package), package, parts, HALF, options) == whole[4:]
    assert plain.train(model_of(package), package, parts, 5, options) == []
    assert done() == HALF  # and not 5, with which the next run would take seven steps again


def test_the_plain_loop_compiled(example, package, tmp_path, monkeypatch) -> None:
    """On the kernels every step is one graph, and its losses are those of eager steps on the reference backend."""
    plain = example("plain_loop")
    texts = importlib.import_module("documents")
    rows = [{name: x[: 8 + n % 5] for name, x in row.items()} for n, row in enumerate(texts.documents())]
    monkeypatch.setattr(texts, "documents", lambda: rows)  # a few tokens of each, since kernels are interpreted
    expected = plain.train(model_of(package), package, tmp_path / "eager", 3, plain.Options())
    compile_ = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="aot_eager", **options))
    fast = plain.Options(compiled=True)
    losses = plain.train(model_of(package, "kernels"), package, tmp_path / "compiled", 3, fast)
    assert losses == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_trainer_of_transformers(example, package, tmp_path, mixed) -> None:
    """Stopped half way and started again, it has the losses of a run in one piece."""
    hf_trainer = example("hf_trainer")
    options = {"learning_rate": 1e-2, "disable_tqdm": True, "bf16": mixed}
    whole = hf_trainer.train(model_of(package), package, tmp_path / "parts", STEPS, **options)
    assert len(whole) == STEPS
    assert falls(whole)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {f"checkpoint-{HALF}", f"checkpoint-{STEPS}"}
    (tmp_path / "parts" / f"checkpoint-{STEPS}").rename(tmp_path / "done")
    again = hf_trainer.train(model_of(package), package, tmp_path / "parts", STEPS, **options)
    assert again == whole


@pytest.mark.parametrize("state", [None, '{"epoch": 0.'])
def test_the_trainer_of_transformers_killed(example, package, tmp_path, state) -> None:
    """Ended in the middle of writing a checkpoint, it goes on from the one before."""
    hf_trainer = example("hf_trainer")
    options = {"disable_tqdm": True, "bf16": False}
    whole = hf_trainer.train(model_of(package), package, tmp_path, 4, **options)
    torn = tmp_path / "checkpoint-4"
    (torn / "optimizer.pt").unlink()
    (torn / "trainer_state.json").unlink()
    if state is not None:
        (torn / "trainer_state.json").write_text(state, encoding="utf-8")
    assert hf_trainer.train(model_of(package), package, tmp_path, 4, **options) == whole
    assert (torn / "optimizer.pt").exists()


def test_the_trainer_of_transformers_for_one_step(example, package, tmp_path) -> None:
    """Half of one step is none, after which no checkpoint can be."""
    losses = example("hf_trainer").train(model_of(package), package, tmp_path, 1, disable_tqdm=True, bf16=False)
    assert len(losses) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(example, package, tmp_path, precision) -> None:
    """Stopped half way and started again, it has the losses of a run in one piece."""
    pytest.importorskip("lightning", reason=NO_LIGHTNING)
    snippet = example("with_lightning")
    options = {"accelerator": "cpu", "enable_model_summary": False, "precision": precision}
    whole = snippet.train(model_of(package), package, tmp_path / "whole", STEPS, **options)
    assert len(whole) == STEPS
    assert falls(whole)
    first = snippet.train(model_of(package), package, tmp_path / "parts", HALF, **options)
    second = snippet.train(model_of(package), package, tmp_path / "parts", STEPS, **options)
    assert first + second == whole
    assert snippet.train(model_of(package), package, tmp_path / "parts", STEPS, **options) == []


class Called:
    """A trainer with Lightning's arguments, which does the steps that it is told and calls callbacks after each."""

    def __init__(self, max_steps: int, callbacks: list[Any], **_: Any) -> None:
        self.max_steps, self.callbacks, self.global_step, self.saved = max_steps, callbacks, 0, list[int]()

    def fit(self, module: Any, loader: Any, ckpt_path: str | None) -> None:
        """Train, after what a checkpoint has."""
        self.global_step = 0 if ckpt_path is None else int(Path(ckpt_path).read_text(encoding="utf-8"))
        for number, batch in enumerate(loader):
            if self.global_step >= self.max_steps:
                break
            module.training_step(batch, number)
            self.global_step += 1
            for callback in self.callbacks:
                callback.on_train_batch_end(self, module, None, batch, number)

    def save_checkpoint(self, place: Path) -> None:
        """Write the number of the step alone."""
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(str(self.global_step), encoding="utf-8")


@pytest.fixture
def like_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what the snippet imports of Lightning, whose own checkpoints are never due."""
    made = {"lightning": ModuleType("lightning"), "lightning.pytorch": ModuleType("lightning.pytorch")}
    made["lightning.pytorch.callbacks"] = ModuleType("lightning.pytorch.callbacks")
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    silent = type("Silent", (), {"__init__": lambda *_, **__: None, "on_train_batch_end": lambda *_: None})
    vars(made["lightning"]).update(LightningModule=torch.nn.Module, Callback=object, Trainer=Called)
    vars(made["lightning.pytorch.callbacks"]).update(ModelCheckpoint=silent)


def test_lightning_keeps_the_last_step(example, like_lightning, package, tmp_path) -> None:
    """A run whose last step is between two checkpoints has one of it, and the same command then does nothing."""
    snippet = example("with_lightning")
    assert len(snippet.train(model_of(package), package, tmp_path, 3)) == 3
    assert (tmp_path / "last.ckpt").read_text(encoding="utf-8") == "3"
    assert snippet.train(model_of(package), package, tmp_path, 3) == []
    assert len(snippet.train(model_of(package), package, tmp_path, 5)) == 2


BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_page_shows_what_is_tested() -> None:
    """Every line of Python on the page of training is a line of a snippet, in the same order."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.py"))]
    lines = [[line.strip() for line in text.splitlines()] for text in sources]
    blocks = BLOCK.findall((ROOT / "docs" / "training.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 3
    for block in blocks:
        shown = [line.strip() for line in block.splitlines() if line.strip() not in ("", "...")]
        assert any(_in_order(shown, having) for having in lines), block


def _in_order(shown: list[str], having: list[str]) -> bool:
    left = iter(having)
    return all(line in left for line in shown)
