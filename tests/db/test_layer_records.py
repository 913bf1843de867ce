"""Records of kernels around a recurrence: their lines, when they are stale, and what builds make of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command_line import run
from records import H100, H200, environment, failed, timing, winner
from support import ROOT, import_package, make_variant

from m2gen import pipeline
from m2gen.bucket import Bucket
from m2gen.db import POLICY, Database, Key, NotARecord, Provenance, Record, Sizes, TensorError, decode, encode, stale
from m2gen.db.lookup import usual_device
from m2gen.kernels import identity
from m2gen.kernels.identity import identity_of
from m2gen.package import emit
from m2gen.schedule.layer import USUAL, AnyTiles, ConvolveTiles, DecayTiles, DecodeTiles, FinishTiles, LayerTiles
from m2gen.schedule.tunable import Tunable
from m2gen.spec import Objective
from m2gen.variant import Variant

TINY = str(ROOT / "specs" / "tiny.yaml")
VARIANT = make_variant(dtype="bf16")
"""The second variant of the tiny spec."""
FINISH, DECODE = FinishTiles(rows=4), DecodeTiles(heads=2)


def tiled(tiles: AnyTiles, variant: Variant = VARIANT, device: str = H200, high: float = 0.9) -> Record:
    """Return a record that serves builds, of a kernel around a recurrence."""
    tunable = Tunable.around(variant, tiles.family)
    times = timing(high)
    if not tunable.times_backward(Objective.TRAIN):
        times = replace(times, backward_ms=None)
    return Record(
        Key(tunable.key, Objective.TRAIN, Bucket.MORE, POLICY),
        environment(device),
        Provenance(identity_of(tunable.variant, tiles), "0" * 12, "0.1.0", 0, 40, "host:0", "study"),
        Sizes(4, 4096),
        tiles,
        times,
        (TensorError("o", 1e-3, 2e-3),),
    )


def test_a_record_is_a_line_that_is_read_back() -> None:
    """Its schedule has the kernel and its knobs; a record of a recurrence has the id that it always had."""
    record = tiled(FINISH)
    line = json.loads(encode(record))
    assert line["schedule"] == {"family": "finish", "rows": 4, "block": 1024, "warps": 4}
    assert line["key"]["variant"] == "finish_k16_v16_q1_k1_v2_f2_w2_bf16"
    assert decode(encode(record)) == record
    assert decode(encode(tiled(DecayTiles(16)))).timing.backward_ms is not None
    shipped = (ROOT / "tuning_db").rglob("*.jsonl")
    for text in [line for path in shipped for line in path.read_text(encoding="utf-8").splitlines()]:
        assert encode(decode(text)) == text


WRONG = {
    "$.schedule.family must be finish, got decode": replace(tiled(FINISH), schedule=DECODE),
    "$.schedule.rows must be at least 1, got 0": replace(tiled(FINISH), schedule=FinishTiles(rows=0)),
    "$.key.bucket must be >8 for the problem": replace(
        tiled(FINISH), key=replace(tiled(FINISH).key, bucket=Bucket.HALF)
    ),
    "$.timing.backward_ms must fit objective train": replace(tiled(FINISH), timing=timing()),
    "$.key.variant must": replace(tiled(FINISH), key=replace(tiled(FINISH).key, variant="finish_k16")),
}


@pytest.mark.parametrize("message", WRONG)
def test_contradictions_are_said(message: str) -> None:
    """A line whose parts do not fit each other is no record."""
    with pytest.raises(Exception, match="record of") as refused:
        encode(WRONG[message])
    assert message in str(refused.value)
    text = json.loads(encode(tiled(FINISH)))
    text["schedule"]["extra"] = 1
    with pytest.raises(NotARecord):
        decode(json.dumps(text, sort_keys=True))


def test_a_record_is_stale_by_its_own_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text of another kernel changes nothing; of this one, or of what it calls, it does."""
    records, render = (tiled(FINISH), tiled(ConvolveTiles(rows=16))), identity.render_layer
    scale, wrong = ("tl.rsqrt(total / INNER + eps) if NORM else 1.0", "tl.rsqrt(total / INNER + eps) if NORM else 2.0")
    changes = (
        (scale, wrong, (True, False)),
        ("FINISH_ROWS: tl.constexpr = tl.constexpr(4)", "FINISH_ROWS: tl.constexpr = tl.constexpr(5)", (True, False)),
        ("DECODE_HEADS: tl.constexpr = tl.constexpr(", "DECODE_HEADS: tl.constexpr = tl.constexpr(1", (False, False)),
        ("e = tl.exp2(-1.4426950408889634 * tl.abs(x))", "e = tl.exp2(-1.5 * tl.abs(x))", (True, True)),
    )
    for old, new, expected in changes:
        identity.layer_kernel_hash.cache_clear()
        monkeypatch.setattr(identity, "render_layer", lambda k, old=old, new=new: render(k).replace(old, new))
        assert tuple(bool(stale(record)) for record in records) == expected, old
    identity.layer_kernel_hash.cache_clear()
    monkeypatch.undo()
    assert not any(map(stale, records))


def test_a_build_has_the_tiles_of_records_and_else_what_it_had() -> None:
    """One module more, for the dtype and arch of the record; every other kernel has the text that it had."""
    plain, tuned = (pipeline.render(pipeline.plan(TINY, records=records)) for records in ((), (tiled(FINISH),)))
    (name,) = {path for path in tuned.files if path.startswith("kernels/")} - set(plain.files)
    assert "FINISH_ROWS: tl.constexpr = tl.constexpr(4)" in tuned.files[name]
    assert tiled(FINISH).id in tuned.files[name]
    assert name.startswith("kernels/layer_k16_v16_q1_k1_v2_f2_")
    same = [path for path in plain.files if path.startswith("kernels/")]
    assert {path: tuned.files[path] for path in same} == {path: plain.files[path] for path in same}
    assert "tiles" not in plain.manifest
    (row,) = tuned.manifest["tiles"]
    assert (row["record"], row["arch"], row["tiles"]) == (tiled(FINISH).id, "sm_90", FINISH.slug)
    usual = pipeline.render(pipeline.plan(TINY, records=[tiled(USUAL.finish)]))
    assert set(usual.files) == set(plain.files), "a default that won is what there is"


def test_records_that_cannot_be_trusted_do_not_serve() -> None:
    """Stale ones, failures and other objectives leave the usual tiles; the device of most records comes first."""

    def tiles(*records: Record) -> LayerTiles:
        planned = pipeline.plan(TINY, records=records)
        (choice, *_) = planned.serving(VARIANT, "sm_90")
        return choice.tiles

    record = tiled(FINISH)
    outdated = replace(record, provenance=replace(record.provenance, kernel="0" * 12))
    infer = replace(record, key=replace(record.key, objective=Objective.INFER))
    assert tiles(outdated, infer, tiled(FINISH, make_variant(9, 9))) == USUAL
    broken = replace(record, timing=None, errors=(), failure=failed().failure)
    assert tiles(record, broken) == USUAL
    assert tiles(record, tiled(DECODE)) == replace(USUAL, finish=FINISH, decode=DECODE)
    other = tiled(FinishTiles(rows=8), device=H100, high=0.5)
    assert tiles(record, other, winner()) == replace(USUAL, finish=FINISH), "packages are built for one device"
    both = [other, replace(other, problem=Sizes(8, 4096)), winner()]
    assert usual_device(both, "sm_90", Objective.TRAIN) == H200, "records of kernels around do not outvote recurrences"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return a package with tiles of records."""
    planned = pipeline.plan(TINY, records=[tiled(FINISH), tiled(DECODE)])
    return import_package(tmp_path_factory.mktemp("tiled"), pipeline.render(planned), "m2gen_test_tiled")


def test_a_package_chooses_by_arch_and_dtype(package: ModuleType) -> None:
    """The searched tiles serve their dtype on their arch; whatever else calls gets the usual ones."""
    dispatch, dims = sys.modules[f"{package.__name__}.dispatch"], (16, 16, 1, 1, 2, 2, 2)
    tuned = dispatch.around(dims, torch.bfloat16, "sm_90")
    usual = dispatch.around(dims, torch.bfloat16, "portable")
    assert (tuned.LAUNCH["finish"], usual.LAUNCH["finish"]) == ((4, 4), (1, 4))
    assert (tuned.LAUNCH["decode"][0], usual.LAUNCH["decode"][0]) == (1, 1)
    for dtype, arch in ((torch.float32, "sm_90"), (torch.bfloat16, "gfx942")):
        assert dispatch.around(dims, dtype, arch) is usual
    rehearsal = sys.modules[f"{package.__name__}.dispatch"].__package__ + ".rehearsal"
    loaded = __import__(rehearsal, fromlist=["loaded"])
    assert tuned in list(loaded.loaded())
    assert {name for name in loaded.AROUND if name.endswith(tuned.__name__.rpartition("_")[2])}


def test_commands_name_kernels_by_their_layers(tmp_path: Path) -> None:
    """``list``, ``show``, ``why`` and ``prune`` read such records as any others."""
    record, old = tiled(FINISH), tiled(ConvolveTiles(rows=16))
    outdated = replace(old, provenance=replace(old.provenance, kernel="0" * 12))
    Database(tmp_path / "db").add([record, outdated, winner(variant=VARIANT)])
    db = ["--db", str(tmp_path / "db")]
    shown = run("db", "list", "--spec", TINY, *db)
    assert "base bf16 finish" in shown.stdout
    assert "4 rows, block 1024, 4 warps" in shown.stdout
    assert FINISH.slug not in shown.stdout
    assert json.loads(run("db", "show", record.id, "--json", *db).stdout)["schedule"]["family"] == "finish"
    answers = json.loads(run("db", "why", "base", "--spec", TINY, "--device", H200, "--json", *db).stdout)
    served = {answer["variant"]: answer["record"] for answer in answers if answer["bucket"] == ">8"}
    assert served[record.key.variant] == record.id
    assert served[outdated.key.variant] is None
    (alone,) = json.loads(run("db", "why", record.key.variant, "--device", H200, "--json", *db).stdout)
    assert (alone["record"], alone["tier"]) == (record.id, "exact")
    pruned = run("db", "prune", "--dry-run", *db)
    assert outdated.id in pruned.stdout
    assert record.id not in pruned.stdout


def test_the_manifest_says_nothing_of_tiles_without_records() -> None:
    """Packages of before are byte for byte what they were, but for what their runtime says."""
    package = pipeline.render(pipeline.plan(TINY, records=[]))
    assert "LAYER_TUNED: Mapping[str, Mapping[LayerKey, str]] = {}" in package.files["built.py"]
    assert "tiles" not in json.loads(emit.manifest_text(package, {}))
