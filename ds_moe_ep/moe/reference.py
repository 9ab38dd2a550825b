"""The slow, readable reference: one process, every expert, one (token, slot) pair after the other.

It shares no code with the dispatchers; tests compare them with it.
"""

# Shapes: T tokens, H hidden, K top_k

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["reference_moe"]


def reference_moe(
    experts: nn.Module, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor
) -> Tensor:
    """Computes ``out[t] = sum_k weights[t, k] * expert[ids[t, k]](x[t])`` in float64 sums.

    Args:
        experts: Module with transformers' experts contract that holds all experts of the layer.
        x_TH: Tokens.
        topk_ids_TK: Expert ids.
        topk_weights_TK: Routing weights.

    Returns:
        Output ``[T, H]`` in x's dtype.
    """
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64, device=x_TH.device)
    one = torch.ones((1, 1), dtype=topk_weights_TK.dtype, device=x_TH.device)
    for t, ids_K in enumerate(topk_ids_TK.tolist()):
        for k, expert in enumerate(ids_K):
            chosen = torch.tensor([[expert]], device=x_TH.device)
            output_H = experts(x_TH[t : t + 1], chosen, one)[0]
            out_TH[t] = out_TH[t] + output_H.double() * topk_weights_TK[t, k].double()
    return out_TH.to(x_TH.dtype)
