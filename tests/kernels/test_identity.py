"""What a record is of: the kernels that the GPU runs, and nothing that it does not see."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support import make_schedule, make_variant

from m2gen.db.rank import stale
from m2gen.device import TARGETS
from m2gen.kernels import identity
from m2gen.kernels.identity import gpu_text, kernel_hash
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.options import options_of
from m2gen.kernels.render import render_kernel
from m2gen.pipeline.plan import shipped_database
from m2gen.schedule import Mma, defaults

VARIANT = make_variant(64, 64, (2, 2, 2, 2, 2), "bf16", tanh="approx", gate="softplus")
EVERY = [Lowering(VARIANT, schedule) for schedule in defaults(VARIANT, TARGETS["sm_90"])]

UNSEEN = {
    "a title": ("M2RNN kernels for", "Kernels for"),
    "a comment": ("# Step t + 0\n", "# The first step\n"),
    "a comment behind code": (
        "length = tl.minimum(remaining, span)",
        "length = tl.minimum(remaining, span)  # so",
    ),
    "a docstring": ('"""Load one step\'s vector;', '"""Load a vector;'),
    "how it is launched": ('"interval": 16', '"interval": 8'),
    "blank lines": ("\n\n        # Step t + 0", "\n\n\n\n        # Step t + 0"),
}
SEEN = {
    "a constant": ("INTERVAL: tl.constexpr = tl.constexpr(16)", "INTERVAL: tl.constexpr = tl.constexpr(8)"),
    "an operation": ("return tl.fma(u, z, f * h)", "return f * h + u * z"),
    "an argument": ("def load_gate(address, inside):", "def load_gate(address, inside, other):"),
    "a decorator": ('(do_not_specialize=["S", "intervals"])', ""),
}


def source() -> str:
    return render_kernel(Lowering(VARIANT, replace(make_schedule(interval=16), segments=2)))


@pytest.mark.parametrize(("old", "new"), UNSEEN.values(), ids=UNSEEN)
def test_what_the_gpu_does_not_see(old: str, new: str) -> None:
    """Words, blank lines and what runs on the host change no hash."""
    text = source()
    assert old in text
    assert gpu_text(text.replace(old, new)) == gpu_text(text)


@pytest.mark.parametrize(("old", "new"), SEEN.values(), ids=SEEN)
def test_what_the_gpu_runs(old: str, new: str) -> None:
    """Constants, statements, arguments and how a function is compiled."""
    text = source()
    assert old in text
    assert gpu_text(text.replace(old, new)) != gpu_text(text)


def test_order_does_not_matter() -> None:
    """Functions may move within a module, and are there each once."""
    text = source()
    first, second = (re.search(rf"@triton\.jit\ndef {name}\(.*?\n\n\n", text, re.S) for name in ("load_gate", "clamp"))
    assert first is not None
    assert second is not None
    moved = text.replace(first[0], "").replace(second[0], second[0] + first[0])
    assert moved != text
    assert gpu_text(moved) == gpu_text(text)
    assert gpu_text(text).count("def ") == text.count("\ndef ")


def test_how_kernels_are_compiled_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound on registers, of a schedule that has one, is none of the text's."""
    schedule = Mma.default(VARIANT, TARGETS["sm_90"])
    apart = replace(schedule, forward=replace(schedule.forward, rows=64, warps=4))
    assert "maxnreg" in options_of(Lowering(VARIANT, apart), Direction.FORWARD)
    found = identity.kernel_hash.__wrapped__(Lowering(VARIANT, apart))
    monkeypatch.setattr(identity, "scheduled_options", lambda k, direction: {"num_warps": 4})
    assert identity.kernel_hash.__wrapped__(Lowering(VARIANT, apart)) != found


def test_every_family_has_a_hash_of_its_own() -> None:
    """They are twelve hex digits, and differ."""
    hashes = {kernel_hash(k) for k in EVERY}
    assert len(hashes) == len(EVERY) == 3
    assert all(re.fullmatch("[0-9a-f]{12}", found) for found in hashes)


def test_shipped_records_are_of_the_kernels_that_are_rendered() -> None:
    """None of them is stale."""
    records = shipped_database().records()
    assert len(records) >= 8
    assert {record.id: stale(record) for record in records} == {record.id: "" for record in records}
