"""What takes the experts' place: a DeepSpeed MoE layer to DeepSpeed, experts to the model.

The model's own router stays outside of it; how rows travel is the dispatcher's business.
"""

# Shapes: T tokens here, H hidden, K top_k, e local experts

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from ds_moe_ep.dist.comm_stats import CommStats
from ds_moe_ep.dist.node_groups import NodeGroups
from ds_moe_ep.dist.shared_memory import SharedMemory
from ds_moe_ep.errors import DistributedError
from ds_moe_ep.moe.auto import Auto
from ds_moe_ep.moe.cost_model import LinkPrices
from ds_moe_ep.moe.dispatch import Dispatcher, make_dispatcher, make_links
from ds_moe_ep.moe.experts import NOT_HERE, Compute, expert_parameters, run_local_experts
from ds_moe_ep.moe.shared_expert import EarlySharedExpert
from ds_moe_ep.moe.slots import ExpertSlots
from ds_moe_ep.moe.state_dict import name_experts_as_deepspeed_does

__all__ = ["DispatchedExperts", "ExpertParallelMoE"]


class DispatchedExperts(nn.Module):
    """The experts of this rank behind a dispatcher: what DeepSpeed finds as ``MoE.deepspeed_moe``.

    Args:
        experts: Hugging Face experts module that holds this rank's experts only.
        dispatcher: Name of the dispatcher.
        slots: The slots of all experts; without, they are contiguous and have one each.
    """

    def __init__(
        self, experts: nn.Module, dispatcher: str, slots: ExpertSlots | None = None
    ) -> None:
        super().__init__()
        self.experts = experts
        name_experts_as_deepspeed_does(experts)
        self.dispatcher_name = dispatcher
        self.slots = slots
        self.ep_group: dist.ProcessGroup | None = None
        # What the next three hold is for the binding: without node groups there are no two levels,
        # without shared memory rows go by the group, and without prices `auto` is alltoall.
        self.node_groups: NodeGroups | None = None
        self.shared: SharedMemory | None = None
        self.prices: LinkPrices | None = None
        self.shared_expert: EarlySharedExpert | None = None  # of the same block, if it has one
        self.stats = CommStats()
        self.on_part: Callable[[str], object] | None = None  # told as "experts", "combine" begin
        self.dispatcher: Dispatcher | None = None
        self.live_T: Tensor | None = None
        self.tokens_per_expert = torch.zeros(experts.num_experts, dtype=torch.int64)
        self._group_ranks, self._ep_rank = [0], 0
        self._num_tokens_W: list[int] | None = None

    def _set_ep_group(self, ep_group: dist.ProcessGroup | None) -> None:
        """Binds the expert group; DeepSpeed calls it by this name. None is a group of one."""
        self.ep_group = ep_group
        self._group_ranks = [0] if ep_group is None else dist.get_process_group_ranks(ep_group)
        links = make_links(ep_group, self.node_groups, stats=self.stats, shared=self.shared)
        self._ep_rank = links.flat.rank
        num_local_experts = self.experts.num_experts
        if self.dispatcher_name == "auto" and self.prices is not None:
            self.dispatcher = Auto(links, self.prices, num_local_experts)
        else:
            name = "alltoall" if self.dispatcher_name == "auto" else self.dispatcher_name
            self.dispatcher = make_dispatcher(name, links, num_local_experts)

    def announce(
        self,
        num_tokens: Sequence[int] | None,
        live_T: Tensor | None = None,
        *,
        has_static_shapes: bool = False,
    ) -> None:
        """Takes note of the tokens that each rank of the job brings to the next calls.

        Args:
            num_tokens: By global rank, the same on all ranks; None if it is not known.
            live_T: bool, which tokens of this rank need experts; None if all do.
            has_static_shapes: Whether all shapes must follow from `num_tokens`, as a CUDA graph
                needs it: ``auto`` then chooses among dispatchers that keep to that.
        """
        self.live_T = live_T
        if isinstance(self.dispatcher, Auto):
            self.dispatcher.has_static_shapes = has_static_shapes
        self._num_tokens_W = (
            None if num_tokens is None else [num_tokens[rank] for rank in self._group_ranks]
        )

    def forget_counts(self) -> None:
        """Forgets what was counted so far: before a job's own passes, others measure or capture."""
        self.tokens_per_expert.zero_()
        self.stats.reset()
        if isinstance(self.dispatcher, Auto):
            self.dispatcher.calls.clear()

    def describe_dispatch(self) -> str:
        """Tells which dispatcher was used; of ``auto`` also which it chose, and why."""
        if isinstance(self.dispatcher, Auto):
            return self.dispatcher.describe()
        return self.dispatcher_name if self.dispatcher is None else self.dispatcher.name

    def forward(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Returns the MoE output ``[T, H]`` of this rank's tokens.

        Raises:
            DistributedError: No expert group was bound.
        """
        if self.dispatcher is None:
            raise DistributedError(
                "the expert group is not bound: call ds_moe_ep.adapter.bind_expert_groups(model) "
                "after init_distributed()."
            )
        self._check_announced(x_TH.shape[0])
        if self.slots is not None:
            # Where all ranks have the same tokens, all must choose the same copies.
            first = 0 if self.dispatcher_name == "allreduce" else self._ep_rank
            topk_ids_TK = self.slots.choose(topk_ids_TK, first)
        if self.live_T is not None:
            topk_ids_TK = topk_ids_TK.masked_fill(~self.live_T[:, None], NOT_HERE)
        compute: Compute = partial(run_local_experts, self.experts)
        if self.on_part is not None:
            compute = partial(_compute_and_tell, compute, self.on_part)
        meanwhile = None
        if self.shared_expert is not None:
            meanwhile = self.shared_expert.while_rows_travel(x_TH)
        output_TH, rows_e = self.dispatcher(
            compute, x_TH, topk_ids_TK, topk_weights_TK, self._num_tokens_W, meanwhile
        )
        if self.tokens_per_expert.device != rows_e.device:
            with torch.inference_mode(False):  # later passes may be in another mode
                self.tokens_per_expert = self.tokens_per_expert.to(rows_e.device)
        self.tokens_per_expert.add_(rows_e)  # each replay of a CUDA graph counts its rows
        return output_TH

    def _check_announced(self, num_tokens: int) -> None:
        if self._num_tokens_W is None:
            return
        announced = self._num_tokens_W[self._ep_rank]
        if num_tokens != announced:
            raise DistributedError(
                f"an MoE layer got {num_tokens} tokens in a pass that was announced with "
                f"{announced}: the ranks would exchange rows of different sizes. A model whose "
                "layers see other tokens than its input cannot be run with announced passes."
            )


def _compute_and_tell(
    compute: Compute,
    on_part: Callable[[str], object],
    *rows: Tensor,
) -> tuple[Tensor, Tensor]:
    on_part("experts")
    result = compute(*rows)
    on_part("combine")
    return result


class ExpertParallelMoE(MoE):
    """Experts spread over the ranks of an expert group, called with transformers' experts contract.

    It is a ``deepspeed.moe.layer.MoE``, so DeepSpeed's ``has_moe_layers``, expert groups,
    ``init_inference`` and gradient reduction treat it as one; DeepSpeed's own constructor is not
    run, because its gate and experts are not used.

    Args:
        experts: Hugging Face experts module that holds this rank's experts only.
        num_experts: Experts of the layer over all ranks.
        ep_size: Ranks of the expert group.
        dispatcher: Name of the dispatcher.
        slots: The slots of all experts; without, they are contiguous and have one each.
    """

    def __init__(
        self,
        experts: nn.Module,
        *,
        num_experts: int,
        ep_size: int,
        dispatcher: str,
        slots: ExpertSlots | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.use_residual = False
        self.enable_expert_tensor_parallelism = False
        self.num_experts = num_experts
        self.ep_size = ep_size
        self.num_local_experts = experts.num_experts
        # Not the model's hidden size where experts work in a narrower space of their own.
        is_transposed = getattr(experts, "is_transposed", False)
        self.hidden_size = experts.down_proj.shape[-1 if is_transposed else -2]
        self.expert_group_name = f"ep_size_{ep_size}"
        self.deepspeed_moe = DispatchedExperts(experts, dispatcher, slots)
        for param in expert_parameters(experts).values():
            # DeepSpeed knows an expert parameter by these two attributes.
            param.allreduce = False
            param.group_name = self.expert_group_name

    def announce(
        self,
        num_tokens: Sequence[int] | None,
        live_T: Tensor | None = None,
        *,
        has_static_shapes: bool = False,
    ) -> None:
        """See `DispatchedExperts.announce`."""
        self.deepspeed_moe.announce(num_tokens, live_T, has_static_shapes=has_static_shapes)

    def forget_counts(self) -> None:
        """See `DispatchedExperts.forget_counts`."""
        self.deepspeed_moe.forget_counts()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes what the replaced experts computed, together with the other ranks.

        Args:
            hidden_states: ``[T, H]``; T may differ from rank to rank and be zero.
            top_k_index: Global expert ids ``[T, K]``.
            top_k_weights: Routing weights ``[T, K]``.

        Returns:
            ``[T, H]`` in the dtype of hidden_states.
        """
        return self.deepspeed_moe(hidden_states, top_k_index, top_k_weights)
