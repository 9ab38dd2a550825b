"""A shared expert on real ranks: it runs between sending rows and waiting for those of others."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.adapter import adapt, moe_layers
from ds_moe_ep.dist.meeting import Meeting
from ds_moe_ep.dist.node_groups import NodeGroups, create_node_groups, open_within_nodes
from ds_moe_ep.dist.shared_memory import SharedMemory
from ds_moe_ep.moe.cost_model import GroupPrices, LinkPrices, Price
from ds_moe_ep.moe.dispatch import TWO_LEVEL
from ds_moe_ep.plan import ParallelPlan
from tests.helpers import run_ranks
from tests.helpers.families import build_tiny

FLAT = ("alltoall", "allgather", "allreduce", "deepspeed", "auto")
FP32 = {"rtol": 1e-5, "atol": 1e-6}


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Lists when rows are sent without waiting, and when others' are waited for."""
    log: list[str] = []
    exchange, come, wait = dist.all_to_all_single, Meeting.come, Meeting.wait

    class Work:
        def __init__(self, work: dist.Work) -> None:
            self.work = work

        def wait(self) -> None:
            log.append("wait")
            self.work.wait()

    def record_exchange(*args, async_op=False, **kwargs):
        work = exchange(*args, async_op=async_op, **kwargs)
        if not async_op:
            return work
        log.append("send")
        return Work(work)

    def record_come(meeting):
        log.append("send")
        come(meeting)

    def record_wait(meeting):
        log.append("wait")
        wait(meeting)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(dist, "all_to_all_single", record_exchange))
        patches.enter_context(mock.patch.object(Meeting, "come", record_come))
        patches.enter_context(mock.patch.object(Meeting, "wait", record_wait))
        yield log


def _moe_block(model: nn.Module) -> nn.Module:
    return model.model.layers[-1].mlp


def _gradients(block: nn.Module, x_1TH: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns the outputs and the gradients of the tokens and of the shared expert."""
    x_1TH = x_1TH.clone().requires_grad_()
    out_1TH = block(x_1TH)
    params = list(block.shared_experts.parameters())
    grads = torch.autograd.grad(out_1TH.sin().sum(), [x_1TH, *params])
    return out_1TH.detach(), list(grads)


@dataclass(frozen=True)
class _Setup:
    """How rows of a dispatcher travel.

    Attributes:
        dispatcher: Its name.
        shared: Memory of all ranks, or of those of a node.
        node_groups: Both levels, where there are some.
        prices: What decides for ``auto``, and
        chosen: what it then chooses.
    """

    dispatcher: str
    shared: SharedMemory | None = None
    node_groups: NodeGroups | None = None
    prices: LinkPrices | None = None
    chosen: str = ""


def _prices(size: int, *, is_gathering_cheap: bool) -> GroupPrices:
    cheap, dear = Price(0.0, 0.0), Price(1.0, 0.0)
    gather = cheap if is_gathering_cheap else dear
    return GroupPrices(size, 0.0, dear if is_gathering_cheap else cheap, gather, gather)


def _check(rank: int, world_size: int, setup: _Setup) -> None:
    dispatcher = setup.dispatcher
    model, reference = build_tiny("deepseek_v3"), _moe_block(build_tiny("deepseek_v3"))
    hidden_size = model.config.hidden_size
    adapt(model, ParallelPlan(world_size), ep_rank=rank, dispatcher=dispatcher)
    block = _moe_block(model)
    experts = moe_layers(model)[-1].deepspeed_moe
    experts.shared, experts.node_groups, experts.prices = (
        setup.shared,
        setup.node_groups,
        setup.prices,
    )
    experts._set_ep_group(dist.group.WORLD)
    # All ranks bring tokens, then all but the last do.
    for idle in (-1, world_size - 1):
        count = 6 if dispatcher == "allreduce" else 0 if rank == idle else 3 + rank
        seed = 7 if dispatcher == "allreduce" else rank
        generator = torch.Generator().manual_seed(seed)
        x_1TH = torch.randn(1, count, hidden_size, generator=generator)
        expected_1TH, expected_grads = _gradients(reference, x_1TH)
        if dispatcher == "auto":
            experts.announce([0 if each == idle else 3 + each for each in range(world_size)])
        first_1TH, _ = _gradients(block, x_1TH)
        with recorded() as log, torch.no_grad():
            log_work = block.shared_experts.gate_proj.register_forward_hook(
                lambda *_, log=log: log.append("work")
            )
            overlapped_1TH = block(x_1TH)
            log_work.remove()
        actual_1TH, actual_grads = _gradients(block, x_1TH)
        assert torch.equal(overlapped_1TH, first_1TH)
        torch.testing.assert_close(overlapped_1TH, expected_1TH, **FP32)
        torch.testing.assert_close(actual_1TH, expected_1TH, **FP32)
        for actual, expected in zip(actual_grads, expected_grads, strict=True):
            torch.testing.assert_close(actual, expected, **FP32)
        at = log.index("work")
        assert log.count("work") == 1
        assert log[at - 1] == "send", log
        assert log[at + 1] == "wait", log
    if setup.chosen:
        assert set(experts.dispatcher.calls) == {setup.chosen}


def _check_all(rank: int, world_size: int) -> None:
    shared = SharedMemory.open(dist.group.WORLD, total_bytes=2**20, timeout_s=60)
    assert shared is not None
    setups = [_Setup(name, each) for name in FLAT for each in (None, shared)]
    # auto without prices is alltoall; with them, what they make cheapest.
    for chosen in ("alltoall", "allgather"):
        prices = LinkPrices(_prices(world_size, is_gathering_cheap=chosen == "allgather"))
        setups.append(_Setup("auto", shared, prices=prices, chosen=chosen))
    nodes = [each // 2 for each in range(world_size)]
    node_groups = create_node_groups(world_size, nodes)
    if node_groups is not None:
        within = open_within_nodes(dist.group.WORLD, node_groups, nodes, timeout_s=60)
        setups += [_Setup(name, each, node_groups) for name in TWO_LEVEL for each in (None, within)]
    for setup in setups:
        _check(rank, world_size, setup)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_shared_expert_runs_while_rows_travel(tmp_path, world_size):
    run_ranks(_check_all, world_size, tmp_path)
