"""Decode passes of one shape, each told to a GPU as one CUDA graph, not as a thousand operations.

It holds the cache that such passes share, captures one of them and replays it for all others. When
all ranks can replay at once is settled in sync.py.
"""

# Shapes: B prompts of a batch, the same on all ranks

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from ds_moe_ep.dist.moments import Moment, now, wait_within
from ds_moe_ep.engine.decoding import without_own_settings
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.auto import Auto
from ds_moe_ep.moe.expert_gemm import follows_contract
from ds_moe_ep.moe.layer import ExpertParallelMoE

__all__ = ["DecodeGraph", "capture", "check_replayable"]

# To come to a pass to capture: the first new token is the prompt's, the second a decode pass's.
_PROMPT_TOKENS, _NEW_TOKENS = 2, 2
# Kinds of rotary positions whose frequencies hang on the longest prompt, by way of the host.
_READ_BY_HOST = {"dynamic", "longrope"}


class DecodeGraph:
    """The decode passes of a model over B prompts: its ``forward``, when it is switched on.

    All ranks make theirs at once. Without a GPU a pass has the same shapes and meets the other
    ranks in the same way, but is run one operation after the other: so a job can be rehearsed.

    Args:
        model: The adapted model; its ``forward`` is wrapped.
        layers: Its MoE layers.
        world_size: Ranks of the job, all of which replay at once.
        batch_size: B.
        cache_len: Tokens of the longest prompt with its completion, which has two at least.
        timeout_s: How long a replay may take, waiting for other ranks included; None is for ever.

    Attributes:
        cache: The KV cache of every batch, to be given to ``generate``.
        num_replays: Passes that were replayed so far.

    Raises:
        ConfigError: The model has passes that a graph cannot hold.
        DistributedError: The captured pass was not done in time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[ExpertParallelMoE],
        *,
        world_size: int,
        batch_size: int,
        cache_len: int,
        timeout_s: float | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.cache = StaticCache(config=model.config, max_cache_len=cache_len)
        self.num_replays = 0
        check_replayable(model, layers)
        self._layers = layers
        self._num_tokens_W = [batch_size] * world_size
        self._live_B = torch.zeros(batch_size, dtype=torch.bool, device=model.device)
        self._forward = model.forward
        self._held: dict[str, Any] = {}  # what a pass is given, in memory of its own
        self._output: Any = None
        self._is_on = False
        self._launch: Callable[[], object] = self._pass
        self._captured: torch.cuda.CUDAGraph | None = None
        self._timeout_s = timeout_s if world_size > 1 else None
        self._launched: Moment = 0.0
        # Where replays do not call the layers: what each that chooses has chosen, and its counts.
        self._chosen: list[tuple[Counter[str], str]] = []
        self._capture_first_pass(model)
        model.forward = functools.wraps(self._forward)(
            lambda *args, **kwargs: self._run(*args, **kwargs)
        )

    def fits(self, given: Mapping[str, Any]) -> bool:
        """Says whether a pass that is given so much can be replayed.

        Args:
            given: Keyword arguments of the model's ``forward``.
        """
        own, own_form = pytree.tree_flatten(self._held)
        others, form = pytree.tree_flatten(dict(given))
        return form == own_form and all(map(_is_alike, own, others))

    def switch_on(self, live_B: Tensor | None) -> None:
        """Makes the next pass a replay, as it is on all other ranks.

        Args:
            live_B: Which of its rows need experts; None if all do.
        """
        if live_B is None:
            self._live_B.fill_(True)
        else:
            self._live_B.copy_(live_B)
        self._is_on = True

    def replay_without_rows(self) -> None:
        """Takes part in a pass of the other ranks, with rows of which none needs experts."""
        self._live_B.zero_()
        self._rewind_to(0)  # or the rows would outgrow the cache
        self._replay()
        self.wait()

    def wait(self) -> None:
        """Waits until the last replay is done, for as long as it may take.

        Call it when all is told that works on the pass, before the host waits for a result: that
        wait has no bound.

        Raises:
            DistributedError: It was not done in time.
        """
        if self._timeout_s is not None:
            wait_within(self._launched, self._timeout_s, "a replayed pass was not done")

    def close(self) -> None:
        """Lets go of the captured pass; to be called before the process groups end.

        Until then NCCL waits, without an end, for graphs that hold messages of a communicator to
        let go of it.
        """
        if self._captured is not None:
            self._captured.reset()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``forward``."""
        if not self._is_on:
            return self._forward(*args, **kwargs)
        self._is_on = False
        for own, other in zip(*map(pytree.tree_leaves, (self._held, kwargs)), strict=True):
            if isinstance(own, Tensor):
                own.copy_(other)
        self._replay()
        return self._output

    def _replay(self) -> None:
        self._launch()
        self._launched = now(self._live_B.device)
        self.num_replays += 1
        for calls, name in self._chosen:
            calls[name] += 1

    def _pass(self) -> None:
        for layer in self._layers:
            layer.announce(self._num_tokens_W, self._live_B, has_static_shapes=True)
        self._output = self._forward(**self._held)

    def _capture_first_pass(self, model: PreTrainedModel) -> None:
        """Generates a little, of which nothing counts, and captures its decode pass."""

        def forward(**kwargs: Any) -> Any:
            if kwargs["input_ids"].shape[1] > 1:
                for layer in self._layers:
                    layer.announce(
                        [_PROMPT_TOKENS * each for each in self._num_tokens_W],
                        self._live_B.repeat_interleave(_PROMPT_TOKENS),
                    )
                return self._forward(**kwargs)
            self._held = pytree.tree_map_only(Tensor, Tensor.clone, kwargs)
            if _can_capture(self._live_B.device):
                self._forget_counts()  # so that what is counted next is what is captured
                self._captured = capture(self._pass)
                self._launch = self._captured.replay
                self._chosen = [
                    (auto.calls, next(iter(auto.calls)))
                    for layer in self._layers
                    if isinstance(auto := layer.deepspeed_moe.dispatcher, Auto)
                ]
                self._rewind_to(_PROMPT_TOKENS)
            self._launch()
            self._launched = now(self._live_B.device)
            self.wait()
            return self._output

        ids_BS = torch.zeros(
            (self.batch_size, _PROMPT_TOKENS), dtype=torch.int64, device=model.device
        )
        model.forward = functools.wraps(self._forward)(forward)
        with torch.no_grad(), without_own_settings(model):
            model.generate(
                ids_BS,
                attention_mask=torch.ones_like(ids_BS),
                past_key_values=self.cache,
                min_new_tokens=_NEW_TOKENS,
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                disable_compile=True,
            )
        for layer in self._layers:
            layer.announce(None)
        self._forget_counts()

    def _forget_counts(self) -> None:
        for layer in self._layers:
            layer.forget_counts()

    def _rewind_to(self, num_tokens: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(num_tokens)


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Captures a step in a CUDA graph.

    Args:
        step: The step. It is run once before, outside of the graph, for what is set up at first.

    Returns:
        The graph, to be replayed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's watchdog, may go on asking events.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def _is_alike(own: object, other: object) -> bool:
    if isinstance(own, Tensor):
        return isinstance(other, Tensor) and (own.shape, own.dtype) == (other.shape, other.dtype)
    return own is other or (type(own) is type(other) and own == other)


def check_replayable(model: PreTrainedModel, layers: Sequence[ExpertParallelMoE]) -> None:
    """Refuses a model whose passes are not all the same to a GPU.

    Args:
        model: An adapted model; without weights, on the meta device, it will do.
        layers: Its MoE layers.

    Raises:
        ConfigError: It has passes that a graph cannot hold.
    """
    name = type(model).__name__
    why = None
    of_cache = StaticCache(config=model.config, max_cache_len=1).layers
    if others := {type(each).__name__ for each in of_cache if type(each) is not StaticLayer}:
        why = f"{name} has layers whose cache changes its shape ({', '.join(sorted(others))})"
    elif not all(follows_contract(layer.deepspeed_moe.experts) for layer in layers):
        why = f"the experts of {name} compute in a way of their own, for which the host reads"
    elif kinds := _READ_BY_HOST & set(pytree.tree_leaves(_rope_parameters(model))):
        why = f"{name} has {kinds.pop()} rotary positions, which the host computes from the prompts"
    if why:
        raise ConfigError(f"--cuda-graphs: {why}. Leave --cuda-graphs out for this model.")


def _rope_parameters(model: PreTrainedModel) -> object:
    return getattr(model.config.get_text_config(), "rope_parameters", None)
