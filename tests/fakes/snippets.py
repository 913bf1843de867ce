"""What the Python of pages takes as given: the names that the text around a snippet presumes, at small sizes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import make_variant
from torch import Tensor

Names = dict[str, Any]
ROWS, COLUMNS, HEADS, WIDTH = 16, 16, 4, 1536
"""K, V and N of the small package's layer, and the width of the pages' model."""
REQUESTS, DRAFTS, EVERY = 2, 2, 16
"""Requests of the page on serving, their tokens beside the sampled one, and tokens between states that are kept."""


def _operands(device: torch.device, *lead: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and forget."""
    q, k = torch.randn(2, *lead, 1, ROWS, device=device)
    return q, k, torch.randn(*lead, HEADS, COLUMNS, device=device), torch.rand(*lead, HEADS, device=device)


def _weight(device: torch.device) -> Tensor:
    return torch.randn(HEADS, COLUMNS, COLUMNS, device=device) / COLUMNS


def operator(device: torch.device) -> Names:
    """Return a batch of two sequences, and a token of each."""
    q, k, v, forget = _operands(device, 2, 3)
    q_t, k_t, v_t, f_t = _operands(device, 2)
    tokens = {"q_t": q_t, "k_t": k_t, "v_t": v_t, "f_t": f_t}
    return {"q": q, "k": k, "v": v, "forget": forget, "weight": _weight(device), **tokens}


def package(device: torch.device) -> Names:
    """Return what the operator and the layer take."""
    wide = {name: torch.randn(2, length, WIDTH) for name, length in (("x", 3), ("prompt", 3), ("token", 1))}
    packed = {"packed": torch.randn(5, WIDTH), "offsets": torch.tensor([0, 2, 5], dtype=torch.int32)}
    return {**operator(device), **{name: x.to(device) for name, x in {**wide, **packed}.items()}}


def serving(device: torch.device) -> Names:
    """Return prompts, tokens and drafts of two requests, and slots for all of them."""
    h100 = importlib.import_module("generated.h100")
    layer = h100.M2RNN.from_variant("m2rnn_7b", hidden_size=32, device=device)
    pool = h100.M2RNNPool.allocate(layer, REQUESTS)
    length = REQUESTS * EVERY
    offsets = torch.tensor([0, EVERY, length], dtype=torch.int32)
    table = torch.arange(REQUESTS * (1 + DRAFTS), device=device).view(REQUESTS, -1)
    decoding = [2, 1]

    def count_accepted(y: Tensor) -> Tensor:
        assert y.shape == (REQUESTS, 1 + DRAFTS, HEADS, COLUMNS)
        return torch.full((REQUESTS,), decoding.pop(), device=device)

    names: Names = {"weight": _weight(device), "slots": table.numel(), "N": HEADS, "K": ROWS, "V": COLUMNS}
    for suffix, f, lead in (
        ("", "forget", (length,)),
        ("_t", "f_t", (REQUESTS,)),
        ("_d", "f_d", (REQUESTS, 1 + DRAFTS)),
    ):
        names |= dict(zip((f"q{suffix}", f"k{suffix}", f"v{suffix}", f), _operands(device, *lead), strict=True))
        names[f"x{suffix}"] = torch.randn(*lead, 32, device=device)
    names |= {"table": table, "slots_of_requests": table, "slots_of": table[:, 0], "pages": table[:, 1:2]}
    names |= {"has": torch.tensor([False, False], device=device), "counts": torch.ones_like(table[:, 0])}
    names |= {"packed": {"cu_seqlens": offsets.to(device), "cu_seqlens_cpu": offsets}, "C": EVERY, "B": REQUESTS}
    names |= {"offsets": offsets.to(device), "offsets_cpu": offsets, "layer": layer}
    slots = {"conv": pool.conv.new_zeros(table.numel(), *pool.conv.shape[1:])}
    slots |= {"state": pool.state.new_zeros(table.numel(), *pool.state.shape[1:])}
    return {**names, **slots, "decoding": decoding, "count_accepted": count_accepted}


def tokenizer(folder: Path) -> None:
    """Write a tokenizer of three words beside a checkpoint."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = importlib.import_module("tokenizers")
    model = tokenizers.models.WordLevel({"[UNK]": 0, "M²RNN": 1, "is": 2}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def a_peer_is_asked(names: Names) -> None:
    """The adapter on the page gives a peer what it asks for, in its order, and returns what it gives."""
    peer: Any = ModuleType("peer")
    peer.scan = lambda *given: given
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "peer", peer)
        scan = names["adapter"](make_variant())
        assert scan("q", "k", "v", "weight", "forget", None, None, 1.0) == ("q", "k", "v", "weight", "forget", 1.0)


def finite(names: Names) -> None:
    """The last y has no NaN."""
    assert names["y"].isfinite().all()


PRESUMED: dict[str, Callable[[torch.device], Names]] = {
    "docs/design.md": operator,
    "docs/package.md": package,
    "docs/serving.md": serving,
}
"""The names that a page's snippets take as given."""
WITHOUT_GRADIENTS = ("docs/serving.md",)
"""Pages whose text says that their snippets run under ``torch.no_grad()``."""
HOLDS: dict[str, Callable[[Names], None]] = {
    "docs/benchmarks.md": a_peer_is_asked,
    "docs/how-to/in-a-model.md": finite,
    "docs/package.md": finite,
    "docs/serving.md": finite,
}
"""What holds once a page's snippets have run."""


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Have Python work in a folder and import the packages that are there, and forget these at the end."""
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "generated"]:
                del sys.modules[name]
