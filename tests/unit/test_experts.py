"""The local experts' arithmetic in every layout that transformers declares, against the reference.

No process group: which rows reach a rank is the dispatchers' business (tests/dist).
"""

from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ds_moe_ep.adapter import shard_experts
from ds_moe_ep.moe import expert_gemm as gemm
from ds_moe_ep.moe import experts as local_experts
from ds_moe_ep.moe.expert_gemm import follows_contract, lay_out_for_cpu
from ds_moe_ep.moe.experts import NOT_HERE, expert_parameters, run_local_experts, run_static
from ds_moe_ep.moe.reference import reference_moe
from tests.helpers.families import build_tiny

# A family for each way of storing and computing experts.
LAYOUTS = {
    "olmoe": "plain",
    "aria_text": "transposed",
    "gpt_oss": "transposed, interleaved, biases, gate of its own",
    "deepseek_v4": "gate of its own",
    "nemotron_h": "no gate",
    "muse_spark": "a norm behind",
    "step3p7": "does not follow the contract",
}


def run_captured(*args: Any) -> tuple[Tensor, Tensor]:
    """As in a CUDA graph, on a GPU whose grouped product syncs."""
    with mock.patch.object(local_experts, "_must_not_group", lambda *args: True):
        return run_static(*args)


WAYS = {"chosen": run_local_experts, "static": run_static, "captured": run_captured}
WITHOUT_CONTRACT = "step3p7"
FP32 = {"rtol": 1e-5, "atol": 1e-5}  # gradients are sums of terms of up to ten


def build_experts(family: str, ep_size: int = 1) -> nn.Module:
    """The first MoE layer's experts of a tiny model, cut to those of rank 0."""
    model = build_tiny(family)
    return model.get_submodule(shard_experts(model, ep_size, 0)[0].name)


def hidden_size(experts: nn.Module) -> int:
    return experts.down_proj.shape[-1 if getattr(experts, "is_transposed", False) else -2]


def routed(experts: nn.Module, num_rows: int, share_here: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, local expert ids (some elsewhere, some twice in a row) and weights."""
    generator = torch.Generator().manual_seed(num_rows)
    x_RH = torch.randn(num_rows, hidden_size(experts), generator=generator)
    ids_RK = torch.randint(0, experts.num_experts, (num_rows, 3), generator=generator)
    elsewhere_RK = torch.rand(num_rows, 3, generator=generator) > share_here
    weights_RK = torch.rand(num_rows, 3, generator=generator)
    return x_RH, ids_RK.masked_fill(elsewhere_RK, NOT_HERE).int(), weights_RK


def expected(experts: nn.Module, x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """The reference with weight 0 for what is elsewhere."""
    weights_RK = weights_RK * (ids_RK != NOT_HERE)
    return reference_moe(experts, x_RH, ids_RK.clamp(min=0).long(), weights_RK)


def ways_of(families: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of a family and a way; all but one are for those that follow the contract."""
    return [
        (family, way)
        for family in families
        for way in WAYS
        if family != WITHOUT_CONTRACT or way == "chosen"
    ]


@pytest.mark.parametrize("ep_size", [1, 8], ids=["all", "one"])
@pytest.mark.parametrize(("family", "way"), ways_of(LAYOUTS))
def test_outputs_and_gradients_equal_the_reference(family: str, ep_size: int, way: str) -> None:
    experts = build_experts(family, ep_size)
    seen = []
    for run in (WAYS[way], None):
        x_RH, ids_RK, weights_RK = routed(experts, 11, share_here=0.6)
        x_RH.requires_grad_()
        weights_RK.requires_grad_()
        experts.zero_grad()
        if run is None:
            y_RH = expected(experts, x_RH, ids_RK, weights_RK)
        else:
            y_RH, rows_e = run(experts, x_RH, ids_RK, weights_RK)
            assert rows_e.dtype == torch.int64
            assert rows_e.tolist() == [int((ids_RK == i).sum()) for i in range(len(rows_e))]
        y_RH.backward(torch.linspace(-1, 1, y_RH.numel()).view_as(y_RH))
        slices = expert_parameters(experts).values()
        seen.append([y_RH, x_RH.grad, weights_RK.grad, *(param.grad.clone() for param in slices)])
    for found, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(found, wanted, **FP32)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("family", [family for family in LAYOUTS if family != WITHOUT_CONTRACT])
def test_what_the_kernel_leaves_in_rows_of_other_ranks_reaches_none(
    family: str, is_training: bool, monkeypatch
) -> None:
    experts = build_experts(family)
    product = functional.grouped_mm

    def leaving(rows: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        is_unread_P = torch.arange(len(rows)) >= offs[-1]
        return product(rows, weight, offs=offs).masked_fill(is_unread_P[:, None], torch.nan)

    monkeypatch.setattr(functional, "grouped_mm", leaving)
    rows = routed(experts, 11, share_here=0.4)
    with torch.set_grad_enabled(is_training):
        y_RH, _ = run_static(experts, *rows)
    torch.testing.assert_close(y_RH, expected(experts, *rows), **FP32)


@pytest.mark.parametrize("num_rows", [0, 1, 9])
@pytest.mark.parametrize("family", LAYOUTS)
def test_bare_rows_are_for_the_only_expert(family: str, num_rows: int) -> None:
    experts = build_experts(family, ep_size=8)
    x_RH, *_ = routed(experts, num_rows, share_here=1.0)
    ids_R1 = torch.zeros(num_rows, 1, dtype=torch.int64)
    y_RH, rows_e = run_local_experts(experts, x_RH)
    torch.testing.assert_close(y_RH, expected(experts, x_RH, ids_R1, torch.ones(num_rows, 1)))
    assert rows_e.tolist() == [num_rows]


@pytest.mark.parametrize("share_here", [0.0, 0.3, 1.0])
def test_one_expert_of_many_rows_gathers_each_row_once(share_here: float, monkeypatch) -> None:
    experts = build_experts("olmoe", ep_size=8)
    rows = routed(experts, 600, share_here)  # more than are multiplied whether they chose it or not
    gathered = []
    run_grouped = gemm.run_grouped

    def watched(module: nn.Module, x_PH: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        gathered.append(len(x_PH))
        return run_grouped(module, x_PH, *args, **kwargs)

    monkeypatch.setattr("ds_moe_ep.moe.experts.run_grouped", watched)
    with torch.no_grad():
        y_RH, rows_e = run_static(experts, *rows)
        torch.testing.assert_close(y_RH, expected(experts, *rows), **FP32)
    assert rows_e.tolist() == [int((rows[1] == 0).sum())]
    assert gathered == [600]


@pytest.mark.parametrize("num_rows", [0, 5])
@pytest.mark.parametrize("ep_size", [1, 8], ids=["all", "one"])
@pytest.mark.parametrize(("family", "way"), ways_of(["olmoe", "step3p7"]))
def test_rows_that_chose_no_expert_here_give_zeros(
    family: str, ep_size: int, num_rows: int, way: str
) -> None:
    experts = build_experts(family, ep_size)
    x_RH, ids_RK, weights_RK = routed(experts, num_rows, share_here=0.0)
    y_RH, rows_e = WAYS[way](experts, x_RH.requires_grad_(), ids_RK, weights_RK.requires_grad_())
    assert y_RH.shape == x_RH.shape
    assert not y_RH.any()
    assert rows_e.tolist() == [0] * experts.num_experts
    y_RH.sum().backward()  # other ranks' collectives in backward wait for this rank's
    assert not x_RH.grad.any()
    assert not weights_RK.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "step3p7"])
def test_weights_may_be_more_exact_than_rows(family: str, dtype: torch.dtype) -> None:
    experts = build_experts(family).to(dtype)
    x_RH, ids_RK, weights_RK = routed(experts, 9, share_here=0.7)
    with torch.no_grad():
        y_RH, _ = run_local_experts(experts, x_RH.to(dtype), ids_RK, weights_RK)
        wanted_RH = expected(experts, x_RH.to(dtype), ids_RK, weights_RK)
    assert y_RH.dtype == dtype
    # Three roundings to bf16 (2^-8 each) on the way of a sum of a few terms of order one.
    torch.testing.assert_close(y_RH, wanted_RH, rtol=3e-2, atol=3e-2)


def test_widths_that_cannot_be_aligned_are_left_to_the_module() -> None:
    experts = build_experts("olmoe")
    assert follows_contract(experts)
    experts.down_proj = nn.Parameter(experts.down_proj[..., :-1])
    assert not follows_contract(experts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_narrower_than_float32_lie_as_stored(dtype: torch.dtype) -> None:
    experts = build_experts("olmoe", ep_size=2).to(dtype)
    lay_out_for_cpu(experts)
    assert experts.gate_up_proj.is_contiguous()
    assert experts.down_proj.is_contiguous()


@pytest.mark.parametrize("family", LAYOUTS)
def test_laid_out_for_a_cpu_weights_and_outputs_stay(family: str) -> None:
    experts = build_experts(family, ep_size=2)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    lay_out_for_cpu(experts)
    after = experts.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    if follows_contract(experts):
        matrix = experts.down_proj[0] if experts.is_transposed else experts.down_proj[0].t()
        assert matrix.is_contiguous()  # [I, H], what rows are multiplied with from the left
    rows = routed(experts, num_rows=17, share_here=0.5)
    with torch.no_grad():
        found, _ = run_local_experts(experts, *rows)
        torch.testing.assert_close(found, expected(experts, *rows), **FP32)
