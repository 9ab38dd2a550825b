"""What the comparison with Hugging Face notices: every mistake here changes logits, or is refused.

The mistakes are in converted weights and in arguments. Last, each argument is left out once: it is
missed, or it is named here as one that changes nothing on one rank of a CPU.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ds_moe_ep.errors import CheckpointError, MegatronError
from ds_moe_ep.megatron.arguments import one_parser, parse_arguments, read_arguments
from ds_moe_ep.megatron.model import start_model_parallel
from ds_moe_ep.megatron.score import megatron_logits
from tests.helpers.families import VOCAB_SIZE
from tests.megatron.converted import load_converted, save_converted

TOLERANCE = 5e-6
NOTICED = 20 * TOLERANCE

TOKENS = torch.randint(3, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Converted:
    """A case of converted.py, and what Hugging Face's model gives."""

    folder: Path
    words: list[str]
    logits: Tensor

    def difference(
        self, words: Sequence[str] | None = None, change: Callable[[Any], None] | None = None
    ) -> float:
        """Returns how far logits are from Hugging Face's; infinity where the model is refused."""
        try:
            model = load_converted(self.folder, words=words or self.words)
        except (CheckpointError, MegatronError):
            return math.inf
        if change is not None:
            with torch.no_grad():
                change(model)
        return float((megatron_logits(model, TOKENS) - self.logits).abs().max())


@pytest.fixture(scope="module")
def converted(megatron_is_installed, tmp_path_factory) -> Iterator[Callable[[str], Converted]]:
    """Returns what makes a case, once."""
    from megatron.core import parallel_state

    made: dict[str, Converted] = {}

    def get(case: str) -> Converted:
        if case not in made:
            folder = tmp_path_factory.mktemp("converted")
            hf = save_converted(case, folder)
            words = read_arguments(folder / "ep1.args")
            if not made:
                args = parse_arguments(words, rank=0, world_size=1)
                start_model_parallel(args, timeout_s=60)
            with torch.no_grad():
                made[case] = Converted(folder, words, hf(TOKENS).logits)
        return made[case]

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    with one_parser():
        yield get
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


CASES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")


@pytest.mark.parametrize("case", CASES)
def test_without_a_mistake_nothing_is_noticed(case, converted):
    assert converted(case).difference() <= TOLERANCE


Change = Callable[[Any], None]
"""Makes a mistake in the weights of a model."""


def tensors(model: Any, pattern: str) -> list[Tensor]:
    """Returns the weights whose names end with a pattern, in the order of the layers."""
    named = (*model.named_parameters(), *model.named_buffers())
    found = [tensor for name, tensor in named if re.search(f"{pattern}$", name)]
    assert found, pattern
    return found


def exchange(a: Tensor, b: Tensor) -> None:
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def halves_exchanged(pattern: str) -> Change:
    def change(model: Any) -> None:
        for tensor in tensors(model, pattern):
            exchange(*tensor.chunk(2))

    return change


def both_exchanged(pattern: str, other: str) -> Change:
    def change(model: Any) -> None:
        for a, b in zip(tensors(model, pattern), tensors(model, other), strict=True):
            exchange(a, b)

    return change


def filled(pattern: str, value: float) -> Change:
    def change(model: Any) -> None:
        for tensor in tensors(model, pattern):
            tensor.fill_(value)

    return change


def q_then_k_then_v(kind: str) -> Change:
    """Puts all queries before all keys, where they belong to each other group by group."""

    def change(model: Any) -> None:
        config = model.config
        for tensor in tensors(model, f"linear_qkv.{kind}"):
            of_group = tensor.unflatten(0, (config.num_query_groups, -1, config.kv_channels))
            parts = of_group[:, :-2], of_group[:, -2], of_group[:, -1]
            tensor.copy_(torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts]))

    return change


def keys_and_values_exchanged(model: Any) -> None:
    for tensor in tensors(model, "linear_kv_up_proj.weight"):
        exchange(*tensor.unflatten(0, (model.config.num_attention_heads, 2, -1)).unbind(1))


def rotated_part_first(model: Any) -> None:
    for tensor in tensors(model, "linear_kv_down_proj.weight"):
        tensor.copy_(tensor.roll(model.config.qk_pos_emb_head_dim, 0))


def router_rows_exchanged(model: Any) -> None:
    for tensor in tensors(model, "router.weight"):
        exchange(tensor[0], tensor[1])


def an_expert_rounded(model: Any) -> None:
    for tensor in tensors(model, r"experts\.5\.linear_fc1.weight"):
        tensor.copy_(tensor.bfloat16())


MISTAKES_IN_WEIGHTS: dict[str, tuple[str, Change]] = {
    "gate and up of experts exchanged": (
        "olmoe",
        halves_exchanged(r"local_experts\.\d+\.linear_fc1.weight"),
    ),
    "gate and up of shared experts exchanged": (
        "deepseek_v3",
        halves_exchanged("shared_experts.linear_fc1.weight"),
    ),
    "gate and up of a dense layer exchanged": (
        "qwen3_moe",
        halves_exchanged("mlp.linear_fc1.weight"),
    ),
    "queries, keys and values one after the other": ("mixtral", q_then_k_then_v("weight")),
    "their biases one after the other": ("qwen2_moe", q_then_k_then_v("bias")),
    "experts 0 and 1 exchanged": (
        "olmoe",
        both_exchanged(r"local_experts\.0\..*", r"local_experts\.1\..*"),
    ),
    "rows of the router exchanged": ("mixtral", router_rows_exchanged),
    "a layer's experts in another": (
        "qwen3_moe",
        both_exchanged(r"layers\.1\.mlp\.experts\..*", r"layers\.2\.mlp\.experts\..*"),
    ),
    "norms of queries and keys exchanged": (
        "qwen3_moe",
        both_exchanged("q_layernorm.weight", "k_layernorm.weight"),
    ),
    "norms of a layer exchanged": (
        "mixtral",
        both_exchanged("input_layernorm.weight", "pre_mlp_layernorm.weight"),
    ),
    "the last norm left as it is made": ("olmoe", filled("final_layernorm.weight", 1.0)),
    "the norm of latents left as it is made": ("deepseek_v3", filled("kv_layernorm.weight", 1.0)),
    "the head taken for the embedding": (
        "olmoe",
        both_exchanged("word_embeddings.weight", "output_layer.weight"),
    ),
    "no correction bias": ("deepseek_v3", filled("expert_bias", 0.0)),
    "no gate of the shared expert": ("qwen2_moe", filled("gate_weight", 0.0)),
    "keys and values of latents exchanged": ("deepseek_v3", keys_and_values_exchanged),
    "the rotated part of latents first": ("deepseek_v3", rotated_part_first),
    "an expert rounded to bfloat16": ("mixtral", an_expert_rounded),
}


@pytest.mark.parametrize("mistake", MISTAKES_IN_WEIGHTS)
def test_a_mistake_in_weights_is_noticed(mistake, converted):
    case, change = MISTAKES_IN_WEIGHTS[mistake]
    assert NOTICED < converted(case).difference(change=change) < math.inf


Words = list[str]


def without(*names: str) -> Callable[[Words], Words]:
    """Leaves arguments out, with their values."""

    def change(words: Words) -> Words:
        left = [argument for argument in arguments_of(words) if argument[0] not in names]
        return [word for argument in left for word in argument]

    return change


def arguments_of(words: Words) -> list[Words]:
    """Splits words into arguments, each a name and its values."""
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    return [words[i:j] for i, j in pairwise([*starts, len(words)])]


def added(*more: str) -> Callable[[Words], Words]:
    return lambda words: [*words, *more]


MISTAKES_IN_ARGUMENTS: dict[str, tuple[str, Callable[[Words], Words]]] = {
    "weights of top-k normalised that are not": ("olmoe", without("--moe-router-pre-softmax")),
    "weights of top-k not normalised that are": ("mixtral", added("--moe-router-pre-softmax")),
    "one expert more": ("olmoe", added("--moe-router-topk", "3")),
    "one expert": ("mixtral", added("--moe-router-topk", "1")),
    "Megatron's own epsilon": ("qwen3_moe", without("--norm-epsilon")),
    "Megatron's own rotary base": ("mixtral", without("--rotary-base")),
    "pairs rotated that lie side by side": ("olmoe", added("--rotary-interleaved")),
    "half of each head rotated": ("olmoe", added("--rotary-percent", "0.5")),
    "stretched positions": (
        "deepseek_v3",
        added("--rope-type", "yarn", "--rotary-scaling-factor", "40"),
    ),
    "no scaling of experts": ("deepseek_v3", without("--moe-router-topk-scaling-factor")),
    "no groups": ("deepseek_v3", without("--moe-router-num-groups", "--moe-router-group-topk")),
    "another number of groups": ("deepseek_v3", added("--moe-router-num-groups", "2")),
    "no correction bias": ("deepseek_v3", without("--moe-router-enable-expert-bias")),
    "softmax for sigmoid": ("deepseek_v3", added("--moe-router-score-function", "softmax")),
    "norms of each head for norms of all": ("olmoe", without("--spec")),
    "experts in other layers": ("qwen3_moe", added("--moe-layer-freq", "([1]*1+[0]*1+[1]*1)")),
    "heads of another width": ("qwen3_moe", added("--kv-channels", "8")),
    "fewer layers": ("mixtral", added("--num-layers", "2")),
    "fewer experts": ("qwen2_moe", added("--num-experts", "4")),
    "gelu for silu": ("mixtral", added("--quick-geglu")),
}


@pytest.mark.parametrize("mistake", MISTAKES_IN_ARGUMENTS)
def test_a_mistake_in_arguments_is_noticed_or_refused(mistake, converted):
    case, change = MISTAKES_IN_ARGUMENTS[mistake]
    model = converted(case)
    assert change(model.words) != model.words
    assert model.difference(change(model.words)) > NOTICED


CHANGES_NOTHING = {
    "--attention-dropout": "in training only",
    "--hidden-dropout": "in training only",
    "--moe-router-load-balancing-type": "in training only",
    "--moe-router-dtype": "all is float32 here",
    "--moe-token-dispatcher-type": "it says who sends what, and the sums are the same",
    "--no-masked-softmax-fusion": "there is no such kernel for CPUs",
    "--rope-type": "by Megatron's own value positions are stretched, but by a factor of 1",
}


@pytest.mark.parametrize("case", ["qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_no_argument_can_be_left_out(case, converted):
    model = converted(case)
    given = parsed(model.words)
    unnoticed = set()
    for name, *_ in arguments_of(model.words):
        left = without(name)(model.words)
        # Some say what Megatron would take for this model anyhow.
        if parsed(left) != given and model.difference(left) <= NOTICED:
            unnoticed.add(name)
    assert unnoticed == CHANGES_NOTHING.keys() & set(model.words)


def parsed(words: Words) -> dict[str, Any]:
    """Returns what Megatron makes of arguments; nothing where it refuses them."""
    try:
        return vars(parse_arguments(words, rank=0, world_size=1))
    except MegatronError:
        return {}
