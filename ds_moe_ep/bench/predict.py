"""`bench predict`: what is predicted of a job, from hardware measured in it, and what it does."""

# Shapes: B prompts, S tokens of a prompt

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ds_moe_ep import heap
from ds_moe_ep.bench.collectives import open_links
from ds_moe_ep.bench.generate_sides import (
    GenerateSide,
    add_batch_arguments,
    check_batches,
    load_ours,
)
from ds_moe_ep.bench.hardware_now import HardwareNow
from ds_moe_ep.bench.memory import PeakMemory
from ds_moe_ep.bench.models import SHAPES, write_model
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.bench.timing import Spread, time_in_turn
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.moe.cost_model import LinkPrices
from ds_moe_ep.moe.probe import measure_links
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.predict.passes import Deployment, Pass, PassTimes, predict_pass
from ds_moe_ep.predict.throughput import Memory, Sequences

__all__ = ["TABLE", "TIME_BAR", "off_by", "within"]

_MS, _MB = 1000.0, 1e6
_MEMORY_BAR = 0.05
TIME_BAR = 0.25
"""How far a predicted time may be from the measured one, as a share of it."""
_MEMORY = ("held", "cache", "grown")
_NARROW = "narrow"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_batch_arguments(parser, world=[2, 4, 8], new_tokens=8)
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of each prompt")


def _prepare(args: argparse.Namespace, work: Path) -> None:
    check_batches(args.batch, args.world)
    shape = SHAPES[args.model]
    write_model(shape, work / args.model)
    # As many layers, experts and choices of next to no width: what of a process is not tensors.
    narrow = replace(shape, hidden_size=64, moe_intermediate_size=32, num_heads=2)
    write_model(narrow, work / _NARROW)


@torch.no_grad()
def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[Result]:
    folder, most = work / args.model, max(args.batch)
    hardware = HardwareNow(
        job, args.timeout, SHAPES[args.model], hosts_are_simulated=args.simulate_hosts
    )
    hardware.warm_up()
    # Twice, as a process loads libraries and opens shared memory for the first model alone.
    narrow = [_load(args, job, work / _NARROW, batch=job.info.world_size) for _ in range(2)]
    loaded = _load(args, job, folder, batch=most)
    model, side = loaded.model, loaded.side
    held_bytes, cache_bytes = job.all_gather(_held_bytes(model)), _cache_bytes(model, job, args)
    _, _, links = open_links(job, args.timeout)
    times: dict[int, dict[str, list[float]]] = {b: {"first": [], "step": []} for b in args.batch}
    prices = []
    for _ in range(args.rounds):
        # Next to each other, as the machine is not always as fast.
        prices.append(measure_links(links, job.device))
        hardware.measure(links, prices[-1])
        for batch in args.batch:
            _time(args, job, side, batch, times[batch])
    device, link_prices = hardware.device(), _middle(prices)
    spec, plan = read_model_spec(folder), ParallelPlan(job.info.world_size)
    deployment = Deployment(spec, plan, device, link_prices)
    sequences = Sequences(args.prompt_tokens, 1 + args.new_tokens)
    dispatcher = predict_pass(deployment, _first_pass(deployment, args, most)).dispatcher
    memory = Memory.of(spec, plan, sequences, device, dispatcher)
    of_narrow = Memory.of(read_model_spec(work / _NARROW), plan, sequences, device, dispatcher)
    other_bytes = narrow[-1].grown_bytes - of_narrow.weight_bytes - of_narrow.needs.num_bytes
    fit = {name: price for name, price in asdict(link_prices).items() if price is not None}
    local_s_per_byte = fit.pop("local_s_per_byte")
    return [
        {
            "world_size": job.info.world_size,
            "num_nodes": len(set(job.nodes)),
            "model": args.model,
            "batch": batch,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "device": asdict(device),
            "fit": fit,
            "local_s_per_byte": local_s_per_byte,
            "memory": {
                "held_bytes": max(held_bytes),
                "held_bytes_spread": (max(held_bytes) - min(held_bytes)) / max(held_bytes),
                "predicted_held_bytes": memory.weight_bytes,
                "cache_bytes": cache_bytes,
                "predicted_cache_bytes": memory.kv_bytes_per_token * args.prompt_tokens,
                "grown_bytes": max(job.all_gather(loaded.grown_bytes)),
                "other_bytes": other_bytes,
                "predicted_grown_bytes": other_bytes
                + memory.weight_bytes
                + memory.needs.num_bytes * -(-most // job.info.world_size),
            },
            "passes": _passes(deployment, args, batch, times[batch]),
        }
        for batch in args.batch
    ]


@dataclass(frozen=True)
class _Loaded:
    """A model, and what this process has grown by when it had loaded and used it."""

    model: PreTrainedModel
    side: GenerateSide
    grown_bytes: int


def _load(args: argparse.Namespace, job: Job, folder: Path, batch: int) -> _Loaded:
    heap.release_freed_memory()
    before_bytes = PeakMemory.now()
    with PeakMemory() as peak:
        model, side = load_ours(folder, job, "auto")
        side(_prompts(args, batch), 1 + args.new_tokens)
    return _Loaded(model, side, peak.num_bytes - before_bytes)


def _held_bytes(model: PreTrainedModel) -> int:
    return sum(param.untyped_storage().nbytes() for param in model.parameters())


def _cache_bytes(model: PreTrainedModel, job: Job, args: argparse.Namespace) -> int:
    """Returns the bytes of the KV cache of one prompt; all ranks call it."""
    ids_1S = torch.full((1, args.prompt_tokens), 3, device=job.device)
    cache = model(ids_1S, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _middle(prices: Sequence[LinkPrices]) -> LinkPrices:
    """Returns the prices of the round whose small messages took the median of all rounds."""
    ordered = sorted(prices, key=lambda p: p.flat.gather.latency_s + p.flat.reduce.latency_s)
    return ordered[len(ordered) // 2]


def _prompts(args: argparse.Namespace, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    vocabulary = SHAPES[args.model].vocab_size
    return torch.randint(3, vocabulary, (batch, args.prompt_tokens), generator=generator)


def _time(
    args: argparse.Namespace,
    job: Job,
    side: GenerateSide,
    batch: int,
    times: dict[str, list[float]],
) -> None:
    """Adds the seconds of a first pass and of a step of the slowest rank, once each."""
    prompts_BS = _prompts(args, batch)
    spreads = time_in_turn(
        {str(new): functools.partial(side, prompts_BS, new) for new in (1, 1 + args.new_tokens)},
        1,
        wait_for_all=lambda: job.wait_for_all(args.timeout, "generating"),
        slowest=lambda taken: max(job.all_gather(taken)),
    )
    first_s = spreads["1"].median
    times["first"].append(first_s)
    times["step"].append((spreads[str(1 + args.new_tokens)].median - first_s) / args.new_tokens)


def _first_pass(deployment: Deployment, args: argparse.Namespace, batch: int) -> Pass:
    prompts = -(-batch // deployment.plan.world_size)
    return Pass(prompts, args.prompt_tokens, is_first=True)


def _passes(
    deployment: Deployment, args: argparse.Namespace, batch: int, times: dict[str, list[float]]
) -> list[Result]:
    first = _first_pass(deployment, args, batch)
    context = args.prompt_tokens + args.new_tokens // 2
    asked = {"first": first, "step": Pass(first.prompts, context=context)}
    found = []
    for name, each in asked.items():
        predicted: PassTimes = predict_pass(deployment, each)
        found.append(
            {
                "pass": name,
                "seconds": vars(Spread.of(times[name])),
                "predicted_s": predicted.seconds,
                "predicted_shares": predicted.shares(),
            }
        )
    return found


def _to_markdown(results: Sequence[Result]) -> str:
    titles = ["ranks", "hosts", "prompts in all", "pass", "predicted, ms", "measured, ms", "off by"]
    titles += ["dense", "attention", "experts", "communication", "launching"]
    rows = [
        [result["world_size"], result["num_nodes"], result["batch"], *_pass_cells(one)]
        for result in results
        for one in result["passes"]
    ]
    of_world = {(result["world_size"], result["num_nodes"]): result for result in results}
    memory = [[*world, *_memory_cells(result["memory"])] for world, result in of_world.items()]
    hardware = [[*world, *_hardware_cells(result)] for world, result in of_world.items()]
    times_within = within(
        TIME_BAR,
        [(one["predicted_s"], one["seconds"]["median"]) for r in results for one in r["passes"]],
    )
    memory_within = within(
        _MEMORY_BAR,
        [
            (result["memory"][f"predicted_{name}_bytes"], result["memory"][f"{name}_bytes"])
            for result in of_world.values()
            for name in _MEMORY
        ],
    )
    spread = max(result["memory"]["held_bytes_spread"] for result in results)
    one = results[0]
    return (
        f"{markdown_table(titles, rows)}\n\n"
        f"{times_within} times. {one['model']} in float32, "
        f"{one['prompt_tokens']} tokens a prompt; "
        "the first pass reads the prompts (with what `generate` does around it), a step makes a "
        f"token of each, {one['new_tokens']} of them after the first. Measured is the median "
        f"(least to most) of {one['passes'][0]['seconds']['num_rounds']} rounds, the slowest "
        "rank's; in each round the hardware and the links were measured just before. The shares "
        "are predicted.\n\nMemory of the fullest rank, MB, predicted and measured:\n\n"
        + markdown_table(
            ["ranks", "hosts", "weights", "off by", "KV cache of a prompt", "off by"]
            + ["process, weights and most prompts", "off by"],
            memory,
        )
        + f"\n\n{memory_within} figures. Weights and cache are counted in tensors; the "
        f"weights of ranks differ by {spread:.1%} of those of the fullest. The process is what "
        "loading and generating add to its proportional set size at the peak, after a small model "
        "has run; predicted of it are weights, the cache and the tensors of a pass. To these is "
        f"added what is not tensors, {one['memory']['other_bytes'] / _MB:.1f} MB with "
        f"{one['world_size']} ranks, measured of a model of as many layers and experts that is "
        "next to nothing wide.\n\n"
        "What the predictions started from, a rank's, all ranks at once. Wait is what a message "
        "costs more after work than among idle ranks, as not all are given a core at once:\n\n"
        + markdown_table(
            ["ranks", "hosts", "products, GFLOP/s", "reading weights, GB/s"]
            + ["a layer's operations, ms", "around the layers, ms", "a first pass more, ms"]
            + ["gather, ms", "reduce, ms", "wait, ms", "bytes, MB/s"],
            hardware,
        )
    )


def _pass_cells(one: Result) -> list[str]:
    shares = one["predicted_shares"]
    names = ("dense weights", "attention", "experts", "communication", "launching")
    return [
        one["pass"],
        f"{one['predicted_s'] * _MS:,.1f}",
        with_range(one["seconds"], scale=_MS, digits=1),
        f"{off_by(one['predicted_s'], one['seconds']['median']):+.0%}",
        *(f"{shares.get(name, 0.0):.0%}" for name in names),
    ]


def _memory_cells(memory: Result) -> list[str]:
    cells = []
    for name in _MEMORY:
        predicted, measured = memory[f"predicted_{name}_bytes"], memory[f"{name}_bytes"]
        cells.append(f"{predicted / _MB:,.2f} and {measured / _MB:,.2f}")
        cells.append(f"{off_by(predicted, measured):+.1%}")
    return cells


def _hardware_cells(result: Result) -> list[str]:
    device, flat = result["device"], result["fit"]["flat"]
    launches, slope = device["launches"], flat["gather"]["s_per_byte"]
    return [
        f"{device['flops_32bit'] / 1e9:.1f}",
        f"{device['bytes_per_s'] / 1e9:.2f}",
        *(f"{launches[name] * _MS:.2f}" for name in ("layer_s", "step_s", "start_s")),
        *(f"{flat[kind]['latency_s'] * _MS:.2f}" for kind in ("gather", "reduce")),
        f"{device['wait_s'] * _MS:.2f}",
        f"{1 / slope / _MB:,.0f}" if slope else "-",
    ]


def within(bar: float, pairs: Sequence[tuple[float, float]]) -> str:
    """Says how many predictions are within a bar of what was measured."""
    num_met = sum(abs(off_by(predicted, measured)) <= bar for predicted, measured in pairs)
    return f"Within {bar:.0%} are {num_met} of {len(pairs)}"


def off_by(predicted: float, measured: float) -> float:
    """Returns the share of a measured figure by which the predicted one is more."""
    return predicted / measured - 1.0


TABLE = Table(
    name="predict",
    heading="Predicted and measured",
    add_arguments=_add_arguments,
    prepare=_prepare,
    measure=_measure,
    to_markdown=_to_markdown,
    document="planning.md",
)
