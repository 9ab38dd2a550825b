"""Predicts one pass of a model through one rank: what each part reads, multiplies and sends.

A part takes what reading its weights or its products take, whichever is more (the roofline model),
and what rows are moved by the kernels between products. What fits in memory, and how many passes
there are, is no affair of this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ds_moe_ep.memory_needs import kv_bytes_per_token
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.moe.cost_model import LayerShape, LinkPrices, predict_s
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.predict.hardware import Device, num_operations

__all__ = [
    "Deployment",
    "Part",
    "Pass",
    "PassTimes",
    "bytes_sent_per_token",
    "expected_experts",
    "expected_most_rows",
    "predict_pass",
]

# The residual stream, norms, queries, keys, values and sums of a layer: each written and read once.
_WIDTHS_MOVED = 2 * 10
# Of a row at an expert: gathered and summed (each read and written), and read by the up projection.
_HIDDEN_MOVED, _EXPERT_WIDTHS_MOVED = 5, 6
# Of a layer: after the router and after the experts. A message right after finds all ranks there.
_WAITS = 2
_READING, _PRODUCTS = "memory bandwidth", "matrix products"
_LATENCY, _SENDING, _LAUNCHING = "network latency", "network bandwidth", "launching operations"
_KERNELS = "starting kernels"


@dataclass(frozen=True)
class Deployment:
    """A model on devices.

    Attributes:
        spec: The model.
        plan: The parallel sizes; tp_size and pp_size are 1.
        device: What each rank computes on.
        links: What messages cost in an expert group; not needed for ep_size 1.
    """

    spec: ModelSpec
    plan: ParallelPlan
    device: Device
    links: LinkPrices | None = None

    @property
    def num_local_experts(self) -> int:
        """Experts of a layer on a rank."""
        return self.spec.num_experts // self.plan.ep_size


@dataclass(frozen=True)
class Pass:
    """What each rank brings to a pass.

    Attributes:
        prompts: Prompts in its batch.
        new_tokens: Tokens of each that the pass reads: all of a prompt, or one of a decode step.
        context: Tokens of each that are in the cache already.
        is_first: Whether it is the first pass of its batch.
        is_scored: Whether the head sees all tokens, not the last of each prompt alone.
        in_place: Whether the cache is written where it lies, as transformers' static cache is; its
            default is copied to be appended to.
    """

    prompts: int
    new_tokens: int = 1
    context: int = 0
    is_first: bool = False
    is_scored: bool = False
    in_place: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of one rank."""
        return self.prompts * self.new_tokens


@dataclass(frozen=True)
class Part:
    """One part of a pass.

    Attributes:
        name: "dense weights", "attention", "experts", "kernels", "communication" or "launching".
        seconds: What it takes.
        bound: What it waits for.
        num_bytes: Bytes that are read or sent.
        flops: Operations of its matrix products.
    """

    name: str
    seconds: float
    bound: str
    num_bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class PassTimes:
    """The prediction of a pass.

    Attributes:
        parts: What the device and the links do.
        launching: What telling the device takes.
        overlaps: Whether the device works meanwhile.
        dispatcher: How rows travel; empty without communication.
    """

    parts: tuple[Part, ...]
    launching: Part
    overlaps: bool
    dispatcher: str

    @property
    def device_s(self) -> float:
        """Seconds of the device and the links: what is left if launching costs nothing."""
        return sum(part.seconds for part in self.parts)

    @property
    def seconds(self) -> float:
        """Seconds of the pass."""
        launching_s = self.launching.seconds
        return max(self.device_s, launching_s) if self.overlaps else self.device_s + launching_s

    @property
    def bound(self) -> str:
        """What most of the pass waits for."""
        if self.overlaps and self.launching.seconds > self.device_s:
            return self.launching.bound
        seconds: dict[str, float] = {}
        for part in (*self.parts, *(() if self.overlaps else (self.launching,))):
            seconds[part.bound] = seconds.get(part.bound, 0.0) + part.seconds
        return max(seconds, key=seconds.__getitem__)

    def shares(self) -> dict[str, float]:
        """Returns each part's share of the seconds of the pass.

        Where launching overlaps, its share is the time by which it outlasts the device.
        """
        total = self.seconds
        found = {part.name: part.seconds / total for part in self.parts}
        found[self.launching.name] = (total - self.device_s) / total
        return found


def expected_experts(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Returns how many experts are chosen by any of some tokens: E * (1 - (1 - K/E)^T).

    Each token is taken to choose K of E experts, all equally often.
    """
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


def expected_most_rows(
    num_experts: int, top_k: int, num_tokens: int, num_local_experts: int
) -> float:
    """Returns about how many (row, expert) pairs the busiest rank gets if routing is random.

    The mean, and the square root of 2 ln(ranks) standard deviations more, which is what the largest
    of as many independent normal variables tends to. One rank's pairs of a token are
    hypergeometric: K drawn of E experts, of which some are its own.
    """
    num_ranks = num_experts // num_local_experts
    mean = num_tokens * top_k / num_ranks
    if num_ranks == 1 or num_experts == 1:
        return mean
    own = num_local_experts / num_experts
    variance = top_k * own * (1 - own) * (num_experts - top_k) / (num_experts - 1)
    most = mean + math.sqrt(2 * math.log(num_ranks) * num_tokens * variance)
    return min(most, num_tokens * min(top_k, num_local_experts))


def bytes_sent_per_token(spec: ModelSpec, plan: ParallelPlan) -> dict[str, float]:
    """Returns the bytes that a token makes all ranks send in a pass through all layers, at least.

    Returns:
        By dispatcher: alltoall, a row to each other rank that owns one of its experts and one back;
        allgather, a row to every other rank and one back. Expert ids and weights travel with them.
    """
    others = plan.ep_size - 1
    if not others:
        return {"alltoall": 0.0, "allgather": 0.0}
    shape = _layer_shape(spec)
    both_ways = len(spec.moe_layers) * (shape.routed_row_bytes + shape.row_bytes)
    wanted = shape.share_wanted(spec.num_experts // plan.ep_size)
    return {"alltoall": others * wanted * both_ways, "allgather": others * float(both_ways)}


def predict_pass(deployment: Deployment, each: Pass) -> PassTimes:
    """Predicts what a pass takes in which every rank brings as much."""
    spec, device = deployment.spec, deployment.device
    parts = [_dense(deployment, each), _attention(deployment, each)]
    dispatcher = ""
    if spec.is_moe:
        parts.append(_experts(deployment, each))
    if spec.is_moe and deployment.plan.ep_size > 1:
        part, dispatcher = _communication(deployment, each)
        parts.append(part)
    if device.kernel_s:
        kernels_s = num_operations(spec.num_layers) * device.kernel_s
        parts.append(Part("kernels", kernels_s, _KERNELS))
    launches = device.launches
    launching_s = spec.num_layers * launches.layer_s + launches.step_s
    if each.is_first:
        launching_s += launches.start_s
    launching = Part("launching", launching_s, _LAUNCHING)
    return PassTimes(tuple(parts), launching, device.overlaps, dispatcher)


def _part(
    name: str,
    device: Device,
    element_bytes: int,
    *,
    read_bytes: float,
    moved_bytes: float,
    flops: float,
) -> Part:
    """Returns a part that reads weights or the cache while it multiplies, and then moves rows.

    Rows are moved by kernels of their own, before and after products: a GPU runs one at a time.
    """
    reading_s, moving_s = (each / device.bytes_per_s for each in (read_bytes, moved_bytes))
    products_s = flops / device.flops(element_bytes)
    work_s = max(reading_s, products_s) if device.overlaps else reading_s + products_s
    bound = _READING if reading_s + moving_s > products_s else _PRODUCTS
    return Part(name, work_s + moving_s, bound, read_bytes + moved_bytes, flops)


def _dense(deployment: Deployment, each: Pass) -> Part:
    """Projections, routers, shared experts and the head; of the embedding only rows are read."""
    spec = deployment.spec
    head = spec.vocab_size * spec.hidden_size
    head_rows = each.tokens if each.is_scored else each.prompts
    products = spec.num_dense_params - (head if spec.tie_word_embeddings else 2 * head)
    moved = each.tokens * spec.num_layers * _WIDTHS_MOVED * spec.hidden_size
    return _part(
        "dense weights",
        deployment.device,
        spec.param_bytes,
        read_bytes=(products + head) * spec.param_bytes,
        moved_bytes=moved * spec.param_bytes,
        flops=2.0 * (products * each.tokens + head * head_rows),
    )


def _attention(deployment: Deployment, each: Pass) -> Part:
    """Scores and sums over the cache, which transformers copies to append to it by default."""
    spec = deployment.spec
    value_dim = spec.head_dim if spec.mla is None else spec.mla.v_head_dim
    keys_seen = each.context + (each.new_tokens + 1) / 2
    flops = 2.0 * spec.num_layers * spec.num_attention_heads * (spec.head_dim + value_dim)
    after = each.context + each.new_tokens
    written = each.new_tokens if each.in_place else each.context + after  # read, and written
    token_bytes = each.prompts * kv_bytes_per_token(spec, spec.param_bytes)
    return _part(
        "attention",
        deployment.device,
        spec.param_bytes,
        read_bytes=after * token_bytes,
        moved_bytes=written * token_bytes,
        flops=flops * each.tokens * keys_seen,
    )


def _experts(deployment: Deployment, each: Pass) -> Part:
    """The experts that any token of the group chose, and the rows of the busiest rank."""
    spec, ep_size = deployment.spec, deployment.plan.ep_size
    num_tokens = ep_size * each.tokens
    read = expected_experts(spec.num_experts, spec.top_k, num_tokens) / ep_size
    rows = float(each.tokens * spec.top_k)
    if not deployment.device.is_shared:
        rows = expected_most_rows(
            spec.num_experts, spec.top_k, num_tokens, deployment.num_local_experts
        )
    widths = _HIDDEN_MOVED * spec.hidden_size + _EXPERT_WIDTHS_MOVED * spec.moe_intermediate_size
    num_layers = len(spec.moe_layers)
    return _part(
        "experts",
        deployment.device,
        spec.param_bytes,
        read_bytes=num_layers * read * spec.num_params_per_expert * spec.param_bytes,
        moved_bytes=num_layers * rows * widths * spec.param_bytes,
        flops=2.0 * num_layers * rows * spec.num_params_per_expert,
    )


def _communication(deployment: Deployment, each: Pass) -> tuple[Part, str]:
    """The cheapest dispatcher's messages, and the one that announces the pass."""
    spec, links = deployment.spec, deployment.links
    if links is None:
        raise ValueError("ep_size > 1 needs the prices of links")
    shape, num_layers, ep_size = _layer_shape(spec), len(spec.moe_layers), deployment.plan.ep_size
    predicted = predict_s(links, shape, (each.tokens,) * ep_size)
    dispatcher = min(predicted, key=predicted.__getitem__)
    waits_s = num_layers * _WAITS * deployment.device.wait_s
    seconds = num_layers * predicted[dispatcher] + waits_s
    latency_s = num_layers * predict_s(links, shape, (0,) * ep_size)[dispatcher] + waits_s
    bound = _LATENCY if 2 * latency_s > seconds else _SENDING
    kind = "alltoall" if dispatcher.startswith("alltoall") else "allgather"
    num_bytes = each.tokens * bytes_sent_per_token(spec, deployment.plan)[kind]
    announcing_s = links.flat.gather.latency_s
    return Part("communication", seconds + announcing_s, bound, num_bytes), dispatcher


def _layer_shape(spec: ModelSpec) -> LayerShape:
    return LayerShape(spec.num_experts, spec.top_k, spec.hidden_size * spec.param_bytes)
