"""Tiles of the kernels around the recurrence, which move memory and need no search to come near its speed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerTiles:
    """Tokens and channels of the programs of a layer's kernels, and their warps.

    Tokens of a program of a backward kernel are taken one after the other: the more there are, the fewer are computed
    twice, and the fewer partial sums there are to add.
    """

    conv_rows: int = 32
    conv_cols: int = 128
    conv_warps: int = 4
    unconv_steps: int = 64
    unconv_cols: int = 128
    unconv_warps: int = 1
    unconv_unroll: int = 4
    decay_rows: int = 32
    decay_warps: int = 4
    finish_rows: int = 1
    finish_block: int = 1024
    """Most channels that a program holds in one piece."""
    finish_warps: int = 4
    unfinish_rows: int = 64
    unfinish_block: int = 2048
    unfinish_warps: int = 8
    decode_heads: int = 4
    decode_rows: int = 64
    """Most rows of a state that a program of the decode kernel holds at once."""
    decode_block: int = 1024
