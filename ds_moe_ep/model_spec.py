"""Translates a Hugging Face config.json into a `ModelSpec`; the only place that knows Hugging Face's field names.

It reads no weights and imports neither torch nor transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_moe_ep.errors import ModelSpecError

__all__ = ["MLASpec", "ModelSpec", "model_spec_from_config", "read_model_spec"]

_BYTES_PER_PARAM = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class MLASpec:
    """Sizes of multi-head latent attention; q_lora_rank is None where queries are projected directly."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class ModelSpec:
    """What planning needs to know about a model, in this project's words.

    `num_experts` and `top_k` are per MoE layer and 0 for a dense model. `num_dense_params` counts everything but the
    routed experts (routers included), `num_params_per_expert` one routed expert of one layer.
    """

    name: str
    model_type: str
    architecture: str
    num_layers: int
    moe_layers: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    num_shared_experts: int
    shared_expert_intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mla: MLASpec | None
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    num_dense_params: int
    num_params_per_expert: int

    @property
    def is_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return bool(self.moe_layers)

    @property
    def num_expert_params(self) -> int:
        """Parameters of all routed experts of all layers."""
        return len(self.moe_layers) * self.num_experts * self.num_params_per_expert

    @property
    def num_params(self) -> int:
        """Parameters of the whole model, tied embeddings counted once."""
        return self.num_dense_params + self.num_expert_params

    @property
    def param_bytes(self) -> int:
        """Bytes of one parameter in `dtype`."""
        return _BYTES_PER_PARAM[self.dtype]


def read_model_spec(path: str | Path) -> ModelSpec:
    """Read the spec of a model directory or of a bare config.json.

    Raises:
        ModelSpecError: with the file and the field at fault.
    """
    raise ModelSpecError(f"{path}: reading is not written yet")


def model_spec_from_config(config: Mapping[str, Any], *, source: str, name: str) -> ModelSpec:
    """Translate the content of a config.json.

    Args:
        config: the parsed file.
        source: path for messages.
        name: model name for display.

    Raises:
        ModelSpecError: with the field at fault and its value.
    """
    raise ModelSpecError(f"{source}: reading is not written yet")
