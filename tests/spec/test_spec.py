"""Good specs: what they mean, how they are found, and what identifies them."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from m2gen.errors import SpecError
from m2gen.spec import (
    KNOWN_TARGETS,
    MAX_VARIANTS,
    ClipMode,
    Dtype,
    Fp32Products,
    HeadGrid,
    Heads,
    Layer,
    Objective,
    Point,
    StateDtype,
    TanhMode,
    find_spec,
    json_schema,
    load_spec,
    parse_spec,
    spec_hash,
)
from m2gen.variant import expand

SPECS = Path(__file__).resolve().parents[2] / "specs"
SHIPPED = sorted(SPECS.glob("*.yaml"))

MINIMAL = """
schema: 1
name: minimal
targets: sm_90
layers:
  base: {head_dim: 16, state_expansion: 64, heads: {q: 1, k: 1, v: 4, f: 4, w: 2}, dtypes: bf16}
"""

GRID = """
schema: 1
name: grid
targets: [gfx942, sm_80]
layers:
  second: {head_dim: [32, 16], state_expansion: 64, heads: {q: [1, 2], k: 1, v: 4, f: 4, w: 4}, dtypes: [fp32, bf16]}
  first: {head_dim: 8, state_expansion: [8], heads: {q: 1, k: 1, v: 1, f: 1, w: 1}, dtypes: [fp16]}
numerics: {clip: total}
tuning: {objective: infer, budget: 90s}
"""


def test_a_minimal_spec_gets_the_defaults() -> None:
    spec = parse_spec(MINIMAL, "a.yaml")
    layer = spec.layers["base"]
    assert (spec.schema_version, spec.name, spec.targets) == (1, "minimal", ("sm_90",))
    assert (layer.head_dim, layer.state_expansion, layer.dtypes) == ((16,), (64,), (Dtype.BF16,))
    assert layer.workloads == ()
    assert spec.numerics.model_dump() == {
        "state": StateDtype.FP32,
        "clip": ClipMode.CARRY,
        "tanh": TanhMode.APPROX,
        "fp32_products": Fp32Products.IEEE,
    }
    assert (spec.tuning.budget_seconds, spec.tuning.objective) == (600, Objective.TRAIN)
    heads = Heads(q=1, k=1, v=4, f=4, w=2)
    assert heads.total == 4
    assert layer.points() == (Point(head_dim=16, state_expansion=64, heads=heads, dtype=Dtype.BF16),)


def test_a_grid_expands_in_the_order_of_the_file() -> None:
    spec = parse_spec(GRID, "a.yaml")
    assert list(spec.layers) == ["second", "first"]
    layer = spec.layers["second"]
    points = [(p.head_dim, p.state_expansion, p.heads.q, p.dtype.value) for p in layer.points()]
    assert points == list(product([32, 16], [64], [1, 2], ["fp32", "bf16"]))
    assert layer.size == len(points) == 8
    assert spec.targets == ("gfx942", "sm_80")
    assert spec.numerics.clip is ClipMode.TOTAL
    assert (spec.tuning.budget_seconds, spec.tuning.objective) == (90, Objective.INFER)


def test_gates_are_the_fastest_axis_of_a_grid() -> None:
    """Each dtype with a gate that is given, then with one that the kernel computes; only the latter's key says so."""
    spec = parse_spec(MINIMAL.replace("dtypes: bf16", "dtypes: [bf16, fp16], gate: [given, softplus]"), "a.yaml")
    assert [(p.dtype.value, p.gate.value) for p in spec.layers["base"].points()] == list(
        product(["bf16", "fp16"], ["given", "softplus"])
    )
    assert [built.variant.key.endswith("_softplus") for built in expand(spec)] == [False, True, False, True]


def test_products_of_fp32_are_part_of_what_a_kernel_means() -> None:
    """tf32 is another variant of fp32, and none of the narrow dtypes, which it says nothing about."""
    text = MINIMAL.replace("dtypes: bf16", "dtypes: [bf16, fp32]")
    ieee, tf32 = (
        [built.variant.key for built in expand(parse_spec(f"{text}{more}", "a.yaml"))]
        for more in ("", "numerics: {fp32_products: tf32}\n")
    )
    assert ieee[0] == tf32[0]
    assert tf32[1] == f"{ieee[1]}_tf32"


@pytest.mark.parametrize(("budget", "seconds"), [("90s", 90), ("10m", 600), ("1h", 3600), ("999999h", 3599996400)])
def test_budgets_are_read_as_seconds(budget: str, seconds: int) -> None:
    assert parse_spec(f"{MINIMAL}tuning: {{budget: {budget}}}\n", "a.yaml").tuning.budget_seconds == seconds


def test_a_spec_is_frozen_hashable_and_picklable() -> None:
    spec = parse_spec(GRID, "a.yaml")
    assert pickle.loads(pickle.dumps(spec)) == spec == copy.deepcopy(spec)
    assert hash(spec) == hash(parse_spec(GRID, "b.yaml"))
    with pytest.raises(ValidationError):
        spec.name = "other"
    with pytest.raises(TypeError):
        spec.layers["third"] = spec.layers["first"]  # type: ignore[index]


def test_models_check_what_python_gives_them_too() -> None:
    with pytest.raises(ValidationError, match="must divide 6"):
        Heads(q=4, k=1, v=6, f=6, w=6)
    layer: dict[str, Any] = {"head_dim": 8, "state_expansion": 8, "dtypes": "bf16"}
    layer["heads"] = {"q": 4, "k": 1, "v": 6, "f": 6, "w": 6}
    with pytest.raises(ValidationError, match="must divide 6"):
        Layer(**layer)


def test_dump_and_schema_survive_a_round_trip() -> None:
    spec = parse_spec(GRID, "a.yaml")
    dumped = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    assert parse_spec(yaml.safe_dump(dumped, sort_keys=False), "b.yaml") == spec


def test_the_largest_grid_is_served_and_one_more_is_not() -> None:
    dims, heads = list(range(1, 33)), "{q: 1, k: 1, v: 1, f: 1, w: 1}"
    layer = f"{{head_dim: {dims}, state_expansion: {[*dims, *range(33, 129)]}, heads: {heads}, dtypes: bf16}}"
    text = f"schema: 1\nname: a\ntargets: sm_90\nlayers:\n  x: {layer}\n"
    assert len(parse_spec(text, "a.yaml").layers["x"].points()) == MAX_VARIANTS
    more = f"{text}  y: {{head_dim: 1, state_expansion: 1, heads: {heads}, dtypes: bf16}}\n"
    with pytest.raises(SpecError, match=r"^a\.yaml: \$\.layers must ask for at most 4096 variants, got 4097$"):
        parse_spec(more, "a.yaml")


AXIS = st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=3, unique=True)


@settings(max_examples=300)
@given(st.tuples(AXIS, AXIS, AXIS, AXIS, AXIS))
def test_head_grids_are_checked_as_if_every_combination_were(axes: tuple[list[int], ...]) -> None:
    expected = {
        (role, axis.index(count))
        for counts in product(*axes)
        for role, axis, count in zip("qkvfw", axes, counts, strict=True)
        if max(counts) % count
    }
    try:
        grid = HeadGrid.model_validate(dict(zip("qkvfw", axes, strict=True)))
    except ValidationError as error:
        found = {breach.path for breach in error.errors()[0]["ctx"]["breaches"]}
    else:
        found = set()
        assert [heads.counts for heads in grid.points()] == list(product(*axes))
    assert found == expected


SAME = [
    MINIMAL.replace("sm_90", "[sm_90] # comment").replace("head_dim: 16", "head_dim: [16]"),
    MINIMAL.replace("name: minimal\n", "").replace("targets:", "name: 'minimal'\ntargets:"),
    MINIMAL.replace("{q: 1, k: 1, v: 4, f: 4, w: 2}", "{w: 2, v: [4], f: 4, k: 1, q: 1}"),
    MINIMAL + "numerics: {tanh: approx}\ntuning: {budget: 600s}\n",
    "\ufeff" + MINIMAL.replace("\n", "\r\n"),
]


@pytest.mark.parametrize("text", SAME)
def test_what_means_the_same_has_the_same_hash(text: str) -> None:
    assert spec_hash(parse_spec(text, "b.yaml")) == spec_hash(parse_spec(MINIMAL, "a.yaml"))


def test_the_hash_never_changes_by_accident() -> None:
    assert spec_hash(parse_spec(MINIMAL, "a.yaml")) == "802d2fd84c74"


def test_what_means_something_else_has_another_hash() -> None:
    spec = yaml.safe_load(GRID)
    swapped = dict(reversed(spec["layers"].items()))
    changes: list[dict[str, Any]] = [
        {"name": "other"},
        {"targets": ["sm_80", "gfx942"]},
        {"layers": swapped},
        {"layers": {"third" if name == "first" else name: layer for name, layer in spec["layers"].items()}},
        {"numerics": {"clip": "carry"}},
        {"tuning": {"objective": "infer", "budget": "91s"}},
    ]
    texts = [GRID, *(yaml.safe_dump({**spec, **change}, sort_keys=False) for change in changes)]
    hashes = [spec_hash(parse_spec(text, "a.yaml")) for text in texts]
    assert len(set(hashes)) == len(texts)
    assert all(len(digits) == 12 and int(digits, 16) >= 0 for digits in hashes)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_specs_load(path: Path) -> None:
    spec = load_spec(path)
    assert spec.name == path.stem
    for_verification = spec.name.startswith("matrix")  # which is never timed
    assert all(layer.workloads or for_verification for layer in spec.layers.values())
    assert load_spec(path) == parse_spec(path.read_bytes(), "elsewhere.yaml")


def test_there_is_a_spec_for_each_gpu() -> None:
    assert {path.stem for path in SHIPPED} >= {"a100", "b200", "h100", "h200", "mi300x", "tiny"}
    h100, h200 = (load_spec(SPECS / name) for name in ("h100.yaml", "h200.yaml"))
    assert dict(h200.layers) == {**h100.layers, "square_16": h200.layers["square_16"]}


def conforms(value: object, schema: dict[str, Any], definitions: dict[str, Any]) -> bool:
    """Tell whether ``value`` conforms to the part of JSON schema that ``json_schema`` uses."""
    if "$ref" in schema:
        return conforms(value, definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return any(conforms(value, option, definitions) for option in schema["anyOf"])
    match schema["type"]:
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "string":
            return isinstance(value, str) and value in schema.get("enum", [value])
        case "array":
            if not isinstance(value, list) or len(value) < schema["minItems"]:
                return False
            distinct = all(item not in value[:i] for i, item in enumerate(value))
            return distinct and all(conforms(item, schema["items"], definitions) for item in value)
        case "object":
            return isinstance(value, dict) and object_conforms(value, schema, definitions)
    raise AssertionError(schema)


def object_conforms(value: dict[str, object], schema: dict[str, Any], definitions: dict[str, Any]) -> bool:
    """Tell whether the mapping ``value`` conforms: known keys, required keys, conforming values."""
    assert schema["additionalProperties"] is False
    properties = schema.get("properties", {})
    patterns = list(schema.get("patternProperties", {}).values())
    known = set(value) <= set(properties) or patterns
    required = set(schema.get("required", [])) <= set(value)
    parts = {key: properties.get(key) or patterns[0] for key in value} if known else {}
    return bool(known) and required and all(conforms(value[key], part, definitions) for key, part in parts.items())


@pytest.mark.parametrize("text", [MINIMAL, GRID, *(path.read_text() for path in SHIPPED)])
def test_specs_conform_to_the_json_schema(text: str) -> None:
    schema = json_schema()
    spec = yaml.safe_load(text)
    assert conforms(spec, schema, schema["$defs"])
    wrongs: list[dict[str, Any]] = [
        {"schema": 2},
        {"layers": {"x": {}}},
        {"layers": []},
        {"targets": ["sm_90", "sm_90"]},
        {"targets": ["sm_1"]},
        {"extra": 1},
    ]
    for wrong in wrongs:
        assert not conforms({**spec, **wrong}, schema, schema["$defs"])


def test_the_json_schema_uses_the_words_of_the_file() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {"schema", "name", "targets", "layers", "numerics", "tuning"}
    assert schema["required"] == ["schema", "name", "targets", "layers"]
    head_dim = schema["$defs"]["Layer"]["properties"]["head_dim"]["anyOf"]
    assert head_dim[0] == {"type": "integer", "minimum": 1, "maximum": 128}
    assert head_dim[1] == {"type": "array", "items": head_dim[0], "minItems": 1, "uniqueItems": True}
    assert schema["properties"]["targets"]["anyOf"][0]["enum"] == list(KNOWN_TARGETS)
    assert "budget" in schema["$defs"]["Tuning"]["properties"]


def test_specs_are_looked_for_nearest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, here = tmp_path / "shipped", tmp_path / "here"
    (here / "specs").mkdir(parents=True)
    shipped.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(SpecError) as caught:
        find_spec("a.yaml", roots=[shipped])
    expected = f"a.yaml: $ must be a spec file, got none at a.yaml, specs/a.yaml, {shipped / 'a.yaml'}"
    assert caught.value.problems == (expected,)
    for directory, found in [(shipped, shipped), (here / "specs", Path("specs")), (here, Path())]:
        (directory / "a.yaml").write_text(MINIMAL)
        assert find_spec("a.yaml", roots=[shipped]) == found / "a.yaml"
        assert load_spec(find_spec("a.yaml", roots=[shipped])).name == "minimal"


def test_a_path_is_taken_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(MINIMAL)
    absolute = str(tmp_path / "a.yaml")
    assert find_spec(absolute, roots=[]) == Path(absolute)
    missing = str(tmp_path / "b.yaml")
    with pytest.raises(SpecError) as caught:
        find_spec(missing, roots=[tmp_path])
    assert caught.value.problems == (f"{missing}: $ must be a spec file, got none at {missing}",)


@pytest.mark.parametrize("name", ["", ".", "specs", "a\0b", "x" * 5000, "../../none.yaml"])
def test_what_is_no_file_is_not_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        find_spec(name, roots=[tmp_path])
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].isprintable()
