"""One GPU, one rank: NCCL, bf16 and float32 against Hugging Face on the same device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_moe_ep.adapter import adapt, bind_expert_groups, moe_layers
from ds_moe_ep.bench.layer_sides import build_one_layer
from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.config.deepspeed import inference_config
from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.dist.groups import RankInfo, init_distributed
from ds_moe_ep.dist.transport import Transport
from ds_moe_ep.engine.decode_graph import DecodeGraph, capture
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.loading import init_inference
from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.engine.sync import ForwardSync
from ds_moe_ep.engine.tasks import EncodedPrompt, GenerateSettings, generate_batch
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.moe.dispatch import Links
from ds_moe_ep.moe.probe import measure_links
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import CORE_FAMILIES, VOCAB_SIZE, save_tiny

PLAN = ParallelPlan(ep_size=1)


@pytest.fixture(scope="module")
def device() -> Any:
    job = init_distributed(RankInfo(rank=0, local_rank=0, world_size=1), timeout_s=60)
    yield job.device
    torch.distributed.destroy_process_group()


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    model, _ = load_expert_parallel_model(folder, PLAN, ep_rank=0, dtype=dtype, device=device)
    bind_expert_groups(model)
    config = inference_config(PLAN, read_model_spec(folder), dtype=str(dtype))
    return init_inference(model, config)


@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_logits_equal_hugging_face(tmp_path, device, family) -> None:
    save_tiny(family, tmp_path)
    ids = torch.randint(3, VOCAB_SIZE, (2, 9), device=device)

    def hugging_face(dtype: torch.dtype) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).to(device)
        return model(ids).logits.float()

    def error(logits: torch.Tensor) -> float:
        return float((logits.float() - exact).square().mean().sqrt())

    with torch.no_grad():
        exact = hugging_face(torch.float32)
        logits = load(tmp_path, torch.float32, device)(ids).logits
        torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)  # other kernels
        # In bf16 both are as far from that: roundings add up in another order, so token by token
        # they may part, where two experts have scores that close.
        rounded = load(tmp_path, torch.bfloat16, device)(ids).logits
        assert error(rounded) <= 2 * error(hugging_face(torch.bfloat16))


def test_weights_and_experts_live_on_the_gpu(tmp_path, device) -> None:
    save_tiny("deepseek_v3", tmp_path)
    engine = load(tmp_path, torch.bfloat16, device)
    tensors = [*engine.module.parameters(), *engine.module.buffers()]
    assert {tensor.device for tensor in tensors} == {device}
    assert moe_layers(engine.module)


def test_collectives_are_timed_without_a_sync(device) -> None:
    comm = Communicator(None)
    with comm.stats.timed("sum", device, sent_bytes=4):
        torch.randn(2048, 2048, device=device) @ torch.randn(2048, 2048, device=device)
    assert comm.stats.calls == 1
    assert 0.0 < comm.stats.seconds() < 10.0


def test_the_probe_tells_a_row_s_price_from_that_of_starting_kernels(device) -> None:
    model = build_one_layer(SHAPES["620M"]).to(device, torch.bfloat16)
    adapt(model, PLAN, ep_rank=0)
    (layer,) = moe_layers(model)
    found = measure_links(Links(Communicator(None)), device, layer)
    assert found.experts is not None
    row_bytes = 2 * layer.hidden_size
    # Each is moved some times, at most at 10 TB/s; starting kernels for one alone takes over 10 us.
    assert row_bytes / 10e12 < found.experts.s_per_slot < 1e-6
    assert 1 / 10e12 < found.local_s_per_byte < 1e-9
    assert 0.0 < found.experts.s_per_pair < 1e-6


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_captured_layer_computes_new_rows_when_it_is_replayed(tmp_path, device, family) -> None:
    save_tiny(family, tmp_path)
    (layer, *_) = moe_layers(load(tmp_path, torch.bfloat16, device).module)

    def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = torch.rand((5, layer.num_experts), device=device).topk(2)
        x = torch.randn((5, layer.hidden_size), device=device, dtype=torch.bfloat16)
        return x, scores.indices, scores.values

    held = inputs()
    layer.deepspeed_moe.announce([5])
    with torch.no_grad():
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # what is set up at first must not be captured
            layer(*held)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(*held)
        for _ in range(2):
            fresh = inputs()
            for place, value in zip(held, fresh, strict=True):
                place.copy_(value)
            graph.replay()
            torch.testing.assert_close(captured, layer(*fresh), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_generation_from_a_graph_gives_the_tokens_of_hugging_face(tmp_path, device, family) -> None:
    save_tiny(family, tmp_path)
    prompts = [(5, 9, 33, 4, 71), (17,), (3, 88, 12), (8, 7)]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to(device)
    expected = []
    for ids in prompts:
        alone = reference.generate(torch.tensor([ids], device=device), **settings)
        expected.append(tuple(alone[0, len(ids) :].tolist()))
    engine = load(tmp_path, torch.float32, device)
    engine.module.generation_config.eos_token_id = None
    layers, live_rows = moe_layers(engine.module), LiveRows([], device)
    graph = DecodeGraph(engine.module, layers, world_size=1, batch_size=3, cache_len=11)
    ForwardSync(
        engine.module,
        layers,
        None,
        top_k=2,
        dtype=torch.float32,
        device=device,
        live_rows=live_rows,
        graph=graph,
    )
    encoded = [EncodedPrompt(Prompt(str(i), None, ids), ids) for i, ids in enumerate(prompts)]
    how, found = GenerateSettings(max_new_tokens=6, context_length=64), []
    for batch in (encoded[:3], encoded[3:]):  # the second with two rows that have no prompt
        found += generate_batch(engine, batch, how, None, live_rows, graph)
    assert [result.token_ids for result in found] == expected
    assert graph.num_replays == 2 * 5


@pytest.mark.parametrize("way", ["gather", "exchange", "reduce", "sum"])
def test_nccl_brings_rows(device, way) -> None:
    transport = Transport(torch.distributed.group.WORLD)  # a Communicator skips groups of one
    rows = torch.randn((5, 8), device=device)
    brought = {
        "gather": lambda: transport.gather(rows, [5]),
        "exchange": lambda: transport.exchange(rows, [5], [5]),
        "reduce": lambda: transport.reduce(rows, [5]),
        "sum": lambda: transport.sum(rows),
    }[way]()
    assert brought.data_ptr() != rows.data_ptr()
    torch.testing.assert_close(brought, rows, rtol=0, atol=0)
    assert transport.stats.calls == 1


def test_what_a_gpu_has_gathered_comes_to_the_host(device) -> None:
    rows = torch.arange(12, device=device).view(4, 3)
    transport = Transport(torch.distributed.group.WORLD)
    torch.testing.assert_close(transport._to_host(rows * 2), rows.cpu() * 2)


@pytest.mark.parametrize("way", ["gather", "reduce", "sum"])
def test_a_captured_nccl_collective_brings_new_rows_when_it_is_replayed(device, way) -> None:
    transport = Transport(torch.distributed.group.WORLD)
    rows, brought = torch.randn((5, 8), device=device), torch.empty((5, 8), device=device)
    bring = {
        "gather": lambda: transport.gather(rows, [5]),
        "reduce": lambda: transport.reduce(rows, [5]),
        "sum": lambda: transport.sum(rows),
    }[way]
    replay = capture(lambda: brought.copy_(bring())).replay
    for _ in range(2):
        rows.normal_()
        replay()
        torch.testing.assert_close(brought, rows, rtol=0, atol=0)
