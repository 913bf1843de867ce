"""Language models on a GPU: a hybrid of the 410M model's layer trains compiled, and decodes as full calls do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import distance
from checkpoints import hf_of
from support import make_variant

pytestmark = pytest.mark.gpu

HEADS = 84
STEPS, LENGTH = 30, 256
"""Steps of training on one batch, and tokens of a sequence."""


def config_of_layers(hidden: int, heads: int, rows: int = 64) -> dict[str, Any]:
    """Return the configuration of an M2RNN block and one of attention."""
    mixer = {
        "sequence_mixer_type": "m2rnn", "k_head_dim": rows, "v_head_dim": 16, "num_q_heads": 1, "num_k_heads": 1,
        "num_v_heads": heads, "num_f_heads": heads, "num_g_heads": heads, "num_weight_heads": heads,
        "use_residual": True, "kernel_size": 4, "activation_function": "silu", "add_bias": False,
        "gradient_clipping": 1.0, "normalization_function": "rmsnorm",
    }  # fmt: skip
    attention = {"sequence_mixer_type": "softmax_attention", "num_attention_heads": 4, "num_key_value_heads": 2}
    mlp = {"mlp_type": "MLP", "intermediate_size": 2 * hidden, "activation_function": "swiglu"}
    return {
        "vocab_size": 256, "hidden_size": hidden, "num_layers": 2, "sequence_mixer_blocks": [mixer, attention],
        "mlp_blocks": [mlp, mlp], "position_embedding_type": "nope",
    }  # fmt: skip


def model_of(built, device: torch.device, hidden: int = 1024) -> Any:
    """Return a hybrid model on the kernels of the 410M layer in bf16."""
    hf = hf_of(built(make_variant(64, 16, (1, 1, HEADS, HEADS, HEADS), "bf16", tanh="approx")))
    torch.manual_seed(0)
    return hf.M2RNNForCausalLM(hf.M2RNNConfig(**config_of_layers(hidden, HEADS))).to(device)


def test_a_hybrid_trains_compiled(built, device) -> None:
    """Under autocast and torch.compile, one graph a step: the loss of a batch falls, as that of eager steps does."""
    tokens = torch.randint(256, (4, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    losses: dict[bool, list[float]] = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        model = model_of(built, device).train()
        step = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[compiled] = []
        for _ in range(STEPS):
            with torch.autocast(device.type, torch.bfloat16):
                loss = step(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[compiled].append(loss.item())
        assert losses[compiled][-1] < losses[compiled][0] - 0.5
    first = [abs(a - b) for a, b in zip(losses[True][:3], losses[False][:3], strict=True)]
    assert max(first) < 0.05  # later steps train on the rounding of these


@pytest.mark.parametrize("numbers", [False, True])
def test_packed_training_with_offsets_of_the_host_never_waits(built, device, numbers) -> None:
    """A step of a model of M2RNN layers reads nothing from the device where a copy of the offsets comes along."""
    hf = hf_of(built(make_variant(64, 16, (1, 1, HEADS, HEADS, HEADS), "bf16", tanh="approx")))
    config = config_of_layers(256, HEADS)
    config["sequence_mixer_blocks"] = config["sequence_mixer_blocks"][:1] * 2
    model = hf.M2RNNForCausalLM(hf.M2RNNConfig(**config)).to(device).bfloat16().train()
    row = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    host = torch.tensor([0, 30, 100, LENGTH], dtype=torch.int32)
    copy = host.tolist() if numbers else host
    offsets = [host.to(device) for _ in range(2)]
    model(row, labels=row, cu_seq_lens_q=offsets[0], cu_seqlens_cpu=copy).loss.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(row, labels=row, cu_seq_lens_q=offsets[1], cu_seqlens_cpu=copy).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_decoding_is_full_calls(built, device) -> None:
    """Padded prompts and steps of ``generate``, compiled by it, have the logits of calls on everything so far."""
    model = model_of(built, device).bfloat16().eval()
    prompt = torch.randint(3, 256, (2, 17), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    for options in ({}, {"cache_implementation": "static"}):
        out = model.generate(
            prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip
        found = torch.stack(out.logits, 1)
        for row, begin in enumerate((0, 5)):
            with torch.no_grad():
                full = model(out.sequences[row : row + 1, begin:], use_cache=False).logits
            assert distance(found[row], full[0, -9:-1]) < 0.03  # bf16, of two orders of summing
