"""The layer on sequences that lie over ranks, which exchange their tokens for heads and back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from .. import fused
from ..cache import States
from ..forward import check_tokens
from ..fused import Projected
from ..mixer import Mixer, operand_sizes, split_sizes
from ..norm import RMSNorm
from ..not_built import check_built
from ..scan import epilogue, recur
from .agreement import check_calls_agree, check_ranks_agree, offsets_of
from .normed import Normed, dims_of, scaled, squared
from .share import HeadShare, RankOf
from .slab_products import normed_from_heads, product_to_heads
from .slabs import Route
from .transposes import to_heads, to_tokens


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

    Projections and the norm run on the rank's own tokens; the rows of the input projection are exchanged for heads,
    before the convolution, so that it sees whole sequences; what the norm takes comes back. Operands whose heads are
    fewer than ranks go to every rank that reads them. Modules leave the output gates where they are, for y + D v.

    Raises what ``HeadShare`` raises, and ValueError for ``tokens`` that are not one for each rank, or not this rank's.
    """
    return HeadExchange(layer, group)(x, cu_seqlens, cu_seqlens_cpu, tokens)


class HeadExchange:
    """``exchange_over_ranks`` of one layer and group.

    Raises ValueError for heads that themselves spread tokens, VariantNotBuiltError where the share of heads was not
    built, and RanksDifferError.
    """

    def __init__(self, layer: Mixer, group: distributed.ProcessGroup | None = None) -> None:
        found = group or distributed.group.WORLD
        if found is None:
            raise RuntimeError("M2RNN: torch.distributed must be initialised before tokens are exchanged over ranks")
        if getattr(layer, "sequence_parallel", False):
            raise ValueError("M2RNN: sequence_parallel must be False where tokens are exchanged over ranks")
        self.layer, self.group = layer, found
        self.place = RankOf(found.rank(), found.size())
        self.share = HeadShare(layer, self.place)
        self.dims = dims_of(self.share)
        if layer.backend == "kernels":
            check_ranks_agree(found)  # first: a rank with another package may not have the share
            check_built(layer.state_expansion, layer.head_dim, self.share.heads, layer.state_weight.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadExchange:
        made = HeadExchange.__new__(HeadExchange)
        memo[id(self.group)] = self.group  # the same ranks, of the copied layer
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def __call__(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """Do what ``exchange_over_ranks`` does."""

        def facts() -> dict[str, str]:
            check_tokens(self.layer, x, cu_seqlens, cu_seqlens_cpu)
            return {**self._facts(x, tokens), "cu_seqlens": offsets_of(cu_seqlens, cu_seqlens_cpu)}

        sizes = (tuple(x.shape[:-1]), None) if tokens is None else (tuple(x.shape[:-2]), tuple(tokens))
        check_calls_agree(self.group, "exchange", (x.dtype, *sizes), facts)
        check_tokens(self.layer, x, cu_seqlens, cu_seqlens_cpu)
        counts = self._counts(x, tokens)
        run = self._by_kernels if fused.computes(self.share, x) else self._by_modules
        if cu_seqlens is None:
            return run(x, counts, None, None)
        return run(x[None], counts, cu_seqlens, cu_seqlens_cpu)[0]

    def _by_modules(
        self, x: Tensor, counts: tuple[int, ...], cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None
    ) -> Tensor:
        """Return the result (B, S_r, hidden_size); output gates stay where they are."""
        layer, share, ranks = self.layer, self.share, self.place.ranks
        mixed, f, g = fused.project(layer, x).parts(layer)
        operands = (*torch.split(mixed, list(operand_sizes(layer)), -1), f)
        groups = (*layer.heads[:3], layer.forget_inputs)
        rows = to_heads(_by_reader(operands, groups, ranks, x.dim() - 1, fills=False), counts, self.group)
        mixed, f = torch.split(rows, [sum(operand_sizes(share)), share.forget_inputs], -1)
        packed = cu_seqlens is not None
        if packed:
            mixed, f = mixed[0], f[0]
        y, _, _ = recur(share, mixed, f, States(None, None), cu_seqlens, cu_seqlens_cpu)
        y = to_tokens((y[None] if packed else y).flatten(-2), counts, self.group)
        return epilogue(layer, torch.unflatten(y, -1, (layer.total_heads, layer.head_dim)), g)

    def _by_kernels(
        self, x: Tensor, counts: tuple[int, ...], cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None
    ) -> Tensor:
        """Return the same; rows go to heads whole, output gates too, so that all up to the norm is theirs."""
        rows = self._rows(x, counts)
        own, _, gates = split_sizes(self.share)
        packed = cu_seqlens is not None
        theirs = Projected(rows[0] if packed else rows, own + gates, own)
        y, _, _ = fused.between(self.share, theirs, States(None, None), cu_seqlens, cu_seqlens_cpu)
        return self._normed(y[None] if packed else y, counts)

    def _rows(self, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Return of x (B, S_r, hidden_size) the rows that this rank's heads read, of all tokens, (B, S, columns).

        They are products with rows of the weight, one rank's after the other's, where it may be read.
        """
        layer, ranks = self.layer, self.place.ranks
        groups = (*layer.heads[:3], layer.gate_heads, layer.forget_inputs)
        if not fused.reads_projection(layer, x):
            mixed, f, g = fused.project(layer, x).parts(layer)
            operands = (*torch.split(mixed, list(operand_sizes(layer)), -1), g, f)
            return to_heads(_by_reader(operands, groups, ranks, x.dim() - 1), counts, self.group)
        module, dtype = cast(nn.Linear, layer.input_projection), fused.compute_dtype(x)
        _, forget, gates = split_sizes(layer)

        def laid_out(p: Tensor) -> Tensor:
            *mixed, f, g = torch.split(p, [*operand_sizes(layer), forget, gates])
            return _by_reader((*mixed, g, f), groups, ranks, 0).to(dtype)

        weight, bias = laid_out(module.weight), None if module.bias is None else laid_out(module.bias)
        if torch.compiler.is_compiling():
            return to_heads(F.linear(x, weight, bias), counts, self.group)
        return product_to_heads(x.to(dtype), weight, bias, Route(self.group, counts))

    def _normed(self, y: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Return the output projection of the norm, of this rank's tokens, of y (B, S, C), all tokens of its heads."""
        norm, out = self.layer.g_norm, self.layer.output_projection
        if not self._norms_after():
            mixed: Tensor = out(norm(to_tokens(y, counts, self.group)))
            return mixed
        norm, out = cast(RMSNorm, norm), cast(nn.Linear, out)
        weight = (out.weight * norm.weight).to(y.dtype)
        if not torch.compiler.is_compiling():
            normed = Normed(norm.weight.numel(), norm.eps, self.dims)
            return normed_from_heads(y, weight, normed, Route(self.group, counts))
        y, squares = squared(to_tokens(y, counts, self.group))
        return scaled(F.linear(y, weight), squares, Normed(norm.weight.numel(), norm.eps))

    def _norms_after(self) -> bool:
        """Whether the norm's weight is read, and its scale taken after the output projection."""
        norm, out = self.layer.g_norm, self.layer.output_projection
        return fused.plain(norm, RMSNorm) and fused.plain(out, nn.Linear) and not isinstance(norm.weight, DTensor)

    def _facts(self, x: Tensor, tokens: Sequence[int] | None) -> dict[str, str]:
        """Return what decides on the messages of a call."""
        reads = {"input_projection": fused.reads_projection(self.layer, x), "g_norm": self._norms_after()}
        called = ", ".join(name for name, is_read in reads.items() if not is_read) or "none of them"
        return {
            "sequences": str(x.shape[0]) if x.dim() > 2 else "packed",
            "tokens of the ranks": str(self._counts(x, tokens)),
            "dtype": str(fused.compute_dtype(x)),
            "modules that are called": called if fused.computes(self.share, x) else "all",
        }

    def _counts(self, x: Tensor, tokens: Sequence[int] | None) -> tuple[int, ...]:
        if tokens is None:
            return (x.shape[-2],) * self.place.ranks
        if len(tokens) != self.place.ranks or tokens[self.place.rank] != x.shape[-2]:
            expected = f"of {self.place.ranks} ranks, {x.shape[-2]} of rank {self.place.rank}"
            raise ValueError(f"M2RNN: tokens must be those {expected} as x has, got {tuple(tokens)}")
        return tuple(tokens)


def _by_reader(operands: Sequence[Tensor], groups: Sequence[int], ranks: int, dim: int, fills: bool = True) -> Tensor:
    """Return what each rank reads of operands of so many groups along ``dim``, one rank's after the other's.

    With ``fills`` there are zeros after each rank's, up to what rows of kernels are multiples of.
    """
    parts = [_read(x, count, ranks, dim) for x, count in zip(operands, groups, strict=True)]
    return torch.cat(fused.filled(parts, dim + 1) if fills else parts, dim + 1).flatten(dim, dim + 1)


def _read(x: Tensor, groups: int, ranks: int, dim: int) -> Tensor:
    """Return x with ``dim`` as (ranks, size of a rank's): of fewer groups than ranks, each goes to several."""
    if groups % ranks == 0:
        return torch.unflatten(x, dim, (ranks, -1))
    each = torch.unflatten(x, dim, (groups, 1, -1))
    sizes = list(each.shape)
    sizes[dim + 1] = ranks // groups
    return each.expand(sizes).flatten(dim, dim + 1)
