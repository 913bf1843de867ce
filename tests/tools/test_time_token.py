"""The products for few rows are right, and every part of a token has its line."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional as F

from tools import time_token

SMALL = time_token.Layer("small", 96, 112, 80, 300)


def operands_of(batch: int, device: torch.device) -> time_token.Operands:
    """Return operands of a small layer, in float16, since the interpreter multiplies no bfloat16."""
    return time_token.Operands(SMALL, batch, device, torch.float16)


@pytest.mark.parametrize("batch", [1, 17, 64])
@pytest.mark.parametrize("by", [time_token.Tiles(16, 64, 4, 2), time_token.Tiles(64, 128, 4, 2)], ids=str)
def test_products_of_few_rows(device, batch, by) -> None:
    """Rows, depths and columns that fill no tile come out within what float16 rounds, and nothing else is written."""
    operands = operands_of(batch, device)
    out = torch.full((batch + 1, SMALL.projected + 8), float("nan"), dtype=operands.x.dtype, device=device)
    found = time_token.few_rows(operands.x, operands.w_in, out[:batch, : SMALL.projected], by)
    assert time_token.error_of(operands.x, operands.w_in, found) < 2.0**-11
    assert bool(out[batch].isnan().all())
    assert bool(out[:, SMALL.projected :].isnan().all())


def test_both_ways_make_the_same_token(device) -> None:
    """The stand-in for the layer's kernel moves every state once, and has results of its projection."""
    by = dict.fromkeys(("in", "out"), time_token.Tiles(16, 64, 4, 2))
    usual, other = (operands_of(3, device) for _ in range(2))
    expected, found = usual.token(None), other.token(by)
    assert float((found - expected).float().norm()) < 2.0**-7 * float(expected.float().norm())
    assert torch.allclose(other.state, usual.state, atol=2.0**-7)
    assert bool((usual.state != 0).all())


def test_every_line_has_its_time(device, monkeypatch) -> None:
    """Products by torch and by the shortest tiles, the states, then the token three ways."""
    calls = iter([9.0, 5.0, 4.0, 8.0, 3.0, 6.0, 7.0, 30.0, 20.0, 10.0])
    monkeypatch.setattr(time_token, "microseconds", lambda run: next(calls))
    tried = [time_token.Tiles(16, 64, 4, 2), time_token.Tiles(32, 64, 4, 2)]
    monkeypatch.setattr(time_token, "tiles", lambda: iter(tried))
    lines = [line.split(" | ") for line in time_token.report(SMALL, operands_of(2, device))]
    assert [(line[2], line[4]) for line in lines] == [
        ("in", "9.0"), ("in", "4.0"), ("out", "8.0"), ("out", "3.0"), ("states", "7.0"), ("token", "30.0"),
        ("token", "20.0"), ("token", "10.0"),
    ]  # fmt: skip
    assert lines[1][3].startswith("32 columns")
    assert lines[3][3].startswith("16 columns")


def test_a_wrong_product_ends_it(device, monkeypatch) -> None:
    """No time is given of what is wrong."""
    monkeypatch.setattr(time_token, "few_rows", lambda x, w, out, by, early=False: out.copy_(1.01 * F.linear(x, w)))
    monkeypatch.setattr(time_token, "microseconds", lambda run: 1.0)
    with pytest.raises(SystemExit, match=r"few rows by 16 columns, .* must be within 4e-3 of float64, got 1"):
        list(time_token.report(SMALL, operands_of(2, device)))


@pytest.mark.parametrize("batch", ["0", "129"])
def test_batches_that_are_no_few_rows(monkeypatch, capsys, batch) -> None:
    """They are refused, as is a machine without a GPU."""
    monkeypatch.setattr(sys, "argv", ["time_token.py", batch])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        time_token.main()
    assert f"batch must be from 1 to 128, got {batch}" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        time_token.main()
