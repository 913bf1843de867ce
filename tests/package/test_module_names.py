"""Names of the files of packages: short, of one module each, and the same on every machine."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, make_variant

from m2gen import pipeline
from m2gen.db.choice import LONGEST_NAME, module_name
from m2gen.device import PORTABLE, TARGETS
from m2gen.schedule import FAMILIES, Schedule, default, parse
from m2gen.spec import ClipMode, Dtype, Fp32Products, GateKind, StateDtype, TanhMode
from m2gen.variant import Heads, Variant

SPECS = sorted(path.name for path in (ROOT / "specs").glob("*.yaml"))
COUNT = st.integers(1, 10**12)
"""Far beyond what a spec may say: no name may be too long, whatever limits become."""
VARIANTS = st.builds(
    Variant,
    COUNT,
    COUNT,
    st.builds(Heads.model_construct, **dict.fromkeys("qkvfw", COUNT)),
    *map(st.sampled_from, (Dtype, StateDtype, ClipMode, TanhMode, GateKind, Fp32Products)),
)
SCHEDULES = st.builds(
    lambda family, picks: family.of({name: values[picks % len(values)] for name, values in family.AXES.items()}),
    st.sampled_from(FAMILIES),
    st.integers(0, 10**6),
)


def short(name: str) -> bool:
    """Whether the name of a file is below 60 characters."""
    return len(name) < 60


@pytest.mark.parametrize("spec", SPECS)
def test_names_of_shipped_specs(spec: str) -> None:
    """Every file of a package, and a module for every variant and schedule, whose title says both in full."""
    planned = pipeline.plan(str(ROOT / "specs" / spec))
    names = {choice.module: (choice.variant, choice.schedule) for choice in planned.choices}
    assert len(names) == len({(choice.variant, choice.schedule) for choice in planned.choices})
    assert all(short(f"{name}.py") and name.isidentifier() for name in names)
    if spec.startswith("matrix"):  # hundreds of kernels, whose files are named as those of other specs
        return
    files = pipeline.render(planned).files
    assert all(short(part) for path in files for part in PurePosixPath(path).parts)
    for name, (variant, schedule) in names.items():
        title = " ".join(files[f"kernels/{name}.py"].split('"""')[1].split())
        assert f"M2RNN kernels for {variant.key}, schedule {schedule.slug}." in title


@given(variant=VARIANTS, schedule=SCHEDULES)
def test_long_names_are_cut(variant: Variant, schedule: Schedule) -> None:
    """A name is a module's, of at most 59 characters with ``.py``, and tells what its beginning does not say."""
    name = module_name(variant, schedule)
    assert name.isidentifier()
    assert len(f"{name}.py") <= LONGEST_NAME
    digest = hashlib.sha256(f"{variant.key} {schedule.slug}".encode()).hexdigest()
    assert name.endswith(f"_{digest[:12]}")
    other = replace(variant, state_expansion=variant.state_expansion + 1)
    assert module_name(other, schedule) != name


def test_names_say_what_a_reader_looks_for() -> None:
    """Dims, heads, dtype and family stand in front, and the same digits on every machine."""
    variant = make_variant(64, 16, (1, 1, 132, 132, 132), "bf16", tanh="approx")
    schedule = parse("mma_f64x2u8a_b32x1c2as_i16_ptx")
    assert module_name(variant, schedule) == "k64_v16_n132_bf16_mma_1d4374fd5a20"
    assert module_name(variant, default(variant, PORTABLE)) != module_name(variant, default(variant, TARGETS["sm_90"]))
