"""The models that benchmarks run on: shapes with random weights, written as a user's would be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

__all__ = ["SHAPES", "Shape", "write_model"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen3-MoE model: every layer has experts, none is shared."""

    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    moe_intermediate_size: int
    num_heads: int
    vocab_size: int = 1024

    def config(self) -> Qwen3MoeConfig:
        """Returns the transformers config."""
        return Qwen3MoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            moe_intermediate_size=self.moe_intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            max_position_embeddings=512,
        )

    def describe_layer(self) -> str:
        """Returns the sizes of one MoE layer in words."""
        return (
            f"{self.num_experts} experts, top-{self.top_k}, hidden {self.hidden_size}, expert "
            f"width {self.moe_intermediate_size}"
        )


SHAPES = {
    "tiny": Shape(2, 8, 2, hidden_size=64, moe_intermediate_size=32, num_heads=2),
    "105M": Shape(16, 64, 8, hidden_size=256, moe_intermediate_size=128, num_heads=4),
    "620M": Shape(16, 64, 8, hidden_size=512, moe_intermediate_size=384, num_heads=8),
}
"""By the name that tables give them; ``620M`` is 2.5 GB in float32."""


def write_model(shape: Shape, folder: Path) -> None:
    """Writes a model with seeded random weights in float32 as a Hugging Face directory."""
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(shape.config()).save_pretrained(folder)
