"""The all-to-all dispatcher: only routed rows travel; nothing is dropped or padded."""

# Shapes: T tokens here, H hidden, K top_k, W ranks of the expert group, S rows sent, R rows
# received

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ds_moe_ep.dist.collectives import Communicator, Meanwhile
from ds_moe_ep.moe.allgather import AllGather
from ds_moe_ep.moe.experts import NOT_HERE, Compute

__all__ = ["AllToAll"]

# Up to this many bytes from any rank, sending every row everywhere takes less time than telling
# first how many rows will come: about latency times bandwidth, of gloo as of NCCL.
_SEND_TO_ALL_BYTES = 2**20


class AllToAll:
    """Sends each token once to every rank that owns one of its experts, and sums what comes back.

    A row carries its expert ids and routing weights (to a rank of one expert, the weight alone), so
    one message goes out and one comes back, and a token that chose several experts of one rank is
    sent, and its weighted sum returned, once.
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
        token_S, routing_S, send_counts_W = self._route(topk_ids_TK, topk_weights_TK)
        send_counts, recv_counts = self.comm.exchange_counts(send_counts_W)

        x_RH, *ids, weights_RK = self.comm.exchange_rows(
            (x_TH[token_S], *routing_S), send_counts, recv_counts, meanwhile
        )
        y_RH, tokens_per_expert = compute(x_RH, ids[0] if ids else None, weights_RK)
        (y_SH,) = self.comm.exchange_rows((y_RH,), recv_counts, send_counts)
        return _sum_by_token(y_SH, token_S, x_TH), tokens_per_expert

    def _are_few(self, num_tokens_W: Sequence[int], x_TH: Tensor) -> bool:
        row_bytes = x_TH.shape[1] * x_TH.element_size()
        return max(num_tokens_W) * (self.comm.size - 1) * row_bytes <= self.send_to_all_bytes

    def _route(
        self, topk_ids_TK: Tensor, topk_weights_TK: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Lists the rows to send, rank after rank.

        Returns:
            Token of each row ``[S]``; what it tells of its routing: local expert ids int32 and
            weights ``[S, K]``, or where a rank has one expert, the weight for that ``[S, 1]``; and
            rows for each rank ``[W]``.
        """
        size, num_tokens = self.comm.size, topk_ids_TK.shape[0]
        # float32 holds every routing dtype exactly, and a rank without tokens need not know which.
        weights_TK = topk_weights_TK.float()
        owner_TK = topk_ids_TK.long() // self.num_local_experts
        owner_TK = owner_TK.masked_fill(topk_ids_TK == NOT_HERE, size)  # of none of these ranks
        wanted_TW = torch.zeros(
            (num_tokens, size + 1), dtype=torch.bool, device=topk_ids_TK.device
        ).scatter_(1, owner_TK, True)[:, :size]
        rank_S, token_S = wanted_TW.t().nonzero(
            as_tuple=True
        )  # rank-major; a device-to-host sync on a GPU
        send_counts_W = wanted_TW.sum(dim=0)
        if self.num_local_experts == 1:
            weights_TW = weights_TK.new_zeros((num_tokens, size + 1))
            weights_TW = weights_TW.scatter_add(1, owner_TK, weights_TK)
            return token_S, (weights_TW[token_S, rank_S][:, None],), send_counts_W
        local_ids_SK = topk_ids_TK[token_S] - rank_S[:, None] * self.num_local_experts
        local_ids_SK.masked_fill_(owner_TK[token_S] != rank_S[:, None], NOT_HERE)
        return token_S, (local_ids_SK.int(), weights_TK[token_S]), send_counts_W


def _sum_by_token(y_SH: Tensor, token_S: Tensor, x_TH: Tensor) -> Tensor:
    """Sums in float32 the rows that came back for each token, in the shape and dtype of `x_TH`."""
    if not y_SH.is_cuda or y_SH.shape[0] == 0:
        sum_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        return sum_TH.index_add(0, token_S, y_SH.float()).to(x_TH.dtype)
    # There index_add adds in any order, to rows widened to float32; this reads each row once.
    sorted_S, row_S = token_S.sort(stable=True)
    first_T = torch.searchsorted(sorted_S, torch.arange(x_TH.shape[0], device=token_S.device))
    return functional.embedding_bag(row_S, y_SH, first_T, mode="sum").to(x_TH.dtype)
