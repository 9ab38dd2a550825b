"""What a rank's part of a Megatron model holds: parameters, and experts by layer.

Experts are read from `sharded_state_dict`, where Megatron says which part of the whole a tensor is.
"""

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["RankPart", "rank_part"]

# Each expert has one of these, whatever its activation, and it is not split into parts of its own.
_ONE_PER_EXPERT = re.compile(r"\.mlp\.experts\.(experts|local_experts\.\d+)\.linear_fc2\.weight$")
_ROUTED = ".mlp.experts."


@dataclass(frozen=True)
class RankPart:
    """What one rank holds.

    Attributes:
        rank: The rank.
        dense_params: Parameters of everything but routed experts.
        expert_params: Parameters of routed experts, or of the rank's parts of them.
        experts: Layer to the experts of it, ascending; layers without experts are not there.
    """

    rank: int
    dense_params: int
    expert_params: int
    experts: dict[int, tuple[int, ...]]


def rank_part(model: Any, rank: int) -> RankPart:
    """Returns what a model holds.

    Args:
        model: A GPTModel, on any device.
        rank: The rank it was built for.
    """
    own = getattr(model, "module", model)  # of what casts inputs and outputs of a bf16 model
    sizes = {name: parameter.numel() for name, parameter in own.named_parameters()}
    of_experts = sum(size for name, size in sizes.items() if _ROUTED in name)
    experts: dict[int, set[int]] = {}
    for tensor in own.sharded_state_dict().values():
        if _ONE_PER_EXPERT.search(tensor.key):
            layer, expert = _layer_and_expert(tensor)
            experts.setdefault(layer, set()).add(expert)
    return RankPart(
        rank=rank,
        dense_params=sum(sizes.values()) - of_experts,
        expert_params=of_experts,
        experts={layer: tuple(sorted(experts[layer])) for layer in sorted(experts)},
    )


def _layer_and_expert(tensor: Any) -> tuple[int, int]:
    """Returns where an expert's tensor lies in the whole.

    Layers that are all alike are one tensor with axes [layer, expert, ...]; others have a tensor
    each, with their number in its key.
    """
    *layer, expert = tensor.global_offset[: tensor.prepend_axis_num]
    if layer:
        return layer[0], expert
    number = re.search(r"layers\.(\d+)\.", tensor.key)
    assert number is not None, tensor.key
    return int(number[1]), expert
