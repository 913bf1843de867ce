"""How the kernels around the recurrence are made for the dims and heads of a layer: what their templates ask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from m2gen.kernels.literals import literal
from m2gen.kernels.render import render_template
from m2gen.runtime.layer_plan import LayerPlan
from m2gen.schedule.layer import LayerTiles
from m2gen.spec import Heads
from m2gen.variant import Variant, padded

TAPS = 4
"""Widest convolution that the kernels have."""


class Piece(NamedTuple):
    """Channels of a token that are one tensor of a program."""

    i: int
    first: int
    size: int


class Pull(NamedTuple):
    """One step of an iteration of the convolution's backward, and the inputs that it takes."""

    u: int
    last: int
    taps: tuple[tuple[int, int], ...]
    """Taps, each with the number of its input, counted backwards from the iteration's first step."""


@dataclass(frozen=True)
class LayerLowering:
    """How the kernels around the recurrence are made; templates see it as ``k``."""

    state_expansion: int
    head_dim: int
    heads: Heads
    tiles: LayerTiles = field(default_factory=LayerTiles)

    jit = "triton.jit"
    tanh_ptx = False  # decoding asks for the instruction where it is launched

    @property
    def name(self) -> str:
        """The module's name: dims and heads, which are all that it depends on."""
        heads = self.heads
        return f"layer_k{self.state_expansion}_v{self.head_dim}_q{heads.q}_k{heads.k}_v{heads.v}_f{heads.f}"

    @cached_property
    def constants(self) -> dict[str, int]:
        """Numbers that the kernels name."""
        tiles, inner = self.tiles, self.heads.v * self.head_dim
        q_end = self.heads.q * self.state_expansion
        k_end = q_end + self.heads.k * self.state_expansion
        return {
            "Q_END": q_end, "K_END": k_end, "CHANNELS": k_end + inner, "INNER": inner,
            "K": self.state_expansion, "V": self.head_dim, "V_PAD": padded(self.head_dim),
            "N": self.heads.v, "NQ": self.heads.q, "NK": self.heads.k,
            "NF": self.heads.f, "NF_PAD": padded(self.heads.f),
            "CONV_ROWS": tiles.conv_rows, "CONV_COLS": tiles.conv_cols,
            "CONV_PARTS": -(-(k_end + inner) // tiles.conv_cols),
            "UNCONV_STEPS": tiles.unconv_steps, "UNCONV_COLS": tiles.unconv_cols,
            "UNCONV_PARTS": -(-(k_end + inner) // tiles.unconv_cols),
            "DECAY_ROWS": tiles.decay_rows, "FINISH_ROWS": tiles.finish_rows, "UNFINISH_ROWS": tiles.unfinish_rows,
            "DECODE_HEADS": tiles.decode_heads, "DECODE_PARTS": -(-self.heads.v // tiles.decode_heads),
            "DECODE_ROWS": self.decode_rows, "DECODE_HEADS_PAD": padded(tiles.decode_heads),
            "DECODE_Q": self._read_by(tiles.decode_heads, self.heads.q) * self.state_expansion,
            "DECODE_K": self._read_by(tiles.decode_heads, self.heads.k) * self.state_expansion,
            "DECODE_V": tiles.decode_heads * self.head_dim, "DECODE_V_PAD": padded(tiles.decode_heads * self.head_dim),
            "DECODE_SCRATCH": self.decode_scratch,
        }  # fmt: skip

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All channels of a token: blocks, and a rest that wastes less than a block would."""
        return _pieces(self.constants["INNER"], self.tiles.finish_block)

    @property
    def back_pieces(self) -> tuple[Piece, ...]:
        """The same for the backward."""
        return _pieces(self.constants["INNER"], self.tiles.unfinish_block)

    # Decoding.

    @property
    def decode_rows(self) -> int:
        """Rows of a state that are advanced at once."""
        return min(self.tiles.decode_rows, padded(self.state_expansion))

    @property
    def decode_warps(self) -> int:
        """Warps that hold these in 32 registers of a thread."""
        return max(1, min(8, self.decode_rows * padded(self.head_dim) // 1024))

    def _read_by(self, heads: int, groups: int) -> int:
        """Return how many of ``groups`` heads, at most, are those of ``heads`` that a program advances."""
        size = self.heads.v // groups
        firsts = range(0, self.heads.v, heads)
        return max((min(first + heads, self.heads.v) - 1) // size - first // size + 1 for first in firsts)

    @property
    def decode_scratch(self) -> int:
        """Numbers of a program of the decode kernel: q, k and v of its heads, f and 1 - f."""
        heads, tiles = self.heads, self.tiles
        shared = self._read_by(tiles.decode_heads, heads.q) + self._read_by(tiles.decode_heads, heads.k)
        return shared * self.state_expansion + tiles.decode_heads * (self.head_dim + 2)

    @property
    def decode_reads(self) -> tuple[tuple[str, str, str, str, tuple[Piece, ...]], ...]:
        """Channels of q, k and v that a program reads: how many, from where on, and before which they end."""
        counts = ((x, f"DECODE_{x.upper()}") for x in "qkv")
        starts = ("first_q * K", "Q_END + first_k * K", "K_END + first * V")
        ends = ("Q_END", "K_END", "CHANNELS")
        return tuple(
            (x, size, start, end, _pieces(self.constants[size], self.tiles.decode_block))
            for (x, size), start, end in zip(counts, starts, ends, strict=True)
        )

    @property
    def decode_shared(self) -> tuple[Piece, ...]:
        """Channels of q and k, which several programs may read."""
        return _pieces(self.constants["K_END"], self.tiles.decode_block)

    @property
    def decode_pieces(self) -> tuple[Piece, ...]:
        """All heads' channels, as the last program of a token has them."""
        return _pieces(self.constants["INNER"], self.tiles.decode_block)

    # The convolution's backward.

    @property
    def taps(self) -> range:
        return range(TAPS)

    @property
    def halo(self) -> int:
        """Steps after a chunk that owe something to its inputs."""
        return TAPS - 1

    @property
    def carried(self) -> range:
        """Inputs that a step leaves to the one before it."""
        return range(TAPS - 1)

    @property
    def unroll(self) -> int:
        return self.tiles.unconv_unroll

    @property
    def owes(self) -> tuple[tuple[int, int], ...]:
        return tuple((j, j + 1) for j in range(1, TAPS - 1))

    @property
    def shifts(self) -> tuple[tuple[int, int], ...]:
        return tuple((j, j + 1) for j in self.carried)

    @property
    def moves(self) -> tuple[tuple[int, int], ...]:
        return tuple((j, j + self.unroll) for j in self.carried)

    @property
    def pulls(self) -> tuple[Pull, ...]:
        return tuple(
            Pull(u, u + TAPS - 1, tuple((j, u + j) for j in range(TAPS))) for u in range(self.tiles.unconv_unroll)
        )

    @property
    def plan(self) -> LayerPlan:
        """All that launchers must know of these kernels."""
        tiles, numbers = self.tiles, self.constants
        return LayerPlan(
            q_end=numbers["Q_END"], k_end=numbers["K_END"], channels=numbers["CHANNELS"], inner=numbers["INNER"],
            conv=(tiles.conv_rows, tiles.conv_cols, tiles.conv_warps),
            unconv=(tiles.unconv_steps, tiles.unconv_cols, tiles.unconv_warps),
            decay=(tiles.decay_rows, tiles.decay_warps), finish=(tiles.finish_rows, tiles.finish_warps),
            unfinish=(tiles.unfinish_rows, tiles.unfinish_warps),
            decode=(numbers["DECODE_PARTS"], self.decode_warps, self.decode_scratch),
        )  # fmt: skip


def _pieces(inner: int, block: int) -> tuple[Piece, ...]:
    firsts = range(0, inner, block)
    return tuple(Piece(i, first, min(block, padded(inner - first))) for i, first in enumerate(firsts))


def layer_of(variant: Variant) -> LayerLowering | None:
    """Return how the layer's kernels are made for a variant; None where they serve no layer of its heads."""
    heads = variant.heads
    if heads.v != heads.total:
        return None
    return LayerLowering(variant.state_expansion, variant.head_dim, heads)


def layers_of(variants: Iterable[Variant]) -> dict[str, LayerLowering]:
    """Return every module of layer kernels that variants need, once, by name."""
    found = (layer_of(variant) for variant in variants)
    return {k.name: k for k in found if k is not None}


def render_layer(k: LayerLowering, provenance: str = "") -> str:
    """Return the module of the kernels around a layer's recurrence."""
    heads = k.heads
    title = (
        f"Kernels around the recurrence of K{k.state_expansion} V{k.head_dim}, "
        f"heads q{heads.q} k{heads.k} v{heads.v} f{heads.f}."
    )
    return render_template(
        "kernels/layer/module.py.j2", k=k, title=title, provenance=provenance, launch=literal(k.plan._asdict())
    )
