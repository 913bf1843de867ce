"""How the kernels around the recurrence are made for the dims and heads of a layer: what their templates ask."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from m2gen.kernels.literals import literal
from m2gen.kernels.render import render_template
from m2gen.runtime.layer_plan import LayerPlan
from m2gen.schedule.layer import USUAL, LayerTiles
from m2gen.spec import Heads
from m2gen.variant import Variant, padded

TAPS = 4
"""Widest convolution that the kernels have."""
SCALE = (4, 512, 4)
"""Tokens and columns that a program scales at once, by the norm of heads on several ranks, and its warps."""


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
    tiles: LayerTiles = USUAL

    jit = "triton.jit"
    tanh_ptx = False  # decoding asks for the instruction where it is launched

    @property
    def usual(self) -> bool:
        """Whether the tiles are those that serve without a record."""
        return self.tiles == USUAL

    @property
    def name(self) -> str:
        """The module's name: dims and heads, and of other tiles than the defaults their digits."""
        heads = self.heads
        name = f"layer_k{self.state_expansion}_v{self.head_dim}_q{heads.q}_k{heads.k}_v{heads.v}_f{heads.f}"
        if self.usual:
            return name
        return f"{name}_{hashlib.sha256(self.tiles.slug.encode()).hexdigest()[:12]}"

    @cached_property
    def constants(self) -> dict[str, int]:
        """Numbers that the kernels name."""
        tiles, back, inner = self.tiles, self.tiles.convolve_backward, self.heads.v * self.head_dim
        q_end = self.heads.q * self.state_expansion
        k_end = q_end + self.heads.k * self.state_expansion
        return {
            "Q_END": q_end, "K_END": k_end, "CHANNELS": k_end + inner, "INNER": inner,
            "K": self.state_expansion, "V": self.head_dim, "V_PAD": padded(self.head_dim),
            "N": self.heads.v, "NQ": self.heads.q, "NK": self.heads.k,
            "NF": self.heads.f, "NF_PAD": padded(self.heads.f),
            "CONV_ROWS": tiles.convolve.rows, "CONV_COLS": tiles.convolve.cols,
            "CONV_PARTS": -(-(k_end + inner) // tiles.convolve.cols),
            "UNCONV_STEPS": back.steps, "UNCONV_COLS": back.cols, "UNCONV_PARTS": -(-(k_end + inner) // back.cols),
            "DECAY_ROWS": tiles.decay.rows, "FINISH_ROWS": tiles.finish.rows,
            "UNFINISH_ROWS": tiles.finish_backward.rows, "SCALE_ROWS": SCALE[0], "SCALE_COLS": SCALE[1],
            "DECODE_HEADS": tiles.decode.heads, "DECODE_PARTS": -(-self.heads.v // tiles.decode.heads),
            "DECODE_ROWS": self.decode_rows, "DECODE_HEADS_PAD": padded(tiles.decode.heads),
            "DECODE_Q": self._read_by(tiles.decode.heads, self.heads.q) * self.state_expansion,
            "DECODE_K": self._read_by(tiles.decode.heads, self.heads.k) * self.state_expansion,
            "DECODE_V": tiles.decode.heads * self.head_dim, "DECODE_V_PAD": padded(tiles.decode.heads * self.head_dim),
            "DECODE_SCRATCH": self.decode_scratch,
        }  # fmt: skip

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All channels of a token: blocks, and a rest that wastes less than a block would."""
        return _pieces(self.constants["INNER"], self.tiles.finish.block)

    @property
    def back_pieces(self) -> tuple[Piece, ...]:
        """The same for the backward."""
        return _pieces(self.constants["INNER"], self.tiles.finish_backward.block)

    # Decoding.

    @property
    def decode_rows(self) -> int:
        """Rows of a state that are advanced at once."""
        return min(self.tiles.decode.rows, padded(self.state_expansion))

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
        shared = self._read_by(tiles.decode.heads, heads.q) + self._read_by(tiles.decode.heads, heads.k)
        return shared * self.state_expansion + tiles.decode.heads * (self.head_dim + 2)

    @property
    def decode_reads(self) -> tuple[tuple[str, str, str, str, tuple[Piece, ...]], ...]:
        """Channels of q, k and v that a program reads: how many, from where on, and before which they end."""
        counts = ((x, f"DECODE_{x.upper()}") for x in "qkv")
        starts = ("first_q * K", "Q_END + first_k * K", "K_END + first * V")
        ends = ("Q_END", "K_END", "CHANNELS")
        return tuple(
            (x, size, start, end, _pieces(self.constants[size], self.tiles.decode.block))
            for (x, size), start, end in zip(counts, starts, ends, strict=True)
        )

    @property
    def decode_shared(self) -> tuple[Piece, ...]:
        """Channels of q and k, which several programs may read."""
        return _pieces(self.constants["K_END"], self.tiles.decode.block)

    @property
    def decode_pieces(self) -> tuple[Piece, ...]:
        """All heads' channels, as the last program of a token has them."""
        return _pieces(self.constants["INNER"], self.tiles.decode.block)

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
        return self.tiles.convolve_backward.unroll

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
        return tuple(Pull(u, u + TAPS - 1, tuple((j, u + j) for j in range(TAPS))) for u in range(self.unroll))

    @property
    def plan(self) -> LayerPlan:
        """All that launchers must know of these kernels."""
        tiles, back, numbers = self.tiles, self.tiles.convolve_backward, self.constants
        return LayerPlan(
            q_end=numbers["Q_END"], k_end=numbers["K_END"], channels=numbers["CHANNELS"], inner=numbers["INNER"],
            conv=(tiles.convolve.rows, tiles.convolve.cols, tiles.convolve.warps),
            unconv=(back.steps, back.cols, back.warps),
            decay=(tiles.decay.rows, tiles.decay.warps), finish=(tiles.finish.rows, tiles.finish.warps),
            unfinish=(tiles.finish_backward.rows, tiles.finish_backward.warps), scale=(SCALE[0], SCALE[2]),
            decode=(numbers["DECODE_PARTS"], self.decode_warps, self.decode_scratch),
        )  # fmt: skip


def _pieces(inner: int, block: int) -> tuple[Piece, ...]:
    firsts = range(0, inner, block)
    return tuple(Piece(i, first, min(block, padded(inner - first))) for i, first in enumerate(firsts))


def layer_of(variant: Variant, tiles: LayerTiles = USUAL) -> LayerLowering | None:
    """Return how the layer's kernels are made for a variant; None where they serve no layer of its heads."""
    heads = variant.heads
    if heads.v != heads.total:
        return None
    return LayerLowering(variant.state_expansion, variant.head_dim, heads, tiles)


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
