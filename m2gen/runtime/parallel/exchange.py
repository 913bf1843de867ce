"""The layer on sequences that lie over ranks, which exchange their tokens for heads and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from ..cache import States
from ..mixer import Mixer, operand_sizes
from ..not_built import check_built
from ..scan import epilogue, project, recur
from .collectives import exchanged
from .share import HeadShare, RankOf


def exchange_over_ranks(
    layer: Mixer,
    x: Tensor,
    group: distributed.ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    tokens: Sequence[int] | None = None,
) -> Tensor:
    """Run sequences that lie over the ranks of a group, each rank with its share of the heads on all tokens.

    x (B, S_r, hidden_size) has this rank's tokens of each sequence, in the order of ranks; or (T_r, hidden_size) those
    of a packed batch, with the offsets of the whole batch as ``m2rnn`` takes them. Ranks have as many ``tokens`` each
    as that says, None for equal parts. The result is that of the rank's tokens. Gradients of parameters are what the
    rank contributes: their sum over ranks is the whole batch's.

    Projections and the norm run on the rank's own tokens; q, k, v and the forget gate's input are exchanged for heads,
    before the convolution, so that it sees whole sequences; y + D v comes back. Operands whose heads are fewer than
    ranks go to every rank that reads them.

    Raises what ``HeadShare`` raises, and ValueError for ``tokens`` that are not one for each rank, or not this rank's.
    """
    return HeadExchange(layer, group)(x, cu_seqlens, cu_seqlens_cpu, tokens)


class HeadExchange:
    """``exchange_over_ranks`` of one layer and group; VariantNotBuiltError where its share of heads was not built."""

    def __init__(self, layer: Mixer, group: distributed.ProcessGroup | None = None) -> None:
        found = group or distributed.group.WORLD
        if found is None:
            raise RuntimeError("M2RNN: torch.distributed must be initialised before tokens are exchanged over ranks")
        self.layer, self.group = layer, found
        self.place = RankOf(found.rank(), found.size())
        self.share = HeadShare(layer, self.place)
        if layer.backend == "kernels":
            check_built(layer.state_expansion, layer.head_dim, self.share.heads, layer.state_weight.dtype)

    def __call__(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """Do what ``exchange_over_ranks`` does."""
        packed = cu_seqlens is not None
        counts = self._counts(x, tokens)
        mixed, f, g = project(self.layer, x[None] if packed else x)
        mixed, f = self._to_heads(mixed, f, counts)
        if packed:
            mixed, f = mixed[0], f[0]
        y, _, _ = recur(self.share, mixed, f, States(None, None), cu_seqlens, cu_seqlens_cpu)
        y = self._to_tokens((y[None] if packed else y).flatten(-2), counts)
        mixed = epilogue(self.layer, torch.unflatten(y, -1, (self.layer.total_heads, self.layer.head_dim)), g)
        return mixed[0] if packed else mixed

    def _counts(self, x: Tensor, tokens: Sequence[int] | None) -> tuple[int, ...]:
        if tokens is None:
            return (x.shape[-2],) * self.place.ranks
        if len(tokens) != self.place.ranks or tokens[self.place.rank] != x.shape[-2]:
            expected = f"of {self.place.ranks} ranks, {x.shape[-2]} of rank {self.place.rank}"
            raise ValueError(f"M2RNN: tokens must be those {expected} as x has, got {tuple(tokens)}")
        return tuple(tokens)

    def _to_heads(self, mixed: Tensor, f: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the inputs (B, S, C) of this rank's heads on all tokens, of those of all heads on its own."""
        layer, ranks = self.layer, self.place.ranks
        operands = (*torch.split(mixed, list(operand_sizes(layer)), -1), f)
        groups = (*layer.heads[:3], layer.forget_inputs)
        send = torch.cat([_by_reader(x, n, ranks) for x, n in zip(operands, groups, strict=True)], -1)
        batch, here, channels = send.shape[1:]
        sizes = [batch * count * channels for count in counts]
        flat = exchanged(send.flatten(), [batch * here * channels] * ranks, sizes, self.group)
        whole = _joined(flat, (batch, channels), counts)
        own = sum(operand_sizes(self.share))
        return whole[..., :own], whole[..., own:]

    def _to_tokens(self, y: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Return y (B, S_r, C) of all heads on this rank's tokens, of this rank's heads on all."""
        batch, _, channels = y.shape
        here, ranks = counts[self.place.rank], self.place.ranks
        flat = torch.cat([part.flatten() for part in torch.split(y, list(counts), 1)])
        sizes = [batch * count * channels for count in counts]
        back = exchanged(flat, sizes, [batch * here * channels] * ranks, self.group)
        return back.view(ranks, batch, here, channels).permute(1, 2, 0, 3).flatten(2)


def _by_reader(x: Tensor, groups: int, ranks: int) -> Tensor:
    """Return the groups of x (B, S, groups * size) that each rank reads, as (ranks, B, S, size of a rank's)."""
    if groups % ranks == 0:
        return torch.unflatten(x, -1, (ranks, -1)).movedim(2, 0)
    each = torch.unflatten(x, -1, (groups, 1, -1)).expand(-1, -1, -1, ranks // groups, -1)
    return each.flatten(2, 3).movedim(2, 0)


def _joined(flat: Tensor, sizes: tuple[int, int], counts: tuple[int, ...]) -> Tensor:
    """Return the parts that ranks sent as one (B, S, C); ``sizes`` are B and C."""
    batch, channels = sizes
    if len(set(counts)) == 1:
        return flat.view(len(counts), batch, counts[0], channels).transpose(0, 1).flatten(1, 2)
    parts = torch.split(flat, [batch * count * channels for count in counts])
    return torch.cat([part.view(batch, count, channels) for part, count in zip(parts, counts, strict=True)], 1)
