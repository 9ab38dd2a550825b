"""The arithmetic of Hugging Face experts as matrix products over rows sorted by expert.

It follows what transformers' experts contract declares of a module (layout, bias, gate, norm) and
uses the module's own gate and activation; it knows no model family.
"""

# Shapes: P pairs of a row and an expert, H hidden, I expert width, e local experts

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "declares_contract",
    "follows_contract",
    "groups_without_sync",
    "lay_out_for_cpu",
    "run_grouped",
    "run_single",
]

_DECLARED = (
    "num_experts",
    "has_gate",
    "has_bias",
    "is_transposed",
    "is_concatenated",
    "_apply_gate",
)

# torch's grouped product wants rows that start at multiples of this.
_ALIGNMENT_BYTES = 16


def declares_contract(module: nn.Module) -> bool:
    """Says whether a module has what transformers gives every experts module.

    Source:
        ``use_experts_implementation`` in ``transformers/integrations/moe.py``.
    """
    return all(hasattr(module, name) for name in _DECLARED)


def follows_contract(experts: nn.Module) -> bool:
    """Says whether `experts` keep the contract, and their rows can be aligned."""
    if not (declares_contract(experts) and hasattr(experts, "down_proj")):
        return False
    widths = (*experts.down_proj.shape[1:], _up_projection(experts).shape[-1])
    item_bytes = experts.down_proj.element_size()
    return all(width * item_bytes % _ALIGNMENT_BYTES == 0 for width in widths)


@torch.no_grad()
def lay_out_for_cpu(experts: nn.Module) -> None:
    """Lays the matrices of experts on a CPU out as its matrix products read them fastest.

    Shapes and values stay; in memory a matrix becomes what multiplies rows from the right, input
    after input. With few rows an expert that saves up to a third of the time, with hundreds
    nothing. Call it before inference: what trains weights may keep views of their memory.

    Args:
        experts: Any experts module; one that does not follow the contract is left alone, and so is
            one that is not on a CPU, or not of float32: the products of narrower types read large
            matrices faster as they are stored, float16 many times.
    """
    if not follows_contract(experts) or experts.is_transposed or experts.down_proj.is_cuda:
        return
    if experts.down_proj.dtype != torch.float32:
        return
    for weight in (_up_projection(experts), experts.down_proj):
        laid_out = torch.empty_like(weight.transpose(1, 2), memory_format=torch.contiguous_format)
        for target, matrix in zip(laid_out, weight, strict=True):
            target.copy_(matrix.t())  # one by one: torch has a fast path for a single matrix
        weight.data = laid_out.transpose(1, 2)


def run_grouped(
    experts: nn.Module,
    x_PH: Tensor,
    expert_P: Tensor,
    offsets_e: Tensor,
    unread_P1: Tensor | None = None,
) -> Tensor:
    """Computes expert ``expert_P[p]`` of row p, for rows sorted by expert.

    Args:
        experts: Module that follows the contract.
        x_PH: Rows, at least one.
        expert_P: Local expert of each row, ascending; for rows of none, the number of experts.
        offsets_e: Where the rows of each expert end, int32.
        unread_P1: True for the rows of no expert, behind the last offset: nothing is computed for
            them, and they get no gradient. None if there can be none.

    Returns:
        The unweighted outputs ``[P, H]``, zero for rows of no expert.
    """
    is_training = torch.is_grad_enabled()
    if experts.has_bias and unread_P1 is not None:
        expert_P = expert_P.clamp(max=experts.num_experts - 1)

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not experts.is_transposed:
            weight = weight.transpose(1, 2)
        out = functional.grouped_mm(rows.to(weight.dtype), weight, offs=offsets_e)
        return out if bias is None else out + bias[expert_P]

    def clear(rows: Tensor) -> Tensor:
        if unread_P1 is None:
            return rows
        return (rows.masked_fill if is_training else rows.masked_fill_)(unread_P1, 0.0)

    # The kernel leaves unread rows as it finds the memory: NaN, perhaps. No other row hears of it
    # before the last product; but their gradients would, so each product's have to be cleared.
    if is_training:
        x_PH = clear(x_PH)
    bias_up, bias_down = _biases(experts)
    up_PI = product(x_PH, _up_projection(experts), bias_up)
    h_PI = _activate(experts, clear(up_PI) if is_training else up_PI)
    return _normalise(experts, clear(product(h_PI, experts.down_proj, bias_down)))


def groups_without_sync(experts: nn.Module) -> bool:
    """Says whether `run_grouped` tells a GPU all it does without waiting for it.

    torch has a kernel that reads the offsets on the GPU for bfloat16 on compute capability 9 and
    10; else the host reads them, and launches one product after the other.

    Source:
        ``use_fast_path`` in torch's ``aten/src/ATen/native/cuda/GroupedBlas.cpp``, torch 2.11.
    """
    weight = experts.down_proj
    if weight.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(weight.device)[0] in (9, 10)


def run_single(experts: nn.Module, x_PH: Tensor, expert: int = 0) -> Tensor:
    """Computes one expert of a module that follows the contract for every row.

    Returns:
        The unweighted outputs ``[P, H]``.
    """

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrix = weight[expert].t() if experts.is_transposed else weight[expert]
        own_bias = None if bias is None else bias[expert]
        return functional.linear(rows.to(weight.dtype), matrix, own_bias)

    bias_up, bias_down = _biases(experts)
    h_PI = _activate(experts, product(x_PH, _up_projection(experts), bias_up))
    return _normalise(experts, product(h_PI, experts.down_proj, bias_down))


def _up_projection(experts: nn.Module) -> Tensor:
    return experts.gate_up_proj if experts.has_gate else experts.up_proj


def _biases(experts: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    if not experts.has_bias:
        return None, None
    up = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
    return up, experts.down_proj_bias


def _activate(experts: nn.Module, up: Tensor) -> Tensor:
    return experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)


def _normalise(experts: nn.Module, y_PH: Tensor) -> Tensor:
    # An older transformers does not declare it.
    has_norm = getattr(experts, "has_post_expert_norm", False)
    return experts.post_expert_norm(y_PH) if has_norm else y_PH
