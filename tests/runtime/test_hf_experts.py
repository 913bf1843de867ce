"""Mixtures of experts: every token by the experts that it chooses, one by one, from the published formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import distance
from checkpoints import config_of, small_model
from torch import Tensor

EXPERTS, CHOSEN, SIZE = 4, 2, 24
ROUNDING = 1e-5
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"activation_function": "gelu", "shared_intermediate_size": None},
    "shared": {"activation_function": "swiglu", "shared_intermediate_size": 16},
    "gated": {
        "activation_function": "swiglu", "shared_intermediate_size": 16, "shared_expert_gating": True,
        "normalized_topk": False,
    },
}  # fmt: skip


def block(shape: str) -> dict[str, Any]:
    """Return a mixture's mapping."""
    sizes = {"intermediate_size": SIZE, "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
    return {"mlp_type": "MoE", "add_bias": False, "dropout": 0.0, **sizes, **SHAPES[shape]}


def model_of(hf: Any, shape: str, **options: Any) -> Any:
    """Return a hybrid model whose second MLP is a mixture."""
    mlps = [config_of("hybrid_rope")["mlp_blocks"][0], block(shape)]
    return small_model(hf, "hybrid_rope", mlp_blocks=mlps, **options)


def by_hand(mixture: Any, shape: str, x: Tensor) -> Tensor:
    """Evaluate a mixture on one token x (hidden_size,) in float64."""
    p = {name: parameter.detach().double() for name, parameter in mixture.named_parameters()}
    x = x.double()

    def mlp(first: Tensor, second: Tensor) -> Tensor:
        inner = first @ x
        if shape == "plain":
            return second @ (inner * (1 + torch.erf(inner / 2**0.5)) / 2)
        gate = inner[::2]
        return second @ (inner[1::2] * gate / (1 + torch.exp(-gate)))

    scores = torch.exp(p["gate.weight"] @ x)
    best = sorted(range(EXPERTS), key=lambda i: -scores[i])[:CHOSEN]
    total = scores.sum() if shape == "gated" else sum(scores[i] for i in best)
    y = sum(scores[i] / total * mlp(p["c_fc.weight"][i], p["c_proj.weight"][i]) for i in best)
    if shape != "plain":
        share = 1 / (1 + torch.exp(-p["shared_expert_gate.weight"] @ x)) if shape == "gated" else 1
        y = y + share * mlp(p["c_fc_shared.weight"], p["c_proj_shared.weight"])
    return y


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_token_by_its_experts(hf: Any, shape: str, tokens: int) -> None:
    """Few tokens, as decoding has them, and many."""
    mixture = model_of(hf, shape).transformer.h[1].mlp_block
    x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0))
    y, uneven = mixture(x)
    assert uneven is None
    assert distance(y[0], torch.stack([by_hand(mixture, shape, row) for row in x[0]])) < ROUNDING


def test_gradients_of_few_and_many_tokens(hf: Any) -> None:
    """Both ways have the same gradients, an expert without tokens none."""
    mixture = model_of(hf, "gated").transformer.h[1].mlp_block
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    few = torch.autograd.grad(mixture(x)[0].square().sum(), list(mixture.parameters()))
    repeated = x.repeat(3, 1)  # more choices than experts
    many = torch.autograd.grad(mixture(repeated)[0].square().sum(), list(mixture.parameters()))
    assert max(distance(b, 3 * a) for a, b in zip(few, many, strict=True)) < ROUNDING


def test_the_auxiliary_loss(hf: Any) -> None:
    """In training the loss has the coefficient's part of it: the switch loss, and a tenth of the logits' size."""
    model = model_of(hf, "shared", router_aux_loss_coef=0.5)
    tokens = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(2))
    logits: list[Tensor] = []
    model.transformer.h[1].mlp_block.gate.register_forward_hook(lambda _, __, y: logits.append(y.detach().double()))
    plain = model.eval()(tokens, labels=tokens)
    assert plain.aux_loss is None
    out = model.train()(tokens, labels=tokens)
    probabilities = logits[-1].exp() / logits[-1].exp().sum(-1, keepdim=True)
    chosen = probabilities.topk(CHOSEN).indices.flatten().tolist()
    shares = [chosen.count(i) / len(chosen) for i in range(EXPERTS)]
    switch = EXPERTS * sum(share * probabilities[:, i].mean() for i, share in enumerate(shares))
    size = logits[-1].exp().sum(-1).log().square().mean()
    assert out.aux_loss.item() == pytest.approx((switch + 0.1 * size).item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(plain.loss.item() + 0.5 * out.aux_loss.item(), rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_auxiliary_loss(hf: Any, reentrant: bool) -> None:
    """Its gradients reach the gate."""
    model = model_of(hf, "shared", router_aux_loss_coef=0.5).train()
    tokens = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(2))
    gate = model.transformer.h[1].mlp_block.gate.weight
    plain = torch.autograd.grad(model(tokens, labels=tokens).loss, gate)[0]
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(tokens, labels=tokens).loss.backward()
    assert distance(gate.grad, plain) < ROUNDING


def test_generation(hf: Any, tmp_path: Path) -> None:
    """Cached steps are full calls, also compiled; a saved model is the same."""
    from transformers import CompileConfig

    model = model_of(hf, "gated")
    prompt = torch.randint(3, 64, (1, 6), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, **options), expected)
    torch._dynamo.reset()
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    given = copy.deepcopy(options) | {"cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(model.generate(prompt, **given), expected)
    model.save_pretrained(tmp_path)
    again, report = hf.M2RNNForCausalLM.from_pretrained(tmp_path, backend="reference", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(again.generate(prompt, **options), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most num_experts = 4, got 5"),
        ({"add_bias": True}, "add_bias must be false where mlp_type is 'MoE', got True"),
        ({"shared_expert_gating": True}, "shared_expert_gating must be false where shared_intermediate_size is null"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mixtures_that_are_none(hf: Any, change: dict[str, Any], said: str) -> None:
    """The error names the key."""
    with pytest.raises(ValueError, match=said):
        small_model(hf, "hybrid_rope", mlp_blocks=[{**block("plain"), **change}] * 2)
