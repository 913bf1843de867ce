"""Records as lines: what is written is read back, and nothing else is taken for a record."""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import H200, VARIANT, environment, failed, timing, winner
from support import make_schedule, make_variant, variants

from m2gen.bucket import BUCKETS, Bucket, bucket_of, most_sequences
from m2gen.db import (
    POLICY,
    SCHEMA,
    Clocks,
    Estimate,
    Failure,
    NotARecord,
    Reason,
    Sizes,
    Status,
    TensorError,
    Throttled,
    ThrottleReason,
    decode,
    encode,
)
from m2gen.device import TARGETS
from m2gen.errors import DatabaseError
from m2gen.measure.context import worker_name
from m2gen.schedule import defaults, parse
from m2gen.spec import Objective
from m2gen.variant import parse_variant
from m2gen.verify.oracle import DRAWS, FACTOR

LINE = encode(winner())


def changed(path: str, value: Any) -> str:
    """Return the line of a valid record with one value replaced, or added."""
    document = json.loads(LINE)
    *folders, last = path.split(".")
    inner = document
    for folder in folders:
        inner = inner[folder]
    inner[last] = value
    return json.dumps(document, sort_keys=True)


@pytest.mark.parametrize(
    "record", [winner(), failed(), winner(Bucket.HALF, high=0.1 + 0.2)], ids=["won", "failed", "x"]
)
def test_a_line_is_read_back_as_it_was_written(record) -> None:
    """Records survive the way to text and back, bit for bit, with their ids."""
    again = decode(encode(record))
    assert again == record
    assert again.id == record.id == json.loads(encode(record))["id"]
    assert encode(again) == encode(record)


def test_clocks_are_in_the_line_where_they_are_known() -> None:
    """A record without them has the line and the id that it had before there were any; failures have none."""
    bare = winner()
    assert "clocks" not in json.loads(encode(bare))
    throttled = Clocks(1410, 1980, 2619, (Throttled(ThrottleReason.POWER, 0.5),))
    full = replace(bare, clocks=throttled)
    assert decode(encode(full)) == full
    assert full.id != bare.id
    assert json.loads(encode(full))["clocks"]["throttled"] == [{"part": 0.5, "reason": "power"}]
    with pytest.raises(NotARecord, match="canonical"):
        decode(json.dumps({**json.loads(LINE), "clocks": None}, sort_keys=True))
    with pytest.raises(DatabaseError, match=r"\$\.clocks must be of a record with timing"):
        encode(replace(failed(), clocks=throttled))


@pytest.mark.parametrize("family", ["portable", "mma", "wgmma"])
def test_a_record_holds_the_knobs_of_its_family(family: str) -> None:
    """All of them and no other: what another family has is no key of its records."""
    variant = make_variant(64, 64, (2, 2, 2, 2, 2), "bf16", tanh="approx")
    (schedule,) = (one for one in defaults(variant, TARGETS["sm_90"]) if one.family == family)
    record = winner(variant=variant, schedule=schedule)
    written = json.loads(encode(record))["schedule"]
    assert written.pop("family") == family
    knobs = {f"{a}.{b}" for a in ("forward", "backward") for b in written.pop(a)} | set(written)
    assert knobs == set(schedule.AXES) - ({"forward.slots", "forward.registers"} if family == "mma" else set())
    assert decode(encode(record)) == record


def test_a_forward_with_slots_has_a_knob_more() -> None:
    """A record says so of those alone; where it is said that a forward has none, the line is not canonical."""
    variant = make_variant(64, 16, (2, 2, 2, 2, 2), "bf16", tanh="approx")
    slots, plain = map(parse, ("mma_f64x2u8at_b64x2c8at_i8_ptx", "mma_f64x2u8a_b64x2c8at_i8_ptx"))
    record = winner(variant=variant, schedule=slots)
    assert json.loads(encode(record))["schedule"]["forward"]["slots"] is True
    assert decode(encode(record)) == record
    assert record.id != winner(variant=variant, schedule=plain).id
    told = json.loads(encode(winner(variant=variant, schedule=plain)))
    assert "slots" not in told["schedule"]["forward"]
    told["schedule"]["forward"]["slots"] = False
    with pytest.raises(NotARecord, match="canonical"):
        decode(json.dumps(told, sort_keys=True))
    assert "registers" not in json.loads(encode(record))["schedule"]["forward"]
    more = winner(variant=variant, schedule=parse("mma_f64x2u8at255_b64x2c8at_i8_ptx"))
    assert json.loads(encode(more))["schedule"]["forward"]["registers"] == 255
    assert decode(encode(more)) == more
    assert more.provenance.kernel != record.provenance.kernel


def test_a_backward_that_clamps_by_one_instruction_has_a_knob_more() -> None:
    """A record says so of those alone: lines from before there was the knob stay as they are, with their ids."""
    variant = make_variant(64, 16, (2, 2, 2, 2, 2), "bf16", tanh="approx")
    one, two = map(parse, ("mma_f64x2u8a_b64x2c8atx_i8_ptx", "mma_f64x2u8a_b64x2c8at_i8_ptx"))
    record, before = (winner(variant=variant, schedule=each) for each in (one, two))
    assert json.loads(encode(record))["schedule"]["backward"]["xorsign"] is True
    assert record.id != before.id
    assert record.provenance.kernel != before.provenance.kernel
    for each in (record, before):
        assert decode(encode(each)) == each
    told = json.loads(encode(before))
    assert "xorsign" not in told["schedule"]["backward"]
    told["schedule"]["backward"]["xorsign"] = False
    with pytest.raises(NotARecord, match="canonical"):
        decode(json.dumps(told, sort_keys=True))


def test_a_record_of_a_gpu_that_lacks_the_instruction_is_none() -> None:
    """What the GPU cannot run won nowhere on it."""
    variant = make_variant(64, 16, (2, 2, 2, 2, 2), "bf16", tanh="approx")
    where = environment("NVIDIA A100-SXM4-80GB", "sm_80")
    with pytest.raises(DatabaseError, match=r"\$\.schedule\.backward\.xorsign must be false on sm_80, got true"):
        encode(winner(variant=variant, schedule=parse("mma_f64x2u8a_b64x2c8atx_i8_ptx"), where=where))
    assert encode(winner(variant=variant, schedule=parse("mma_f64x2u8a_b64x2c8at_i8_ptx"), where=where))


def test_ids_name_content() -> None:
    """Two records have one id only if they are the same; numbers mean the same, however they are written."""
    one = winner()
    assert one.id == winner().id
    others = [winner(seed=1), winner(high=0.8), winner(where=environment(driver="1")), failed()]
    assert len({record.id for record in (one, *others)}) == 5
    whole = replace(one, timing=replace(timing(), tuned=Estimate(1, 1, 1)))
    assert encode(whole) == encode(replace(one, timing=replace(timing(), tuned=Estimate(1.0, 1.0, 1.0))))


def test_status() -> None:
    """A record either serves or keeps a schedule from serving."""
    assert (winner().status, failed().status) == (Status.WINNER, Status.FAILED)


WRONG = {
    "schema": (SCHEMA + 1, r"\$.schema must be 3, got '4'$"),
    "id": ("0" * 12, r"\$.id must be [0-9a-f]{12}, which the content gives, got '0{12}'"),
    "extra": (1, r"\$.id must be|\$ must be canonical"),
    "key.objective": ("fast", r"\$.key.objective must be 'train' or 'infer', got 'fast'"),
    "key.bucket": ("<=8", r"\$.key.bucket must be <=4 for the problem and the GPU, got <=8"),
    "key.variant": ("../../etc", r"\$.key.variant must match"),
    "environment.arch": ("../sm_90", r"\$.environment.arch must match"),
    "environment.device": ("../x", r"\$.environment.device must match"),
    "environment.sm_count": (0, r"\$.environment.sm_count must be greater"),
    "provenance.kernel": ("x", r"\$.provenance.kernel must match"),
    "problem.batch": (True, r"\$.problem.batch must be a valid integer, got True"),
    "schedule.family": ("fast", r"\$.schedule must have the family portable, mma, wgmma, convolve, .*, decode, got"),
    "schedule.forward.rows": (True, r"\$.schedule.forward.rows must be a valid integer, got True"),
    "schedule.interval": (7, r"\$.schedule.interval must be a multiple of forward.unroll = 4, got 7"),
    "schedule.tanh": ("ptx", r"\$.schedule.tanh must be exp where the spec asks for exact, got ptx"),
    "timing.tuned.low_ms": (1e6, r"\$.timing.tuned must have low_ms <= median_ms"),
    "timing.forward_ms": (float("nan"), r"\$.timing.forward_ms must be"),
    "timing.backward_ms": (None, r"\$.timing.backward_ms must fit objective train"),
    "timing": (None, r"\$ must have either timing or failure, got none"),
    "failure": ({"reason": "hang", "message": ""}, r"\$ must have either timing or failure, got both"),
    "errors": ([{"tensor": "y", "error": 2.0, "budget": 1.0}], r"\$.errors must be within their budgets, got y"),
}


@pytest.mark.parametrize(("path", "value", "message"), [(p, *w) for p, w in WRONG.items()], ids=WRONG.keys())
def test_what_is_wrong_with_a_line_is_said(path: str, value: Any, message: str) -> None:
    """A value of the wrong type, out of range, or at odds with another is named with its place."""
    with pytest.raises(NotARecord, match=message):
        decode(changed(path, value))


@pytest.mark.parametrize("schema", [1, 2])
def test_a_record_of_layouts_is_told_what_to_do(schema: int) -> None:
    """A record of an earlier version names kernels otherwise, and no build can use it."""
    remedy = r"\(m2gen tune measures again; m2gen db prune --unreadable removes the line\)"
    with pytest.raises(NotARecord, match=rf"^\$\.schema must be 3, got '{schema}' {remedy}$"):
        decode(changed("schema", schema))


@pytest.mark.parametrize("text", ["", "null", "[]", "<<<<<<< HEAD", "{", "[" * 9000, '{"schema": ' + "9" * 9000 + "}"])
def test_what_is_no_record_at_all(text: str) -> None:
    """Anything may stand in a file."""
    with pytest.raises(NotARecord, match=r"^\$"):
        decode(text)


@given(st.data())
def test_only_what_would_be_written_is_read(data: st.DataObject) -> None:
    """A line that was cut, edited or spliced anywhere is refused, or is another record's own line."""
    at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(LINE))] * 2)))
    line = LINE[:at] + data.draw(st.text(max_size=8)) + LINE[end:]
    with suppress(NotARecord):  # and nothing else
        assert encode(decode(line)) == line


def test_another_spelling_of_a_record_is_refused() -> None:
    """There is one text for a record, so that files can be compared byte by byte."""
    document = json.loads(LINE)
    for text in (json.dumps(document, indent=1), json.dumps(dict(reversed(document.items()))), LINE + "\r"):
        with pytest.raises(NotARecord, match="canonical"):
            decode(text)


def test_a_record_that_could_not_be_read_cannot_be_written() -> None:
    """Records that a program makes are checked like those in a file, whose lines have a longest one."""
    many = winner()
    for record in (
        replace(winner(), errors=(TensorError("y", float("inf"), 1.0),)),
        replace(winner(), schedule=make_schedule(warps=3)),
        replace(winner(), environment=replace(environment(), device="\x1b[2J")),
        replace(many, problem=Sizes(1, 64, (64,) * 4000), key=replace(many.key, bucket=Bucket.MORE)),
    ):
        with pytest.raises(DatabaseError, match=r"a record of k16_v16_.*\$"):
            encode(record)


def test_a_host_of_any_name_writes_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a search has found is not lost for a name that a record cannot have."""
    monkeypatch.setattr(platform, "node", lambda: "höst\x7f" * 30)
    record = replace(winner(), provenance=replace(winner().provenance, worker=worker_name("gpu-1")))
    assert decode(encode(record)).provenance.worker.startswith("h_st_h_st_")


def test_messages_of_failures_fit_a_line() -> None:
    """Whatever a compiler or a signal says becomes printable and short."""
    failure = Failure.of(Reason.CRASH, "died:\n\x1b[31m é " + "x" * 1000)
    line = encode(replace(failed(), failure=failure))
    assert decode(line).failure == failure
    assert failure.message.isprintable()
    assert len(failure.message) == 500
    noted = failure.noting(", here")
    assert (noted.message[-10:], len(noted.message)) == ("xxxx, here", 500)
    assert Failure(Reason.HANG, "slow").noting(", here") == Failure(Reason.HANG, "slow, here")


@pytest.mark.parametrize("variant", [*variants("carry"), *variants("total"), make_variant(products="tf32")], ids=str)
def test_variants_are_parsed_from_their_keys(variant) -> None:
    """A key says everything about a variant."""
    assert parse_variant(variant.key) == variant


@pytest.mark.parametrize(
    "key",
    ["", "k16", VARIANT.key + "_x", VARIANT.key + "\n", VARIANT.key.replace("k16", "k016"), "k999" + VARIANT.key[3:]],
)
def test_other_texts_are_no_variants(key: str) -> None:
    """Other spellings, and dims that the templates do not serve, are refused."""
    with pytest.raises(ValueError, match="must be the key of a variant"):
        parse_variant(key)


def test_the_policy_names_the_budget_rule() -> None:
    """Records that passed under other budgets must not be taken for records under these."""
    assert f"float64_draws{DRAWS}_x{FACTOR:g}" == POLICY


@given(sequences=st.integers(1, 10**6), heads=st.integers(1, 65535), sms=st.integers(1, 1000))
def test_buckets_are_programs_for_each_sm(sequences: int, heads: int, sms: int) -> None:
    """A bucket is what its name says, of exact numbers."""
    bucket = bucket_of(sequences, heads, sms)
    load = sequences * heads / sms
    bounds = [0.0, *(float(b[2:]) for b in BUCKETS[:-1]), float("inf")]
    assert bounds[bucket.place] < load <= bounds[bucket.place + 1]


def test_no_sequence_is_in_the_first_bucket() -> None:
    """An empty batch is a call, too; heads beyond a bound leave buckets without any."""
    assert bucket_of(0, 132, 132) is Bucket.HALF
    assert most_sequences(132, 132) == (0, 1, 2, 4, 8)
    assert most_sequences(65535, 132)[:4] == (0, 0, 0, 0)


def test_sizes_of_packed_batches() -> None:
    """Sequences count, however they are laid out."""
    assert Sizes(4, 64).sequences == Sizes(1, 1, (5, 6, 7, 8)).sequences == 4
    packed = replace(winner(), problem=Sizes(1, 1, (8,) * winner().problem.batch))
    assert decode(encode(packed)) == packed
    assert packed.environment.device == H200
    assert packed.key.objective is Objective.TRAIN
