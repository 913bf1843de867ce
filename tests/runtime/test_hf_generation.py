"""``generate`` on caches of states: whatever the batch, padding, pieces and cache, it gives what full calls give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import distance
from checkpoints import small_model
from torch import Tensor

KINDS = ("hybrid_rope", "hybrid_options", "recurrent", "bare")
"""A model whose first mixer is an M2RNN, one whose first is attention, and two without attention, of which the last
has an M2RNN without a convolution, a residual, and gates of its own."""
PROMPT, NEW = 6, 5
ROUNDING = 1e-5


@pytest.fixture(scope="module", params=KINDS)
def model(hf_built: Any, request: pytest.FixtureRequest) -> Any:
    """Return a small model on the reference backend."""
    return small_model(hf_built, request.param)


def ids(batch: int = 3, steps: int = PROMPT, seed: int = 1) -> Tensor:
    """Return tokens none of which is padding."""
    return torch.randint(3, 64, (batch, steps), generator=torch.Generator().manual_seed(seed))


def padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    """Return prompts of several lengths as one batch, with padding before them."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [torch.cat((torch.zeros(longest - len(prompt), dtype=torch.long), prompt)) for prompt in prompts]
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": torch.stack(rows), "attention_mask": mask}


def tokens_of(model: Any, inputs: Any, **options: Any) -> Tensor:
    """Return the new tokens, greedy ones unless told otherwise."""
    given = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    chosen: Tensor = model.generate(**given, max_new_tokens=NEW, **{"do_sample": False, **options})
    return chosen[:, given["input_ids"].shape[1] :]


def by_hand(model: Any, prompt: Tensor, steps: int = NEW) -> Tensor:
    """Return greedy tokens of calls on everything so far."""
    with torch.no_grad():
        for _ in range(steps):
            prompt = torch.cat((prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return prompt[:, -steps:]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_full_calls(model: Any, use_cache: bool) -> None:
    """With a cache and without one."""
    assert torch.equal(tokens_of(model, ids(), use_cache=use_cache), by_hand(model, ids()))


def test_a_batch_is_its_rows(model: Any) -> None:
    """A row's tokens do not depend on what is beside it."""
    together = tokens_of(model, ids())
    assert torch.equal(together, torch.cat([tokens_of(model, row[None]) for row in ids()]))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 2}], ids=["greedy", "beams", "chunks"]
)
def test_left_padding_is_no_padding(model: Any, options: dict[str, Any]) -> None:
    """Each prompt's tokens are those that it has alone."""
    prompts = [ids(1, steps, seed=steps)[0] for steps in (6, 1, 4)]
    together = tokens_of(model, padded(prompts), **options)
    assert torch.equal(together, torch.cat([tokens_of(model, prompt[None], **options) for prompt in prompts]))


@pytest.mark.parametrize("size", [1, 4, 6, 9])
def test_chunked_prefill(model: Any, size: int) -> None:
    """Chunks of any size are one call."""
    assert torch.equal(tokens_of(model, ids(), prefill_chunk_size=size), by_hand(model, ids()))


def test_padding_in_chunks_of_one_token(model: Any) -> None:
    """Tokens one at a time, some of them padding, are one call."""
    prompts = [ids(1, steps, seed=steps)[0] for steps in (5, 2)]
    batch = padded(prompts)
    assert torch.equal(tokens_of(model, batch, prefill_chunk_size=1), tokens_of(model, batch))


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams(model: Any, use_cache: bool) -> None:
    """Each beam's score is the log probability of its tokens, by a call on all of them; the best comes first."""
    out = model.generate(
        ids(2), max_new_tokens=NEW, do_sample=False, num_beams=3, num_return_sequences=3, use_cache=use_cache,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    with torch.no_grad():
        logs = model(out.sequences, use_cache=False).logits.log_softmax(-1)[:, PROMPT - 1 : -1]
    chosen = logs.gather(-1, out.sequences[:, PROMPT:, None])[..., 0].sum(-1) / NEW
    assert distance(out.sequences_scores, chosen) < ROUNDING
    scores = out.sequences_scores.view(2, 3)
    assert torch.equal(scores, scores.sort(descending=True).values)


def test_sampling(model: Any) -> None:
    """The same random numbers choose the same tokens with a cache and without one."""
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        samples.append(tokens_of(model, ids(), do_sample=True, num_return_sequences=2, use_cache=use_cache))
    assert torch.equal(*samples)
    assert samples[0].shape == (6, NEW)


def test_generation_goes_on(model: Any) -> None:
    """A returned cache goes on where it stopped."""
    first = model.generate(ids(), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    again = model.generate(first.sequences, max_new_tokens=NEW - 2, do_sample=False, cache=first.cache)
    assert torch.equal(again[:, PROMPT:], by_hand(model, ids()))


def test_embeddings_in_place_of_tokens(model: Any) -> None:
    """``inputs_embeds`` begin a generation as the tokens that they are of."""
    embeddings = model.get_input_embeddings()(ids())
    out = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, by_hand(model, ids()))


def test_a_static_cache(model: Any) -> None:
    """Keys and values of a fixed length beside states."""
    for options in ({}, {"prefill_chunk_size": 4}):
        assert torch.equal(tokens_of(model, ids(), cache_implementation="static", **options), by_hand(model, ids()))
    batch = padded([ids(1, steps, seed=steps)[0] for steps in (5, 2)])
    assert torch.equal(tokens_of(model, batch, cache_implementation="static"), tokens_of(model, batch))


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_under_compile(hf: Any, kind: str, backend: str) -> None:
    """Steps of decoding are one graph without breaks, which the next length does not compile again."""
    from transformers import CompileConfig

    model = small_model(hf, kind, backend)
    torch._dynamo.reset()
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = tokens_of(model, ids(), cache_implementation="static", compile_config=compiled)
    assert torch.equal(out, by_hand(model, ids()))
    assert model._last_compile_config is compiled
    if backend == "reference":  # in chunks the prompt is compiled, too, once for each size
        options = {"cache_implementation": "static", "compile_config": compiled, "prefill_chunk_size": 4}
        assert torch.equal(tokens_of(model, ids(), **options), by_hand(model, ids()))


def test_assisted_generation_is_refused(model: Any) -> None:
    """A state cannot take candidates back."""
    with pytest.raises(ValueError, match="stateful"):
        tokens_of(model, ids(1), prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_generate_the_same(hf: Any, kind: str) -> None:
    """Padded prompts and steps of decoding on kernels."""
    batch = padded([ids(1, steps, seed=steps)[0] for steps in (4, 2)])
    assert torch.equal(tokens_of(small_model(hf, kind, "kernels"), batch), tokens_of(small_model(hf, kind), batch))
