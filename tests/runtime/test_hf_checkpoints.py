"""Checkpoints of the published implementation under transformers: its logits, losses, gradients and greedy tokens."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import distance
from checkpoints import MODEL_NAMES, arrays_of, config_of, hf_of, models_package, write_checkpoint
from safetensors.torch import load_file, save_file
from support import ROOT, SCHEDULES, build_package, import_package, make_variant

from m2gen.package.directory import write

LOGITS, GRADIENTS = 4e-6, 2e-5
"""Four times what the published implementation's own float32 run differs by from its float64 run."""
BACKENDS = ("kernels", "reference")
every_model = pytest.mark.parametrize("name", MODEL_NAMES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def loaded(hf: Any, folder: Path, **options: Any) -> Any:
    """Return a model, all of whose parameters the folder has, and no others."""
    model, report = hf.M2RNNForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


@every_model
@every_backend
def test_logits_loss_and_hidden_states(hf: Any, folders: Any, name: str, backend: str) -> None:
    """Each is what the published implementation computes in float64, within float32's rounding."""
    facts, model = arrays_of(name), loaded(hf, folders(name), backend=backend)
    with torch.no_grad():
        out = model(facts["input_ids"], labels=facts["input_ids"], output_hidden_states=True)
    assert distance(out.logits, facts["logits"]) < LOGITS
    assert abs(out.loss.item() - facts["loss"].item()) < LOGITS
    for i, state in enumerate(out.hidden_states[1:-1]):  # the last is normalised
        assert distance(state, facts[f"hidden.{i}.output"]) < LOGITS
    assert distance(out.hidden_states[-1], facts["hidden.final"]) < LOGITS


@every_model
@every_backend
def test_greedy_tokens(hf: Any, folders: Any, name: str, backend: str) -> None:
    """``generate`` gives the recorded tokens, the logits that each was chosen from, and the states after them."""
    facts, model = arrays_of(name), loaded(hf, folders(name), backend=backend)
    out = model.generate(
        facts["input_ids"], max_new_tokens=8, do_sample=False, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(out.sequences, facts["generated"])
    assert distance(torch.stack(out.logits, 1), facts["generated_logits"]) < LOGITS
    (states,) = (
        layer for layer, kind in zip(out.cache.layers, model.config.layer_types, strict=True) if kind == "m2rnn"
    )
    assert distance(states.conv.mT, facts["generated.conv_state"]) < LOGITS
    assert distance(states.state, facts["generated.recurrent_state"]) < LOGITS


@every_model
@every_backend
def test_left_padded_tokens(hf: Any, folders: Any, name: str, backend: str) -> None:
    """A padded batch gives what each row alone gives: logits at tokens, and the tokens after them."""
    facts, model = arrays_of(name), loaded(hf, folders(name), backend=backend)
    ids, mask = facts["padded.input_ids"], facts["padded.attention_mask"]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    assert distance(logits[mask.bool()], facts["padded.logits"][mask.bool()]) < LOGITS
    new = facts["padded.generated"]
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new.shape[1], do_sample=False, eos_token_id=None)
    assert torch.equal(out[:, ids.shape[1] :], new)


@every_backend
def test_gradients(hf: Any, folders: Any, backend: str) -> None:
    """The loss's gradients are those of the published implementation, which clips the whole gradient of a state."""
    facts, model = arrays_of("hybrid_nope"), loaded(hf, folders("hybrid_nope"), backend=backend)
    model(facts["input_ids"], labels=facts["input_ids"]).loss.backward()
    parameters = dict(model.named_parameters())
    assert {f"grad.{name}" for name in parameters} == {key for key in facts if key.startswith("grad.")}
    errors = {name: distance(p.grad, facts[f"grad.{name}"]) for name, p in parameters.items()}
    assert {name: error for name, error in errors.items() if not error < GRADIENTS} == {}


@every_model
def test_a_saved_model_is_the_same(hf: Any, folders: Any, name: str, tmp_path: Path) -> None:
    """``save_pretrained`` writes the published names, and Auto classes load the folder again."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    facts, model = arrays_of(name), loaded(hf, folders(name), backend="reference")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gpt_base"
    assert "backend" not in config  # which is the process's, not the model's
    again = AutoModelForCausalLM.from_pretrained(tmp_path, backend="reference")
    assert type(again) is hf.M2RNNForCausalLM
    assert {key: value.tolist() for key, value in again.state_dict().items()} == {
        key: value.tolist() for key, value in model.state_dict().items()
    }
    with torch.no_grad():
        assert torch.equal(again(facts["input_ids"]).logits, model(facts["input_ids"]).logits)
    assert type(AutoConfig.from_pretrained(folders(name))) is hf.M2RNNConfig
    trunk = AutoModel.from_pretrained(folders(name), backend="reference")
    with torch.no_grad():
        assert distance(trunk(facts["input_ids"]).last_hidden_state, facts["hidden.final"]) < LOGITS


def test_auto_classes_are_those_of_the_package_registered_last(hf: Any, folders: Any, tmp_path: Path) -> None:
    """A second package's import takes the Auto classes over, and ``register`` has the first answer again."""
    from transformers import AutoConfig

    other = importlib.import_module(f"{models_package(tmp_path).__name__}.hf")
    assert type(AutoConfig.from_pretrained(folders("hybrid_nope"))) is other.M2RNNConfig
    hf.register()
    assert type(AutoConfig.from_pretrained(folders("hybrid_nope"))) is hf.M2RNNConfig


@every_backend
def test_parts_on_other_devices(hf: Any, folders: Any, backend: str, tmp_path: Path) -> None:
    """``device_map`` may leave layers on a disk, from where each call has them."""
    facts = arrays_of("hybrid_nope")
    parts = {"transformer.wte": "cpu", "transformer.h.0": "disk", "transformer.h.1": "disk"}
    places = {**parts, "transformer.ln_f": "cpu", "lm_head": "disk"}
    model = loaded(hf, folders("hybrid_nope"), backend=backend, device_map=places, offload_folder=str(tmp_path))
    assert model.transformer.h[0].sequence_mixer.D.is_meta
    out = model.generate(facts["input_ids"], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(out, facts["generated"])


def test_a_model_that_was_not_built_says_what_to_add(tmp_path: Path) -> None:
    """A package of other dims raises the layer's error, whose lines are a spec's."""
    folder = tmp_path / "other"
    package = import_package(folder, build_package("other", [make_variant()], SCHEDULES["one_level_atomic"]))
    hf = hf_of(package)
    config = hf.M2RNNConfig(**{key: value for key, value in config_of("hybrid_nope").items() if key != "model_type"})
    line = r"head_dim: 16, state_expansion: 16, heads: \{q: 1, k: 1, v: 4, f: 4, w: 4\}"
    with pytest.raises(package.VariantNotBuiltError, match=line):
        hf.M2RNNForCausalLM(config)
    config.backend = "reference"
    hf.M2RNNForCausalLM(config)


ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import alone
assert not [name for name in sys.modules if name.startswith("transformers")]
import alone.hf
assert "transformers" in sys.modules
"""


def test_only_the_module_needs_transformers(tmp_path: Path) -> None:
    """Importing a package leaves transformers alone."""
    package = build_package("alone", [make_variant()], SCHEDULES["one_level_atomic"])
    write(tmp_path / "alone", package.files)
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@every_backend
def test_gates_are_rounded_where_asked(hf: Any, folders: Any, backend: str, tmp_path: Path) -> None:
    """``round_gate`` is a key of the configuration, which a saved model keeps, and reaches each mixer."""
    model = loaded(hf, folders("hybrid_nope"), backend=backend, round_gate=True)
    model.save_pretrained(tmp_path)
    again = loaded(hf, tmp_path, backend=backend)
    assert model.transformer.h[0].sequence_mixer.round_gate
    assert again.transformer.h[0].sequence_mixer.round_gate
    assert not loaded(hf, folders("hybrid_nope"), backend=backend).transformer.h[0].sequence_mixer.round_gate


@every_backend
def test_decay_parameters_stay_wide(hf: Any, folders: Any, backend: str) -> None:
    """A model that is loaded in bf16 keeps A_log and dt_bias in float32, with every bit, and runs."""
    facts = arrays_of("hybrid_nope")
    model = hf.M2RNNForCausalLM.from_pretrained(folders("hybrid_nope"), backend=backend, dtype=torch.bfloat16)
    for name, parameter in model.bfloat16().named_parameters():
        wide = name.endswith(("A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert not wide or torch.equal(parameter, facts[name])
    if backend == "reference":  # the package has kernels for float32 alone
        with torch.no_grad():
            assert distance(model(facts["input_ids"]).logits, facts["logits"]) < 0.05


@pytest.mark.parametrize(("kind", "name"), [("missing", "state_weight"), ("unexpected", "nonsense")])
def test_weights_that_are_not_the_models(hf: Any, tmp_path: Path, kind: str, name: str) -> None:
    """A weight that transformers would draw anew, and one that it would leave out, are errors that name it."""
    folder = write_checkpoint(tmp_path / "changed", "hybrid_nope")
    weights = load_file(folder / "model.safetensors")
    place = "transformer.h.0.sequence_mixer"
    if kind == "missing":
        del weights[f"{place}.{name}"]
    else:
        weights[f"{place}.{name}"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"weights must be those of the model, {kind} {place}.{name}"):
        hf.M2RNNForCausalLM.from_pretrained(folder, backend="reference")
