"""Every dispatcher on real ranks, forward and backward, against one process that has all tokens.

That process computes the layer, and its gradients, in float64 with the slow reference, or with
experts whose answer has a closed form. All cases run for every dispatcher, in fp32 and bf16.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from ds_moe_ep.errors import DistributedError
from ds_moe_ep.moe.auto import Auto
from ds_moe_ep.moe.cost_model import GroupPrices, LinkPrices, Price
from ds_moe_ep.moe.dispatch import (
    DISPATCHERS,
    TWO_LEVEL,
    Dispatcher,
    Links,
    make_dispatcher,
    make_links,
)
from ds_moe_ep.moe.experts import NOT_HERE, run_local_experts
from ds_moe_ep.moe.probe import measure_links
from ds_moe_ep.moe.reference import reference_moe
from tests.helpers import run_ranks

# Shapes: T tokens of a rank, R tokens of all ranks, H hidden, K top_k, E experts, e local experts,
# W ranks

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

    def __init__(self, which: range) -> None:
        super().__init__()
        self.first, self.num_experts = which.start, len(which)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        assert ((top_k_index >= 0) & (top_k_index < self.num_experts)).all()
        return hidden_states * (self.first + top_k_index + 1) * top_k_weights


class IdentityExperts(ScaleExperts):
    """Every expert gives its input back."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states * top_k_weights


def gated_experts(which: range) -> OlmoeExperts:
    """Real experts; the parameters of one follow from its number alone, whoever else is there."""
    config = OlmoeConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=len(which))
    config._experts_implementation = "eager"
    experts = OlmoeExperts(config)
    with torch.no_grad():
        for place, expert in enumerate(which):
            generator = torch.Generator().manual_seed(expert)
            for param in experts.parameters():
                param[place] = torch.randn(param.shape[1:], generator=generator) * 0.15
    return experts


def scaled(_: nn.Module, x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """What `ScaleExperts` come to; ``NOT_HERE``, which is -1, scales by zero."""
    return x_RH * ((ids_RK + 1) * weights_RK).sum(dim=1, keepdim=True)


def given_back(_: nn.Module, x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """What `IdentityExperts` come to: the input, where weights are 1/K."""
    return x_RH * weights_RK.sum(dim=1, keepdim=True)


def at_random(scores_RE: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct experts, and their weights."""
    weights_RK, ids_RK = scores_RE.topk(min(TOP_K, scores_RE.shape[1]), dim=1)
    return ids_RK, weights_RK


def with_equal_weights(scores_RE: Tensor) -> tuple[Tensor, Tensor]:
    ids_RK, weights_RK = at_random(scores_RE)
    return ids_RK, torch.full_like(weights_RK, 1 / weights_RK.shape[1])


def to_the_last_expert(scores_RE: Tensor) -> tuple[Tensor, Tensor]:
    ids_RK, weights_RK = at_random(scores_RE)
    return torch.full_like(ids_RK, scores_RE.shape[1] - 1), weights_RK


def with_padding(scores_RE: Tensor) -> tuple[Tensor, Tensor]:
    """Every third token needs no expert: its row comes back as zeros."""
    ids_RK, weights_RK = at_random(scores_RE)
    ids_RK[::3] = NOT_HERE
    return ids_RK, weights_RK


@dataclass(frozen=True)
class Case:
    """Tokens of every rank, how they are routed, and what should become of them.

    Attributes:
        num_tokens: Tokens of a rank, from the rank and the number of ranks.
        route: Expert ids and weights ``[R, K]`` from scores ``[R, E]``.
        make_experts: The experts of a range.
        expected: The output ``[R, H]``, from all experts, tokens, expert ids and weights.
        dtype: Of tokens and experts.
        is_counted: Whether alltoall tells first how many rows will come, as with batches that are
            too large to be sent to all ranks.
    """

    num_tokens: Callable[[int, int], int]
    route: Callable[[Tensor], tuple[Tensor, Tensor]] = at_random
    make_experts: Callable[[range], nn.Module] = gated_experts
    expected: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] = reference_moe
    dtype: torch.dtype = torch.float32
    is_counted: bool = False

    def num_tokens_of_ranks(self, world_size: int) -> list[int]:
        return [self.num_tokens(rank, world_size) for rank in range(world_size)]


def equal(count: int) -> Callable[[int, int], int]:
    """As many tokens on every rank."""
    return lambda rank, world_size: count


_IN_FP32 = {
    "identity_gives_the_input_back": Case(
        equal(7), with_equal_weights, IdentityExperts, given_back
    ),
    "the_right_experts_compute": Case(equal(7), at_random, ScaleExperts, scaled),
    "random_routing": Case(equal(13)),
    "unequal_counts": Case(lambda rank, world_size: 1 + 5 * rank),
    "a_rank_without_tokens": Case(lambda rank, world_size: 0 if rank == 1 else 6),
    "only_one_rank_has_tokens": Case(lambda rank, world_size: 9 if rank == world_size - 1 else 0),
    "no_rank_has_tokens": Case(equal(0)),
    "all_tokens_on_one_expert": Case(equal(8), to_the_last_expert),
    "rows_that_need_no_expert": Case(equal(13), with_padding, ScaleExperts, scaled),
    # Too many for sums in one step, and for the shared memory of the test.
    "many_tokens": Case(equal(1100), with_equal_weights, IdentityExperts, given_back),
    "rows_are_counted_first": Case(equal(13), is_counted=True),
}
CASES = _IN_FP32 | {
    f"{name}_in_bf16": replace(case, dtype=torch.bfloat16) for name, case in _IN_FP32.items()
}


def cases_of(dispatcher: str) -> list[str]:
    """All that there can be: a replicated batch is as long on all ranks, and only alltoall counts.

    Auto's alltoall always counts, so ``auto: alltoall`` has that in every case.
    """
    return [
        name
        for name, case in CASES.items()
        if (dispatcher != "allreduce" or len(set(case.num_tokens_of_ranks(4))) == 1)
        and (dispatcher.startswith("alltoall") or not case.is_counted)
    ]


@dataclass(frozen=True)
class Solution:
    """A batch of all ranks, rank after rank, and what one process in float64 makes of it.

    Attributes:
        x: Tokens ``[R, H]``.
        ids: Expert ids ``[R, K]``.
        weights: Routing weights ``[R, K]``.
        out_grad: The gradient of the output, given.
        out: The output ``[R, H]``.
        grads: Gradients of x, of weights, and of each parameter of all experts.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor
    out_grad: Tensor
    out: Tensor
    grads: list[Tensor]


@cache
def solve(case: Case, num_tokens: int, num_experts: int) -> Solution:
    """Makes the tokens of a case and computes them without a dispatcher, once for all of them."""
    generator = torch.Generator().manual_seed(100)
    x_RH = torch.randn(num_tokens, HIDDEN, generator=generator).to(case.dtype)
    out_grad_RH = torch.randn(num_tokens, HIDDEN, generator=generator).to(case.dtype)
    ids_RK, weights_RK = case.route(torch.rand(num_tokens, num_experts, generator=generator))
    x, weights = x_RH.double().requires_grad_(), weights_RK.double().requires_grad_()
    experts = case.make_experts(range(num_experts)).to(case.dtype).double()
    out_RH = case.expected(experts, x, ids_RK, weights)
    out_RH = out_RH + 0 * x  # without a token, nothing else requires a gradient
    grads = gradients(out_RH, out_grad_RH.double(), x, weights, experts)
    return Solution(x_RH, ids_RK, weights_RK, out_grad_RH, out_RH.detach(), grads)


def gradients(
    out: Tensor, out_grad: Tensor, x: Tensor, weights: Tensor, experts: nn.Module
) -> list[Tensor]:
    """Of x, of weights and of each parameter; zeros where nothing depends on one."""
    inputs = [x, weights, *experts.parameters()]
    return list(torch.autograd.grad(out, inputs, out_grad, materialize_grads=True))


def check(
    case: Case, rank: int, links: Links, name: str, num_local: int, *, is_announced: bool
) -> None:
    """Compares what a dispatcher makes of a case on this rank, backward too, with its solution."""
    num_tokens_W = case.num_tokens_of_ranks(links.flat.size)
    # With allreduce, all ranks have the tokens of rank 0.
    batches, place = (num_tokens_W[:1], 0) if name == "allreduce" else (num_tokens_W, rank)
    mine = slice(sum(batches[:place]), sum(batches[: place + 1]))
    here = slice(rank * num_local, (rank + 1) * num_local)
    all_experts = range(links.flat.size * num_local)
    solution = solve(case, sum(batches), len(all_experts))

    experts = case.make_experts(all_experts[here]).to(case.dtype)
    x_TH = solution.x[mine].clone().requires_grad_()
    weights_TK = solution.weights[mine].clone().requires_grad_()
    dispatcher = make(name, links, num_local, is_counted=case.is_counted)
    dispatch = partial(
        dispatcher,
        partial(run_local_experts, experts),
        x_TH,
        solution.ids[mine],
        weights_TK,
        num_tokens_W if is_announced else None,
    )
    with torch.no_grad():
        inferred = dispatch()
    trained = dispatch()
    grads = gradients(trained[0], solution.out_grad[mine], x_TH, weights_TK, experts)

    # Assertions come after the last collective of a case, so that one that fails leaves the ranks
    # in step.
    check_choice(dispatcher, name, is_announced=is_announced)
    for out_TH, rows_e in (inferred, trained):
        assert out_TH.dtype == case.dtype
        assert_close("output", out_TH, solution.out[mine], case.dtype)
        check_rows(rows_e, solution.ids, here)
    names = ["x", "weights", *dict(experts.named_parameters())]
    parts = [mine, mine] + [here] * (len(names) - 2)
    for what, found, wanted, part in zip(names, grads, solution.grads, parts, strict=True):
        assert_close(f"gradient of {what}", found, wanted[part], case.dtype)


def assert_close(what: str, found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Compares with a float64 tensor; the tolerance is for the roundings of what is tested.

    A value is a sum of terms, each rounded to bf16's 8 bits (2^-8 = 0.4%) a few times on the way:
    what an expert computes from rows, its weights and activations, the rows that come back, the
    sum. Five such roundings are 2%; 3% is the bound, of the value or, where terms cancel out, of
    the largest in the tensor.
    """
    rtol, atol = 1e-5, 1e-6
    if dtype == torch.bfloat16:
        rtol, atol = 3e-2, 3e-2 * max(wanted.abs().flatten().tolist(), default=0.0)
    torch.testing.assert_close(
        found.double(), wanted, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
    )


def check_rows(rows_e: Tensor, ids_RK: Tensor, here: slice) -> None:
    """A token's choices of one expert may be one row or several; else rows are conserved."""
    chosen_RKE = ids_RK[:, :, None] == torch.arange(here.stop)
    tokens_E, slots_E = chosen_RKE.any(dim=1).sum(dim=0), chosen_RKE.sum(dim=(0, 1))
    for rows, *allowed in zip(
        rows_e.tolist(), tokens_E[here].tolist(), slots_E[here].tolist(), strict=True
    ):
        assert rows in allowed


def check_choice(dispatcher: Dispatcher, name: str, *, is_announced: bool) -> None:
    """Forced prices choose what they are meant to, where tokens are known to all."""
    _, _, chosen = name.partition(": ")
    if isinstance(dispatcher, Auto) and chosen:
        assert set(dispatcher.calls) == {chosen if is_announced else "alltoall"}


def make(name: str, links: Links, num_local: int, *, is_counted: bool) -> Dispatcher:
    """Returns the dispatcher under test."""
    if name.startswith("auto"):
        _, _, chosen = name.partition(": ")
        prices = prices_for(chosen, links) if chosen else measured(links)
        return Auto(links, prices, num_local)
    dispatcher = make_dispatcher(name, links, num_local)
    if is_counted:
        getattr(dispatcher, "across", dispatcher).send_to_all_bytes = 0
    return dispatcher


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
                at_links = links_by_memory if way == "memory" else links
                is_announced = way != "unannounced"
                for name in cases_of(dispatcher):
                    try:
                        check(
                            CASES[name],
                            rank,
                            at_links,
                            dispatcher,
                            num_local,
                            is_announced=is_announced,
                        )
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
    experts = partial(run_local_experts, IdentityExperts(range(num_local)))
    out_TH, _ = make_dispatcher("alltoall-2level", links, num_local)(
        experts, x_TH, ids_TK, weights_TK
    )
    assert links.across is not None
    exchanged = links.across.stats.by_kind["exchange"]
    torch.testing.assert_close(out_TH, x_TH)
    # A row goes with three ids and three weights, each 12 bytes that take 16; its output returns.
    row_bytes = HIDDEN * 4
    assert exchanged.durations.count == 2
    assert exchanged.sent_bytes == 4 * (row_bytes + 16 + 16) + 4 * row_bytes


def test_a_row_crosses_between_nodes_once_for_all_experts_there(tmp_path):
    run_ranks(check_bytes_between_nodes, 4, tmp_path)


def check_unequal_batches_are_refused(rank: int, world_size: int) -> None:
    links = make_links(dist.group.WORLD)
    num_tokens_W = [3 + each for each in range(world_size)]
    x_TH = torch.ones(num_tokens_W[rank], HIDDEN)
    ids_T1 = torch.zeros(len(x_TH), 1, dtype=torch.int64)
    compute = partial(run_local_experts, IdentityExperts(range(1)))
    with pytest.raises(DistributedError, match=r"same tokens on every rank.*\[3, 4\].*alltoall"):
        make_dispatcher("allreduce", links, 1)(
            compute, x_TH, ids_T1, torch.ones(len(x_TH), 1), num_tokens_W
        )


def test_allreduce_refuses_batches_that_differ_on_every_rank(tmp_path):
    run_ranks(check_unequal_batches_are_refused, 2, tmp_path)
