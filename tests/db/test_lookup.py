"""The record that serves, by tiers, and the reasons against those that do not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import H100, H200, VARIANT, environment, failed, winner
from support import make_schedule, make_variant

from m2gen.bucket import BUCKETS, Bucket
from m2gen.db import Query, Reason, Record, Tier, flag, look_up, stale, usual_device
from m2gen.device import target
from m2gen.measure.context import recorded_name
from m2gen.pipeline import db as asked
from m2gen.spec import Objective


def query(bucket: Bucket = Bucket.FOUR, device: str = H200, arch: str = "sm_90") -> Query:
    """Return a query for the records' variant."""
    return Query(VARIANT.key, Objective.TRAIN, arch, device, bucket)


def reasons(records: Sequence[Record], asked: Query) -> dict[Record, str]:
    """Return why each record that does not serve does not."""
    return {rejection.record: rejection.reason for rejection in look_up(records, asked).rejected}


TRAIN = Objective.TRAIN
NEAR, FAR = winner(Bucket.TWO), winner(Bucket.HALF)
OTHER = winner(where=environment(H100))
EXACT = winner()

TIERS = {
    "exact": ([FAR, OTHER, EXACT, NEAR], Tier.EXACT, EXACT),
    "nearest": ([FAR, OTHER, NEAR], Tier.NEAREST, NEAR),
    "nearest_of_one": ([OTHER, FAR], Tier.NEAREST, FAR),
    "arch": ([OTHER], Tier.ARCH, OTHER),
    "default": ([], Tier.DEFAULT, None),
}


@pytest.mark.parametrize(("records", "tier", "expected"), TIERS.values(), ids=TIERS.keys())
def test_tiers(records: list[Record], tier: Tier, expected: Record | None) -> None:
    """The device before the bucket, then another device of the arch, then none."""
    for order in (records, records[::-1]):
        served = look_up(order, query())
        assert (served.tier, served.record) == (tier, expected)
        assert len(served.rejected) == len(records) - (expected is not None)


@given(st.sets(st.sampled_from(BUCKETS), min_size=1), st.sampled_from(BUCKETS))
def test_the_nearest_bucket(having: set[Bucket], asked: Bucket) -> None:
    """No bucket is closer; of two as close, the one of fewer programs serves."""
    found = look_up([winner(bucket) for bucket in having], query(asked)).record
    assert found is not None
    distances = {bucket: abs(BUCKETS.index(bucket) - BUCKETS.index(asked)) for bucket in having}
    nearest = [bucket for bucket in BUCKETS if distances.get(bucket) == min(distances.values())]
    assert found.key.bucket is nearest[0]


STALE = replace(winner(high=0.1), provenance=replace(winner().provenance, kernel="0" * 12))
POLICY = replace(winner(high=0.1), key=replace(winner().key, policy="other"))
INFER = replace(
    winner(high=0.1),
    key=replace(winner().key, objective=Objective.INFER),
    timing=replace(winner().timing, backward_ms=None),
)
DISQUALIFIED = {
    "kernels": (STALE, "stale: measured kernels 0{12}, which are [0-9a-f]{12} now"),
    "policy": (POLICY, "stale: passed numerics policy other, which is float64_"),
    "objective": (INFER, "tuned for objective infer, not train"),
    "failure": (failed(Reason.WRONG), "records a failure: wrong"),
    "arch": (winner(where=environment("NVIDIA A100", "sm_80")), "for sm_80, not sm_90"),
}


@pytest.mark.parametrize(("record", "reason"), DISQUALIFIED.values(), ids=DISQUALIFIED.keys())
def test_what_never_serves(record: Record, reason: str) -> None:
    """However fast it was, and with nothing else to serve, a record that cannot be trusted is not used."""
    served = look_up([record], query())
    assert (served.tier, served.record) == (Tier.DEFAULT, None)
    ((rejected, said),) = reasons([record], query()).items()
    assert rejected == record
    assert re.fullmatch(f"{reason}.*", said)


def test_a_failure_disqualifies_the_same_kernels() -> None:
    """Kernels that hung once on a device serve none of its calls, and serve other devices and toolchains."""
    hung = failed(Reason.HANG, bucket=Bucket.ONE)
    assert look_up([EXACT, hung], query()).record is None
    assert reasons([EXACT, hung], query())[EXACT] == f"its kernels failed on this device: hang, record {hung.id}"
    for other in (OTHER, winner(where=environment(triton="3.7.1")), winner(schedule=make_schedule())):
        assert look_up([other, hung], query()).record == other
    assert look_up([EXACT, failed(Reason.MEMORY, bucket=Bucket.ONE)], query()).record == EXACT, "others may have had it"
    forgotten = replace(hung, provenance=replace(hung.provenance, kernel="0" * 12))
    assert look_up([EXACT, forgotten], query()).record == EXACT


def test_what_is_said_of_the_outranked() -> None:
    """Each that could serve is told what it lost by."""
    older = winner(where=environment(triton="3.5.10"), high=0.5)
    newest = winner(where=environment(triton="3.10.0"), high=0.8)
    slower = winner(where=environment(triton="3.10.0"), high=0.9, seq=128)
    tied = winner(where=environment(triton="3.10.0"), high=0.8, seq=256)
    found = look_up([older, newest, slower, tied, NEAR, OTHER], query())
    assert found.record in (newest, tied)
    said = reasons([older, newest, slower, tied, NEAR, OTHER], query())
    assert said[older] == "measured with an earlier toolchain: triton 3.5.10, not 3.10.0"
    assert said[slower] == "at most 0.900 of the default's time, not 0.800"
    assert said[tied if found.record == newest else newest].startswith("ties")
    assert said[NEAR] == "bucket <=2 is further than <=4"
    assert said[OTHER] == f"of another device, {H100}"


VERSIONS = {
    "triton": (("3.7.1", "12.8", "2.11.0", "570.1"), ("3.6.0", "13.1", "2.12.0", "580.1")),
    "ptxas": (("3.6.0", "13.1", "2.11.0", "570.1"), ("3.6.0", "12.8", "2.12.0", "580.1")),
    "torch": (("3.6.0", "12.8", "2.12.0", "570.1"), ("3.6.0", "12.8", "2.11.0", "580.1")),
    "driver": (("3.6.0", "12.8", "2.11.0", "580.1"), ("3.6.0", "12.8", "2.11.0", "570.1")),
}


@pytest.mark.parametrize("name", VERSIONS)
def test_a_later_toolchain_is_preferred_by_triton_first(name: str) -> None:
    """Versions count in the order in which they matter, whatever the later ones and the times are."""

    def measured(versions: tuple[str, str, str, str], high: float) -> Record:
        triton, ptxas, torch, driver = versions
        where = replace(environment(), triton=triton, ptxas=ptxas, torch=torch, driver=driver)
        return winner(where=where, high=high)

    later, other = measured(VERSIONS[name][0], 0.9), measured(VERSIONS[name][1], 0.5)
    assert look_up([other, later], query()).record == look_up([later, other], query()).record == later
    assert reasons([other, later], query())[other].startswith(f"measured with an earlier toolchain: {name} ")


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize(("later", "earlier"), [("3.6", ""), ("3.6.1", "3.6"), ("3.10", "3.9")])
def test_versions_are_numbers_and_an_unknown_one_is_the_earliest(name: str, later: str, earlier: str) -> None:
    """A tool whose version nobody knows is not later than one that is known, however fast its record is."""
    one = winner(where=replace(environment(), **{name: later}), high=0.9)
    other = winner(where=replace(environment(), **{name: earlier}), high=0.5)
    assert look_up([other, one], query()).record == look_up([one, other], query()).record == one
    said = f"measured with an earlier toolchain: {name} {earlier or 'unknown'}, not {later}"
    assert reasons([one, other], query())[other] == said


def test_builds_of_one_version_are_no_earlier_toolchain() -> None:
    """What is said of a record that lost by its time is its time, however the builds of its tools are named."""
    named = winner(where=replace(environment(), torch="2.11.0+cpu"), high=0.95)
    assert reasons([EXACT, named], query())[named] == "at most 0.950 of the default's time, not 0.900"


def test_other_variants_are_not_mentioned() -> None:
    """An explanation is about one variant."""
    other = winner(variant=make_variant(rows=32))
    assert look_up([other, EXACT], query()).rejected == ()


def test_the_device_that_packages_are_built_for() -> None:
    """It is the arch's device with most usable winners, the first by name of two; without any, the arch itself."""
    assert usual_device([EXACT, NEAR, OTHER], "sm_90", TRAIN) == H200
    assert usual_device([OTHER, EXACT], "sm_90", TRAIN) == usual_device([EXACT, OTHER], "sm_90", TRAIN) == H100
    assert usual_device([STALE, replace(STALE, problem=NEAR.problem, key=NEAR.key), OTHER], "sm_90", TRAIN) == H100
    assert usual_device([failed(), failed(bucket=Bucket.ONE), OTHER], "sm_90", TRAIN) == H100
    assert usual_device([EXACT], "sm_80", TRAIN) == usual_device([], "sm_80", TRAIN) == "sm_80"
    assert usual_device([EXACT, NEAR, failed(), OTHER], "sm_90", TRAIN) == H100, "what failed since can serve nothing"
    forwards = [INFER, replace(INFER, problem=NEAR.problem, key=replace(INFER.key, bucket=Bucket.TWO))]
    assert usual_device([*forwards, OTHER], "sm_90", TRAIN) == H100, "nor can what is for the forward alone"
    assert usual_device([*forwards, OTHER], "sm_90", Objective.INFER) == H200


def test_staleness_and_flags() -> None:
    """Another text of kernels makes a record unusable; another Triton is only mentioned."""
    assert stale(EXACT) == ""
    assert stale(STALE) != ""
    assert flag(EXACT, "3.6.0") == ""
    assert flag(EXACT, "3.7.1") == "measured with triton 3.6.0, here 3.7.1"


def test_a_failure_of_an_earlier_policy_disqualifies_nothing() -> None:
    """What failed by other budgets may pass today's: such a failure counts no more than such a winner."""
    record = winner()
    old = replace(failed(Reason.WRONG), key=replace(record.key, policy="other"))
    assert look_up([old, record], query()).record == record
    assert look_up([failed(Reason.WRONG), record], query()).record is None


def test_a_gpu_is_asked_for_by_the_name_that_records_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product's name may have characters that no record has."""
    device = replace(target("sm_90"), name="Maker's X / Y é")
    monkeypatch.setattr(asked, "detect", lambda: device)
    assert asked._device(asked.Question("base"), asked._Asked((), TRAIN, (), ()), [])[:2] == (
        "sm_90",
        recorded_name(device),
    )
    assert recorded_name(device) == "Maker's X _ Y _"
