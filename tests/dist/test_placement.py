"""Models with placed experts on real ranks give what Hugging Face's give, with every dispatcher."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_moe_ep.balance import RankLayout, balance
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.moe.dispatch import DISPATCHERS, TWO_LEVEL
from ds_moe_ep.placement import SlotPlacement
from tests.helpers import run_ranks
from tests.helpers.families import NUM_EXPERTS, VOCAB_SIZE, save_tiny

FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3")
NEW_TOKENS = 4
PROMPTS = [
    torch.randint(3, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(length))
    for length in (5, 11, 2)
]
# Slots on each rank: with four ranks both without and with copies.
SLOTS_OF_WORLD = {2: (5,), 4: (2, 3)}
FLAT = [name for name in DISPATCHERS if name not in TWO_LEVEL]


def dispatchers(family: str, world_size: int) -> list[str]:
    """All for one family; what differs between families does not depend on the dispatcher."""
    if family != FAMILIES[0]:
        return ["alltoall"]
    return [*(DISPATCHERS if world_size == 4 else FLAT), "auto"]


def placed(folder: Path, world_size: int, slots_per_rank: int) -> SlotPlacement:
    """A placement for skewed loads, which the model need not have."""
    chance = random.Random(slots_per_rank)
    layers = read_model_spec(folder).moe_layers
    loads = {layer: [chance.random() ** 4 for _ in range(NUM_EXPERTS)] for layer in layers}
    return balance(loads, RankLayout(world_size, slots_per_rank))


def observe(model, generate, prompt):
    """Logits of a prompt, and its greedy completion."""
    with torch.no_grad():
        logits = model(input_ids=prompt).logits
    mask = torch.ones_like(prompt)
    return logits, generate(
        input_ids=prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
    )


def run_placed(rank: int, world_size: int, folders: dict[str, Path]):
    """Runs the prompts of this rank, by family, slots and dispatcher; returns what it saw."""
    from ds_moe_ep.adapter import bind_expert_groups, moe_layers
    from ds_moe_ep.checkpoint import load_expert_parallel_model
    from ds_moe_ep.config.deepspeed import inference_config
    from ds_moe_ep.dist.groups import RankInfo, init_distributed
    from ds_moe_ep.engine.loading import init_inference
    from ds_moe_ep.engine.sync import ForwardSync
    from ds_moe_ep.plan import ParallelPlan

    init_distributed(RankInfo(rank, rank, world_size), timeout_s=60)
    plan, cpu = ParallelPlan(world_size), torch.device("cpu")
    nodes = [each // 2 for each in range(world_size)]
    seen = {}
    for family, folder in folders.items():
        spec = read_model_spec(folder)
        for slots in SLOTS_OF_WORLD[world_size]:
            for dispatcher in dispatchers(family, world_size):
                model, _ = load_expert_parallel_model(
                    folder,
                    plan,
                    ep_rank=rank,
                    dispatcher=dispatcher,
                    placement=placed(folder, world_size, slots),
                )
                bind_expert_groups(model, nodes=nodes, device=cpu, timeout_s=60)
                engine = init_inference(model, inference_config(plan, spec, dtype="float32"))
                layers = moe_layers(model)
                sync = ForwardSync(
                    model,
                    layers,
                    torch.distributed.group.WORLD,
                    top_k=spec.top_k,
                    dtype=torch.float32,
                    device=cpu,
                )
                all_the_same = dispatcher == "allreduce"
                own = range(
                    0 if all_the_same else rank, len(PROMPTS), 1 if all_the_same else world_size
                )
                outputs = {i: observe(model, engine.generate, PROMPTS[i]) for i in own}
                sync.join_others()
                rows = [layer.deepspeed_moe.tokens_per_expert.tolist() for layer in layers]
                seen[family, slots, dispatcher] = outputs, rows
    return seen


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("placement")
    for family in FAMILIES:
        save_tiny(family, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def expected(folders):
    """What Hugging Face's models give."""
    found = {}
    for family, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found[family] = [observe(model, model.generate, prompt) for prompt in PROMPTS]
    return found


@pytest.fixture(scope="module", params=SLOTS_OF_WORLD, ids=lambda size: f"ep{size}")
def observed(request, folders, tmp_path_factory):
    """The number of ranks, and what each saw: one job for all cases."""
    path = tmp_path_factory.mktemp("ranks")
    return request.param, run_ranks(run_placed, request.param, path, folders, timeout_s=200)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_equal_hugging_face(observed, expected, family):
    world_size, ranks = observed
    for slots in SLOTS_OF_WORLD[world_size]:
        for dispatcher in dispatchers(family, world_size):
            outputs = {}
            for seen in ranks:
                for index, output in seen[family, slots, dispatcher][0].items():
                    outputs.setdefault(index, []).append(output)
            assert sorted(outputs) == list(range(len(PROMPTS)))
            for index, found in outputs.items():
                logits, tokens = expected[family][index]
                for own_logits, own_tokens in found:
                    torch.testing.assert_close(own_logits, logits, rtol=1e-5, atol=1e-5)
                    assert torch.equal(own_tokens, tokens), (dispatcher, slots)


def test_the_copies_of_an_expert_share_its_rows(observed, folders):
    world_size, ranks = observed
    family, slots = FAMILIES[0], SLOTS_OF_WORLD[world_size][-1]
    placement = placed(folders[family], world_size, slots)

    def rows_of_slots(dispatcher):
        of_rank = [seen[family, slots, dispatcher][1] for seen in ranks]
        return [sum(layer, []) for layer in zip(*of_rank, strict=True)]

    rows = rows_of_slots("alltoall")
    assert rows == rows_of_slots("allgather") == rows_of_slots("deepspeed")
    # The prompts' tokens twice, and one of each prompt in the passes after its first new token.
    num_tokens = 2 * sum(prompt.numel() for prompt in PROMPTS) + len(PROMPTS) * (NEW_TOKENS - 1)
    top_k = read_model_spec(folders[family]).top_k
    for of_slot, held in zip(rows, placement.expert_of_slot.values(), strict=True):
        assert sum(of_slot) == num_tokens * top_k
        for expert in range(NUM_EXPERTS):
            copies = [of_slot[slot] for slot, each in enumerate(held) if each == expert]
            # Tokens on even and odd turns are not exactly as many.
            assert max(copies) - min(copies) <= max(3, sum(copies) // 2), (expert, copies)
