"""The configuration of a model, with the keys of the published implementation's ``config.json``."""

# mypy: allow-untyped-calls
# since functions of transformers have no types

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..checkpoints import CONFIG, M2RNN_BLOCK, CheckpointError, spec_text
from .blocks import attention_block, mixer_kind

FULL_ATTENTION = "full_attention"
M2RNN_LAYER = "m2rnn"
DEFAULT_MIXER: dict[str, Any] = {
    "sequence_mixer_type": M2RNN_BLOCK, "k_head_dim": 64, "v_head_dim": 16,
    "num_q_heads": 1, "num_k_heads": 1, "num_v_heads": 84, "num_f_heads": 84, "num_g_heads": 84,
    "num_weight_heads": 84, "use_residual": True, "kernel_size": 4, "activation_function": "silu", "add_bias": False,
    "gradient_clipping": 1.0, "normalization_function": "rmsnorm",
    "A_init_min": 0, "A_init_max": 16, "dt_init_min": 1e-3, "dt_init_max": 0.1, "dt_init_floor": 1e-4,
}  # fmt: skip
"""The mixer of the published 410M model."""


class M2RNNConfig(PreTrainedConfig):
    """Keys as the published ``gpt_base`` has them: ``sequence_mixer_blocks`` and ``mlp_blocks`` describe each layer.

    ``round_gate`` rounds M2RNN blocks' gates to the activations' dtype, as the released models did in training.
    ``backend`` is ``m2rnn``'s: how this process runs the recurrence, which ``save_pretrained`` does not write.
    Without blocks every layer has the mixer of the published 410M model, and a SwiGLU MLP of four times the width.

    Raises CheckpointError, with the key, for what cannot be run.
    """

    model_type: ClassVar[str] = "gpt_base"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_layers"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    vocab_size: int = 50304
    max_position_embeddings: int = 4096
    hidden_size: int = 1024
    num_layers: int = 24
    embedding_dropout: float | int = 0.0
    normalization_function: str = "rmsnorm"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float | int = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    position_embedding_type: str = "nope"
    rope_theta: float | int = 10000
    rope_scaling: dict[str, Any] | None = None
    rope_dim: int | None = None
    m_emb: float | int | None = None
    m_width: float | int | None = None
    m_residual: float | int | None = None
    init_method: str = "normal"
    embedding_init_method: str = "normal"
    use_depth_scaled_init: bool = True
    sequence_mixer_blocks: list[dict[str, Any]] | None = None
    mlp_blocks: list[dict[str, Any]] | None = None
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float | int | None = None
    use_cache: bool = True
    round_gate: bool = False
    backend: str = "kernels"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.sequence_mixer_blocks is None:
            self.sequence_mixer_blocks = [dict(DEFAULT_MIXER) for _ in range(self.num_layers)]
        if self.mlp_blocks is None:
            mlp = {"mlp_type": "MLP", "intermediate_size": 4 * self.hidden_size, "activation_function": "swiglu"}
            self.mlp_blocks = [dict(mlp) for _ in range(self.num_layers)]
        kwargs.pop("layer_types", None)  # a property: what blocks say
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        """Raise CheckpointError for the first key that cannot be run as it says."""
        for key in ("sequence_mixer_blocks", "mlp_blocks"):
            if len(getattr(self, key)) != self.num_layers:
                given = len(getattr(self, key))
                raise CheckpointError(
                    f"{CONFIG}: $.{key} must have num_layers = {self.num_layers} entries, got {given}"
                )
        allowed: dict[str, tuple[Any, ...]] = {
            "normalization_function": ("rmsnorm", "layernorm"),
            "position_embedding_type": ("rope", "nope"),
            "rope_scaling": (None,),
            "init_method": ("normal", "fan_in", "mup"),
            "embedding_init_method": ("normal", "fan_in", "mup"),
            "backend": ("kernels", "reference"),
        }
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                expected = " or ".join(map(repr, values))
                raise CheckpointError(f"{CONFIG}: $.{key} must be {expected}, got {getattr(self, key)!r}")
        if "mup" in (self.init_method, self.embedding_init_method) and self.m_width is None:
            raise CheckpointError(f"{CONFIG}: $.m_width must be a number where init_method is 'mup', got None")
        if self.position_embedding_type == "rope" and FULL_ATTENTION in self.layer_types:
            self._check_rotary()

    def _check_rotary(self) -> None:
        """Raise CheckpointError unless every head has as many dims as are rotated, in pairs."""
        least, size = min(self._head_dims - {0}), self.rotary_size
        if type(size) is not int or size % 2 or not 0 < size <= least:
            rule = f"be an even number up to {least}, the least head_dim"
            raise CheckpointError(f"{CONFIG}: $.rope_dim must {rule}, got {size!r}")

    @property
    def layer_types(self) -> list[str]:
        """Return what each layer's cache holds: the states of an M2RNN block, or keys and values."""
        kinds = [mixer_kind(block, i) for i, block in enumerate(self.sequence_mixer_blocks or ())]
        return [M2RNN_LAYER if kind == M2RNN_BLOCK else FULL_ATTENTION for kind in kinds]

    @property
    def rotary_size(self) -> int:
        """Return how many dims of a head are rotated: ``rope_dim``, or a head where every layer's have one size."""
        sizes = self._head_dims
        if self.rope_dim is None and len(sizes) != 1:
            raise CheckpointError(f"{CONFIG}: $.rope_dim must be a number where mixers differ, got None")
        return sizes.pop() if self.rope_dim is None else self.rope_dim

    @property
    def _head_dims(self) -> set[int]:
        """Return the sizes of attention heads, and 0 for M2RNN blocks."""
        blocks = enumerate(self.sequence_mixer_blocks or ())
        return {
            0 if mixer_kind(block, i) == M2RNN_BLOCK else attention_block(block, i, self.hidden_size).head_dim
            for i, block in blocks
        }

    def validate(self) -> None:
        """Run the checks of every configuration but that of layer types, since transformers has no list of these."""
        for check in self.__class_validators__:
            if check.__name__ != "validate_layer_type":
                check(self)

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to ``config.json``: all but the backend, and a key of which transformers warns."""
        written: dict[str, Any] = super().to_dict()
        for key in ("backend", "rope_scaling"):  # the latter is None
            written.pop(key, None)
        return written

    def spec(
        self, name: str = "checkpoint", targets: Sequence[str] = ("sm_90",), dtypes: Sequence[str] = ("bf16",)
    ) -> str:
        """Return the YAML of the spec from which ``m2gen build`` makes a package that runs this model."""
        return spec_text(self.to_dict(), name=name, targets=targets, dtypes=dtypes)
