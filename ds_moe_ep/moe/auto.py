"""Chooses a dispatcher for each pass by what the cost model predicts, the same on all ranks."""

# Shapes: T tokens here, H hidden, K top_k, W ranks of the expert group

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ds_moe_ep.dist.collectives import Meanwhile
from ds_moe_ep.moe.allgather import AllGather
from ds_moe_ep.moe.alltoall import AllToAll
from ds_moe_ep.moe.cost_model import LayerShape, LinkPrices, predict_s
from ds_moe_ep.moe.dispatch import STATIC_SHAPES, Dispatcher, Links
from ds_moe_ep.moe.experts import Compute
from ds_moe_ep.moe.two_level import TwoLevel

__all__ = ["Auto"]


class Auto:
    """Dispatches each pass in the way that is predicted to cost least.

    What it knows is the same on all ranks: the agreed prices and the tokens of each rank. Where
    those are not known, it uses alltoall, which needs to know nothing. The deepspeed dispatcher is
    not considered: it sends and computes the rows of alltoall and padding besides, in as many
    messages, so it never costs less.

    Args:
        links: What connects the ranks.
        prices: What its messages and its experts cost, from ``measure_links``.
        num_local_experts: Experts on each rank.

    Attributes:
        has_static_shapes: Whether the shapes of a pass must follow from the tokens of each rank.
    """

    name = "auto"

    def __init__(self, links: Links, prices: LinkPrices, num_local_experts: int) -> None:
        self.prices = prices
        self.num_experts = num_local_experts * links.flat.size
        # Small batches that are best sent to all ranks are the cost model's to find, not theirs.
        routed = partial(AllToAll, send_to_all_bytes=0)
        self.candidates: dict[str, Dispatcher] = {
            "alltoall": routed(links.flat, num_local_experts),
            "allgather": AllGather(links.flat, num_local_experts),
        }
        if links.across is not None and links.within is not None:
            levels = links.across, links.within
            self.candidates |= {
                "alltoall-2level": TwoLevel(routed, *levels, num_local_experts),
                "allgather-2level": TwoLevel(AllGather, *levels, num_local_experts),
            }
        self.has_static_shapes = False
        self.calls: Counter[str] = Counter()
        self._predicted_s: dict[str, dict[str, float]] = {}  # when the name was chosen last

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
        name = "alltoall"
        if num_tokens_W is not None:
            row_bytes = x_TH.shape[1] * x_TH.element_size()
            name, predicted_s = self.choose(
                topk_ids_TK.shape[1],
                row_bytes,
                num_tokens_W,
                has_static_shapes=self.has_static_shapes,
            )
            self._predicted_s[name] = predicted_s
        self.calls[name] += 1
        return self.candidates[name](
            compute, x_TH, topk_ids_TK, topk_weights_TK, num_tokens_W, meanwhile
        )

    def choose(
        self,
        top_k: int,
        row_bytes: int,
        num_tokens_W: Sequence[int],
        *,
        has_static_shapes: bool = False,
    ) -> tuple[str, dict[str, float]]:
        """Returns what a pass would be dispatched by, and the predicted seconds of each candidate.

        Args:
            top_k: Experts of a token.
            row_bytes: Bytes of a token's hidden state.
            num_tokens_W: Tokens of each rank.
            has_static_shapes: Whether shapes must follow from these numbers.
        """
        shape = LayerShape(self.num_experts, top_k, row_bytes)
        predicted_s = predict_s(self.prices, shape, tuple(num_tokens_W))
        if has_static_shapes:
            predicted_s = {name: s for name, s in predicted_s.items() if name in STATIC_SHAPES}
        return min(predicted_s, key=predicted_s.__getitem__), predicted_s

    def describe(self) -> str:
        """Tells what was chosen how often, and what was predicted of the others then."""
        total = sum(self.calls.values())
        told = []
        for name, calls in self.calls.most_common():
            text = f"{name} in {calls} of {total} passes"
            if predicted_s := self._predicted_s.get(name):
                each = ", ".join(f"{other} {s * 1e3:.3g}" for other, s in predicted_s.items())
                text += f" (predicted ms a layer: {each})"
            told.append(text)
        return "; ".join(told) or "no pass yet"
