"""Records in packages: which schedules a spec gets, where they are said to come from, and the same bytes again."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records import H100, VARIANT, environment, failed, winner
from support import ROOT, make_schedule

from m2gen import pipeline
from m2gen.bucket import BUCKETS, Bucket
from m2gen.db import Database, Record, Tier, read_export, write_export
from m2gen.db.choice import module_name
from m2gen.device import PORTABLE, TARGETS
from m2gen.kernels.compile import Job
from m2gen.kernels.resources import Resources
from m2gen.package import emit
from m2gen.package.directory import MANIFEST, write
from m2gen.pipeline import Plan
from m2gen.schedule import default
from m2gen.spec import Objective

TINY = str(ROOT / "specs" / "tiny.yaml")
LOW, HIGH = winner(Bucket.ONE), winner(Bucket.EIGHT, schedule=make_schedule(interval=6, unroll=3, chunk=3))


class Silent:
    """Progress that nobody watches."""

    def start(self, stage: str, total: int) -> None: ...
    def advance(self, item: str) -> None: ...
    def finish(self) -> None: ...


def planned(*records: Record) -> Plan:
    """Return the plan of the tiny spec, whose first variant is the records', with a database of ``records``."""
    return pipeline.plan(TINY, records=records)


def facts(plan: Plan, arch: str = "sm_90") -> list[tuple[Any, ...]]:
    """Return the choices for the records' variant on one arch."""
    return [(c.buckets, c.schedule, c.tier, c.record) for c in plan.serving(VARIANT, arch)]


def test_without_records_the_default_serves_everything() -> None:
    """An empty database is the learned rule, which has one schedule for all calls of so small a state."""
    (usual,) = {default(VARIANT, TARGETS["sm_90"], bucket) for bucket in BUCKETS}
    assert facts(planned()) == [(BUCKETS, usual, Tier.DEFAULT, None)]


def test_each_bucket_gets_its_record_or_the_nearest() -> None:
    """Exact where there is one, nearest elsewhere; other variants, arches and the portable kernels stay as they are."""
    assert facts(planned(HIGH, LOW)) == [
        ((Bucket.HALF, Bucket.TWO), LOW.schedule, Tier.NEAREST, LOW),
        ((Bucket.ONE,), LOW.schedule, Tier.EXACT, LOW),
        ((Bucket.FOUR, Bucket.MORE), HIGH.schedule, Tier.NEAREST, HIGH),
        ((Bucket.EIGHT,), HIGH.schedule, Tier.EXACT, HIGH),
    ]
    others = [c for c in planned(HIGH, LOW).choices if c.variant != VARIANT or c.device.arch != "sm_90"]
    assert {c.tier for c in others} == {Tier.DEFAULT}
    assert {(c.variant.key, c.device.arch) for c in others} >= {(VARIANT.key, "gfx942"), (VARIANT.key, PORTABLE.arch)}


def test_another_device_of_the_arch() -> None:
    """The device of most records comes first; a variant that only another device has is served by that."""
    other = replace(VARIANT, dtype=planned().variants[1].variant.dtype)
    records = (LOW, HIGH, winner(where=environment(H100), variant=other))
    plan = planned(*records)
    (choice,) = plan.serving(other, "sm_90")
    assert (choice.tier, choice.record, choice.buckets) == (Tier.ARCH, records[2], BUCKETS)


def test_records_that_cannot_be_trusted_do_not_serve() -> None:
    """Stale kernels, a failure and another objective leave the default."""
    stale = replace(LOW, provenance=replace(LOW.provenance, kernel="0" * 12))
    infer = replace(LOW, key=replace(LOW.key, objective=Objective.INFER), timing=replace(LOW.timing, backward_ms=None))
    assert facts(planned(stale, infer, LOW, failed(bucket=Bucket.EIGHT))) == facts(planned())


def table(package: emit.Package) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return which modules a package's ``built.py`` says to serve each arch and variant."""
    body = ast.parse(package.files["built.py"]).body
    (value,) = (
        node.value for node in body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "KERNELS"
    )
    return ast.literal_eval(value)


def test_the_package_and_its_manifest_name_tiers_and_records() -> None:
    """The table has a module for each bucket; the manifest and the kernels say why."""
    package = pipeline.render(planned(LOW, HIGH))
    low, high = (module_name(VARIANT, record.schedule) for record in (LOW, HIGH))
    assert table(package)["sm_90"][VARIANT.key] == (low, low, low, high, high, high)
    title = " ".join(package.files[f"kernels/{high}.py"].split('"""')[1].split())
    place = "of NVIDIA H200, programs an SM"
    assert f"sm_90 (nearest {HIGH.id} {place} <=4 >8), sm_90 (exact {HIGH.id} {place} <=8)" in title
    rows = [row for row in package.manifest["schedules"] if row["record"] == LOW.id]
    assert [(row["tier"], row["programs_an_sm"], row["device"]) for row in rows] == [
        ("nearest", ["<=0.5", "<=2"], "NVIDIA H200"),
        ("exact", ["<=1"], "NVIDIA H200"),
    ]


def test_one_record_serves_all_buckets_by_one_module() -> None:
    """A table of buckets that are all the same is not spelled out."""
    package = pipeline.render(planned(LOW))
    assert table(package)["sm_90"][VARIANT.key] == (module_name(VARIANT, LOW.schedule),)


def test_the_same_winners_give_the_same_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported, imported elsewhere in another order, on a machine with another GPU: the same bytes."""
    first = Database(tmp_path / "a")
    first.add([LOW, HIGH, failed()])
    write_export(tmp_path / "all.jsonl", first.records())
    second = Database(tmp_path / "b")
    for record in reversed(read_export(tmp_path / "all.jsonl")):
        second.add([record])
    before = pipeline.render(planned(*first.records()))
    monkeypatch.setattr("m2gen.device.detect", lambda: replace(TARGETS["sm_90"], name=H100, sm_count=114))
    after = pipeline.render(planned(*second.records()))
    assert after == before
    assert emit.manifest_text(after, {}) == emit.manifest_text(before, {})
    assert before.files != pipeline.render(planned(LOW)).files


def test_every_schedule_can_be_reached_by_small_problems() -> None:
    """Uniform plans cover every schedule of every variant; a plan without buckets is its own."""
    plan = planned(LOW, HIGH)
    parts = plan.uniform()
    assert all(choice.buckets == BUCKETS for part in parts for choice in part.choices)
    assert {(c.variant, c.device, c.schedule) for part in parts for c in part.choices} == {
        (c.variant, c.device, c.schedule) for c in plan.choices
    }
    assert len({len(part.choices) for part in parts}) == 1
    plain = planned().portable()
    assert plain.uniform() == (plain,)


def test_check_compiles_each_schedule_once_and_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that serve by two tiers are one line with both."""
    compiled: list[Job] = []

    def compile_all(jobs: Iterable[Job], *_: object) -> dict[Job, Resources]:
        compiled.extend(jobs)
        return {job: Resources(64, 0, 1024, 9000) for job in compiled}

    monkeypatch.setattr(sys.modules["m2gen.pipeline.check"], "compile_all", compile_all)
    rows = pipeline.check(replace(planned(LOW), choices=planned(LOW).serving(VARIANT, "sm_90")), Silent())
    assert [row.kernel for row in rows] == ["forward", "backward", "step"]
    assert {row.source for row in rows} == {f"nearest {LOW.id}, exact {LOW.id}"}
    assert {job.lowering.schedule for job in compiled} == {LOW.schedule}


def test_a_committed_package_is_checked_against_the_database(tmp_path: Path) -> None:
    """A new record makes a package stale, as a template does."""
    package = pipeline.render(planned())
    write(tmp_path / "tiny", {**package.files, MANIFEST: emit.manifest_text(package, {})})
    assert pipeline.difference(planned(), tmp_path) == []
    lines = pipeline.difference(planned(LOW), tmp_path)
    assert any(json.dumps(LOW.id) in line for line in lines)


def test_verification_runs_every_schedule() -> None:
    """On a GPU whose calls are split by bucket, cases of a variant run by each of its schedules, in its own package."""
    stage = sys.modules["m2gen.pipeline.verify"]
    jobs = stage._jobs(planned(LOW, HIGH), pipeline.VerifyRequest(quick=True), TARGETS["sm_90"])
    ran = {(job.schedule, job.folder.name) for job in jobs if job.variant == VARIANT}
    assert {slug for slug, _ in ran} == {LOW.schedule.slug, HIGH.schedule.slug}
    assert len({folder for _, folder in ran}) == 2
    plain = stage._jobs(planned().portable(), pipeline.VerifyRequest(quick=True), TARGETS["sm_90"])
    jobs, plain = ([job for job in each if job.variant == VARIANT] for each in (jobs, plain))
    second = [job for job in jobs if job.schedule == HIGH.schedule.slug]
    assert len(jobs) == len(plain) + len(second)
    assert {job.variant for job in second} == {VARIANT}
