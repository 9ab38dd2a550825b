"""Experts in slots, without ranks: what is loaded, which copy a token takes, what is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_moe_ep.adapter import adapt, moe_layers
from ds_moe_ep.bringup.experts import judge_placed
from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.checkpoint.convert import to_expert_sharded
from ds_moe_ep.checkpoint.load import build_on_meta
from ds_moe_ep.checkpoint.reader import TensorReader
from ds_moe_ep.errors import AdapterError
from ds_moe_ep.moe.experts import expert_parameters
from ds_moe_ep.moe.slots import ExpertSlots
from ds_moe_ep.placement import SlotPlacement
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import FAMILIES, NUM_EXPERTS, save_tiny

# Of eight experts on two ranks: 1 and 6 have copies, on the other rank or on their own.
_SLOTS = ((6, 1, 0, 7, 2), (1, 3, 4, 5, 6)), ((0, 1, 1, 2, 3), (4, 5, 6, 6, 7))


def _placement(layers, num_ranks=2):
    filled = {layer: sum(_SLOTS[i % 2], ()) for i, layer in enumerate(layers)}
    return SlotPlacement(NUM_EXPERTS, num_ranks, len(sum(_SLOTS[0], ())) // num_ranks, filled)


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss", "deepseek_v3"])
def family(request, tmp_path_factory):
    """A folder with experts one by one or fused, its model, and the layers that have experts."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    of_experts = {
        int(name.split(".")[2]): module
        for name, module in reference.named_modules()
        if hasattr(module, "_apply_gate")
    }
    return folder, of_experts


def _load(folder, ep_rank, placement):
    return load_expert_parallel_model(folder, ParallelPlan(2), ep_rank=ep_rank, placement=placement)


def _check(folder, of_experts):
    placement = _placement(of_experts)
    for ep_rank in range(2):
        model, report = _load(folder, ep_rank, placement)
        assert str(report).endswith("holds 5 of 8 experts in each, by placement")
        for swapped, layer in zip(moe_layers(model), of_experts, strict=True):
            held = list(placement.local_experts(layer, ep_rank))
            for name, param in expert_parameters(swapped.deepspeed_moe.experts).items():
                wanted = of_experts[layer].get_parameter(name)[held]
                torch.testing.assert_close(param, wanted, rtol=0, atol=0)


def test_a_rank_holds_the_experts_of_its_slots(family):
    _check(*family)


def test_slots_are_filled_from_the_shards_of_any_plan(family, tmp_path):
    folder, of_experts = family
    to_expert_sharded(folder, tmp_path / "sharded", ep_size=4)
    _check(tmp_path / "sharded", of_experts)


def test_nothing_is_read_twice_but_copies(family, monkeypatch):
    folder, of_experts = family
    read_bytes = []
    read = TensorReader.read

    def count(self, pieces):
        tensor = read(self, pieces)
        read_bytes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(TensorReader, "read", count)
    load_expert_parallel_model(folder, ParallelPlan(2), ep_rank=0)  # 4 experts of each layer
    plain = sum(read_bytes)
    read_bytes.clear()
    _load(folder, 0, _placement(of_experts))  # 5
    one = sum(p[0].nbytes for m in of_experts.values() for p in expert_parameters(m).values())
    assert sum(read_bytes) == plain + one


def test_a_loaded_model_is_cut_alike(family):
    folder, of_experts = family
    placement = _placement(of_experts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapt(model, ParallelPlan(2), ep_rank=1, placement=placement)
    loaded, _ = _load(folder, 1, placement)
    for (name, found), (_, wanted) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(found, wanted), name


def test_tokens_take_copies_in_turn():
    slots = ExpertSlots((0, 2, 1, 2, 2, 0))  # 0 in slots 0 and 5, 2 in slots 1, 3 and 4
    ids_TK = torch.tensor([[0, 1], [0, 2], [2, 0], [2, 1], [1, 2]])
    assert slots.choose(ids_TK, 0).tolist() == [[0, 2], [5, 3], [4, 0], [1, 2], [2, 3]]
    assert slots.choose(ids_TK, 1).tolist() == [[5, 2], [0, 4], [1, 5], [3, 2], [2, 4]]
    assert slots.choose(ids_TK[:0], 3).shape == (0, 2)
    everyone_K = slots.choose(torch.full((600, 1), 2), 7).flatten()
    assert torch.bincount(everyone_K).tolist() == [0, 200, 0, 200, 200]


@pytest.mark.parametrize(
    ("placement", "says"),
    [
        (_placement((0, 1)), "is of 2 layers with 8 experts on 2 ranks; the model has 3 with 8"),
        (_placement((0, 1, 2), num_ranks=1), "on 1 ranks; the model has 3 with 8, and ep_size=2"),
        (
            SlotPlacement(2, 2, 1, dict.fromkeys((0, 1, 2), (0, 1))),
            "is of 3 layers with 2 experts",
        ),
    ],
)
def test_a_placement_of_another_model(placement, says):
    model = build_on_meta(FAMILIES["olmoe"](), torch.float32)
    with pytest.raises(AdapterError) as refused:
        adapt(model, ParallelPlan(2), ep_rank=0, placement=placement)
    assert says in str(refused.value)
    assert "ds-moe-ep balance" in str(refused.value)


def test_the_bring_up_names_ranks_that_hold_other_experts():
    placement = _placement((3, 4))
    held = [
        {"a": (placement.local_experts(3, rank % 2), 8), "b": (placement.local_experts(4, rank), 8)}
        for rank in range(2)
    ]
    good = judge_placed(held * 2, placement)
    assert (good.verdict, good.reason) == (
        "pass",
        "4 ranks hold 5 of 8 experts in each of 2 layers, as placed: 2 slots of a layer hold "
        "copies",
    )
    held[1]["b"] = (range(5), 8)
    bad = judge_placed(held, placement)
    assert (bad.verdict, bad.reason) == (
        "fail",
        "not as the placement says: rank 1 holds [0, 1, 2, 3, 4] of b",
    )
