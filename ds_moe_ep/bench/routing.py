"""Inputs whose routing is known: which experts the tokens of a benchmark choose.

A router is a matrix, so for any logits there are tokens that get them: every side can use its own
router, and still all route alike.
"""

# Shapes: N tokens of all ranks, H hidden, E experts, K top_k

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from ds_moe_ep.demo import MODEL_DIR
from ds_moe_ep.errors import ConfigError

__all__ = ["ROUTINGS", "routed_tokens", "tokens_with_logits"]

_ZIPF_EXPONENT = 1.2
_TEXT = MODEL_DIR.with_name("alice.txt")
# Between the logits of chosen experts and the others: far more than rounding.
_MARGIN = 2.0


def tokens_with_logits(logits_NE: Tensor, router_EH: Tensor, generator: torch.Generator) -> Tensor:
    """Returns random tokens ``[N, H]`` for which a router computes given logits.

    Args:
        logits_NE: What the router is to compute.
        router_EH: Its weight, with orthonormal rows.
        generator: Random numbers for what the router does not see of the tokens.
    """
    random_NH = torch.randn((len(logits_NE), router_EH.shape[1]), generator=generator)
    unseen_NH = random_NH - (random_NH @ router_EH.T) @ router_EH
    return logits_NE @ router_EH + unseen_NH


def _uniform(num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    return _choosing(torch.zeros(num_experts), num_tokens, top_k, generator)


def _zipf(num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    places = torch.arange(1, num_experts + 1, dtype=torch.float32)
    return _choosing(-_ZIPF_EXPONENT * places.log(), num_tokens, top_k, generator)


def _all_to_one(
    num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator
) -> Tensor:
    first = torch.zeros(num_experts)
    first[:top_k] = 1000.0
    return _choosing(first, num_tokens, top_k, generator)


def _trained(num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    config = model.config
    if (config.num_experts, config.num_experts_per_tok) != (num_experts, top_k):
        raise ConfigError(
            f"routing 'trained' is that of the bundled model: {config.num_experts} experts, "
            f"top-{config.num_experts_per_tok}; not {num_experts}, top-{top_k}."
        )
    text = _TEXT.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(MODEL_DIR)(text)["input_ids"][:num_tokens]
    logits = []
    with torch.no_grad():
        for window in torch.tensor(ids).split(config.max_position_embeddings):
            found = model(window[None], output_router_logits=True).router_logits
            logits.append(found[len(found) // 2])  # of the layer in the middle
    return torch.cat(logits)


def _choosing(
    log_popularity_E: Tensor, num_tokens: int, top_k: int, generator: torch.Generator
) -> Tensor:
    """Returns logits ``[N, E]`` by which tokens choose K experts each, by their popularity.

    Source:
        Drawing without replacement by adding Gumbel noise: https://arxiv.org/abs/1903.06059.
    """
    size = (num_tokens, len(log_popularity_E))
    gumbel_NE = -torch.empty(size).exponential_(generator=generator).log()
    chosen_NK = (log_popularity_E + gumbel_NE).topk(top_k).indices
    logits_NE = torch.rand(size, generator=generator)
    return logits_NE.scatter_add_(1, chosen_NK, torch.full(chosen_NK.shape, _MARGIN))


ROUTINGS: dict[str, Callable[[int, int, int, torch.Generator], Tensor]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "all-to-one": _all_to_one,
    "trained": _trained,
}
"""Functions of tokens, experts, top_k and random numbers that return logits ``[N, E]``.

Every expert is as likely as another; expert i in proportion to ``(i + 1) ** -1.2``; all tokens
choose the first experts, which share a rank; what a layer of the bundled model says to its book.
"""


def routed_tokens(
    model: Qwen3MoeForCausalLM, routing: str, num_tokens: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Makes tokens that the first router of a model sends to experts in a way of `ROUTINGS`.

    Returns:
        Their logits ``[N, E]``, and the tokens ``[N, H]``.
    """
    generator, sizes = torch.Generator().manual_seed(seed), model.config
    logits_NE = ROUTINGS[routing](
        num_tokens, sizes.num_experts, sizes.num_experts_per_tok, generator
    )
    router_EH = model.model.layers[0].mlp.gate.weight
    return logits_NE, tokens_with_logits(logits_NE, router_EH, generator)
