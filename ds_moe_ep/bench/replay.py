"""`bench replay`: one rank of a large job in this process, against what its hardware could do."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch._inductor.config
from transformers import PreTrainedModel, StaticCache

from ds_moe_ep.adapter import moe_layers
from ds_moe_ep.bench.floors import copy_rate, matmul_rate, wait
from ds_moe_ep.bench.replayed_rank import announce, build_own_part, join_fake_job
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.bench.timing import Spread, time_in_turn
from ds_moe_ep.engine.decode_graph import capture
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model_spec import ModelSpec, read_model_spec

__all__ = ["TABLE", "prefill_flops"]

_MS = 1000.0
_STEPS = 8  # decode steps of a round, for which the cache has room after the context


def prefill_flops(spec: ModelSpec, num_tokens: int, expert_rows: int) -> int:
    """Returns the operations of a rank's matrix products in a prefill of one prompt.

    The head is left out, as it sees the last token alone; attention is causal.

    Args:
        spec: The model.
        num_tokens: Tokens of the prompt.
        expert_rows: Pairs of a row and an expert that this rank computes, in all layers.
    """
    num_embeddings = 1 if spec.tie_word_embeddings else 2
    dense = spec.num_dense_params - num_embeddings * spec.vocab_size * spec.hidden_size
    attention = 2 * spec.num_layers * spec.num_attention_heads * spec.head_dim * num_tokens**2
    return 2 * dense * num_tokens + 2 * spec.num_params_per_expert * expert_rows + attention


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with a config.json")
    parser.add_argument("--world", type=int, default=64, help="ranks of the job")
    parser.add_argument("--rank", type=int, default=0, help="the one that this process plays")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 8, 32, 128], metavar="T", help="tokens a rank"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens before those decoded")
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of the prompt")


def _prepare(args: argparse.Namespace, work: Path) -> None:
    read_model_spec(args.model)  # refuses what it cannot read
    if not 0 <= args.rank < args.world:
        raise ConfigError(
            f"--rank={args.rank} is not a rank of --world={args.world}. Use 0 to {args.world - 1}."
        )


@torch.no_grad()
def _measure(args: argparse.Namespace, work: Path) -> list[Result]:
    job = join_fake_job(args.rank, args.world)
    dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
    model = build_own_part(args.model, job, dtype, "allgather")
    weight_bytes = sum(param.nbytes for param in model.parameters())
    about = {
        "model": Path(args.model).name,
        "world_size": args.world,
        "rank": args.rank,
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": weight_bytes,
        "num_layers": model.config.num_hidden_layers,
        "bytes_per_s": copy_rate(job.device, args.rounds),
        "flops": matmul_rate(job.device, dtype, args.rounds),
    }
    results = []
    for num_tokens in args.tokens:
        announce(model, num_tokens, args.world)
        floor = {"floor": "weights", "floor_s": weight_bytes / about["bytes_per_s"]}
        for mode, spread in _time_decode(model, num_tokens, args.context, args.rounds).items():
            what = {"phase": "decode", "tokens": num_tokens, "context": args.context, "mode": mode}
            results.append({**about, **what, **floor, "seconds": vars(spread)})
    del model
    model = build_own_part(args.model, job, dtype, "alltoall")
    announce(model, args.prefill, args.world)
    spreads, expert_rows = _time_prefill(model, args.prefill, args.rounds)
    flops = prefill_flops(read_model_spec(args.model), args.prefill, expert_rows)
    floor = {"floor": "products", "floor_s": flops / about["flops"]}
    for mode, spread in spreads.items():
        what = {"phase": "prefill", "tokens": args.prefill, "context": 0, "mode": mode}
        results.append({**about, **what, **floor, "seconds": vars(spread)})
    return results


def _time_decode(
    model: PreTrainedModel, num_tokens: int, context: int, rounds: int
) -> dict[str, Spread]:
    cache = StaticCache(config=model.config, max_cache_len=context + _STEPS)
    ids_T1 = torch.full((num_tokens, 1), 3, device=model.device)
    steps: dict[str, Callable[[], object]] = {
        "eager": functools.partial(model, ids_T1, past_key_values=cache)
    }

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
        wait(model.device)

    steps["eager"]()  # makes the cache
    if model.device.type == "cuda":
        torch._dynamo.reset()  # what was compiled for other shapes counts towards a limit
        compiled = torch.compile(model, dynamic=False)
        steps["compiled"] = functools.partial(compiled, ids_T1, past_key_values=cache)
        # Weights as constants: products of the same rows become one.
        with torch._inductor.config.patch(freezing=True):
            steps["compiled"]()
        for mode in ("eager", "compiled"):
            rewind()
            steps[f"{mode}, {_GRAPH}"] = capture(steps[mode]).replay

    def run(step: Callable[[], object]) -> None:
        for _ in range(_STEPS):
            step()
        wait(model.device)

    sides = {mode: functools.partial(run, step) for mode, step in steps.items()}
    for side in sides.values():
        rewind()
        side()  # compiles, and makes buffers
    return time_in_turn(
        sides, rounds, wait_for_all=rewind, slowest=lambda seconds: seconds / _STEPS
    )


def _time_prefill(
    model: PreTrainedModel, num_tokens: int, rounds: int
) -> tuple[dict[str, Spread], int]:
    ids_1T = torch.randint(model.config.vocab_size, (1, num_tokens), device=model.device)
    passes: dict[str, Callable[..., object]] = {"eager": model}
    if model.device.type == "cuda":
        torch._dynamo.reset()
        passes["compiled"] = torch.compile(model, dynamic=False)

    def run(forward: Callable[..., object]) -> None:
        forward(ids_1T, logits_to_keep=1, use_cache=False)
        wait(model.device)

    sides = {mode: functools.partial(run, forward) for mode, forward in passes.items()}
    sides["eager"]()
    expert_rows = sum(
        int(layer.deepspeed_moe.tokens_per_expert.sum()) for layer in moe_layers(model)
    )
    for side in sides.values():
        side()
    return time_in_turn(sides, rounds), expert_rows


def _to_markdown(results: Sequence[Result]) -> str:
    titles = ["phase", "tokens a rank", "context", "mode", "ms", "eager / mode"]
    titles += ["floor, ms", "share of the floor"]
    eager_s = _eager_seconds(results)
    rows = []
    for result in results:
        seconds, floor_s = result["seconds"], result["floor_s"]
        rows.append(
            [
                *(result["phase"], f"{result['tokens']:,}", result["context"], result["mode"]),
                with_range(seconds, scale=_MS),
                f"{eager_s[result['phase'], result['tokens']] / seconds['median']:.2f}",
                f"{floor_s * _MS:.2f} ({result['floor']})",
                f"{floor_s / seconds['median']:.0%}",
            ]
        )
    one = results[0]
    return (
        f"{markdown_table(titles, rows)}\n\n"
        f"Rank {one['rank']} of {one['world_size']} of {one['model']} in one process with torch's "
        f"`fake` process group: its shapes and kernels, random weights in {one['dtype']}; instead "
        "of communication, a copy of what is sent is what comes. Tokens "
        "choose all experts equally, and each as many ranks as it can. Milliseconds "
        f"are of a pass through the whole model, the median (least to most) of "
        f"{one['seconds']['num_rounds']} rounds. Decode: allgather with announced tokens, {_STEPS} "
        "steps a round, compiled with the weights as constants; prefill: alltoall, one prompt a "
        "rank, in no CUDA graph, as the host reads how many rows go where. Floors: reading all "
        f"{one['weight_bytes'] / 1e6:,.0f} MB of weights that the rank holds (dense, embeddings "
        "among them, and its experts) at the rate of a copy, "
        f"{one['bytes_per_s'] / 1e9:,.1f} GB/s measured here; the matrix products of the pass at "
        f"the rate of a large one, {one['flops'] / 1e12:,.2f} TFLOP/s measured here."
        + (_bars(results) if one["dtype"] == "bfloat16" else _NO_GPU)
    )


def _eager_seconds(results: Sequence[Result]) -> dict[tuple[str, int], float]:
    """Returns the eager time of each phase and number of tokens."""
    return {
        (each["phase"], each["tokens"]): each["seconds"]["median"]
        for each in results
        if each["mode"] == "eager"
    }


def _bars(results: Sequence[Result]) -> str:
    """Says of each bar whether all rows that it is about meet it."""
    eager_s = _eager_seconds(results)
    best_s: dict[tuple[str, int], float] = {}
    for each in results:
        key = each["phase"], each["tokens"]
        if each["phase"] == "prefill" or each["mode"].endswith(_GRAPH):
            best_s[key] = min(each["seconds"]["median"], best_s.get(key, math.inf))
    decode = {key: s for key, s in best_s.items() if key[0] == "decode"}
    steps = [s * _MS for (_, tokens), s in decode.items() if tokens == _BAR_TOKENS]
    ratios = [eager_s[key] / s for key, s in decode.items()]
    shares = [
        each["floor_s"] / best_s["prefill", each["tokens"]]
        for each in results
        if each["phase"] == "prefill"
    ]
    bars = [
        (f"a graph's step of {_BAR_TOKENS} tokens at most {_MOST_MS} ms on an H200", steps, None),
        (f"a graph at least {_LEAST_RATIO} times as fast as eager", ratios, _LEAST_RATIO),
        (f"prefill at least {_LEAST_SHARE:.0%} of the measured rate", shares, _LEAST_SHARE),
    ]
    verdicts = []
    for what, found, least in bars:
        met = max(found, default=0) <= _MOST_MS if least is None else min(found, default=0) >= least
        verdicts.append(f"{what}: {('met' if met else '**not met**') if found else 'no such row'}")
    return f"\n\nBars: {'; '.join(verdicts)}."


_GRAPH = "CUDA graph"
_BAR_TOKENS, _MOST_MS = 8, 1.2
_LEAST_RATIO, _LEAST_SHARE = 4.0, 0.5


_NO_GPU = (
    " There was no GPU: this shows that the command works; its rows on a GPU, compiled and as a "
    "CUDA graph too, are not measured yet."
)

TABLE = Table(
    name="replay",
    heading="One rank of a large job",
    add_arguments=_add_arguments,
    prepare=_prepare,
    to_markdown=_to_markdown,
    measure_alone=_measure,
)
