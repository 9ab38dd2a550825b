"""When a shared expert is computed early, and that its answer is always that of its input."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.adapter import adapt, moe_layers
from ds_moe_ep.moe.shared_expert import EarlySharedExpert
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import build_tiny

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class SharedExpert(nn.Module):
    """Tells when it computes."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.log = log

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.log.append("shared")
        return self.proj(x) * scale


class Block(nn.Module):
    """Calls its shared expert as `call` does; rows travel between "sent" and "received"."""

    def __init__(self, call: Callable[["Block", Tensor], Tensor]) -> None:
        super().__init__()
        self.log: list[str] = []
        self.shared_experts = SharedExpert(self.log)
        self.call = call
        self.early: EarlySharedExpert | None = None

    def experts(self, x: Tensor) -> Tensor:
        meanwhile = self.early and self.early.while_rows_travel(x)
        self.log.append("sent")
        if meanwhile:
            meanwhile()
        self.log.append("received")
        return x.tanh()

    def forward(self, x: Tensor) -> Tensor:
        self.log.append("block")
        return self.call(self, x)


def after(block: Block, x: Tensor) -> Tensor:
    return block.experts(x.view(-1, 4)).view(x.shape) + block.shared_experts(x)


def after_with_the_rows_of_the_experts(block: Block, x: Tensor) -> Tensor:
    rows = x.view(-1, 4)
    return (block.experts(rows) + block.shared_experts(rows)).view(x.shape)


def before(block: Block, x: Tensor) -> Tensor:
    shared = block.shared_experts(x)
    return block.experts(x.view(-1, 4)).view(x.shape) + shared


def with_another_tensor(block: Block, x: Tensor) -> Tensor:
    return block.experts(x.view(-1, 4)).view(x.shape) + block.shared_experts(x * 2)


def with_a_keyword(block: Block, x: Tensor) -> Tensor:
    return block.experts(x.view(-1, 4)).view(x.shape) + block.shared_experts(x, scale=3.0)


def written_into(block: Block, x: Tensor) -> Tensor:
    routed = block.experts(x.view(-1, 4)).view(x.shape)
    return routed + block.shared_experts(x.add_(1.0))


def never(block: Block, x: Tensor) -> Tensor:
    return block.experts(x.view(-1, 4)).view(x.shape)


def with_early(plain: Block) -> Block:
    block = copy.deepcopy(plain)
    block.early = EarlySharedExpert(block, block.shared_experts)
    return block


def log_of(block: Block, x: Tensor = X) -> list[str]:
    block.log.clear()
    block(x.clone())
    return block.log


EARLY = ["block", "sent", "shared", "received"]
LATE = ["block", "sent", "received", "shared"]


@pytest.mark.parametrize("call", [after, after_with_the_rows_of_the_experts])
def test_after_a_pass_that_is_watched_it_runs_while_rows_travel(call):
    block = with_early(Block(call))
    assert log_of(block) == LATE
    assert log_of(block) == EARLY
    assert log_of(block, X[:1]) == EARLY


@pytest.mark.parametrize(
    ("call", "log"),
    [
        (before, ["block", "shared", "sent", "received"]),
        (with_another_tensor, LATE),
        (with_a_keyword, LATE),
        (written_into, LATE),
        (never, ["block", "sent", "received"]),
    ],
)
def test_it_is_never_computed_in_vain(call, log):
    block = with_early(Block(call))
    for _ in range(3):
        assert log_of(block) == log


@pytest.mark.parametrize(
    "calls", [(after, other, after, after) for other in (before, with_another_tensor, written_into)]
)
def test_a_block_that_changes_its_ways_gets_what_it_asks_for(calls):
    plain = Block(after)
    block = with_early(plain)
    for call in (after, *calls):
        block.call = plain.call = call
        assert torch.equal(block(X.clone()), plain(X.clone()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("x", [X, X[:, :0]], ids=["tokens", "no_tokens"])
def test_the_output_is_the_same(mode, x):
    plain = Block(after)
    block = with_early(plain)
    with mode():
        for _ in range(2):
            assert torch.equal(block(x), plain(x))


def test_gradients_are_the_same():
    plain = Block(after)
    block = with_early(plain)
    block(X)
    grads = []
    for each in (plain, block):
        x = X.clone().requires_grad_()
        each(x).square().sum().backward()
        grads.append([x.grad, *(param.grad for param in each.parameters())])
    for actual, expected in zip(*grads, strict=True):
        assert torch.equal(actual, expected)


def test_hooks_of_the_shared_expert_see_its_call_when_it_is_made():
    block = with_early(Block(after))
    block(X)
    seen = []
    handle = block.shared_experts.register_forward_hook(lambda *_: seen.append(len(block.log)))
    assert log_of(block) == LATE
    assert seen == [4]
    handle.remove()
    assert log_of(block) == EARLY


def test_nothing_is_held_between_passes():
    block = with_early(Block(never))
    block(X)
    assert block.early._inputs == []
    assert block.early._early is None


def test_a_copy_of_a_block_has_a_shared_expert_of_its_own():
    block = with_early(Block(after))
    block(X)
    other = copy.deepcopy(block)
    with torch.no_grad():
        other.shared_experts.proj.bias += 1.0
    torch.testing.assert_close(other(X), block(X) + 1.0)
    assert log_of(other) == EARLY


@pytest.mark.parametrize(
    ("family", "is_early"),
    [("deepseek_v3", True), ("glm4_moe", True), ("flint", True), ("qwen2_moe", False)],
)
def test_families(family, is_early):
    model, reference = build_tiny(family), build_tiny(family)
    names = [name for name in model.state_dict() if "shared_expert" in name]
    adapt(model, ParallelPlan(1), ep_rank=0)
    assert names
    assert [name for name in model.state_dict() if "shared_expert" in name] == names
    layers = [layer.deepspeed_moe for layer in moe_layers(model)]
    for layer in layers:
        layer._set_ep_group(None)
    prompt = torch.tensor([[5, 9, 33, 4], [7, 3, 12, 8]])
    with torch.no_grad():
        passes = [model(prompt).logits for _ in range(2)]
        torch.testing.assert_close(passes[0], reference(prompt).logits)
    assert torch.equal(*passes)
    assert {layer.shared_expert._which is not None for layer in layers} == {is_early}
