"""The model that flame builds: from a configuration's file, by Auto classes, as its command does."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import distance
from flame_on_ranks import CHECKS
from ranks import launch
from support import ROOT, SCHEDULES, build_package, import_package, make_variant
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from watch import WAITS, Reads, Watch

from m2gen.package.directory import write
from m2gen.runtime.optimizer import parameter_groups

EXAMPLE = ROOT / "examples" / "train" / "flame_m2rnn_410m.json"
ROUNDING = 1e-5
NO_FLA = "flash-linear-attention is not installed"
MIXER = {"state_expansion": 16, "head_dim": 16, "heads": {"q": 1, "k": 1, "v": 4, "f": 4, "w": 4}}
SMALL = {"model_type": "flame_m2rnn", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}


def module_of(package: str) -> Any:
    """Return a package's module for flame, whose classes are the Auto classes' from now on."""
    module = importlib.import_module(f"{package}.integrations.flame")
    module.register()
    return module


@pytest.fixture
def flame(hf: Any) -> Any:
    """Return the module for flame of a package."""
    return module_of(hf.__name__.removesuffix(".hf"))


def config_file(folder: Path, backend: str = "reference", **keys: Any) -> Path:
    """Write a small configuration and return its place."""
    place = folder / "small.json"
    mixer = {**MIXER, "backend": backend}
    place.write_text(json.dumps({**SMALL, "mixer": mixer, "vocab_size": 64, **keys}), encoding="utf-8")
    return place


def small(folder: Path, backend: str = "reference", **keys: Any) -> Any:
    """Return a small model, built on the meta device and drawn afterwards, as flame does."""
    config = AutoConfig.from_pretrained(config_file(folder, backend, **keys))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.apply(lambda module: setattr(module, "_is_hf_initialized", False))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        model.post_init()
    return model


def ids(batch: int = 2, steps: int = 7, seed: int = 1) -> Tensor:
    """Return tokens."""
    return torch.randint(3, 64, (batch, steps), generator=torch.Generator().manual_seed(seed))


def test_the_example_is_built_as_flame_builds_it(tmp_path: Path) -> None:
    """Auto classes make the 410M model of the file, as soon as the module of a package with its layer is imported."""
    variant = make_variant(64, 16, (1, 1, 84, 84, 84), "bf16")
    built = build_package("for_410m", [variant], SCHEDULES["one_level_atomic"])
    module_of(import_package(tmp_path / "for_410m", built, "m2gen_test_flame_410m").__name__)
    config = AutoConfig.from_pretrained(EXAMPLE)
    config.vocab_size = max(32100, config.vocab_size)  # a tokenizer's
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    assert set(dict(model.model.named_children())) == {"embeddings", "layers", "norm"}
    assert {p.device.type for p in model.parameters()} == {"meta"}
    layers = model.model.layers
    mixers = sum(p.numel() for layer in layers for p in layer.attn.parameters())
    around = 24 * (3 * 1024 * 4096 + 2 * 1024) + 1024 + 2 * 32100 * 1024
    assert (len(layers), sum(p.numel() for p in model.parameters())) == (24, mixers + around)
    assert model.lm_head.weight.shape == (32100, 1024)
    layer = layers[3].attn
    assert (type(layer).__name__, layer.layer_idx, layer.mixer.backend) == ("M2RNNLayer", 3, "kernels")


def test_the_packages_in_the_repository_run_the_example() -> None:
    """The package for H100 holds the layer of the example."""
    mixer = json.loads(EXAMPLE.read_text(encoding="utf-8"))["mixer"]
    heads = tuple(mixer["heads"][name] for name in "qkvfw")
    built = importlib.import_module("generated.h100.built")
    assert built.LAYERS["m2rnn_410m"] == ((mixer["state_expansion"], mixer["head_dim"], heads),)


def test_the_file_says_every_default(flame) -> None:
    """Keys of the example are ones that the configuration reads."""
    keys = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    known = flame.FlameM2RNNConfig().to_dict()
    assert set(keys) <= set(known)
    assert flame.FlameM2RNNConfig(hidden_size=96).inner_size == 256
    with pytest.raises(TypeError, match=r"config.json: \$.mixer must be a mapping, got 3"):
        flame.FlameM2RNNConfig(mixer=3)


def test_dims_that_were_not_built(flame, tmp_path) -> None:
    """The error is the layer's, with the spec lines to add."""
    place = config_file(tmp_path, mixer={**MIXER, "head_dim": 8})
    with pytest.raises(Exception, match=r"no kernels for K=16, V=8.*add to the layers of") as error:
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
    assert type(error.value).__name__ == "VariantNotBuiltError"


def test_it_is_drawn_as_published(flame, tmp_path) -> None:
    """After ``post_init`` every value is drawn: normal, narrower by depth before the residual stream."""
    model = small(tmp_path, hidden_size=256)
    assert all(p.isfinite().all() for p in model.parameters())
    block = model.model.layers[1]
    for weight in (block.attn.mixer.input_projection.weight, block.mlp.up_proj.weight, model.lm_head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (block.attn.mixer.output_projection.weight, block.mlp.down_proj.weight):
        assert weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(block.attn.mixer.state_weight, torch.eye(16).expand(4, 16, 16))
    assert model.model.norm.weight.eq(1).all()
    groups = {group["name"]: group["params"] for group in parameter_groups(model, 0.1)}
    assert len(groups["state_weights"]) == 2


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_training(flame, tmp_path, backend, checkpointing) -> None:
    """A packed step as flame calls it: sequences as alone, and the loss of every next token in the row."""
    model, lengths = small(tmp_path, backend).train(), (4, 1, 6)
    if checkpointing:
        model.activation_checkpointing_enable()
    alone = [ids(1, length, seed=length) for length in lengths]
    row = torch.cat(alone, 1)
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    offsets = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    out = model(input_ids=row, labels=row, position_ids=positions, cu_seqlens=offsets)
    logits = torch.cat([model(input_ids=tokens, cu_seqlens=None).logits for tokens in alone], 1)
    assert distance(out.logits, logits) < ROUNDING
    torch.testing.assert_close(out.loss, F.cross_entropy(logits[0, :-1], row[0, 1:]))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_offsets_of_the_host(flame, tmp_path, monkeypatch) -> None:
    """With a copy of the offsets a step of training asks the device for nothing."""
    model, row = small(tmp_path).train(), ids(1, 11)
    host = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    expected = model(input_ids=row, labels=row, cu_seqlens=host.clone()).loss
    fresh = host.clone()
    with monkeypatch.context() as patch, Reads() as reads:
        seen = Watch(patch, fresh)
        loss = model(input_ids=row, labels=row, cu_seqlens=fresh, cu_seqlens_cpu=host).loss
        loss.backward()
    assert reads.found == []
    assert WAITS.isdisjoint(seen.found)
    assert torch.equal(loss, expected)


def test_the_loss_that_flame_sets(flame, tmp_path) -> None:
    """With ``fuse_linear_cross_entropy`` the model's ``criterion`` gets states, labels and the head, and no logits."""
    model = small(tmp_path, fuse_linear_cross_entropy=True).train()

    class Criterion(torch.nn.Module):
        """The loss, with the arguments of flash-linear-attention's."""

        def forward(self, x: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.cross_entropy(F.linear(x, weight, bias).flatten(0, 1), target.flatten())

    model.criterion = Criterion()
    tokens = ids()
    out = model(input_ids=tokens, labels=tokens)
    assert out.logits is None
    logits = model(input_ids=tokens).logits
    torch.testing.assert_close(out.loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    assert model(input_ids=tokens, logits_to_keep=2).logits.shape == (2, 2, 64)


def test_it_is_saved_and_loaded(flame, tmp_path) -> None:
    """A model loads with its values, decay parameters in float32 beside others in bfloat16."""
    model = small(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected = model.state_dict()
    assert {name for name, x in again.state_dict().items() if not torch.equal(x, expected[name])} == set()
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    wide = {name for name, x in narrow.state_dict().items() if x.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in wide} == {"A_log", "dt_bias"}
    marked = {name for name, p in again.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert {name.rpartition(".")[2] for name in marked} == {"A_log", "dt_bias", "D", "weight"}
    assert "model.layers.1.attn_norm.weight" in marked
    base = AutoModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(base.embeddings.weight, model.model.embeddings.weight)


def test_padded_batches(flame, tmp_path) -> None:
    """Rows with padding give what each row gives alone; a mask of nothing but tokens packs nothing."""
    model, tokens = small(tmp_path).eval(), ids(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        together = model(input_ids=tokens, attention_mask=mask).logits
        assert distance(together[1, 2:], model(input_ids=tokens[1:, 2:]).logits[0]) < ROUNDING
        full = model(input_ids=tokens, attention_mask=torch.ones(2, 6)).logits
        assert torch.equal(full, model(input_ids=tokens).logits)


def test_its_cache_is_theirs(flame, tmp_path) -> None:
    """With flash-linear-attention installed, ``use_cache`` makes its cache, and calls go on from that."""
    pytest.importorskip("fla", reason=NO_FLA)
    model, tokens = small(tmp_path).eval(), ids(2, 6)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        first = model(input_ids=tokens[:, :4], use_cache=True)
        cache = first.past_key_values
        assert isinstance(cache, importlib.import_module("fla.models.utils").Cache)
        second = model(input_ids=tokens[:, 4:5], past_key_values=cache, use_cache=True)
        third = model(input_ids=tokens[:, 5:], past_key_values=cache, use_cache=True)
    assert third.past_key_values is cache
    assert cache.get_seq_length() == 6
    assert distance(torch.cat([first.logits, second.logits, third.logits], 1), whole) < ROUNDING


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_it_generates(flame, tmp_path, options) -> None:
    """Tokens with flash-linear-attention's cache are those without one, also of prompts padded on the left."""
    model = small(tmp_path, eos_token_id=None, initializer_range=0.3).eval()
    prompts = ids(2, 5)
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    common = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, **options}
    plain = model.generate(prompts, attention_mask=mask, use_cache=False, **common)
    alone = model.generate(prompts[1:, 2:], use_cache=False, **common)
    assert torch.equal(plain[1, 5:], alone[0, 3:])
    assert len(set(plain[:, 5:].flatten().tolist())) > 2
    pytest.importorskip("fla", "0.6", reason=f"{NO_FLA}, or is older than 0.6, whose caches transformers cannot use")
    assert torch.equal(model.generate(prompts, attention_mask=mask, use_cache=True, **common), plain)


def test_nothing_of_fla_is_imported() -> None:
    """Building and training the model needs transformers alone."""
    code = "import sys, m2gen.runtime.integrations.flame; assert 'fla' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_training_on_two_ranks(tmp_path: Path) -> None:
    """Sharded as flame shards, mixed precision leaves decay parameters in float32."""
    package = build_package("on_flame", [make_variant(heads=(1, 1, 4, 4, 4))], SCHEDULES["one_level_atomic"])
    write(tmp_path / "on_flame", package.files)
    config_file(tmp_path, vocab_size=50).rename(tmp_path / "config.json")
    said = launch(ROOT / "tests" / "fakes" / "flame_on_ranks.py", tmp_path, 2)
    assert {name: failure for name, failure in said.items() if failure} == {}
    assert list(said) == list(CHECKS)


@pytest.mark.parametrize("offloads", [False, True])
def test_decay_parameters_are_offloaded_with_the_others(flame, monkeypatch, offloads) -> None:
    """What flame's ``apply_fsdp`` is given goes on to it, after the decay parameters were sharded in the same way."""
    calls: list[Any] = []
    module = ModuleType("flame.models.parallelize_fla")
    module.apply_fsdp = lambda *rest, **options: calls.append((rest, options))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    sharding = importlib.import_module(f"{flame.__name__}.sharding")
    monkeypatch.setattr(sharding, "fully_shard_decay", lambda model, **options: calls.append((model, options)))
    assert flame.keep_decay()
    module.apply_fsdp("model", "mesh", param_dtype=1, cpu_offload=offloads)
    (model, first), (rest, options) = calls
    assert (model, first.pop("mesh"), rest) == ("model", "mesh", ("model", "mesh"))
    assert options == {"param_dtype": 1, "cpu_offload": offloads}
    assert [type(x).__name__ for x in first.values()] == (["CPUOffloadPolicy"] if offloads else [])


def test_without_flame_nothing_is_replaced(flame, monkeypatch) -> None:
    """Importing the module elsewhere leaves everything as it is."""
    monkeypatch.delitem(sys.modules, "flame.models.parallelize_fla", raising=False)
    assert not flame.keep_decay()


def test_a_default_mixer_is_each_configurations_own(flame) -> None:
    """A change of one leaves others, and those to come, as they are."""
    one = flame.FlameM2RNNConfig()
    one.mixer["heads"]["q"], one.mixer["clip"] = 2, None
    assert flame.FlameM2RNNConfig().mixer["heads"]["q"] == 1
    assert "clip" not in flame.FlameM2RNNConfig().mixer
