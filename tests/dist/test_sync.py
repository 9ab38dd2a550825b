"""Ranks with unequal numbers of forward passes stay in step, and all of them end."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine.sync import ForwardSync
from tests.helpers import run_ranks

_WORLD_SIZE = 4
_HIDDEN, _TOP_K, _NUM_LAYERS = 6, 2, 3
_PROMPTS_PER_PASS = 10

# Forward passes of each rank.
_CASES = {
    "all equal": (2, 2, 2, 2),
    "rank 0 has none": (0, 3, 1, 5),
    "rank 0 has most": (7, 1, 0, 2),
    "only the last has some": (0, 0, 0, 4),
    "none": (0, 0, 0, 0),
}


class _Layer(nn.Module):
    """Meets the other ranks of its group, as an MoE layer does, and counts rows and meetings."""

    hidden_size = _HIDDEN

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        super().__init__()
        self.rank, self.group, self.calls, self.own_rows, self.all_rows = rank, group, 0, 0, 0
        self.announced, self.misinformed = None, 0

    def announce(self, num_tokens: list[int] | None, live_T: Tensor | None = None) -> None:
        self.announced = num_tokens

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        assert x_TH.shape[1] == _HIDDEN
        assert ids_TK.shape == weights_TK.shape == (len(x_TH), _TOP_K)
        rows = torch.tensor(len(x_TH))
        dist.all_reduce(rows, group=self.group)
        self.calls += 1
        self.own_rows += len(x_TH)
        self.all_rows += int(rows)
        own = None if self.announced is None else self.announced[self.rank]
        self.misinformed += own != len(x_TH)
        return x_TH


class _Model(nn.Module):
    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(group, rank) for _ in range(_NUM_LAYERS))

    def forward(self, input_ids: Tensor) -> Tensor:
        x_TH = torch.ones(input_ids.numel(), _HIDDEN)
        for layer in self.layers:
            count = (len(x_TH), _TOP_K)
            x_TH = layer(x_TH, torch.zeros(count, dtype=torch.int64), torch.ones(count))
        return x_TH


def _serve(
    group: dist.ProcessGroup, layer_group: dist.ProcessGroup, num_passes: int
) -> dict[str, object]:
    model, progress = _Model(layer_group, dist.get_rank(group)), []
    sync = ForwardSync(
        model,
        model.layers,
        group,
        top_k=_TOP_K,
        dtype=torch.float32,
        device=torch.device("cpu"),
        on_progress=progress.append,
    )
    for _ in range(num_passes):
        model(input_ids=torch.ones(1, 5, dtype=torch.int64))
        sync.finish(_PROMPTS_PER_PASS)
    sync.join_others()
    return {
        "steps": sync.num_steps,
        "finished": sync.num_finished,
        "calls": {layer.calls for layer in model.layers},
        "own_rows": {layer.own_rows for layer in model.layers},
        "all_rows": {layer.all_rows for layer in model.layers},
        "misinformed": sum(layer.misinformed for layer in model.layers),
        "progress": progress,
    }


def _run_cases(rank: int, world_size: int) -> dict[str, dict[str, object]]:
    world = dist.group.WORLD
    seen = {name: _serve(world, world, passes[rank]) for name, passes in _CASES.items()}
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    seen["pairs"] = _serve(world, pairs[rank // 2], (0, 1, 0, 4)[rank])
    alone = [dist.new_group([member]) for member in range(world_size)][rank]
    seen["alone"] = _serve(alone, alone, 2)
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, object]]]:
    """What each rank saw of each case: one job, because starting ranks is what costs time."""
    return run_ranks(_run_cases, _WORLD_SIZE, tmp_path_factory.mktemp("sync"))


@pytest.mark.parametrize("case", _CASES)
def test_every_rank_takes_part_in_the_most_passes_any_has(ranks, case):
    passes = _CASES[case]
    for seen, own in zip([rank[case] for rank in ranks], passes, strict=True):
        assert seen["steps"] == max(passes)
        assert seen["calls"] == {max(passes)}
        assert seen["own_rows"] == {5 * own}
        assert seen["all_rows"] == {5 * sum(passes)}
        assert seen["finished"] == _PROMPTS_PER_PASS * own


@pytest.mark.parametrize("case", [*_CASES, "pairs"])
def test_every_layer_knows_the_tokens_of_each_rank(ranks, case):
    assert [rank[case]["misinformed"] for rank in ranks] == [0] * _WORLD_SIZE


@pytest.mark.parametrize("case", _CASES)
def test_rank_0_hears_how_many_prompts_all_have_finished(ranks, case):
    passes = _CASES[case]
    progress = ranks[0][case]["progress"]
    at_each_step = [
        _PROMPTS_PER_PASS * sum(min(own, step) for own in passes) for step in range(max(passes) + 1)
    ]
    assert progress == at_each_step
    assert [rank[case]["progress"] for rank in ranks[1:]] == [[], [], []]


def test_ranks_of_several_expert_groups_end_together(ranks):
    assert [rank["pairs"]["steps"] for rank in ranks] == [4, 4, 4, 4]
    assert [rank["pairs"]["all_rows"] for rank in ranks] == [{5}, {5}, {20}, {20}]


def test_one_that_is_closed_announces_no_more():
    model, told = _Model(None, 0), []
    model.layers = nn.ModuleList()

    def make(name: str) -> ForwardSync:
        return ForwardSync(
            model,
            model.layers,
            None,
            top_k=_TOP_K,
            dtype=torch.float32,
            device=torch.device("cpu"),
            on_step=lambda step: told.append((name, step)),
        )

    ids_BS = torch.ones(1, 5, dtype=torch.int64)
    first = make("first")
    model(input_ids=ids_BS)
    first.join_others()  # of one batch; more may come
    model(input_ids=ids_BS)
    first.close()
    make("second")
    model(input_ids=ids_BS)
    assert told == [("first", 1), ("first", 2), ("second", 1)]


def test_a_rank_alone_waits_for_nobody(ranks):
    for rank in ranks:
        assert rank["alone"]["steps"] == 2
        assert rank["alone"]["progress"] == [0, 10, 20]
