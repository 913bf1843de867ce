"""Attention and MLPs as configurations of the published implementation describe them, checked, with every default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoints import CONFIG, M2RNN_BLOCK, CheckpointError

ATTENTION_BLOCK = "softmax_attention"
INVERSE_SQRT = "1 / sqrt(head_dim)"
INVERSE = "1 / head_dim"


@dataclass(frozen=True)
class AttentionBlock:
    """Attention: heads of queries, and of keys and values, their dim, and how scores are scaled."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    bias: bool
    gate: bool
    exclusive: bool
    score_dropout: float
    dropout: float

    @property
    def groups(self) -> int:
        """Return how many queries share a key."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class MLPBlock:
    """An MLP of one hidden layer; gated where the name of its activation ends in glu."""

    size: int
    activation: str
    bias: bool
    dropout: float

    @property
    def gated(self) -> bool:
        """Whether half of the first projection is a gate."""
        return self.activation.endswith("glu")


@dataclass(frozen=True)
class ExpertsBlock:
    """A mixture of experts, each an MLP without biases, and one MLP, ``shared``, of every token's where it is given.

    Chosen experts' weights add up to 1 where ``normalised``, and else all experts' do.
    """

    expert: MLPBlock
    count: int
    chosen: int
    shared: MLPBlock | None
    shared_gate: bool
    normalised: bool
    dropout: float


class Keys:
    """Read the keys of one mapping of a configuration; ``done`` refuses those that nobody read."""

    def __init__(self, block: Any, where: str) -> None:
        if not isinstance(block, Mapping):
            raise CheckpointError(f"{where} must be a mapping, got {block!r}")
        self._left, self._where = dict(block), where

    def error(self, key: str, contract: str, value: object) -> CheckpointError:
        """Return the error for a key, saying where it is, what it must be and what it was."""
        return CheckpointError(f"{self._where}.{key} must {contract}, got {value!r}")

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number at least 0."""
        value = self._left.pop(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
            raise self.error(key, "be a number at least 0", value)
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; null is the default."""
        value = self._left.pop(key, None)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, "be a positive integer", value)
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self._left.pop(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "be true or false", value)
        return value

    def any(self, key: str, default: Any = None) -> Any:
        """Return whatever there is."""
        return self._left.pop(key, default)

    def only(self, key: str, *allowed: Any) -> Any:
        """Return a value among those allowed, the first of them if absent."""
        value = self._left.pop(key, allowed[0])
        if value not in allowed:
            raise self.error(key, f"be {' or '.join(map(repr, allowed))}", value)
        return value

    def done(self) -> None:
        """Raise CheckpointError for a key that nobody read."""
        if self._left:
            key, value = next(iter(self._left.items()))
            raise self.error(key, "not be given: nothing reads it", value)


def mixer_kind(block: Any, i: int) -> str:
    """Return the type of the mixer of layer i; raises CheckpointError for one that cannot run."""
    keys = Keys(block, f"{CONFIG}: $.sequence_mixer_blocks[{i}]")
    return str(keys.only("sequence_mixer_type", M2RNN_BLOCK, ATTENTION_BLOCK))


def attention_block(block: Any, i: int, hidden_size: int) -> AttentionBlock:
    """Return the attention of layer i; raises CheckpointError for a key that cannot be run as it says."""
    keys = Keys(block, f"{CONFIG}: $.sequence_mixer_blocks[{i}]")
    keys.only("sequence_mixer_type", ATTENTION_BLOCK)
    heads = keys.count("num_attention_heads")
    kv_heads = keys.count("num_key_value_heads")
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"divide {heads}", kv_heads)
    if hidden_size % heads:
        raise keys.error("num_attention_heads", f"divide the hidden size {hidden_size}", heads)
    head_dim = keys.count("head_dim", hidden_size // heads)
    keys.only("sliding_window", None)
    made = AttentionBlock(
        heads, kv_heads, head_dim, _scale(keys, head_dim),
        keys.flag("add_bias"), keys.flag("attention_gate"), keys.flag("exclusive_self_attention"),
        keys.number("softmax_dropout", 0), keys.number("dropout", 0),
    )  # fmt: skip
    keys.done()
    return made


def _scale(keys: Keys, head_dim: int) -> float:
    method, multiplier = keys.any("attention_multiplier_method", INVERSE_SQRT), keys.any("attention_multiplier")
    if method is None:
        if not isinstance(multiplier, int | float):
            raise keys.error("attention_multiplier", "be a number if attention_multiplier_method is null", multiplier)
        return float(multiplier)
    if multiplier is not None:
        raise keys.error("attention_multiplier", "be null beside attention_multiplier_method", multiplier)
    if method not in (INVERSE_SQRT, INVERSE):
        raise keys.error("attention_multiplier_method", f"be {INVERSE_SQRT!r}, {INVERSE!r} or null", method)
    return float(head_dim ** (-0.5 if method == INVERSE_SQRT else -1))


def mlp_block(block: Any, i: int) -> MLPBlock | ExpertsBlock:
    """Return the MLP of layer i; raises CheckpointError for keys that cannot be run as they say."""
    keys = Keys(block, f"{CONFIG}: $.mlp_blocks[{i}]")
    kind = keys.only("mlp_type", "MLP", "MoE")
    activation, bias = str(keys.any("activation_function")), keys.flag("add_bias")
    mlp = MLPBlock(keys.count("intermediate_size"), activation, bias, keys.number("dropout", 0))
    made = mlp if kind == "MLP" else _experts(keys, mlp)
    keys.done()
    return made


def _experts(keys: Keys, mlp: MLPBlock) -> ExpertsBlock:
    """Return the experts of which each is as ``mlp``; published code leaves their biases out."""
    if mlp.bias:
        raise keys.error("add_bias", "be false where mlp_type is 'MoE'", mlp.bias)
    count, chosen = keys.count("num_experts"), keys.count("num_experts_per_tok")
    if chosen > count:
        raise keys.error("num_experts_per_tok", f"be at most num_experts = {count}", chosen)
    shared, expert = keys.any("shared_intermediate_size"), replace(mlp, dropout=0)
    if shared is not None and (type(shared) is not int or shared < 1):
        raise keys.error("shared_intermediate_size", "be null or a positive integer", shared)
    gate = keys.flag("shared_expert_gating")
    if gate and shared is None:
        raise keys.error("shared_expert_gating", "be false where shared_intermediate_size is null", gate)
    always = None if shared is None else replace(expert, size=shared)
    return ExpertsBlock(expert, count, chosen, always, gate, keys.flag("normalized_topk", True), mlp.dropout)
