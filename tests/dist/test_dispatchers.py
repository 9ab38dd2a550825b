"""Every dispatcher on real ranks, against experts with known answers and the slow reference."""

import traceback
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.dist.node_groups import create_node_groups, open_within_nodes
from ds_moe_ep.dist.shared_memory import SharedMemory
from ds_moe_ep.moe.auto import Auto
from ds_moe_ep.moe.cost_model import GroupPrices, LinkPrices, Price
from ds_moe_ep.moe.dispatch import DISPATCHERS, TWO_LEVEL, Links, make_dispatcher, make_links
from ds_moe_ep.moe.experts import NOT_HERE, run_local_experts
from ds_moe_ep.moe.probe import measure_links
from ds_moe_ep.moe.reference import reference_moe
from tests.helpers import run_ranks

HIDDEN, WIDTH, TOP_K = 16, 8, 3
EXPERTS_PER_RANK = (1, 4)
FLAT = [name for name in DISPATCHERS if name not in TWO_LEVEL]
# Four ranks are two nodes of two; two ranks have no second level.
# The tokens of every rank are announced or not; rows go by gloo or by memory that the ranks share.
WAYS = ("announced", "unannounced", "memory")
# "auto: NAME" is auto with prices that make that candidate the cheapest.
AUTO = {2: ["alltoall", "allgather"], 4: ["alltoall", "allgather", *TWO_LEVEL]}
DISPATCHERS_OF_WORLD = {
    world_size: [
        *(FLAT if world_size == 2 else DISPATCHERS),
        "auto",
        *(f"auto: {n}" for n in names),
    ]
    for world_size, names in AUTO.items()
}


class ScaleExperts(nn.Module):
    """Expert i multiplies by i + 1, so an output tells which experts computed it."""

    def __init__(self, first: int, num_experts: int) -> None:
        super().__init__()
        self.first, self.num_experts = first, num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        assert ((top_k_index >= 0) & (top_k_index < self.num_experts)).all()
        return hidden_states * (self.first + top_k_index + 1) * top_k_weights


class IdentityExperts(ScaleExperts):
    """Every expert gives its input back."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states * top_k_weights


def gated_experts(num_experts: int, dtype: torch.dtype) -> OlmoeExperts:
    """All experts of a layer, the same on every rank."""
    config = OlmoeConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=num_experts)
    config._experts_implementation = "eager"
    experts = OlmoeExperts(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in experts.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.15)
    return experts.to(dtype)


def local_part(experts: OlmoeExperts, first: int, num_local: int) -> OlmoeExperts:
    """The experts of one rank, with parameters of their own."""
    config = OlmoeConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=num_local)
    config._experts_implementation = "eager"
    part = OlmoeExperts(config).to(experts.down_proj.dtype)
    with torch.no_grad():
        for name, param in part.named_parameters():
            param.copy_(getattr(experts, name)[first : first + num_local])
    return part


class Ranks:
    """What a case needs on one rank.

    Args:
        rank: This rank.
        links: What connects it with the others.
        dispatcher: Name of the dispatcher under test.
        num_local: Experts on each rank.
        announced: Whether the dispatcher is told the tokens of every rank.
    """

    def __init__(
        self, rank: int, links: Links, dispatcher: str, num_local: int, *, announced: bool
    ) -> None:
        self.rank, self.world_size, self.num_local = rank, links.flat.size, num_local
        self.num_experts = self.world_size * num_local
        self.top_k = min(TOP_K, self.num_experts)
        self.comm, self.announced = links.flat, announced
        self.is_replicated = dispatcher == "allreduce"  # all ranks have the tokens of rank 0
        if dispatcher.startswith("auto"):
            _, _, chosen = dispatcher.partition(": ")
            prices = prices_for(chosen, links) if chosen else measured(links)
            self.dispatcher = Auto(links, prices, num_local)
        else:
            self.dispatcher = make_dispatcher(dispatcher, links, num_local)

    def tokens(
        self, count: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Random rows, distinct experts and weights of this rank."""
        generator = torch.Generator().manual_seed(100 + self.rank * (not self.is_replicated))
        x_TH = torch.randn(count, HIDDEN, generator=generator).to(dtype)
        scores_TE = torch.rand(count, self.num_experts, generator=generator)
        weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
        return x_TH, ids_TK, weights_TK

    def dispatch(
        self, experts: nn.Module, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Calls the dispatcher as the layer does."""
        num_tokens_W = None
        if self.announced:
            counts = self.comm.gather_ints([len(x_TH)], x_TH.device)
            num_tokens_W = [count for (count,) in counts]
        compute = partial(run_local_experts, experts)
        return self.dispatcher(compute, x_TH, ids_TK, weights_TK, num_tokens_W)

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """Sums over the ranks that have tokens of their own."""
        if not self.is_replicated:
            dist.all_reduce(tensor)
        return tensor

    def check(
        self, count: int, *, dtype=torch.float32, ids_TK: Tensor | None = None, **tolerance
    ) -> Tensor:
        """Compares with the reference; returns the rows each local expert got."""
        full = gated_experts(self.num_experts, dtype)
        x_TH, routed_TK, weights_TK = self.tokens(count, dtype)
        has_distinct_ids = ids_TK is None
        ids_TK = routed_TK if ids_TK is None else ids_TK
        local = local_part(full, self.rank * self.num_local, self.num_local)
        with torch.no_grad():
            actual_TH, rows_e = self.dispatch(local, x_TH, ids_TK, weights_TK)
            expected_TH = reference_moe(full, x_TH, ids_TK, weights_TK)
        chosen_E = torch.bincount(ids_TK.flatten(), minlength=self.num_experts)
        chosen_E = self.sum_over_tokens(chosen_E)
        # Assertions come after the last collective of a case, so that one that fails leaves the
        # ranks in step.
        first = self.rank * self.num_local
        if has_distinct_ids:  # else a token's choices of one expert may be one row or several
            assert rows_e.tolist() == chosen_E[first : first + self.num_local].tolist()
        assert actual_TH.dtype == dtype
        torch.testing.assert_close(actual_TH, expected_TH, **tolerance)
        return rows_e


@cache
def measured(links: Links) -> LinkPrices:
    return measure_links(links, torch.device("cpu"))


def prices_for(chosen: str, links: Links) -> LinkPrices:
    """Prices of latency alone: of one kind of collective in one set of groups, next to nothing."""
    kind, _, levels = chosen.partition("-")

    def prices(comm: Communicator | None, is_cheap: bool) -> GroupPrices | None:
        if comm is None:
            return None
        exchange, gather = (
            Price(1e-9 if is_cheap and kind == name else 1.0, 0.0)
            for name in ("alltoall", "allgather")
        )
        return GroupPrices(comm.size, 0.0, exchange, gather, gather)

    flat = prices(links.flat, not levels)
    assert flat is not None
    return LinkPrices(
        flat, across=prices(links.across, bool(levels)), within=prices(links.within, bool(levels))
    )


FP32 = {"rtol": 1e-5, "atol": 1e-6}
# An output is a sum of a few terms of order one, and a gradient of a few more. Each is rounded to
# bf16's 8 bits (2^-8 = 0.4%) a few times on the way: what an expert computes from rows, its weights
# and activations, the rows that come back, the sum. Five such roundings are 2%; 3% is the bound, of
# the value or, where terms cancel out, of one.
BF16 = {"rtol": 3e-2, "atol": 3e-2}


def identity_gives_the_input_back(at: Ranks, dtype=torch.float32, **tolerance) -> None:
    x_TH, ids_TK, _ = at.tokens(7, dtype)
    weights_TK = torch.full(ids_TK.shape, 1 / at.top_k)
    out_TH, _ = at.dispatch(IdentityExperts(0, at.num_local), x_TH, ids_TK, weights_TK)
    torch.testing.assert_close(out_TH.float(), x_TH.float(), **(tolerance or FP32))


def the_right_experts_compute(at: Ranks, dtype=torch.float32, **tolerance) -> None:
    x_TH, ids_TK, weights_TK = at.tokens(7, dtype)
    experts = ScaleExperts(at.rank * at.num_local, at.num_local)
    out_TH, _ = at.dispatch(experts, x_TH, ids_TK, weights_TK)
    scale_T1 = ((ids_TK + 1) * weights_TK).sum(dim=1, keepdim=True)
    torch.testing.assert_close(out_TH.float(), x_TH * scale_T1, **(tolerance or FP32))


def random_routing(at: Ranks, dtype=torch.float32, **tolerance) -> None:
    at.check(13, dtype=dtype, **(tolerance or FP32))


def unequal_counts(at: Ranks, dtype=torch.float32, **tolerance) -> None:
    at.check(1 + 5 * at.rank, dtype=dtype, **(tolerance or FP32))


def a_rank_without_tokens(at: Ranks, dtype=torch.float32, **tolerance) -> None:
    at.check(0 if at.rank == 1 else 6, dtype=dtype, **(tolerance or FP32))


def only_one_rank_has_tokens(at: Ranks, dtype=torch.float32, **tolerance) -> None:
    at.check(9 if at.rank == at.world_size - 1 else 0, dtype=dtype, **(tolerance or FP32))


def no_rank_has_tokens(at: Ranks, dtype=torch.float32, **tolerance) -> None:
    assert at.check(0, dtype=dtype, **(tolerance or FP32)).sum() == 0


def all_tokens_on_one_expert(at: Ranks, dtype=torch.float32, **tolerance) -> None:
    rows_e = at.check(
        8, ids_TK=torch.full((8, at.top_k), at.num_experts - 1), dtype=dtype, **(tolerance or FP32)
    )
    assert not rows_e[:-1].any()
    num_tokens = 8 if at.is_replicated else 8 * at.world_size
    wanted = (num_tokens, num_tokens * at.top_k) if at.rank == at.world_size - 1 else (0,)
    assert int(rows_e[-1]) in wanted


def bf16(case: Callable[..., None]) -> Callable[[Ranks], None]:
    """The same case in bf16."""

    def run(at: Ranks) -> None:
        case(at, dtype=torch.bfloat16, **BF16)

    run.__name__ = f"{case.__name__}_in_bf16"
    return run


def many_tokens(at: Ranks) -> None:
    """Too many for sums in one step, and for the shared memory of the test."""
    x_TH, ids_TK, _ = at.tokens(1100)
    weights_TK = torch.full(ids_TK.shape, 1 / at.top_k)
    out_TH, _ = at.dispatch(IdentityExperts(0, at.num_local), x_TH, ids_TK, weights_TK)
    torch.testing.assert_close(out_TH, x_TH, **FP32)


def rows_that_need_no_expert(at: Ranks) -> None:
    """Padding: its rows come back as zeros, and no expert has computed them."""
    x_TH, ids_TK, weights_TK = at.tokens(13)
    is_live_T = torch.arange(13) % 3 != at.rank * (not at.is_replicated) % 3
    experts = ScaleExperts(at.rank * at.num_local, at.num_local)
    out_TH, rows_e = at.dispatch(
        experts, x_TH, ids_TK.masked_fill(~is_live_T[:, None], NOT_HERE), weights_TK
    )
    chosen_E = torch.bincount(ids_TK[is_live_T].flatten(), minlength=at.num_experts)
    chosen_E = at.sum_over_tokens(chosen_E)
    scale_T1 = ((ids_TK + 1) * weights_TK).sum(dim=1, keepdim=True) * is_live_T[:, None]
    first = at.rank * at.num_local
    assert rows_e.tolist() == chosen_E[first : first + at.num_local].tolist()
    torch.testing.assert_close(out_TH, x_TH * scale_T1, **FP32)


def rows_are_counted_first(at: Ranks, dtype=torch.float32, **tolerance) -> None:
    """What alltoall does with batches that are too large to be sent to all ranks."""
    dispatcher = getattr(at.dispatcher, "candidates", {}).get("alltoall", at.dispatcher)
    for each in (dispatcher, getattr(dispatcher, "across", None)):
        if hasattr(each, "send_to_all_bytes"):
            each.send_to_all_bytes = 0
    at.dispatcher = dispatcher
    at.check(13, dtype=dtype, **(tolerance or FP32))


def backward(at: Ranks, dtype=torch.float32, **tolerance) -> None:
    tolerance = tolerance or FP32
    full = gated_experts(at.num_experts, dtype)
    local = local_part(full, at.rank * at.num_local, at.num_local)
    # A rank without tokens takes part in backward too.
    count = 0 if at.rank == 0 and not at.is_replicated else 5
    x_TH, ids_TK, weights_TK = at.tokens(count, dtype)
    out_grad_TH = torch.linspace(-1, 1, count * HIDDEN).view(count, HIDDEN).to(dtype)

    def gradients(run: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x, weights = x_TH.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        out_TH = run(x, weights)
        if out_TH.requires_grad:  # not the reference's without a token
            out_TH.backward(out_grad_TH)
        return tuple(torch.zeros_like(v) if v.grad is None else v.grad for v in (x, weights))

    actual = gradients(lambda x, weights: at.dispatch(local, x, ids_TK, weights)[0])
    expected = gradients(lambda x, weights: reference_moe(full, x, ids_TK, weights))
    totals = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in full.named_parameters()
    }
    for total in totals.values():
        at.sum_over_tokens(total)  # the reference's experts saw this rank's tokens only
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)
    for name, total in totals.items():
        mine = total[at.rank * at.num_local : (at.rank + 1) * at.num_local]
        found = getattr(local, name).grad
        torch.testing.assert_close(
            torch.zeros_like(mine) if found is None else found, mine, **tolerance
        )


_UNEQUAL = (unequal_counts, a_rank_without_tokens, only_one_rank_has_tokens)
_IN_BOTH_TYPES = (
    identity_gives_the_input_back,
    the_right_experts_compute,
    random_routing,
    no_rank_has_tokens,
    all_tokens_on_one_expert,
    rows_are_counted_first,
    backward,
    *_UNEQUAL,
)
CASES = {
    case.__name__: case
    for case in (
        *_IN_BOTH_TYPES,
        *map(bf16, _IN_BOTH_TYPES),
        many_tokens,
        rows_that_need_no_expert,
    )
}
# Not for a replicated batch.
UNEQUAL = {case.__name__ for each in _UNEQUAL for case in (each, bf16(each))}


def cases_of(dispatcher: str) -> list[str]:
    return [name for name in CASES if dispatcher != "allreduce" or name not in UNEQUAL]


def _check_choice(at: Ranks, dispatcher: str, *, is_announced: bool) -> None:
    """Forced prices choose what they are meant to, where tokens are known to all."""
    _, _, chosen = dispatcher.partition(": ")
    if chosen and isinstance(at.dispatcher, Auto):
        assert set(at.dispatcher.calls) == {chosen if is_announced else "alltoall"}


def run_all_cases(rank: int, world_size: int) -> dict[tuple[Any, ...], str]:
    """Runs every case of every dispatcher; returns the tracebacks of those that failed."""
    failed = {}
    nodes = [each // 2 for each in range(world_size)]
    node_groups = create_node_groups(world_size, nodes)
    links = make_links(dist.group.WORLD, node_groups)
    shared = SharedMemory.open(dist.group.WORLD, total_bytes=2**18, timeout_s=60)
    within = open_within_nodes(dist.group.WORLD, node_groups, nodes, timeout_s=60)
    assert shared is not None and within is not None
    links_by_memory = Links(
        Communicator(dist.group.WORLD, shared=shared),
        links.across,
        links.within and Communicator(node_groups.within, shared=within),
    )
    for dispatcher in DISPATCHERS_OF_WORLD[world_size]:
        for num_local in EXPERTS_PER_RANK:
            for way in WAYS:
                for name in cases_of(dispatcher):
                    at = Ranks(
                        rank,
                        links_by_memory if way == "memory" else links,
                        dispatcher,
                        num_local,
                        announced=way != "unannounced",
                    )
                    try:
                        CASES[name](at)
                        _check_choice(at, dispatcher, is_announced=way != "unannounced")
                    except AssertionError:
                        failed[dispatcher, num_local, way, name] = traceback.format_exc()
    return failed


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> Callable[[int], list[dict[tuple[Any, ...], str]]]:
    """What failed on each rank: one job for all cases, as starting ranks is what costs time."""

    @cache
    def of_world(world_size: int) -> list[dict[tuple[Any, ...], str]]:
        return run_ranks(run_all_cases, world_size, tmp_path_factory.mktemp("dispatchers"))

    return of_world


@pytest.mark.parametrize(
    ("world_size", "dispatcher", "case"),
    [
        (world_size, dispatcher, case)
        for world_size, dispatchers in DISPATCHERS_OF_WORLD.items()
        for dispatcher in dispatchers
        for case in cases_of(dispatcher)
    ],
)
@pytest.mark.parametrize("num_local", EXPERTS_PER_RANK)
@pytest.mark.parametrize("way", WAYS)
def test_dispatcher(
    failures, world_size: int, dispatcher: str, num_local: int, way: str, case: str
) -> None:
    for rank, failed in enumerate(failures(world_size)):
        key = (dispatcher, num_local, way, case)
        assert key not in failed, f"rank {rank}: {failed[key]}"


def check_bytes_between_nodes(rank: int, world_size: int) -> None:
    """Counts what two nodes of two ranks send each other for several experts of one node."""
    node_groups = create_node_groups(world_size, [each // 2 for each in range(world_size)])
    assert node_groups is not None
    links = Links(
        Communicator(dist.group.WORLD),
        Communicator(node_groups.across),
        Communicator(node_groups.within),
    )
    num_local, num_tokens = 4, 6
    # Experts 0 to 7 are on node 0. The first four tokens want both ranks of the other node, and two
    # experts of one of them; the last two tokens stay.
    elsewhere, here = (8, 0) if rank < 2 else (0, 8)
    ids_TK = torch.tensor([[0, 1, 4]] * num_tokens) + elsewhere
    ids_TK[4:] += here - elsewhere
    x_TH = torch.ones(num_tokens, HIDDEN)
    weights_TK = torch.full(ids_TK.shape, 1 / 3)
    experts = partial(run_local_experts, IdentityExperts(0, num_local))
    out_TH, _ = make_dispatcher("alltoall-2level", links, num_local)(
        experts, x_TH, ids_TK, weights_TK
    )
    assert links.across is not None
    exchanged = links.across.stats.by_kind["exchange"]
    torch.testing.assert_close(out_TH, x_TH, **FP32)
    # A row goes with three ids and three weights, each 12 bytes that take 16; its output returns.
    row_bytes = HIDDEN * 4
    assert exchanged.durations.count == 2
    assert exchanged.sent_bytes == 4 * (row_bytes + 16 + 16) + 4 * row_bytes


def test_a_row_crosses_between_nodes_once_for_all_experts_there(tmp_path):
    run_ranks(check_bytes_between_nodes, 4, tmp_path)
