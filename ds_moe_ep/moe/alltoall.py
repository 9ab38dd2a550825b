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
from ds_moe_ep.moe.experts import NOT_HERE, Compute, local_ids

__all__ = ["AllToAll", "sum_by_token"]

# Up to this many bytes from any rank, sending every row everywhere takes less time than telling
# first how many rows will come: about latency times bandwidth, of gloo as of NCCL.
_SEND_TO_ALL_BYTES = 2**20


class AllToAll:
    """Sends each token once to every rank that owns one of its experts, and sums what comes back.

    Where a rank has several experts, a row carries its expert ids and routing weights, so that a
    token that chose several of them is sent, and its weighted sum returned, once. To a rank of one
    expert goes the bare row, and what returns is weighted here.
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
        if self.comm.size == 1 or (num_tokens_W is not None and self._are_few(num_tokens_W, x_TH)):
            return self._send_to_all(
                compute, x_TH, topk_ids_TK, topk_weights_TK, num_tokens_W, meanwhile
            )
        token_S, rank_S, send_counts_W = self._route(topk_ids_TK)
        send_counts, recv_counts = self.comm.exchange_counts(send_counts_W)
        # On a CPU many times as quick as indexing.
        rows: tuple[Tensor, ...] = (x_TH.index_select(0, token_S),)
        ids_SK = topk_ids_TK.index_select(0, token_S)
        if self.num_local_experts > 1:
            ids_there_SK = local_ids(
                ids_SK, rank_S[:, None], self.comm.size, self.num_local_experts
            )
            # Weights travel as float32: it holds every routing dtype exactly, and a rank without
            # tokens need not know which.
            rows += (ids_there_SK.int(), topk_weights_TK.index_select(0, token_S).float())
        received = self.comm.exchange_rows(rows, send_counts, recv_counts, meanwhile)
        y_RH, tokens_per_expert = compute(*received)
        (y_SH,) = self.comm.exchange_rows((y_RH,), recv_counts, send_counts)
        weights_S = None
        if self.num_local_experts == 1:
            weights_SK = topk_weights_TK.index_select(0, token_S)
            weights_S = weights_SK.masked_fill(ids_SK != rank_S[:, None], 0.0).sum(dim=1)
        return sum_by_token(y_SH, token_S, weights_S, x_TH), tokens_per_expert

    def _are_few(self, num_tokens_W: Sequence[int], x_TH: Tensor) -> bool:
        row_bytes = x_TH.shape[1] * x_TH.element_size()
        return max(num_tokens_W) * (self.comm.size - 1) * row_bytes <= self.send_to_all_bytes

    def _route(self, topk_ids_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lists the rows to send, rank after rank.

        Returns:
            Token and rank of each row ``[S]``, and rows for each rank ``[W]``.
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
        return token_S, rank_S, wanted_TW.sum(dim=0)


def sum_by_token(y_SH: Tensor, token_S: Tensor, weights_S: Tensor | None, x_TH: Tensor) -> Tensor:
    """Sums in float32 the rows that came back for each token, in the shape and dtype of `x_TH`.

    Args:
        y_SH: The rows.
        token_S: The token of each.
        weights_S: What each counts; without, 1.
        x_TH: The tokens.
    """
    if y_SH.shape[0] == 0:
        # Zeros, through which backward reaches the other ranks.
        return torch.zeros_like(x_TH) + y_SH.sum().to(x_TH.dtype)
    sorted_S, row_S = token_S.sort(stable=True)
    first_T = torch.searchsorted(sorted_S, torch.arange(x_TH.shape[0], device=token_S.device))
    is_exact = weights_S is None or weights_S.dtype == y_SH.dtype
    if not (y_SH.is_cuda and is_exact):  # a GPU's kernel widens what it adds
        y_SH = y_SH.float()
    if weights_S is not None:
        weights_S = weights_S.to(y_SH.dtype)[row_S]
    sum_TH = functional.embedding_bag(
        row_S, y_SH, first_T, mode="sum", per_sample_weights=weights_S
    )
    return sum_TH.to(x_TH.dtype)
