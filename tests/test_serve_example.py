"""The example of serving: whatever happens to requests, each text is what the model says after its prompt alone."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import hf_of, models_package, small_model
from support import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from m2gen.kernels.compile import load_module

EXAMPLES = ROOT / "examples"
SLOTS, CHUNK, NEW = 3, 5, 3
PROMPTS = [[7, 3, 9, 4, 4, 8, 21], [5], [9, 9, 30], [11, 2, 40, 6, 17, 8, 50, 3, 3, 12, 60], [33, 8], [5, 6, 7]]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return a package that runs the model."""
    return models_package(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def model(package: ModuleType) -> Any:
    """Return a small model of M2RNN layers on kernels."""
    return small_model(hf_of(package), "recurrent", "kernels")


@pytest.fixture(scope="module")
def texts(package: ModuleType) -> list[list[int]]:
    """Return what the same model on the reference says after each prompt."""
    reference = small_model(hf_of(package), "recurrent")
    return [by_hand(reference, prompt) for prompt in PROMPTS]


LOCAL = ("engine", "decoder", "files", "gated_delta")
"""Modules that the example finds beside it."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the example's command."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "serve"), str(EXAMPLES), *sys.path])
    for name in LOCAL:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield load_module(EXAMPLES / "serve" / "run.py", "example_serve_run")
    for name in LOCAL:
        sys.modules.pop(name, None)


@torch.no_grad()
def by_hand(model: Any, prompt: list[int], new: int = NEW) -> list[int]:
    """Return greedy tokens of calls on everything so far, without a cache."""
    text = list(prompt)
    for _ in range(new):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


def engine_of(run: ModuleType, package: ModuleType, model: Any) -> Any:
    """Return an engine whose free slots hold NaN, which any request that read one would show."""
    engine = run.Engine(package, model, SLOTS, CHUNK)
    for pool in engine.pools:
        pool.conv.fill_(torch.nan)
        pool.state.fill_(torch.nan)
    return engine


def poison(engine: Any) -> None:
    """Have every free slot hold NaN, as what others left there."""
    for pool in engine.pools:
        pool.conv[engine.free], pool.state[engine.free] = torch.nan, torch.nan


def test_any_schedule_is_one_by_one_generation(run, package, model, texts) -> None:
    """Requests wait, are prefilled in chunks, decoded together, cancelled, evicted and resumed, in both phases."""
    engine, Status = engine_of(run, package, model), run.Status
    requests = [run.Request(prompt, NEW) for prompt in PROMPTS]
    for request in requests[:4]:
        engine.add(request)
    engine.step()
    assert [request.status for request in requests[:4]] == [Status.RUNNING] * 3 + [Status.WAITING]
    assert (requests[0].seen, [request.text for request in requests[:3]]) == (CHUNK, [[], [], []])
    engine.evict(requests[0])  # between chunks of its prompt
    poison(engine)
    engine.step()
    engine.evict(requests[1])  # between tokens of its text
    assert requests[1].text == texts[1][:1]
    engine.cancel(requests[2])
    poison(engine)
    assert sorted(engine.free) == sorted(set(range(SLOTS)) - {requests[3].slot})
    for request in (requests[4], requests[1], requests[5]):
        engine.add(request)
    engine.step()
    engine.cancel(requests[5])  # before it has a slot
    engine.add(requests[0])
    while engine.running or engine.waiting:
        engine.step()
        poison(engine)
    whole = [i for i, request in enumerate(requests) if request.status is Status.DONE]
    assert whole == [0, 1, 3, 4]
    assert [requests[i].text for i in whole] == [texts[i] for i in whole]
    assert requests[2].text == texts[2][: len(requests[2].text)]
    assert sorted(engine.free) == list(range(SLOTS))


def test_a_seeded_schedule(run, package, model, texts) -> None:
    """Arrivals, evictions, resumptions and cancellations at random, as the command's check has them."""
    requests = [run.Request(prompt, NEW) for prompt in PROMPTS]
    engine = engine_of(run, package, model)
    happened = run.serve(engine, requests, random.Random(44))
    assert happened == {"evicted": 4, "resumed": 4, "cancelled": 1}
    for request, text in zip(requests, texts, strict=True):
        assert request.text == (text if request.status is run.Status.DONE else text[: len(request.text)])
    assert sorted(engine.free) == list(range(SLOTS))


class NoReads(TorchDispatchMode):
    """Fails where an operator would hand a value of a tensor, or a shape that depends on one, to the host."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in func.name() for name in self.READS), func.name()
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_but_its_tokens(run, package, model, texts) -> None:
    """Chunks of prompts and tokens are launched without a value of a tensor on the host."""
    engine = engine_of(run, package, model)
    requests = [run.Request(prompt, NEW) for prompt in PROMPTS[:2]]
    for request in requests:
        engine.add(request)
    for _ in range(2):
        engine.step()
    with NoReads():
        (begun, _), (decoding, chosen) = engine.launch()
    assert (begun, decoding) == ([], requests)
    assert chosen.tolist() == [text[len(request.text)] for request, text in zip(requests, texts, strict=False)]


@pytest.mark.parametrize("several", [False, True])
def test_an_end_of_text(run, package, model, texts, monkeypatch, several) -> None:
    """A token that ends texts is the last one, and frees the slot; ``generate`` has it from the same place."""
    end = texts[3][1]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [model.config.vocab_size, end] if several else end)
    engine, request = run.Engine(package, model, 1), run.Request(PROMPTS[3], NEW)
    engine.add(request)
    for _ in range(NEW):
        engine.step()
    assert request.text == texts[3][: texts[3].index(end) + 1]
    assert engine.free == [0]


def test_misuse(run, package, model) -> None:
    """Errors say what must be and what was given."""
    engine, request = run.Engine(package, model, 1), run.Request([1], 1)
    with pytest.raises(ValueError, match="must be running to be evicted, got one that is WAITING"):
        engine.evict(request)
    engine.add(request)
    with pytest.raises(ValueError, match="must be new or evicted to be added, got one that is WAITING"):
        engine.add(request)
    with pytest.raises(ValueError, match="must have a prompt and new tokens, got 0 and 3"):
        run.Request([], 3)
    for slots, chunk in ((0, 1), (1, 0)):  # with which a step would do nothing for ever
        with pytest.raises(ValueError, match=f"slots and chunk must be at least 1, got {slots} and {chunk}"):
            run.Engine(package, model, slots, chunk)
    for token in (-1, model.config.vocab_size):
        with pytest.raises(ValueError, match=f"must have tokens from 0 to {model.config.vocab_size - 1}, got {token}"):
            engine.add(run.Request([1, token], 1))
    hybrid = small_model(hf_of(package), "hybrid_nope")
    with pytest.raises(ValueError, match="every mixer must be an M2RNN, got M2RNN, SoftmaxAttention"):
        run.Engine(package, hybrid, 1)


def test_the_command(run, package, monkeypatch, tmp_path: Path, capsys) -> None:
    """It checks, times and counts; a text that differs is said, and is an exit status of 1."""
    options = ["--smoke", "--package", package.__name__, "--layer", "layer", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run.py", *options, "--layers", "1", "--batch", "2", "--requests", "2"])
    run.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "serve.md").read_text(encoding="utf-8") == printed
    assert "2 of 2 texts are those of one-by-one generation, in fp32" in printed
    results = json.loads((tmp_path / "serve.json").read_text(encoding="utf-8"))
    assert list(results["milliseconds"]) == ["2"]
    mixed = 16 + 16 + 4 * 16  # channels of the convolution: q, k and v
    assert results["state_bytes"] == 4 * (4 * 16 * 16 + 3 * mixed)
    assert results["attention_bytes"]["256"] == 256 * 2 * 16 * 4
    monkeypatch.setattr(run, "alone", lambda model, request: [-1] * request.new)
    monkeypatch.setattr(run, "measure", lambda *given: {"milliseconds": {}, "state_bytes": 0, "attention_bytes": {}})
    with pytest.raises(SystemExit, match="1"):
        run.main()
    assert "0 of 2 texts" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["chunk", "batch", "steps", "prompt", "new", "requests", "layers", "vocabulary"])
def test_sizes_of_nothing(run, monkeypatch, tmp_path: Path, capsys, option: str) -> None:
    """A size of 0 is refused before anything is served: with some a step would do nothing for ever."""
    monkeypatch.setattr(sys, "argv", ["run.py", "--smoke", f"--{option}", "0", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert f"argument --{option}: must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be(run, package, monkeypatch, tmp_path: Path) -> None:
    """Where results cannot be written nothing is served for them, and those of before stay whole."""
    (tmp_path / "file").touch()
    options = ["--smoke", "--package", package.__name__, "--layer", "layer", "--out", str(tmp_path / "file")]
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    monkeypatch.setattr(run, "check", lambda *_: pytest.fail("served"))
    with pytest.raises(SystemExit, match=r"file must be readable and writable: File exists"):
        run.main()
