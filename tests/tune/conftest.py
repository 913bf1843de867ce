"""Searches are simulated around the defaults of families, whatever the learned rule says today."""

from __future__ import annotations

import pytest

import m2gen.schedule.learned as rule


@pytest.fixture(autouse=True)
def without_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve variants by the defaults of families."""
    monkeypatch.setattr(rule, "rules", dict)
