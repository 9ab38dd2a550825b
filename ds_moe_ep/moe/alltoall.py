"""The all-to-all dispatcher: only routed rows travel; nothing is dropped or padded."""

# Shapes: T tokens here, H hidden, K top_k, W ranks of the expert group, S rows sent, R rows
# received

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_moe_ep.dist.collectives import Communicator, Meanwhile
from ds_moe_ep.moe.allgather import AllGather
from ds_moe_ep.moe.experts import NOT_HERE, Compute

__all__ = ["AllToAll"]

# Up to this many bytes from any rank, sending every row everywhere takes less time than telling
# first how many rows will come: about latency times bandwidth, of gloo as of NCCL.
_SEND_TO_ALL_BYTES = 2**20


class AllToAll:
    """Sends each token once to every rank that owns one of its experts, and sums what comes back.

    A row carries its expert ids and routing weights, so one message goes out and one comes back,
    and a token that chose several experts of one rank is sent, and its weighted sum returned, once.
    A third, small one before them tells the numbers of rows. Small batches are spared it: where the
    tokens of each rank are known, and few, every rank gets every row.

    Args:
        comm: Collectives of the expert group.
        num_local_experts: Experts on each rank; expert i lives on rank ``i // num_local_experts``.
        send_to_all_bytes: What a rank may send at most to spare the message of counts.
    """

    name = "alltoall"

    def __init__(
        self,
        comm: Communicator,
        num_local_experts: int,
        *,
        send_to_all_bytes: int = _SEND_TO_ALL_BYTES,
    ) -> None:
        self.comm = comm
        self.num_local_experts = num_local_experts
        self.send_to_all_bytes = send_to_all_bytes
        self._send_to_all = AllGather(comm, num_local_experts)

    def __call__(
        self,
        compute: Compute,
        x_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        num_tokens_W: Sequence[int] | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See ``Dispatcher``."""
        if num_tokens_W is not None and self._are_few(num_tokens_W, x_TH):
            return self._send_to_all(
                compute, x_TH, topk_ids_TK, topk_weights_TK, num_tokens_W, meanwhile
            )
        token_S, local_ids_SK, send_counts_W = self._route(topk_ids_TK)
        # Weights travel as float32: it holds every routing dtype exactly, and a rank without tokens
        # need not know which.
        sent = (x_TH[token_S], local_ids_SK, topk_weights_TK[token_S].float())
        send_counts, recv_counts = self.comm.exchange_counts(send_counts_W)

        x_RH, local_ids_RK, weights_RK = self.comm.exchange_rows(
            sent, send_counts, recv_counts, meanwhile
        )
        y_RH, tokens_per_expert = compute(x_RH, local_ids_RK, weights_RK)
        (y_SH,) = self.comm.exchange_rows((y_RH,), recv_counts, send_counts)

        sum_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        return sum_TH.index_add(0, token_S, y_SH.float()).to(x_TH.dtype), tokens_per_expert

    def _are_few(self, num_tokens_W: Sequence[int], x_TH: Tensor) -> bool:
        row_bytes = x_TH.shape[1] * x_TH.element_size()
        return max(num_tokens_W) * (self.comm.size - 1) * row_bytes <= self.send_to_all_bytes

    def _route(self, topk_ids_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lists the rows to send, rank after rank.

        Returns:
            Token of each row ``[S]``, local expert ids of its slots int32 ``[S, K]``, rows for each
            rank ``[W]``.
        """
        size = self.comm.size
        owner_TK = topk_ids_TK.long() // self.num_local_experts
        owner_TK = owner_TK.masked_fill(topk_ids_TK == NOT_HERE, size)  # of none of these ranks
        wanted_TW = torch.zeros(
            (topk_ids_TK.shape[0], size + 1), dtype=torch.bool, device=topk_ids_TK.device
        ).scatter_(1, owner_TK, True)[:, :size]
        rank_S, token_S = wanted_TW.t().nonzero(
            as_tuple=True
        )  # rank-major; a device-to-host sync on a GPU
        local_ids_SK = topk_ids_TK[token_S] - rank_S[:, None] * self.num_local_experts
        elsewhere_SK = owner_TK[token_S] != rank_S[:, None]
        return (
            token_S,
            local_ids_SK.masked_fill_(elsewhere_SK, NOT_HERE).int(),
            wanted_TW.sum(dim=0),
        )
