"""`bench overlap`: what it brings to compute a shared expert while rows are on their way."""

# Shapes: T tokens of this rank, H hidden

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from ds_moe_ep.adapter import adapt, bind_expert_groups, moe_layers, prepare_for_inference
from ds_moe_ep.bench.layer_sides import LayerSide, check_equal, on_rows, time_sides
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.options import DISPATCHER_NAMES
from ds_moe_ep.plan import ParallelPlan

__all__ = ["TABLE"]

_MS = 1000.0
_AFTER, _MEANWHILE = "after the experts", "while rows travel"
_SHARED, _NETWORK = "shared memory", "network"
# allreduce is for ranks that all have the same tokens; here each has its own.
_DISPATCHERS = [name for name in DISPATCHER_NAMES if name != "allreduce"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4], help="numbers of ranks")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 16, 256], metavar="T", help="tokens a rank"
    )
    parser.add_argument(
        "--dispatcher",
        choices=_DISPATCHERS,
        default="alltoall",
        help="as for launch/infer.py (default: %(default)s)",
    )


@torch.no_grad()
def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[Result]:
    model = _build_one_layer()
    sides = {
        (links, when): _side(model, job, args.dispatcher, links, when)
        for links in (_SHARED, _NETWORK)
        for when in (_AFTER, _MEANWHILE)
    }
    reference = on_rows(model.model.layers[0].mlp)
    generator = torch.Generator().manual_seed(job.info.rank)
    results = []
    for num_tokens in args.tokens:
        x_TH = torch.randn((num_tokens, model.config.hidden_size), generator=generator)
        for (links, when), side in sides.items():
            for _ in range(2):  # the first pass is watched
                check_equal(job, f"{when}, {links}", side(x_TH.to(job.device)), reference(x_TH))
        named = {", ".join(key): side for key, side in sides.items()}
        spreads = time_sides(job, named, x_TH, rounds=args.rounds, timeout_s=args.timeout)
        results += [
            {
                "world_size": job.info.world_size,
                "tokens_per_rank": num_tokens,
                "dispatcher": args.dispatcher,
                "links": links,
                "seconds": {
                    when: vars(spreads[f"{links}, {when}"]) for when in (_AFTER, _MEANWHILE)
                },
            }
            for links in (_SHARED, _NETWORK)
        ]
    return results


def _build_one_layer() -> DeepseekV3ForCausalLM:
    """Builds a layer with a sixteenth of DeepSeek-V3's widths, on every rank the same."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=448,
        intermediate_size=1152,
        moe_intermediate_size=128,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=64,
        num_experts_per_tok=8,
        n_shared_experts=1,
    )
    return DeepseekV3ForCausalLM(config).eval()


def _side(
    model: DeepseekV3ForCausalLM, job: Job, dispatcher: str, links: str, when: str
) -> LayerSide:
    """Returns the block with its experts spread over all ranks, as infer.py runs it."""
    model = copy.deepcopy(model).to(job.device)
    adapt(model, ParallelPlan(job.info.world_size), ep_rank=job.info.rank, dispatcher=dispatcher)
    nodes = job.nodes if links == _SHARED else None
    bind_expert_groups(model, nodes=nodes, device=job.device)
    prepare_for_inference(model)
    (layer,) = moe_layers(model)
    if when == _AFTER:
        layer.deepspeed_moe.shared_expert = None
    block = on_rows(model.model.layers[0].mlp)

    def run(x_TH: Tensor) -> Tensor:
        layer.announce([len(x_TH)] * job.info.world_size)
        return block(x_TH)

    return run


def _to_markdown(results: Sequence[Result]) -> str:
    titles = ["ranks", "links", "tokens a rank", f"{_AFTER}, ms", f"{_MEANWHILE}, ms", "ratio"]
    rows = []
    for result in sorted(results, key=lambda each: (each["world_size"], each["links"])):
        seconds = result["seconds"]
        rows.append(
            [
                *(result["world_size"], result["links"], result["tokens_per_rank"]),
                *(with_range(seconds[when], scale=_MS) for when in (_AFTER, _MEANWHILE)),
                f"{seconds[_AFTER]['median'] / seconds[_MEANWHILE]['median']:.2f}",
            ]
        )
    return (
        f"{markdown_table(titles, rows)}\n\n"
        "When the shared expert of an MoE block is computed. The block is DeepSeek-V3's with a "
        "sixteenth of its widths: 64 experts, top-8, one shared, hidden 448, expert width 128, "
        f"float32, {results[0]['dispatcher']} dispatch; all outputs are those of transformers' "
        "block (checked before each row). Milliseconds are the median (least to most) of "
        f"{results[0]['seconds'][_AFTER]['num_rounds']} rounds, the slowest rank's; the ratio is "
        "of the medians. Where ranks have no cores to spare, travelling rows leave none idle."
    )


TABLE = Table(
    name="overlap",
    heading="A shared expert while rows travel",
    add_arguments=_add_arguments,
    measure=_measure,
    to_markdown=_to_markdown,
)
