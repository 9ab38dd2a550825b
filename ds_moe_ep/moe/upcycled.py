"""The MoE layer that takes a dense FFN's place: a router, and experts of the FFN's own layout.

The experts follow transformers' experts contract, so that all that works on the experts of a
Hugging Face MoE model works on them. Where they go is settled in adapter/upcycle.py, what their
weights are in checkpoint/upcycled_tensors.py.

Source: sparse upcycling, https://arxiv.org/abs/2212.05055
"""

# Shapes: T tokens, H hidden, I expert width, E experts, K top_k, P rows of one expert

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FfnLayout", "TopKRouter", "UpcycledExperts", "UpcycledMoE", "expert_shapes"]


@dataclass(frozen=True)
class FfnLayout:
    """Where an FFN has its matrices: ``down(act(gate x) * up x)``, or ``down(act(up x))``.

    Attributes:
        up: Names of the linear layers into the FFN: ``(gate, up)``, one in which both are fused,
            gate first, or ``(up,)``.
        down: Name of the linear layer out of it.
        activation: Name of the activation.
        has_gate: Whether there is a gate.
        has_bias: Whether the linear layers have biases.
        is_transposed: Whether matrices are ``[in, out]``, as GPT-2 has them, not ``[out, in]``.
    """

    up: tuple[str, ...]
    down: str
    activation: str
    has_gate: bool
    has_bias: bool
    is_transposed: bool


class TopKRouter(nn.Module):
    """Sends each token to the experts with the largest logits, with weights that sum to 1.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits ``[T, E]``, weights ``[T, K]`` in float32 and expert ids ``[T, K]``."""
        logits_TE = functional.linear(x_TH, self.weight)
        top_TK, ids_TK = logits_TE.float().topk(self.top_k, dim=-1)
        # The softmax over all experts, divided by the sum of the chosen ones', is that over these.
        return logits_TE, top_TK.softmax(dim=-1), ids_TK


class UpcycledExperts(nn.Module):
    """The experts of a layer, each an FFN of the layout of the one they were made from.

    Args:
        layout: That layout.
        hidden_size: H.
        width: I.
        num_experts: E.
        act_fn: The FFN's activation.

    Source: the attributes are what ``transformers/integrations/moe.py`` gives experts modules.
    """

    has_post_expert_norm = False
    is_concatenated = True

    def __init__(
        self, layout: FfnLayout, hidden_size: int, width: int, num_experts: int, act_fn: nn.Module
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.has_gate, self.has_bias = layout.has_gate, layout.has_bias
        self.is_transposed = layout.is_transposed
        self.act_fn = act_fn
        for name, shape in expert_shapes(layout, hidden_size, width).items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_experts, *shape)))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sums the weighted outputs of each token's experts.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: Expert ids ``[T, K]``.
            top_k_weights: Routing weights ``[T, K]``.

        Returns:
            ``[T, H]`` in the dtype of hidden_states.
        """
        sum_TH = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        for expert in top_k_index.unique().tolist():
            token_P, slot_P = (top_k_index == expert).nonzero(as_tuple=True)
            y_PH = self._run(expert, hidden_states[token_P]) * top_k_weights[token_P, slot_P, None]
            sum_TH = sum_TH.index_add(0, token_P, y_PH.float())
        return sum_TH.to(hidden_states.dtype)

    def _run(self, expert: int, x_PH: Tensor) -> Tensor:
        up_PI = self._linear("gate_up_proj" if self.has_gate else "up_proj", expert, x_PH)
        h_PI = self._apply_gate(up_PI) if self.has_gate else self.act_fn(up_PI)
        return self._linear("down_proj", expert, h_PI)

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = self.get_parameter(name)[expert]
        bias = self.get_parameter(f"{name}_bias")[expert] if self.has_bias else None
        return functional.linear(x, weight.t() if self.is_transposed else weight, bias)


class UpcycledMoE(nn.Module):
    """An MoE layer in an FFN's place.

    Args:
        experts: The experts.
        router: The router.
        dropout: The FFN's dropout, which it applies to its output.
    """

    def __init__(self, experts: nn.Module, router: TopKRouter, dropout: nn.Module) -> None:
        super().__init__()
        self.router, self.experts, self.dropout = router, experts, dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns what the layer makes of ``[..., H]``, in the same shape."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, ids_TK = self.router(x_TH)
        return self.dropout(self.experts(x_TH, ids_TK, weights_TK).reshape(hidden_states.shape))


def expert_shapes(layout: FfnLayout, hidden_size: int, width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of one expert's parameters, by name."""
    up_name, up_width = ("gate_up_proj", 2 * width) if layout.has_gate else ("up_proj", width)

    def matrix(width_in: int, width_out: int) -> tuple[int, int]:
        return (width_in, width_out) if layout.is_transposed else (width_out, width_in)

    shapes: dict[str, tuple[int, ...]] = {
        up_name: matrix(hidden_size, up_width),
        "down_proj": matrix(width, hidden_size),
    }
    if layout.has_bias:
        shapes |= {f"{up_name}_bias": (up_width,), "down_proj_bias": (hidden_size,)}
    return shapes
