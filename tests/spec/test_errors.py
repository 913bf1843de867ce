"""Bad specs: every problem at once, one line each, and nothing but ``SpecError`` whatever the input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import Count

from m2gen.errors import SpecError, listed
from m2gen.spec import Spec, load_spec, parse_spec
from m2gen.spec.source import MAX_NODES

WHERE = "specs/a.yaml"
IDENTIFIER = "a Python identifier (ASCII, at most 64 characters, no keyword, no dunder)"
SPEC_NAME = "a Python identifier (ASCII, at most 64 characters, no keyword, no dunder, no leading underscore)"
TARGETS = "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx90a, gfx942"
KEYS = "schema, name, targets, layers, numerics, tuning"
IMPORTED = "fla, lm_engine, m2gen, numpy, torch, transformers, triton, xma"
FREE = f"$.name must name no package that others import ({IMPORTED}, Python's own modules)"

GOOD = """
schema: 1
name: good
targets: [sm_90]
layers:
  x:
    head_dim: [16, 32]
    state_expansion: 64
    heads: {q: 1, k: 1, v: 132, f: 132, w: 132}
    dtypes: [bf16]
    workloads: [{batch: 4, seq: 4096}]
numerics: {state: fp32, clip: carry, tanh: approx}
tuning: {budget: 10m, objective: train}
"""


def problems_of(text: str | bytes) -> list[str]:
    """Return what is wrong with ``text``, without the location that every line starts with."""
    with pytest.raises(SpecError) as caught:
        parse_spec(text, WHERE)
    assert all(line.startswith(f"{WHERE}: ") and line.isprintable() for line in caught.value.problems)
    assert str(caught.value) == "\n".join(listed(caught.value.problems))
    return [line.removeprefix(f"{WHERE}: ") for line in caught.value.problems]


WHY = {
    128: " (registers sum the gradient of the V x V state weight)",
    256: " (the most rows that kernels are verified for)",
}


def integer(limit: int) -> str:
    return f"must be an integer from 1 to {limit}{WHY.get(limit, '')}"


def duration(given: str) -> str:
    return f"$.tuning.budget must be a whole number of seconds, minutes or hours such as 90s, 10m or 1h, got {given}"


TAKEN_NAMES = (
    *("torch", "triton", "m2gen", "numpy", "Torch", "TRITON", "json", "Json", "os", "sys", "test", "this"),
    *("fla", "xma", "lm_engine", "transformers", "Transformers"),
)
"""Names of specs whose packages would shadow others, or install over them; some file systems ignore case."""

# What is replaced in GOOD, by what, and the one problem of the result.
EDITS = [
    ("schema: 1", "schema: 2", "$.schema must be 1, got 2"),
    ("schema: 1", "schema: true", "$.schema must be 1, got true"),
    ("schema: 1", "schema: 1.0", "$.schema must be 1, got 1.0"),
    ("schema: 1", "schema: '1'", "$.schema must be 1, got '1'"),
    ("schema: 1", "schema_version: 1\nschema: 1", "$.schema_version is not a known key (did you mean schema?)"),
    ("schema: 1\n", "", "$.schema is missing"),
    ("name: good\n", "", "$.name is missing"),
    ("name: good", "name: ../x", f"$.name must be {SPEC_NAME}, got '../x'"),
    ("name: good", "name: class", f"$.name must be {SPEC_NAME}, got 'class'"),
    ("name: good", "name: a b", f"$.name must be {SPEC_NAME}, got 'a b'"),
    ("name: good", "name: ''", f"$.name must be {SPEC_NAME}, got ''"),
    ("name: good", "name:", f"$.name must be {SPEC_NAME}, got null"),
    ("name: good", "name: 16", f"$.name must be {SPEC_NAME}, got 16"),
    ("name: good", "name: 9a", f"$.name must be {SPEC_NAME}, got '9a'"),
    ("name: good", "name: _a", f"$.name must be {SPEC_NAME}, got '_a'"),
    ("name: good", "name: __init__", f"$.name must be {SPEC_NAME}, got '__init__'"),
    ("name: good", "name: café", f"$.name must be {SPEC_NAME}, got 'café'"),
    ("name: good", 'name: "a\\n"', f"$.name must be {SPEC_NAME}, got 'a\\n'"),
    ("name: good", 'name: "a\\u202Eb"', f"$.name must be {SPEC_NAME}, got 'a\\u202eb'"),
    ("name: good", f"name: {'a' * 65}", f"$.name must be {SPEC_NAME}, got '{'a' * 56}..."),
    *(("name: good", f"name: {name}", f"{FREE}, got '{name}'") for name in TAKEN_NAMES),
    ("targets: [sm_90]\n", "", "$.targets is missing"),
    ("[sm_90]", "[]", "$.targets must have at least one entry, got []"),
    ("[sm_90]", "[sm_90, sm_91]", f"$.targets[1] must be one of {TARGETS}, got 'sm_91'"),
    ("[sm_90]", "hopper", f"$.targets must be one of {TARGETS}, got 'hopper'"),
    ("[sm_90]", "[sm_90, gfx942, sm_90]", "$.targets[2] must not repeat an earlier entry, got 'sm_90'"),
    ("[sm_90]", "{sm_90: 1}", f"$.targets must be one of {TARGETS}, got {{sm_90: 1}}"),
    ("  x:", "  a b:", f"$.layers['a b'] must be {IDENTIFIER}, got 'a b'"),
    ("  x:", "  def:", f"$.layers.def must be {IDENTIFIER}, got 'def'"),
    ("  x:", "  __x__:", f"$.layers.__x__ must be {IDENTIFIER}, got '__x__'"),
    ("  x:", "  7:", f"$.layers['7'] must be {IDENTIFIER}, got '7'"),
    ("  x:", "  '':", f"$.layers[''] must be {IDENTIFIER}, got ''"),
    ("  x:", '  "[key]":', f"$.layers['[key]'] must be {IDENTIFIER}, got '[key]'"),
    ("  x:", f"  {'x' * 65}:", f"$.layers['{'x' * 56}...] must be {IDENTIFIER}, got '{'x' * 56}..."),
    ("  x:", "  y: 5\n  x:", "$.layers.y must be a mapping, got 5"),
    ("head_dim:", "haed_dim: 1\n    head_dim:", "$.layers.x.haed_dim is not a known key (did you mean head_dim?)"),
    ("head_dim:", "Heads: 1\n    head_dim:", "$.layers.x.Heads is not a known key (did you mean heads?)"),
    ("    head_dim: [16, 32]\n", "", "$.layers.x.head_dim is missing"),
    ("[16, 32]", "[]", "$.layers.x.head_dim must have at least one entry, got []"),
    ("[16, 32]", "[16, 0]", f"$.layers.x.head_dim[1] {integer(128)}, got 0"),
    ("[16, 32]", "-1", f"$.layers.x.head_dim {integer(128)}, got -1"),
    ("[16, 32]", "129", f"$.layers.x.head_dim {integer(128)}, got 129"),
    ("[16, 32]", "true", f"$.layers.x.head_dim {integer(128)}, got true"),
    ("[16, 32]", "16.0", f"$.layers.x.head_dim {integer(128)}, got 16.0"),
    ("[16, 32]", "'16'", f"$.layers.x.head_dim {integer(128)}, got '16'"),
    ("[16, 32]", "[[16]]", f"$.layers.x.head_dim[0] {integer(128)}, got [16]"),
    ("[16, 32]", "{a: null}", f"$.layers.x.head_dim {integer(128)}, got {{a: null}}"),
    ("[16, 32]", "", f"$.layers.x.head_dim {integer(128)}, got null"),
    ("[16, 32]", "[16, 32, 16]", "$.layers.x.head_dim[2] must not repeat an earlier entry, got 16"),
    ("[16, 32]", "1_0", f"$.layers.x.head_dim {integer(128)}, got '1_0'"),
    ("[16, 32]", "0x10", f"$.layers.x.head_dim {integer(128)}, got '0x10'"),
    ("[16, 32]", "0o7", f"$.layers.x.head_dim {integer(128)}, got '0o7'"),
    ("[16, 32]", "010", f"$.layers.x.head_dim {integer(128)}, got '010'"),
    ("[16, 32]", "1:30", f"$.layers.x.head_dim {integer(128)}, got '1:30'"),
    ("[16, 32]", ".inf", f"$.layers.x.head_dim {integer(128)}, got inf"),
    ("[16, 32]", "-.INF", f"$.layers.x.head_dim {integer(128)}, got -inf"),
    ("[16, 32]", ".nan", f"$.layers.x.head_dim {integer(128)}, got nan"),
    ("[16, 32]", "1e400", f"$.layers.x.head_dim {integer(128)}, got inf"),
    ("[16, 32]", "2001-12-14", f"$.layers.x.head_dim {integer(128)}, got '2001-12-14'"),
    ("[16, 32]", "1" + 5000 * "0", f"$.layers.x.head_dim {integer(128)}, got '1{55 * '0'}..."),
    ("[16, 32]", 99 * "9", f"$.layers.x.head_dim {integer(128)}, got {57 * '9'}..."),
    ("state_expansion: 64", "state_expansion: 257", f"$.layers.x.state_expansion {integer(256)}, got 257"),
    ("{q: 1, k: 1, v: 132, f: 132, w: 132}", "8", "$.layers.x.heads must be a mapping, got 8"),
    ("q: 1,", "", "$.layers.x.heads.q is missing"),
    ("q: 1", "q: 5", "$.layers.x.heads.q must divide 132, got 5"),
    ("q: 1", "q: [1, 2, 5]", "$.layers.x.heads.q[2] must divide 132, got 5"),
    ("q: 1", "q: 0", f"$.layers.x.heads.q {integer(65535)}, got 0"),
    ("q: 1", "q: 65536", f"$.layers.x.heads.q {integer(65535)}, got 65536"),
    ("q: 1", "q: 1, n: 1", "$.layers.x.heads.n is not a known key (known: q, k, v, f, w)"),
    ("[bf16]", "[bf16, fp8]", "$.layers.x.dtypes[1] must be one of bf16, fp16, fp32, got 'fp8'"),
    ("[bf16]", "BF16", "$.layers.x.dtypes must be one of bf16, fp16, fp32, got 'BF16'"),
    ("[bf16]", "[[bf16]]", "$.layers.x.dtypes[0] must be one of bf16, fp16, fp32, got ['bf16']"),
    ("batch: 4", "batch: 0", f"$.layers.x.workloads[0].batch {integer(2**31 - 1)}, got 0"),
    ("batch: 4, ", "", "$.layers.x.workloads[0].batch is missing"),
    ("batch: 4", "batch: 4, packed: yes", "$.layers.x.workloads[0].packed must be true or false, got 'yes'"),
    ("[{batch: 4, seq: 4096}]", "[]", "$.layers.x.workloads must have at least one entry, got []"),
    ("[{batch: 4, seq: 4096}]", "[7]", "$.layers.x.workloads[0] must be a mapping, got 7"),
    ("seq: 4096}", "seq: 4096, sep: 1}", "$.layers.x.workloads[0].sep is not a known key (did you mean seq?)"),
    ("state: fp32", "state: bf16", "$.numerics.state must be fp32, got 'bf16'"),
    ("clip: carry", "clip: foo", "$.numerics.clip must be one of carry, total, got 'foo'"),
    ("tanh: approx", "fp32_products: tf16", "$.numerics.fp32_products must be one of ieee, tf32, got 'tf16'"),
    ("[bf16]", "[bf16]\n    gate: relu", "$.layers.x.gate must be one of given, softplus, got 'relu'"),
    ("tanh: approx", "tanh: [exact]", "$.numerics.tanh must be one of exact, approx, got ['exact']"),
    ("clip: carry", "clap: carry", "$.numerics.clap is not a known key (did you mean clip?)"),
    ("{budget: 10m, objective: train}", "", "$.tuning must be a mapping, got null"),
    ("budget: 10m", "budget: 600", duration("600")),
    ("budget: 10m", "budget: 1.5h", duration("'1.5h'")),
    ("budget: 10m", "budget: 0s", duration("'0s'")),
    ("budget: 10m", "budget: 10 m", duration("'10 m'")),
    ("budget: 10m", "budget_seconds: 600", "$.tuning.budget_seconds is not a known key (did you mean budget?)"),
    ("objective: train", "objective: fast", "$.tuning.objective must be one of train, infer, got 'fast'"),
    ("tuning:", "tunning:", "$.tunning is not a known key (did you mean tuning?)"),
    ("tuning:", '"a\\nb": 1\ntuning:', f"$['a\\nb'] is not a known key (known: {KEYS})"),
    ("tuning:", "<<: {a: 1}\ntuning:", f"$['<<'] is not a known key (known: {KEYS})"),
    ("tuning:", "name: good\ntuning:", "$.name must be given once, got it again on line 13"),
    ("q: 1", "q: 1, q: 2", "$.layers.x.heads.q must be given once, got it again on line 9"),
]


@pytest.mark.parametrize(("old", "new", "problem"), EDITS, ids=range(len(EDITS)))
def test_one_problem_is_one_exact_line(old: str, new: str, problem: str) -> None:
    assert GOOD.count(old) >= 1
    assert problems_of(GOOD.replace(old, new, 1)) == [problem]


# A text that is refused as a whole, and the one problem that says why and where.
REFUSED: list[tuple[str | bytes, str]] = [
    ("", "$ must be a mapping, got an empty file"),
    ("# only a comment\n", "$ must be a mapping, got an empty file"),
    ("---\n", "$ must be a mapping, got null"),
    ("[]", "$ must be a mapping, got []"),
    ("- a\n- true\n- 1.5", "$ must be a mapping, got ['a', true, 1.5]"),
    ("spec", "$ must be a mapping, got 'spec'"),
    ("schema: 1\nname: [", "line 2, column 8 must be valid YAML (expected the node content, but found '<stream end>')"),
    ("a: b: c", "line 1, column 5 must be valid YAML (mapping values are not allowed here)"),
    ("a:\n\tb: 1", r"line 2, column 1 must be valid YAML (found character '\t' that cannot start any token)"),
    ("a: 'b", "line 1, column 6 must be valid YAML (found unexpected end of stream)"),
    ('a: "\\q"', "line 1, column 6 must be valid YAML (found unknown escape character 'q')"),
    ('a: "\\UFFFFFFFF"', "line 1, column 7 must be valid YAML (an escape or a version is out of range)"),
    ('a: "\\U00110000"', "line 1, column 7 must be valid YAML (an escape or a version is out of range)"),
    (
        f"%YAML 1.{'9' * 5000}\n---\na: 1",
        "line 1, column 9 must be valid YAML (an escape or a version is out of range)",
    ),
    (
        "%YAML 2.0\n---\na: 1",
        "line 1, column 1 must be valid YAML (found incompatible YAML document (version 1.* is required))",
    ),
    ('a: "\\uD83D\\uDE00"', r"line 1, column 4 must be Unicode text, got '\ud83d\ude00'"),
    ("a: 1\n---\nb: 2", "line 2, column 1 must not start another document"),
    ("a: 1\n...\n---\n", "line 3, column 1 must not start another document"),
    ("a: &x 1\nb: *x", "line 2, column 4 must not be an alias, got '*x'"),
    ("a: &x [*x]", "line 1, column 8 must not be an alias, got '*x'"),
    ("a: &x {b: 1}\nc: {<<: *x}", "line 2, column 9 must not be an alias, got '*x'"),
    ("&x a: 1\n*x : 2", "line 2, column 1 must not be an alias, got '*x'"),
    (
        "a: !!python/object/apply:os.system [ls]",
        "line 1, column 4 must not have a tag, got '!!python/object/apply:os.system'",
    ),
    ("a: !!int '3'", "line 1, column 4 must not have a tag, got '!!int'"),
    ("a: ! b", "line 1, column 4 must not have a tag, got '!'"),
    ("!!set {a}", "line 1, column 1 must not have a tag, got '!!set'"),
    ("? [a]\n: b", "line 1, column 3 must be a key, got a list or a mapping"),
    ("{{a: 1}: b}", "line 1, column 2 must be a key, got a list or a mapping"),
    ("a: " + "[" * 100_000, "line 1, column 20 must not nest deeper than 16 levels"),
    ("- " * 100_000, "line 1, column 35 must not nest deeper than 16 levels"),
    ("a: [" + "1," * 500_000 + "]", "line 1, column 39999 must not exceed 20000 values and keys"),
    ("x" * (2**20 + 1), "$ must be at most 1048576 bytes long"),
    (b"x" * (2**20 + 1), "$ must be at most 1048576 bytes long"),
    ("a: 1\nb: \0", r"line 2, column 4 must be printable text, got '\x00'"),
    ("a: 1\r\nb: \x1b[0m", r"line 2, column 4 must be printable text, got '\x1b'"),
    (b"\xff\xfes\0c\0", "line 1, column 1 must be UTF-8, got byte 0xff"),
    (b"a: 1\nb: caf\xe9", "line 2, column 7 must be UTF-8, got byte 0xe9"),
    (b"\x89PNG\r\n\x1a\n", "line 1, column 1 must be UTF-8, got byte 0x89"),
    (b"\x7fELF\x01", r"line 1, column 1 must be printable text, got '\x7f'"),
]


@pytest.mark.parametrize(("text", "problem"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_spec_is_refused_in_one_located_line(text: str | bytes, problem: str) -> None:
    with Count() as count:
        assert problems_of(text) == [problem]
    assert count.made < 200 * MAX_NODES, "the work is bounded by what is read of the text"


def test_every_problem_is_reported_in_the_order_of_the_file() -> None:
    text = """
tuning: {budgte: 10m}
schema: 3
layers:
  one: {head_dim: 0, state_expansion: [1, 999], heads: {q: 5, k: 1, v: 7, f: 3, w: 7}, dtypes: [bf16, tf32]}
  two: {}
  one: {}
targets: [sm_90, volta]
nmae: x
"""
    dtypes = "must be one of bf16, fp16, fp32, got 'tf32'"
    assert problems_of(text) == [
        "$.name is missing",
        "$.tuning.budgte is not a known key (did you mean budget?)",
        "$.schema must be 1, got 3",
        f"$.layers.one.head_dim {integer(128)}, got 0",
        f"$.layers.one.state_expansion[1] {integer(256)}, got 999",
        "$.layers.one.heads.q must divide 7, got 5",
        "$.layers.one.heads.f must divide 7, got 3",
        f"$.layers.one.dtypes[1] {dtypes}",
        "$.layers.two.head_dim is missing",
        "$.layers.two.state_expansion is missing",
        "$.layers.two.heads is missing",
        "$.layers.two.dtypes is missing",
        "$.layers.one must be given once, got it again on line 7",
        f"$.targets[1] must be one of {TARGETS}, got 'volta'",
        "$.nmae is not a known key (did you mean name?)",
    ]


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ("", "$.layers must be a mapping, got null"),
        ("[]", "$.layers must be a mapping, got []"),
        ("{}", "$.layers must have at least one entry, got {}"),
    ],
)
def test_layers_are_needed(layers: str, problem: str) -> None:
    assert problems_of(f"schema: 1\nname: a\ntargets: sm_90\nlayers: {layers}\n") == [problem]


def test_an_astronomical_grid_fails_at_once() -> None:
    counts, dims = [2**power for power in range(16)], list(range(1, 129))
    layer = {"head_dim": dims, "state_expansion": dims, "heads": dict.fromkeys("qkvfw", counts), "dtypes": "bf16"}
    text = json.dumps({"schema": 1, "name": "a", "targets": "sm_90", "layers": {"x": layer}})
    with Count() as count:
        assert problems_of(text) == [f"$.layers must ask for at most 4096 variants, got {128 * 128 * 16**5}"]
    assert count.made < 1000 * (2 * len(dims) + 5 * len(counts)), "the work is that of the axes, not of the grid"


def test_names_that_only_begin_like_others_are_free() -> None:
    for name in ("torch2", "m2rnn", "json_", "my_triton", "tests"):
        assert parse_spec(GOOD.replace("name: good", f"name: {name}"), WHERE).name == name


def test_a_grid_of_nothing_but_mistakes_is_listed_in_part() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(GOOD.replace("[16, 32]", str([-n for n in range(1, 9001)])), WHERE)
    assert len(caught.value.problems) == 9000
    lines = str(caught.value).splitlines()
    assert lines[:20] == list(caught.value.problems[:20])
    assert lines[20:] == ["and 8980 more"]


def test_long_values_are_cut() -> None:
    (problem,) = problems_of(GOOD.replace("carry", "x" * 10_000))
    assert problem == f"$.numerics.clip must be one of carry, total, got '{'x' * 56}..."


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def problem(path: Path) -> str:
        with pytest.raises(SpecError) as caught:
            load_spec(path)
        (line,) = caught.value.problems
        return line.removeprefix(f"{tmp_path}/")

    assert problem(tmp_path / "none.yaml") == "none.yaml: $ must be a readable file (No such file or directory)"
    assert problem(tmp_path) == f"{tmp_path}: $ must be a readable file (Is a directory)"
    assert problem(tmp_path / "a\0b") == r"a\x00b: $ must be a readable file (embedded null byte)"
    assert problem(tmp_path / "a\nb") == r"a\nb: $ must be a readable file (No such file or directory)"
    (tmp_path / "binary.yaml").write_bytes(b"\x80")
    assert problem(tmp_path / "binary.yaml") == "binary.yaml: line 1, column 1 must be UTF-8, got byte 0x80"
    (tmp_path / "long.yaml").write_bytes(b" " * (2**20 + 1))
    assert problem(tmp_path / "long.yaml") == "long.yaml: $ must be at most 1048576 bytes long"

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", deny)
    assert problem(tmp_path / "secret.yaml") == "secret.yaml: $ must be a readable file (Permission denied)"


def only_specs_and_spec_errors(text: str | bytes) -> None:
    """Fail unless ``text`` gives a spec, or problems of one line that start with the location."""
    try:
        spec = parse_spec(text, WHERE)
    except SpecError as error:
        problems = error.problems
    else:
        assert isinstance(spec, Spec)
        return
    assert problems
    for line in problems:
        assert line.startswith(f"{WHERE}: ")
        assert line.isprintable()
        assert "must be valid (" not in line, "a kind of pydantic error without words of its own"
        assert len(line) < 500


FUZZ = settings(max_examples=300)
WORDS = [
    "!!",
    "*a",
    "&a ",
    "\\x",
    "\\u",
    "\\U",
    "%YAML ",
    "%TAG ",
    "<<",
    "schema",
    "layers",
    "heads",
    "null",
    "1e9",
    "|-\n",
]
YAML_TOKENS = st.sampled_from(
    [*"abq01 :-?[]{},#&*!|>'\"%@`~\n\t\\.\r\x85\u2028\ufeff", ": ", "- ", "? ", "\n  ", "\n    ", "---", "...", *WORDS]
)


@FUZZ
@given(st.text())
def test_any_text(text: str) -> None:
    only_specs_and_spec_errors(text)


@FUZZ
@given(st.binary())
def test_any_bytes(text: bytes) -> None:
    only_specs_and_spec_errors(text)


@settings(FUZZ, max_examples=1000)
@given(st.lists(YAML_TOKENS, max_size=30).map("".join))
def test_any_yaml(text: str) -> None:
    only_specs_and_spec_errors(text)


@FUZZ
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 8), st.lists(YAML_TOKENS, max_size=4).map("".join))
def test_any_edit_of_a_spec(start: int, length: int, text: str) -> None:
    only_specs_and_spec_errors(GOOD[:start] + text + GOOD[start + length :])


def spots(value: object) -> list[tuple[Any, Any]]:
    """List every container inside ``value`` with each of its keys or indices."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [spot for key in keys for spot in spots(value[key])]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
SCALARS |= st.sampled_from(["bf16", "sm_90", "carry", "exact", "infer", "1h", 1, 2, 16, 10**100])
KEYWORDS = st.sampled_from(["q", "batch", "heads", "head_dim", "name", "[key]", "<<", "", "x"]) | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS, inner, max_size=3))


def replaced(container: Any, key: Any, value: object, _: str) -> None:
    container[key] = value


def deleted(container: Any, key: Any, _: object, __: str) -> None:
    del container[key]


def renamed(container: Any, key: Any, _: object, name: str) -> None:
    if isinstance(container, dict):
        container[name] = container.pop(key)


def added(container: Any, key: Any, value: object, name: str) -> None:
    if isinstance(container, dict):
        container[name] = value
    else:
        container.append(container[key])


def wrapped(container: Any, key: Any, _: object, __: str) -> None:
    container[key] = [container[key]]


CHANGES = st.sampled_from([replaced, deleted, renamed, added, wrapped])


@settings(FUZZ, max_examples=600)
@given(st.lists(st.tuples(CHANGES, st.integers(0, 10**6), VALUES, KEYWORDS), min_size=1, max_size=3), st.booleans())
def test_any_mutation_of_a_spec(steps: list[tuple[Callable[..., None], int, object, str]], as_json: bool) -> None:
    spec = yaml.safe_load(GOOD)
    for change, place, value, name in steps:
        if found := spots(spec):
            change(*found[place % len(found)], copy.deepcopy(value), name)
    only_specs_and_spec_errors(json.dumps(spec) if as_json else yaml.safe_dump(spec, sort_keys=False))
