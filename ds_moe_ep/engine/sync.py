"""Keeps ranks that work on different batches in step, one forward pass at a time.

Every forward pass meets collectives in its MoE layers, so all ranks must start as many of them. A
rank announces each of its own passes, and the tokens it brings, with one small message; a rank with
nothing left joins the passes of the others with zero rows, until none is left. So no rank waits for
a batch border of another, a finished rank computes no attention, and all ranks know the tokens of
each in all layers. Nothing here knows what a pass is for.
"""

# Shapes: H hidden, K top_k

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.dist.shared_memory import SharedMemory
from ds_moe_ep.engine.decode_graph import DecodeGraph
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.moe.layer import ExpertParallelMoE

__all__ = ["ForwardSync", "shared_by_all"]

_UNKNOWN = -1


class ForwardSync:
    """Announces the forward passes of a model to all ranks.

    Args:
        model: The adapted model; a hook is put on it, until `close`.
        layers: Its MoE layers in the order of a forward pass.
        group: All ranks of the job: with several expert groups none of them ends, and waits for
            the others, before all have nothing left. On a GPU an announcement is a sync.
        top_k: K.
        dtype: Dtype of the hidden states.
        device: Device of the hidden states.
        shared: Memory that the ranks of `group` share, for short announcements.
        on_progress: Called on rank 0 at each pass with the number of prompts that all ranks have
            finished so far.
        on_step: Called at the start of each pass with its number, from 1 on.
        live_rows: Knows which rows of a pass need experts; without, all do.
        graph: Replays the passes that all ranks can replay; each has one, or none has.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertParallelMoE],
        group: dist.ProcessGroup,
        *,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
        shared: SharedMemory | None = None,
        on_progress: Callable[[int], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        live_rows: LiveRows | None = None,
        graph: DecodeGraph | None = None,
    ) -> None:
        self._layers = layers
        self._comm = Communicator(group, shared=shared)
        self._device = device
        self._dtype = dtype
        self._no_ids_0K = torch.zeros((0, top_k), dtype=torch.int64, device=device)
        self._no_weights_0K = torch.zeros((0, top_k), dtype=torch.float32, device=device)
        self._on_progress = on_progress if self._comm.rank == 0 else None
        self._on_step = on_step
        self._live_rows = live_rows
        self._graph = graph
        self.num_finished = 0
        self.num_steps = 0
        self._hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: self._start_own_pass(args, kwargs),
            with_kwargs=True,
        )

    def finish(self, num_prompts: int) -> None:
        """Counts prompts this rank has finished."""
        self.num_finished += num_prompts

    @torch.no_grad()
    def join_others(self) -> None:
        """Takes part in the others' passes, with no rows, until every rank has called this."""
        while (told := self._announce(0, fits=True)).has_tokens:
            self._count_step()
            if told.graph is not None:
                told.graph.replay_without_rows()
                continue
            self._tell_layers(told)
            for layer in self._layers:
                no_rows_0H = torch.zeros(
                    (0, layer.hidden_size), dtype=self._dtype, device=self._device
                )
                layer(no_rows_0H, self._no_ids_0K, self._no_weights_0K)

    def close(self) -> None:
        """Announces no more passes: another one of these may have the model."""
        self._hook.remove()

    def _start_own_pass(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._count_step()
        ids = kwargs.get("input_ids", args[0] if args else None)
        live_T = None
        if self._live_rows is not None and ids is not None:
            live_T = self._live_rows.of_pass(ids)
        fits = self._graph is not None and self._graph.fits(kwargs)
        told = self._announce(_count_tokens(args, kwargs), fits=fits)
        if told.graph is not None:
            told.graph.switch_on(live_T)
        else:
            self._tell_layers(told, live_T)

    def _count_step(self) -> None:
        self.num_steps += 1
        if self._on_step:
            self._on_step(self.num_steps)

    def _announce(self, num_tokens: int, *, fits: bool) -> _Told:
        """Tells all ranks what this rank brings to a pass now.

        Args:
            num_tokens: Its tokens.
            fits: Whether it is ready to replay a pass, if all are.
        """
        told = self._comm.gather_ints([num_tokens, self.num_finished, int(fits)], self._device)
        tokens_of_rank = [tokens for tokens, _, _ in told]
        if self._on_progress:
            self._on_progress(sum(finished for _, finished, _ in told))
        return _Told(
            tokens_of_rank=None if _UNKNOWN in tokens_of_rank else tokens_of_rank,
            has_tokens=any(tokens_of_rank),
            graph=self._graph if all(fits for _, _, fits in told) else None,
        )

    def _tell_layers(self, told: _Told, live_T: Tensor | None = None) -> None:
        for layer in self._layers:
            layer.announce(told.tokens_of_rank, live_T)


def shared_by_all(layers: Sequence[ExpertParallelMoE], world_size: int) -> SharedMemory | None:
    """Returns the memory that all ranks of the job share, if its layers have one."""
    shared = layers[0].deepspeed_moe.shared
    return shared if shared is not None and shared.size == world_size else None


@dataclass(frozen=True)
class _Told:
    """What all ranks have said before a pass.

    Attributes:
        tokens_of_rank: Tokens of each; None if a rank does not know.
        has_tokens: Whether any has some.
        graph: What to replay; None for a pass of the usual kind.
    """

    tokens_of_rank: list[int] | None
    has_tokens: bool
    graph: DecodeGraph | None


def _count_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Returns the tokens of a call of a transformers model, padding included."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is not None:
        return ids.numel()
    embeddings = kwargs.get("inputs_embeds")
    return _UNKNOWN if embeddings is None else embeddings.shape[:-1].numel()
