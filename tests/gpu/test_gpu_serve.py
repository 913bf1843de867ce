"""The example of serving on a GPU: one captured graph decodes, and nothing but fetching the tokens waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import hf_of, small_config
from support import ROOT, make_variant
from test_launches import no_waiting

from m2gen.kernels.compile import load_module

pytestmark = pytest.mark.gpu

PROMPTS = [[7, 3], [11, 2, 40, 6, 17, 8, 50, 3, 3, 12, 60, 5]]
CHUNK, NEW = 5, 6


@torch.no_grad()
def by_hand(model: Any, prompt: list[int]) -> list[int]:
    """Return greedy tokens of calls on everything so far, without a cache."""
    text = list(prompt)
    for _ in range(NEW):
        ids = torch.tensor([text], device=model.device)
        text.append(int(model(ids, use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


def test_an_engine_waits_for_its_tokens_alone(built, device) -> None:
    """A chunk of a prompt beside a token of a captured graph is launched without waiting; texts are one-by-one ones."""
    package = built(make_variant(heads=(1, 1, 4, 4, 4)))
    engine_module = load_module(ROOT / "examples" / "serve" / "engine.py", "example_serve_engine_gpu")
    hf = hf_of(package)
    torch.manual_seed(0)
    config = hf.M2RNNConfig(**{**small_config("recurrent"), "eos_token_id": None})
    model = hf.M2RNNForCausalLM(config).eval().to(device)
    texts = [by_hand(model, prompt) for prompt in PROMPTS]
    engine = engine_module.Engine(package, model, 3, CHUNK)
    requests = [engine_module.Request(prompt, NEW) for prompt in PROMPTS]
    for request in requests:
        engine.add(request)
    for _ in range(2):
        engine.step()
    assert engine.decoders[1].graph is not None
    with no_waiting():
        (begun, first), (decoding, chosen) = engine.launch()
    assert (begun, decoding) == (requests[1:], requests[:1])
    assert (first.tolist(), chosen.tolist()) == (texts[1][:1], texts[0][2:3])
    again = [engine_module.Request(prompt, NEW) for prompt in PROMPTS]
    for request in requests:
        engine.cancel(request)
    for request in again:
        engine.add(request)
    for _ in range(3):
        engine.step()
    engine.evict(again[0])  # its states go through the host, and the captured graphs over other slots
    engine.add(again[0])
    while engine.running or engine.waiting:
        engine.step()
    assert [request.text for request in again] == texts
