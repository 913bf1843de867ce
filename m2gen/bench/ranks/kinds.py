"""How a layer may lie over ranks; imports nothing that takes a while."""

from __future__ import annotations

from enum import StrEnum


class Form(StrEnum):
    """How a layer lies over ranks."""

    ONE = "one"
    """Not at all: one rank does all the work."""
    HEADS = "heads"
    """Heads over ranks; tokens are whole on each."""
    HEADS_TOKENS = "heads_tokens"
    """Heads over ranks, and tokens outside the layer: gathered before it, sums scattered after it."""
    EXCHANGE = "exchange"
    """Tokens over ranks, exchanged for heads and back."""
    PIPELINE = "pipeline"
    """Tokens over ranks, which hand states on."""
    MESH = "mesh"
    """A mesh of two dims: heads over pairs of ranks, and tokens over the others, exchanged for heads."""
    FSDP = "fsdp"
    """Sequences over ranks, each with a shard of every parameter, of a hybrid of M2RNN and attention."""

    @property
    def shares_tokens(self) -> bool:
        """Whether each rank has its part of the tokens outside the layer."""
        return self in (Form.HEADS_TOKENS, Form.EXCHANGE, Form.PIPELINE, Form.MESH)

    @property
    def captured(self) -> bool:
        """Whether its steps are also timed as a CUDA graph: not where hooks, or ranks in turn, do what it sends."""
        return self not in (Form.PIPELINE, Form.FSDP)


class Mixing(StrEnum):
    """What mixes the tokens of a block."""

    M2RNN = "m2rnn"
    ATTENTION = "attention"
