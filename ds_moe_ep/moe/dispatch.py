"""The protocol that every dispatcher keeps, and the table from which one is chosen by name."""

# Shapes: T tokens here, H hidden, K top_k, e local experts

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.alltoall import AllToAll

__all__ = ["DISPATCHERS", "Dispatcher", "make_dispatcher"]


class Dispatcher(Protocol):
    """Brings tokens to the ranks of their experts and the weighted outputs back.

    Every rank of the group calls it for every layer, with zero tokens if it has none. It keeps no
    state between calls.
    """

    name: str

    def __call__(
        self, experts: nn.Module, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Computes the MoE output of this rank's tokens.

        Args:
            experts: The local experts, called as ``run_local_experts`` says.
            x_TH: Tokens of this rank.
            topk_ids_TK: Global expert ids.
            topk_weights_TK: Routing weights, any floating dtype.

        Returns:
            Output ``[T, H]`` in x's dtype, and the rows each local expert computed, int64 ``[e]``.
        """
        ...


DISPATCHERS = {kind.name: kind for kind in (AllToAll,)}
"""Dispatchers by the name users give to ``--dispatcher``."""


def make_dispatcher(name: str, comm: Communicator, num_local_experts: int) -> Dispatcher:
    """Returns the dispatcher called `name`; ``auto`` picks one.

    Raises:
        ConfigError: There is none of that name.
    """
    chosen = "alltoall" if name == "auto" else name
    if chosen not in DISPATCHERS:
        raise ConfigError(
            f"dispatcher={name!r} is unknown. Use one of: auto, {', '.join(DISPATCHERS)}."
        )
    return DISPATCHERS[chosen](comm, num_local_experts)
