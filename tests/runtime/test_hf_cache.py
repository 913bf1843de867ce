"""Caches of transformers that hold states: moved between sequences, taken back, and calls that go on from them."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from calls import distance
from checkpoints import small_model
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

ROUNDING = 1e-5
KINDS = ("hybrid_rope", "recurrent")
PROMPT, AFTER = slice(0, 4), slice(4, 7)


@pytest.fixture(scope="module", params=KINDS)
def model(hf_built: Any, request: pytest.FixtureRequest) -> Any:
    """Return a small model on the reference backend."""
    return small_model(hf_built, request.param)


def ids(batch: int = 3, seed: int = 1) -> Tensor:
    """Return tokens."""
    return torch.randint(3, 64, (batch, 7), generator=torch.Generator().manual_seed(seed))


def begun(model: Any, tokens: Tensor, static: bool = False) -> Any:
    """Return a cache that has seen the prompt."""
    cache = StaticCache(config=model.config, max_cache_len=8) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, PROMPT], cache=cache)
    return cache


@torch.no_grad()
def goes_on(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Return the logits of the tokens after the prompt."""
    logits: Tensor = model(tokens[:, AFTER], cache=cache).logits
    return logits


@torch.no_grad()
def full(model: Any, tokens: Tensor) -> Tensor:
    """Return the same logits by a call on all tokens."""
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits[:, AFTER]


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_goes_on(model: Any, static: bool) -> None:
    """It counts what it has seen, and begins anew after ``reset``."""
    cache = begun(model, ids(), static)
    assert cache.get_seq_length() == 4
    assert distance(goes_on(model, ids(), cache), full(model, ids())) < ROUNDING
    assert cache.get_seq_length() == 7
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(ids(seed=2)[:, PROMPT], cache=cache)
    assert distance(goes_on(model, ids(seed=2), cache), full(model, ids(seed=2))) < ROUNDING


@pytest.mark.parametrize("static", [False, True])
def test_reorder(model: Any, static: bool) -> None:
    """Sequences change places, and one may have several."""
    order = torch.tensor([2, 0, 2])
    cache = begun(model, ids(), static)
    cache.reorder_cache(order)
    assert distance(goes_on(model, ids()[order], cache), full(model, ids()[order])) < ROUNDING


def test_batch_operations(model: Any) -> None:
    """Sequences are repeated and selected."""
    cache = begun(model, ids())
    cache.batch_repeat_interleave(2)
    repeated = ids().repeat_interleave(2, 0)
    assert distance(goes_on(model, repeated, copy.deepcopy(cache)), full(model, repeated)) < ROUNDING
    chosen = torch.tensor([4, 1])
    cache.batch_select_indices(chosen)
    assert distance(goes_on(model, repeated[chosen], cache), full(model, repeated[chosen])) < ROUNDING


def test_crop(model: Any) -> None:
    """Nothing or everything can be taken back; anything else is an error, which leaves states as they are."""
    cache = begun(model, ids())
    cache.crop(0)
    assert distance(goes_on(model, ids(), cache), full(model, ids())) < ROUNDING
    assert not cache.is_croppable
    cache = begun(model, ids())
    with pytest.raises(RuntimeError, match="crop must remove 0 or all 4 positions, got -1"):
        cache.crop(-1)
    assert distance(goes_on(model, ids(), cache), full(model, ids())) < ROUNDING
    cache.crop(-7)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(ids()[:, PROMPT], cache=cache)
    assert distance(goes_on(model, ids(), cache), full(model, ids())) < ROUNDING


def test_padded_tokens_one_at_a_time(model: Any) -> None:
    """A row that has not begun stays where it is."""
    tokens, mask = ids(2), torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = [model(tokens[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache).logits for t in range(7)]
        alone = model(tokens[1:, 3:], use_cache=False).logits
    assert distance(torch.cat(logits, 1)[1:, 3:], alone) < ROUNDING


def test_calls_with_gradients_have_a_cache(model: Any) -> None:
    """A cache that such a call left, in a graph, goes on without gradients, and the graph is as it was."""
    tokens = ids()
    out = model(tokens[:, PROMPT], labels=tokens[:, PROMPT])
    before = torch.autograd.grad(out.loss, model.get_input_embeddings().weight, retain_graph=True)[0]
    assert distance(goes_on(model, tokens, out.cache), full(model, tokens)) < ROUNDING
    assert torch.equal(before, torch.autograd.grad(out.loss, model.get_input_embeddings().weight)[0])


def test_gradients_go_through_a_cache(model: Any) -> None:
    """The loss of later tokens has the gradients that it has in one call, padding included."""
    tokens, weight = ids(2), model.get_input_embeddings().weight
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    whole = model(tokens, attention_mask=mask, use_cache=False).logits[:, AFTER].square().sum()
    cache = model(tokens[:, PROMPT], attention_mask=mask[:, PROMPT]).cache
    later = model(tokens[:, AFTER], attention_mask=mask, cache=cache).logits.square().sum()
    assert distance(*(torch.autograd.grad(loss, weight)[0] for loss in (later, whole))) < ROUNDING


@pytest.mark.parametrize("how", ["reset", "crop", "reorder"])
@pytest.mark.parametrize("late", [False, True], ids=["after the backward", "before it"])
def test_caches_with_gradients_are_changed(hf_built: Any, how: str, late: bool) -> None:
    """What is done to a cache leaves a graph that its states are of alone, and needs none that was freed."""
    model, tokens = small_model(hf_built, "recurrent"), ids(2)
    weight = model.get_input_embeddings().weight

    def gradient(loss: Tensor, **options: Any) -> Tensor:
        return torch.autograd.grad(loss, weight, **options)[0]

    expected = gradient(model(tokens[:, PROMPT]).logits.square().sum())
    cache = DynamicCache(config=model.config)
    loss = model(tokens[:, PROMPT], cache=cache).logits.square().sum()
    if not late:
        gradient(loss, retain_graph=how == "reorder")
    {
        "reset": cache.reset, "crop": lambda: cache.crop(-4),
        "reorder": lambda: cache.reorder_cache(torch.tensor([1, 0])),
    }[how]()  # fmt: skip
    if how == "reorder":
        assert distance(goes_on(model, tokens.flip(0), cache), full(model, tokens.flip(0))) < ROUNDING
    else:
        again = model(tokens[:, PROMPT], cache=cache).logits.square().sum()
        assert distance(gradient(again), expected) < ROUNDING
    if late:
        assert distance(gradient(loss), expected) < ROUNDING


def test_gradients_of_a_prompt_go_through_a_frozen_model(model: Any) -> None:
    """What is trained may be the prompt alone: later calls, of which nothing else wants gradients, reach it."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    tokens = ids(2)
    prompt = frozen.get_input_embeddings()(tokens[:, PROMPT]).requires_grad_()
    after = frozen.get_input_embeddings()(tokens[:, AFTER])
    whole = frozen(inputs_embeds=torch.cat((prompt, after), 1), use_cache=False).logits[:, AFTER].square().sum()
    cache = frozen(inputs_embeds=prompt, use_cache=True).cache
    later = frozen(tokens[:, AFTER], cache=cache).logits.square().sum()
    assert distance(*(torch.autograd.grad(loss, prompt)[0] for loss in (later, whole))) < ROUNDING


def test_a_cache_whose_entries_keep_states_elsewhere(hf: Any) -> None:
    """An entry's ``mix`` says what its layer makes of a call: here of packed prompts, then tokens, in a pool."""
    model, slots = small_model(hf, "recurrent"), torch.tensor([2, 0])
    package = importlib.import_module(hf.__name__.rpartition(".")[0])

    class Entry(hf.caching.M2RNNCacheLayer):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.pool = package.M2RNNPool.allocate(layer, 3)

        def mix(self, layer: Any, x: Tensor, mask: Tensor | None, packed: Any) -> Tensor:
            assert (layer, mask) == (self.pool.layer, None)
            if packed is None:
                return self.pool.step(x[:, 0], slots)[:, None]
            return self.pool.prefill(x[0], slots, packed.cu_seqlens, packed.cu_seqlens_cpu)[None]

    cache = Cache(layers=[Entry(block.sequence_mixer) for block in model.transformer.h])
    first, second = ids(1)[:, :3], ids(1, seed=2)[:, :5]
    offsets = torch.tensor([0, 3, 8])
    after = torch.tensor([[7], [9]])
    with torch.no_grad():
        prompts = model(torch.cat((first, second), 1), cache=cache, cu_seq_lens_q=offsets, cu_seqlens_cpu=offsets)
        tokens = model(after, cache=cache)
        for text, place, i in ((first, slice(0, 3), 0), (second, slice(3, 8), 1)):
            expected = model(torch.cat((text, after[i : i + 1]), 1), use_cache=False).logits
            assert distance(prompts.logits[:, place], expected[:, :-1]) < ROUNDING
            assert distance(tokens.logits[i], expected[0, -1:]) < ROUNDING


@pytest.mark.parametrize("shape", [(3, 6), (1, 7), (3, 9), (2, 7), (3, 7, 1)])
def test_masks_of_other_shapes(model: Any, shape: tuple[int, ...]) -> None:
    """A mask has a row of each sequence and all of its tokens, be they ones; no columns are cut off."""
    for mask in (torch.ones(shape), torch.zeros(shape)):
        with torch.no_grad(), pytest.raises(ValueError, match=r"attention_mask must be \(3, past \+ 7\), got"):
            model(ids(), attention_mask=mask, use_cache=False)


def test_masks_without_what_a_cache_has_seen(model: Any) -> None:
    """A mask of new tokens alone is refused; those of the past count as well."""
    cache, after = begun(model, ids()), ids()[:, AFTER]
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention_mask must be \(3, past \+ 3\), got \(3, 3\)"):
        model(after, attention_mask=torch.ones(3, 3), cache=cache)
    with torch.no_grad():
        found = model(after, attention_mask=torch.ones(3, 7), cache=cache)
    assert distance(found.logits, full(model, ids())) < ROUNDING


@pytest.mark.parametrize("static", [False, True])
def test_masks_as_long_as_a_cache_of_a_fixed_length(model: Any, static: bool) -> None:
    """Columns behind the tokens of a call, which are of positions to come, do not stand for these tokens."""
    tokens, mask = ids(), torch.ones(3, 7, dtype=torch.long)
    mask[1, :2] = 0  # padded on the left
    whole = torch.cat((mask, torch.zeros(3, 1, dtype=torch.long)), 1)
    cache = StaticCache(config=model.config, max_cache_len=8) if static else DynamicCache(config=model.config)
    found = []
    with torch.no_grad():
        for part in (PROMPT, AFTER):
            seen = whole.clone()
            seen[:, part.stop :] = 0
            found.append(model(tokens[:, part], attention_mask=seen, cache=cache).logits)
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
    assert distance(torch.cat(found, 1)[mask.bool()], expected[mask.bool()]) < ROUNDING


def test_caches_that_are_not_of_the_models_config(hf_built: Any) -> None:
    """One without entries, or with keys and values where a layer has states, is refused in one line."""
    model = small_model(hf_built, "recurrent")
    with pytest.raises(ValueError, match=r"^M2RNN: cache must be made from .* got nothing for layer 0$"):
        model(ids(), cache=DynamicCache())
    other = DynamicCache(config=model.config)
    other.layers[0] = DynamicLayer()
    with pytest.raises(ValueError, match=r"^M2RNN: cache must be made from .* got DynamicLayer for layer 0$"):
        model(ids(), cache=other)
