"""Configurations of the published implementation: what cannot be run is an error that names the key."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from checkpoints import config_of

ATTENTION, MIXER = 0, 1
"""Layers of the recorded model with most options."""


def made(hf: Any, config: dict[str, Any]) -> Any:
    """Return the model of a configuration on the reference backend."""
    return hf.M2RNNForCausalLM(hf.M2RNNConfig(**{**config, "backend": "reference"}))


BLOCKS = {
    "a mixer of another kind": ("sequence_mixer_blocks", MIXER, {"sequence_mixer_type": "mamba2"}),
    "a narrow convolution": ("sequence_mixer_blocks", MIXER, {"kernel_size": 1}),
    "an unknown key of an M2RNN": ("sequence_mixer_blocks", MIXER, {"num_states": 2}),
    "sliding windows": ("sequence_mixer_blocks", ATTENTION, {"sliding_window": 128}),
    "an unknown key": ("sequence_mixer_blocks", ATTENTION, {"sinks": 4}),
    "heads": ("sequence_mixer_blocks", ATTENTION, {"num_key_value_heads": 3}),
    "a head of no size": ("sequence_mixer_blocks", ATTENTION, {"head_dim": -8}),
    "a multiplier and a method": ("sequence_mixer_blocks", ATTENTION, {"attention_multiplier_method": "1 / head_dim"}),
    "a flag": ("sequence_mixer_blocks", ATTENTION, {"attention_gate": 1}),
    "an MLP of another kind": ("mlp_blocks", MIXER, {"mlp_type": "KAN"}),
    "an activation": ("mlp_blocks", MIXER, {"activation_function": "prelu"}),
    "a size": ("mlp_blocks", MIXER, {"intermediate_size": 0}),
    "dropout": ("mlp_blocks", MIXER, {"dropout": "none"}),
    "a shared expert": (
        "mlp_blocks",
        MIXER,
        {"mlp_type": "MoE", "num_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": -3},
    ),
}
SAID = {
    "a mixer of another kind": r"\[1\]\.sequence_mixer_type must be 'm2rnn' or 'softmax_attention', got 'mamba2'",
    "a narrow convolution": r"\[1\]\.kernel_size must be null or an integer of at least 2, got 1",
    "an unknown key of an M2RNN": r"\[1\]\.num_states is no key of a published block",
    "sliding windows": r"\[0\]\.sliding_window must be None, got 128",
    "an unknown key": r"\[0\]\.sinks must not be given: nothing reads it, got 4",
    "heads": r"\[0\]\.num_key_value_heads must divide 4, got 3",
    "a head of no size": r"\[0\]\.head_dim must be a positive integer, got -8",
    "a multiplier and a method": r"\[0\]\.attention_multiplier must be null .*, got 0\.25",
    "a flag": r"\[0\]\.attention_gate must be true or false, got 1",
    "an MLP of another kind": r"\[1\].mlp_type must be 'MLP' or 'MoE', got 'KAN'",
    "an activation": r"\[1\]\.activation_function must be among .*, got 'prelu'",
    "a size": r"\[1\]\.intermediate_size must be a positive integer, got 0",
    "a shared expert": r"\[1\]\.shared_intermediate_size must be null or a positive integer, got -3",
    "dropout": r"\[1\]\.dropout must be a number at least 0, got 'none'",
}


@pytest.mark.parametrize("case", BLOCKS)
def test_what_a_block_cannot_be(hf: Any, case: str) -> None:
    """The error says which layer, which key, what it must be and what it was."""
    blocks, i, change = BLOCKS[case]
    config = copy.deepcopy(config_of("hybrid_options"))
    config[blocks][i] |= change
    with pytest.raises(ValueError, match=rf"config\.json: \$\.{blocks}{SAID[case]}"):
        made(hf, config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type must be 'rope' or 'nope'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling must be None"),
        ({"rope_dim": None}, "rope_dim must be a number where mixers differ"),
        *(
            ({"position_embedding_type": "rope", "rope_dim": size}, f"rope_dim must be an even number .*, got {size}")
            for size in (0, 3, 100)
        ),
        ({"normalization_function": "p_norm"}, "normalization_function must be 'rmsnorm' or 'layernorm'"),
        ({"num_layers": 3}, "sequence_mixer_blocks must have num_layers = 3 entries, got 2"),
        ({"init_method": "mup", "m_width": None}, "m_width must be a number"),
        ({"backend": "cuda"}, "backend must be 'kernels' or 'reference'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_model_cannot_be(hf: Any, change: dict[str, Any], said: str) -> None:
    """The same of keys of the whole model, as soon as there is a configuration."""
    with pytest.raises(ValueError, match=rf"config\.json: \$\.{said}"):
        hf.M2RNNConfig(**{**config_of("hybrid_options"), **change})


def test_defaults_are_a_model(hf: Any) -> None:
    """Without blocks every layer is as the published 410M model's; the spec of it is one that ``m2gen build`` takes."""
    from m2gen.spec import parse_spec

    config = hf.M2RNNConfig()
    assert set(config.layer_types) == {"m2rnn"}
    layer = parse_spec(config.spec("m2rnn_410m", ["sm_80"], ["bf16", "fp32"]), "x.yaml").layers["m2rnn"]
    assert {point.heads.counts for point in layer.points()} == {(1, 1, 84, 84, 84)}
    assert {(point.state_expansion, point.head_dim) for point in layer.points()} == {(64, 16)}


def test_options_of_attention_that_no_record_has(hf: Any) -> None:
    """Scales by the head's size, and norms of the other kind, are modules that run."""
    config = config_of("hybrid_options")
    config["sequence_mixer_blocks"][ATTENTION] |= {
        "attention_multiplier": None, "attention_multiplier_method": "1 / head_dim", "head_dim": 16
    }  # fmt: skip
    model = made(hf, {**config, "normalization_function": "layernorm"})
    assert model.transformer.h[ATTENTION].sequence_mixer.block.scale == 1 / 16
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_values_of_zeros(hf: Any) -> None:
    """Attention without its own value gives numbers, and gradients, where inputs of zeros have a value of zeros."""
    config = config_of("hybrid_nope")
    attention = {**config_of("hybrid_options")["sequence_mixer_blocks"][ATTENTION], "add_bias": False}
    attention["exclusive_self_attention"] = True
    model = made(hf, {**config, "sequence_mixer_blocks": [attention, dict(attention)]}).eval()
    ids, mask = torch.tensor([[9, 9, 3, 4], [3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    x = model.get_input_embeddings()(ids) * mask[..., None]
    logits = model(inputs_embeds=x, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0, 2:], model(ids[:1, 2:]).logits[0])
    logits[:, -1].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_models_are_pickled(hf: Any) -> None:
    """Whatever the activations: processes that are started and ``torch.save`` pickle models whole."""
    package = hf.__name__.rpartition(".")[0]
    mlp, blocks = (importlib.import_module(f"{package}.hf.{name}") for name in ("mlp", "blocks"))
    x = torch.randn(3, 8)
    for name in (*importlib.import_module(f"{package}.activations").ACTIVATIONS, *mlp.GATES):
        function = mlp.activation_of(blocks.MLPBlock(4, name, False, 0), 0)
        assert torch.equal(pickle.loads(pickle.dumps(function))(x), function(x)), name
    model, ids = made(hf, config_of("hybrid_options")).eval(), torch.tensor([[3, 4, 5]])
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits)
