"""What examples say of their runs: accuracies, positions that are right, lengths that are known, places of a text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from support import ROOT

from m2gen.kernels.compile import load_module

EXAMPLES = ROOT / "examples"
Example = Callable[[str, str], ModuleType]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Example]:
    """Return a function that imports a module of an example, with those beside it, which are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    local = {path.stem for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*/*.py"))}
    for name in local:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def imported(folder: str, module: str) -> ModuleType:
        sys.path[:0] = [str(EXAMPLES / folder), str(EXAMPLES), str(ROOT)]
        return load_module(EXAMPLES / folder / f"{module}.py", f"example_metrics_{folder}_{module}")

    yield imported
    for name in local:
        sys.modules.pop(name, None)


def outcome_of(train: ModuleType, words: int, errors: list[int]) -> Any:
    """Return the outcome of a run with these wrong answers at each position."""
    return train.Outcome("S3", "gru", 0, 10, len(errors), [], 1.0, [], words, errors)


@pytest.mark.parametrize(("start", "end", "accuracy"), [
    (0, 2, 1.0), (0, 3, 11 / 12), (0, 4, 3 / 4), (2, 4, 1 / 2), (3, 4, 1 / 4), (2, 9, 1 / 2),
])  # fmt: skip
def test_an_accuracy_is_that_of_its_positions(example: Example, start: int, end: int, accuracy: float) -> None:
    """Answers count from the first position up to the last, and none beyond the words' length."""
    outcome = outcome_of(example("state_tracking", "train"), 4, [0, 0, 1, 3])
    assert outcome.accuracy(start, end) == pytest.approx(accuracy)


@pytest.mark.parametrize(("errors", "place"), [([0, 0, 1, 3], 2), ([1, 0, 0], 0), ([0, 0, 0], 3)])
def test_words_are_right_up_to_the_first_wrong_answer(example: Example, errors: list[int], place: int) -> None:
    """It is the number of positions before that, all of them where there is none."""
    assert outcome_of(example("state_tracking", "train"), 4, errors).perfect_to == place


def test_the_last_length_must_settle(example: Example) -> None:
    """Shorter words are known at 97 %, the longest of all at 99.9 %."""
    train = example("state_tracking", "train")
    changes = {"lengths": [2, 4]}
    curriculum = train.Curriculum(train.load(EXAMPLES / "state_tracking" / "config.yaml", changes), 0)
    for step, accuracy in ((10, 0.96), (20, 0.98), (30, 0.98), (40, 0.9995)):
        curriculum.see(step, [accuracy])
    assert curriculum.known_at == [20, 40]
    assert curriculum.finished


def test_what_is_recorded_of_training_without_end(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies are of all answers up to a length, and the first wrong answer is after ten positions."""
    learn = example("state_tracking", "learn")
    config = yaml.safe_load((EXAMPLES / "state_tracking" / "learn.yaml").read_text(encoding="utf-8"))
    settings = config["defaults"] | {"group": "S2", "heads": 1, "columns": 8, "streams": 2}
    monkeypatch.setattr(learn, "fit", lambda streams, say: ([10], 20))
    monkeypatch.setattr(learn, "judge", lambda model, said, words, length: [0] * 10 + [3] + [1] * 117)
    run, asked = learn.Run("test", {}, settings, 0), {"words": 4, "length": 128}
    row, _ = learn.train(run, learn.package_of("generated.tiny"), asked, torch.device("cpu"))
    assert row["accuracy"] == {"64": 1 - 56 / 256, "128": 1 - 120 / 512}
    assert (row["perfect_to"], row["length"], row["words"]) == (10, 128, 4)
    assert (row["known_at"], row["steps"]) == ([10], 20)


def test_the_last_accuracy_is_that_to_the_end(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of any length have one, which the table shows; a file of before, which has another, shows none."""
    learn = example("state_tracking", "learn")
    config = yaml.safe_load((EXAMPLES / "state_tracking" / "learn.yaml").read_text(encoding="utf-8"))
    settings = config["defaults"] | {"group": "S2", "heads": 1, "columns": 8, "streams": 2}
    run = learn.Run("test", {}, settings, 0)
    monkeypatch.setattr(learn, "fit", lambda streams, say: ([10], 20))
    for length, keys in ((40, ["40"]), (100, ["64", "100"])):
        monkeypatch.setattr(
            learn, "judge", lambda model, said, words, length: [0] * (length // 2) + [4] * (length // 2)
        )
        asked = {"words": 4, "length": length}
        row, _ = learn.train(run, learn.package_of("generated.tiny"), asked, torch.device("cpu"))
        assert list(row["accuracy"]) == keys
        assert learn.table([run], [row]).splitlines()[-1].split(" | ")[9] == "50.00"
        del row["accuracy"][str(length)]
        assert learn.table([run], [row]).splitlines()[-1].split(" | ")[9] == ""


def test_batches_are_of_the_whole_text(example: Example) -> None:
    """Each place with enough bytes after it begins some row, and what is to be told is the byte after each."""
    corpus = example("hybrid_lm", "corpus")
    inputs, answers = corpus.batch(torch.arange(103), 4096, 5, 3, 7)
    assert sorted(set(inputs[:, 0].tolist())) == list(range(97))
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(5))
    assert torch.equal(answers, inputs + 1)
