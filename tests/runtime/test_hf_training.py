"""Training under transformers: losses, checkpointing, packed batches, and the Trainer, which goes on where it was."""

from __future__ import annotations

import copy
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from calls import distance
from checkpoints import small_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import set_seed
from watch import WAITS, Reads, Watch

ROUNDING = 1e-5
KINDS = ("hybrid_rope", "hybrid_options", "recurrent")
STEPS, HALF = 50, 25


def ids(batch: int = 3, steps: int = 7, seed: int = 1) -> Tensor:
    """Return tokens."""
    return torch.randint(3, 64, (batch, steps), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all parameters, by name."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_give_the_loss(hf: Any, kind: str) -> None:
    """The loss is that of the next tokens, without those of label -100, over the tokens that the Trainer counts."""
    model, tokens = small_model(hf, kind), ids()
    labels = tokens.clone()
    labels[:, :3] = -100
    out = model(tokens, labels=labels)
    plain = F.cross_entropy(out.logits[:, 2:-1].flatten(0, 1), tokens[:, 3:].flatten())
    torch.testing.assert_close(out.loss, plain)
    shared = model(tokens, labels=labels, num_items_in_batch=24).loss
    torch.testing.assert_close(shared, plain / 2)


def test_logits_of_chosen_positions(hf: Any) -> None:
    """``logits_to_keep`` is a number of last positions, or their indices."""
    model, tokens = small_model(hf, "hybrid_rope"), ids()
    logits = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, logits[:, -2:])
    chosen = torch.tensor([1, 4])
    torch.testing.assert_close(model(tokens, logits_to_keep=chosen).logits, logits[:, chosen])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing(hf: Any, kind: str, reentrant: bool) -> None:
    """Gradients with and without it."""
    model, tokens = small_model(hf, kind).train(), ids()
    plain = gradients(model, model(tokens, labels=tokens).loss)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls: list[int] = []
    for block in model.transformer.h:
        block.ln_1.register_forward_hook(lambda *_: calls.append(1))
    model(tokens, labels=tokens).loss.backward()
    assert len(calls) == 4  # each of two blocks again in the backward
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {name: error for name, x in plain.items() if (error := distance(found[name], x)) > ROUNDING} == {}


PACKED = (4, 1, 6)
OFFSETS = (0, 4, 5, 11)


def packed_call(how: str) -> dict[str, Any]:
    """Return what says where the sequences of ``PACKED`` begin."""
    positions = torch.cat([torch.arange(length) for length in PACKED])[None]
    offsets = torch.tensor(OFFSETS, dtype=torch.int32)
    return {
        "position_ids": {"position_ids": positions},
        "both": {"position_ids": positions, "cu_seq_lens_q": offsets},
        "cu_seq_lens_q": {"cu_seq_lens_q": offsets},
        "copy": {"cu_seq_lens_q": offsets, "cu_seqlens_cpu": offsets.clone()},
        "array": {"cu_seq_lens_q": offsets, "cu_seqlens_cpu": offsets.numpy()},
        "numbers": {"position_ids": positions, "cu_seq_lens_q": offsets, "cu_seqlens_cpu": list(OFFSETS)},
    }[how]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["position_ids", "both", "cu_seq_lens_q", "copy", "array", "numbers"])
@pytest.mark.parametrize("training", [True, False])
def test_packed_sequences_are_apart(hf: Any, kind: str, how: str, training: bool) -> None:
    """Sequences one after the other in a row, as padding-free collators lay them, are each as alone."""
    model = small_model(hf, kind).train(training)
    alone = [ids(1, length, seed=length) for length in PACKED]
    logits = model(torch.cat(alone, 1), **packed_call(how)).logits
    assert distance(logits, torch.cat([model(tokens).logits for tokens in alone], 1)) < ROUNDING


@pytest.mark.parametrize("kind", ["hybrid_rope", "recurrent"])
def test_packed_sequences_of_several_rows(hf: Any, kind: str) -> None:
    """Offsets count the tokens of all rows; a sequence may go on in the next row for M2RNN layers only."""
    model, tokens = small_model(hf, kind), ids(2, 6)
    logits = model(tokens, cu_seq_lens_q=torch.tensor([0, 2, 6, 9, 12])).logits
    parts = [tokens[:1, :2], tokens[:1, 2:], tokens[1:, :3], tokens[1:, 3:]]
    alone = torch.cat([model(part).logits[0] for part in parts])
    assert distance(logits.flatten(0, 1), alone) < ROUNDING


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_training_never_waits(hf: Any, monkeypatch: Any, kind: str, implementation: str) -> None:
    """With offsets of the host a step asks the device for no value: neither offsets, nor positions, nor masks."""
    model = small_model(hf, kind, attn_implementation=implementation).train()
    row, call = ids(1, sum(PACKED)), packed_call("numbers")
    model(row, labels=row, **call).loss.backward()
    with monkeypatch.context() as patch, Reads() as reads:
        seen = [Watch(patch, x) for x in (call["cu_seq_lens_q"], call["position_ids"])]
        model(row, labels=row, **call).loss.backward()
    assert reads.found == []
    assert all(WAITS.isdisjoint(watch.found) for watch in seen)
    with monkeypatch.context() as patch, Reads() as reads:
        watch = Watch(patch, call["cu_seq_lens_q"])
        del call["cu_seqlens_cpu"]
        call["cu_seq_lens_q"].add_(0)  # what has passed is not read again
        model(row, labels=row, **call)
        assert "tolist" in watch.found
        model(row, position_ids=call["position_ids"])
    assert "nonzero" in reads.found


def test_blocks_on_other_devices_have_the_offsets(hf: Any) -> None:
    """What accelerate moves to a block's device are the offsets, and their copy stays on the host."""
    packing = sys.modules[f"{hf.__name__}.packing"]
    offsets = torch.tensor(OFFSETS)
    moved = send_to_device({"packed": packing.Packed(offsets, offsets.clone())}, "meta")["packed"]
    assert (moved.cu_seqlens.device.type, moved.cu_seqlens_cpu.device.type) == ("meta", "cpu")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_packed_batches(hf: Any, reentrant: bool) -> None:
    """Blocks that run again in the backward know the sequences, too."""
    model, row, call = small_model(hf, "hybrid_rope").train(), ids(1, sum(PACKED)), packed_call("copy")
    plain = gradients(model, model(row, labels=row, **call).loss)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(row, labels=row, **call).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {name: error for name, x in plain.items() if (error := distance(found[name], x)) > ROUNDING} == {}


def test_a_copy_of_the_offsets_is_checked(hf: Any) -> None:
    """It must be one of offsets that are there, of their shape, and hold what they may hold."""
    model, row = small_model(hf, "recurrent"), ids(1, 11)
    offsets = torch.tensor(OFFSETS)
    for call, message in (
        ({"cu_seqlens_cpu": OFFSETS}, "cu_seqlens_cpu must come with cu_seqlens"),
        ({"cu_seq_lens_q": offsets, "cu_seqlens_cpu": [0, 11]}, r"cu_seqlens_cpu must be \(4,\) as cu_seqlens is"),
        ({"cu_seq_lens_q": offsets, "cu_seqlens_cpu": [0, 5, 4, 11]}, "cu_seqlens must not decrease, got 4 at index 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model(row, **call)


def test_flash_attention_is_told_of_packed_sequences(hf: Any) -> None:
    """Attention functions get the offsets, and the longest sequence where that is known without a wait."""
    found: list[dict[str, Any]] = []
    model = small_model(hf, "hybrid_rope")
    for block in model.transformer.h:
        block.sequence_mixer.register_forward_pre_hook(lambda _, rest, given: found.append(given), with_kwargs=True)
    model(ids(1, 11), **packed_call("copy"))
    (given,) = [given for given in found if "cu_seq_lens_k" in given]
    assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == list(OFFSETS)
    assert (given["max_length_q"], given["max_length_k"]) == (6, 6)
    found.clear()
    model(ids(1, 11), **packed_call("cu_seq_lens_q"))
    assert not [given for given in found if "max_length_q" in given]


def test_scores_of_attention(hf: Any) -> None:
    """The eager implementation gives those of each attention layer, whose rows are shares of what came before."""
    model = small_model(hf, "hybrid_options", attn_implementation="eager")
    out = model(ids(), output_attentions=True)
    (scores,) = out.attentions
    assert scores.shape == (3, 4, 7, 7)
    torch.testing.assert_close(scores, scores.tril())
    torch.testing.assert_close(scores.sum(-1), torch.ones(3, 4, 7))
    assert distance(out.logits, small_model(hf, "hybrid_options")(ids()).logits) < ROUNDING


def test_groups_of_an_optimiser(hf: Any, tmp_path: Path) -> None:
    """A loaded model's norms, D, decay parameters and biases have no weight decay; every parameter is in one group."""
    small_model(hf, "hybrid_options").save_pretrained(tmp_path)
    model = hf.M2RNNForCausalLM.from_pretrained(tmp_path, backend="reference")
    groups = sys.modules[hf.__name__.removesuffix(".hf")].parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {group["name"]: {names.pop(id(parameter)) for parameter in group["params"]} for group in groups}
    assert names == {}
    expected = [name for name in dict(model.named_parameters()) if re.search(r"ln_|norm|\.D$|A_log|bias", name)]
    assert held["undecayed"] == set(expected)


def test_marks_of_loaded_parameters(hf: Any, tmp_path: Path) -> None:
    """Whoever asks parameters themselves finds the marks after making, loading and drawing anew."""
    model = small_model(hf, "hybrid_options")
    model.save_pretrained(tmp_path)
    loaded = hf.M2RNNForCausalLM.from_pretrained(tmp_path, backend="reference")
    informed, _ = hf.M2RNNForCausalLM.from_pretrained(tmp_path, backend="reference", output_loading_info=True)
    narrow = hf.M2RNNForCausalLM.from_pretrained(tmp_path, backend="reference", dtype=torch.bfloat16)
    for each in (model, loaded, informed, narrow, copy.deepcopy(model), narrow.float()):
        marked = {name for name, p in each.named_parameters() if getattr(p, "_no_weight_decay", False)}
        expected = [name for name in dict(each.named_parameters()) if re.search(r"ln_|norm|\.D$|A_log|bias", name)]
        assert marked == set(expected)


def test_training_makes_no_cache(hf: Any) -> None:
    """It would keep every state of a step."""
    model = small_model(hf, "hybrid_rope").train()
    assert model(ids()).cache is None
    assert model.eval()(ids()).cache is not None


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_compiled_training(hf: Any, backend: str) -> None:
    """A step of training is one graph, with the gradients of an eager one."""
    torch._dynamo.reset()
    model, tokens = small_model(hf, "hybrid_rope", backend).train(), ids()
    plain = gradients(model, model(tokens, labels=tokens).loss)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = gradients(model, compiled(tokens, labels=tokens).loss)
    assert {name: error for name, x in plain.items() if (error := distance(found[name], x)) > ROUNDING} == {}


@pytest.mark.parametrize("how", ["both", "copy"])
@pytest.mark.parametrize("kind", ["hybrid_rope", "recurrent"])
def test_compiled_packed_training(hf: Any, kind: str, how: str) -> None:
    """A packed step on the kernels is one graph, with the losses of an eager one, and offsets may change in it."""
    torch._dynamo.reset()
    model, row = small_model(hf, kind, "kernels").train(), ids(1, sum(PACKED))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    call = packed_call(how)
    plain = gradients(model, model(row, labels=row, **call).loss)
    found = gradients(model, compiled(row, labels=row, **call).loss)
    assert {name: error for name, x in plain.items() if (error := distance(found[name], x)) > ROUNDING} == {}
    other = {name: x.clone() for name, x in call.items()}
    for x in (other[name] for name in ("cu_seq_lens_q", "cu_seqlens_cpu") if name in other):
        x[1] = 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(row, labels=row, **other).loss, model(row, labels=row, **other).loss)


def test_initialisation(hf: Any) -> None:
    """Weights as published: normal, narrower by depth before the residual stream; norms, D, W are 1."""
    model = small_model(hf, "recurrent", hidden_size=256, initializer_range=0.02)
    mixer, mlp = model.transformer.h[0].sequence_mixer, model.transformer.h[0].mlp_block
    for weight in (model.transformer.wte.weight, mixer.input_projection.weight, mlp.c_fc.weight, model.lm_head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (mixer.output_projection.weight, mlp.c_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    assert torch.equal(mixer.state_weight, torch.eye(16).expand(4, 16, 16))
    assert mixer.decay_gate.A_log.isfinite().all()
    assert model.transformer.ln_f.weight.eq(1).all()


def trainer_of(hf: Any, model: Any, folder: Path) -> Trainer:
    """Return a Trainer of ``STEPS`` steps, which saves after half of them."""
    data = [{"input_ids": row, "labels": row} for row in ids(64, 12)]
    arguments = TrainingArguments(
        folder, max_steps=STEPS, save_steps=HALF, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", disable_tqdm=True, use_cpu=True, activation_checkpointing=True, seed=1,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data)


def losses(trainer: Trainer) -> list[float]:
    """Return the loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_goes_on_with_the_same_losses(hf: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A two-layer model trains, saves, loads, and goes on: the second half of the losses are those of one run."""
    caplog.set_level(logging.ERROR, "transformers.trainer")
    set_seed(1)
    whole = trainer_of(hf, small_model(hf, "hybrid_rope"), tmp_path)
    whole.train()
    expected = losses(whole)
    assert len(expected) == STEPS
    assert sum(expected[-5:]) < 0.8 * sum(expected[:5])
    predicted = whole.predict([{"input_ids": row, "labels": row} for row in ids(5, 12, seed=2)])
    assert predicted.predictions.shape == (5, 12, 64)  # no caches
    folder = tmp_path / f"checkpoint-{HALF}"
    set_seed(2)
    loaded = hf.M2RNNForCausalLM.from_pretrained(folder, backend="reference")
    again = trainer_of(hf, loaded, tmp_path / "again")
    again.train(resume_from_checkpoint=str(folder))
    assert losses(again)[-HALF:] == expected[-HALF:]
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, again.model.state_dict()[name]), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainers_loss_is_of_the_next_token(hf: Any, tmp_path: Path, smoothing: float) -> None:
    """With label smoothing, too, which the Trainer computes itself: of the same token a model learns to copy."""
    model, tokens = small_model(hf, "recurrent"), ids()
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=smoothing, report_to="none", use_cpu=True)
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": tokens, "labels": tokens})
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=smoothing))
