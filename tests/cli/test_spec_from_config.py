"""``m2gen spec from-config``: from a downloaded folder to a spec, and from its package to generated text."""

from __future__ import annotations

import importlib
import json
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import arrays_of, config_of, write_checkpoint
from command_line import fails, run
from support import import_package

from m2gen import pipeline
from m2gen.errors import UsageError
from m2gen.runtime.checkpoints import dtype_of, spec_text
from m2gen.spec import parse_spec

VARIANT = "k16_v16_q1_k1_v4_f4_w4_{dtype}_carry_{tanh}"


def keys(text: str) -> list[str]:
    """Return the keys of a spec's variants."""
    from m2gen.variant import expand

    return [built.variant.key for built in expand(parse_spec(text, "spec.yaml"))]


def test_two_commands_lead_to_text(tmp_path: Path) -> None:
    """The spec of a folder has a package built that loads the folder, on kernels, and generates the recorded tokens."""
    folder = write_checkpoint(tmp_path / "Hybrid-1.5B", "hybrid_nope")
    done = run("spec", "from-config", str(folder), "--out", str(tmp_path / "hybrid.yaml"))
    assert (done.exit_code, done.output) == (0, "")
    text = (tmp_path / "hybrid.yaml").read_text(encoding="utf-8")
    assert parse_spec(text, "hybrid.yaml").name == "hybrid_1_5b"
    assert keys(text) == [VARIANT.format(dtype="fp32", tanh="exact")]  # what the weights are in
    package = import_package(tmp_path / "built", pipeline.render(pipeline.plan(str(tmp_path / "hybrid.yaml"))))
    hf, facts = importlib.import_module(f"{package.__name__}.hf"), arrays_of("hybrid_nope")
    model = hf.M2RNNForCausalLM.from_pretrained(folder)
    out = model.generate(facts["input_ids"], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(out, facts["generated"])


def test_what_may_be_asked(tmp_path: Path) -> None:
    """A name, targets and dtypes in place of the folder's and the GPU's."""
    folder = write_checkpoint(tmp_path / "a", "hybrid_rope")
    asked = ("--name", "other", "--target", "sm_80,gfx942", "--dtype", "bf16", "--dtype", "fp32")
    done = run("spec", "from-config", str(folder), *asked)
    spec = parse_spec(done.stdout, "spec.yaml")
    assert (spec.name, tuple(spec.targets)) == ("other", ("sm_80", "gfx942"))
    assert keys(done.stdout) == [VARIANT.format(dtype=dtype, tanh="exact") for dtype in ("bf16", "fp32")]


def test_layers_of_several_dims(tmp_path: Path) -> None:
    """Each set of dims is a layer, whose comment names its users; a single gate serves all heads."""
    config = config_of("hybrid_nope")
    mixer = config["sequence_mixer_blocks"][0]
    other = {**mixer, "k_head_dim": 32, "num_f_heads": 1}
    config |= {"sequence_mixer_blocks": [mixer, other, mixer], "num_layers": 3, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    text = run("spec", "from-config", str(tmp_path), "--name", "x").stdout
    first = VARIANT.format(dtype="bf16", tanh="approx")
    assert keys(text) == [first, first.replace("k16", "k32")]
    assert "m2rnn:  # layers 0, 2" in text
    assert "m2rnn1:  # layers 1" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sequence_mixer_blocks": None}, r"\$\.sequence_mixer_blocks must be a list of mappings, got None"),
        ({"sequence_mixer_blocks": []}, "must have a block of type m2rnn, got none"),
        ({"dtype": "int8"}, r"\$\.dtype must be of .*, got 'int8'"),
    ],
    ids=["no list", "no block", "dtype"],
)
def test_configurations_that_are_none(tmp_path: Path, change: dict[str, object], said: str) -> None:
    """One line says where the configuration is wrong."""
    (tmp_path / "config.json").write_text(json.dumps({**config_of("hybrid_nope"), **change}), encoding="utf-8")
    assert re.search(said, fails(2, "spec", "from-config", str(tmp_path)))


def test_files_that_are_none(tmp_path: Path) -> None:
    """A folder without a configuration, one that is no JSON, a dim that is none, and a place that cannot be written."""
    assert "config.json must be a readable file" in fails(2, "spec", "from-config", str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "config.json must be JSON" in fails(2, "spec", "from-config", str(tmp_path))
    (tmp_path / "config.json").write_text("[" * 100_000, encoding="utf-8")
    assert "config.json must be JSON" in fails(2, "spec", "from-config", str(tmp_path))
    config = config_of("hybrid_nope")
    config["sequence_mixer_blocks"][0]["num_q_heads"] = 0
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    said = "$.sequence_mixer_blocks[0].num_q_heads must be an integer of at least 1, got 0"
    assert said in fails(2, "spec", "from-config", str(tmp_path))
    folder = write_checkpoint(tmp_path / "a", "hybrid_nope")
    assert "must be writable" in fails(2, "spec", "from-config", str(folder), "--out", str(tmp_path / "no" / "a.yaml"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"weight"',
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
    ],
    ids=["empty", "no length", "no mapping", "cut off", "deep"],
)
def test_weights_that_are_none(tmp_path: Path, content: bytes) -> None:
    """A file that is no safetensors file, whose dtype is asked for where the configuration names none, is an error."""
    folder = write_checkpoint(tmp_path / "a", "hybrid_nope")
    for path in folder.glob("*.safetensors"):
        path.write_bytes(content)
    assert "must be a safetensors file" in fails(2, "spec", "from-config", str(folder))


@pytest.mark.parametrize(
    ("option", "said"), [("--target", "$.targets must have at least one"), ("--name", "--name must be")]
)
def test_empty_options_are_not_as_if_not_given(tmp_path: Path, option: str, said: str) -> None:
    """An empty text is wrong, and not replaced by what comes from the GPU and the folder."""
    folder = write_checkpoint(tmp_path / "a", "hybrid_nope")
    assert said in fails(2, "spec", "from-config", str(folder), option, "")


@pytest.mark.parametrize("positions", ["many", 0, True, None])
def test_positions_that_are_none(tmp_path: Path, positions: object) -> None:
    """The length of the spec's workload is the configuration's, which must be one."""
    folder = write_checkpoint(tmp_path / "a", "hybrid_nope")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}), encoding="utf-8")
    assert "$.max_position_embeddings must be a positive integer" in fails(2, "spec", "from-config", str(folder))


@pytest.mark.parametrize(("positions", "seq"), [(100, 100), (4096, 4096), (131072, 4096), (None, 4096)])
def test_workloads_are_no_longer_than_tuning_likes(positions: int | None, seq: int) -> None:
    """All positions of a model that has few, and 4096 steps of one that has more or does not say."""
    config = {name: value for name, value in config_of("hybrid_nope").items() if name != "max_position_embeddings"}
    given = {} if positions is None else {"max_position_embeddings": positions}
    text = spec_text({**config, **given})
    assert [workload.seq for workload in parse_spec(text, "a.yaml").layers["m2rnn"].workloads] == [seq]


def stored(path: Path, **tensors: tuple[str, list[int]]) -> None:
    """Write the header of a safetensors file, which is all that is read."""
    header = {f"{name}.weight": {"dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def test_weights_have_the_dtype_of_their_matrices(tmp_path: Path) -> None:
    """Norms and codes may have another, and not every file has a matrix; what the configuration says counts first."""
    assert dtype_of(tmp_path, {}) == "bf16"
    stored(tmp_path / "model-1.safetensors", norm=("F32", [16]), codes=("I8", [16, 16]))
    assert dtype_of(tmp_path, {}) == "bf16"
    stored(tmp_path / "model-3.safetensors", up=("F32", [16, 16]))
    assert dtype_of(tmp_path, {}) == "fp32"
    stored(tmp_path / "model-2.safetensors", norm=("F32", [16]), down=("F16", [16, 16]))
    assert dtype_of(tmp_path, {}) == "fp16"
    assert dtype_of(tmp_path, {"torch_dtype": "bfloat16"}) == "bf16"
    assert dtype_of(tmp_path, {"dtype": "float32", "torch_dtype": "bfloat16"}) == "fp32"


def test_a_spec_that_is_there_is_kept(tmp_path: Path) -> None:
    """One that was edited since it was written stays, and the same one may be asked for again."""
    folder, out = write_checkpoint(tmp_path / "a", "hybrid_nope"), tmp_path / "a.yaml"
    command = ("spec", "from-config", str(folder), "--out", str(out))
    assert [run(*command).exit_code for _ in range(2)] == [0, 0]
    edited = out.read_text(encoding="utf-8") + "# mine\n"
    out.write_text(edited, encoding="utf-8")
    assert "must be absent or this spec, got another file" in fails(2, *command)
    assert out.read_text(encoding="utf-8") == edited


SPEC = "schema: 1\n"


def test_a_spec_goes_into_a_pipe() -> None:
    """What is no file is written to as it is, and never read."""
    ours, theirs = os.pipe()
    writing = threading.Thread(target=pipeline.write_spec, args=(Path(f"/proc/self/fd/{theirs}"), SPEC), daemon=True)
    writing.start()
    writing.join(1800)
    assert not writing.is_alive()
    os.close(theirs)
    with open(ours, encoding="utf-8") as pipe:
        assert pipe.read() == SPEC


def test_a_link_that_leads_nowhere_is_kept(tmp_path: Path) -> None:
    """A write that fails leaves what was there."""
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "missing" / "x.yaml")
    with pytest.raises(UsageError, match=r"link\.yaml must be writable"):
        pipeline.write_spec(link, SPEC)
    assert link.is_symlink()


@pytest.mark.parametrize("dtype", [["bf16"], {"a": 1}])
def test_a_dtype_that_is_no_word(tmp_path: Path, dtype: object) -> None:
    """It is named like any other that there is not."""
    told = {"dtype": dtype, "sequence_mixer_blocks": []}
    (tmp_path / "config.json").write_text(json.dumps(told), encoding="utf-8")
    line = fails(2, "spec", "from-config", str(tmp_path), "--target", "sm_90")
    assert "config.json: $.dtype must be of bfloat16" in line
