"""`bench balance-jobs`: whole jobs under skew, with contiguous and with placed experts.

Each step is what a user runs: a job that records, `ds-moe-ep balance`, and jobs with and without
its placement. All figures are those that the jobs themselves recorded.
"""

# Shapes: V vocabulary, H hidden, E experts

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from transformers import Qwen3MoeForCausalLM

from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.routing import ROUTINGS, tokens_with_logits
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.bench.timing import Spread
from ds_moe_ep.bringup.preflight import Launch, launch_command
from ds_moe_ep.demo import MODEL_DIR
from ds_moe_ep.errors import ConfigError, DistributedError
from ds_moe_ep.hostfile import local_cluster
from ds_moe_ep.local_machine import one_thread_each
from ds_moe_ep.monitor.findings import balance_of, hot_experts
from ds_moe_ep.monitor.metrics_folder import Metrics, read_metrics

__all__ = ["TABLE", "write_skewed_model"]

_BEFORE = "contiguous"
_TRAINED = "trained"
_BOOK = MODEL_DIR.with_name("alice.txt")
_OUTPUT = "out.jsonl"
_TAIL_CHARS = 3000


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=3)
    parser.add_argument("--world", type=int, nargs="+", default=[4], help="numbers of ranks")
    parser.add_argument(
        "--routing",
        nargs="+",
        choices=ROUTINGS,
        default=[_TRAINED, "zipf"],
        metavar="R",
        help=f"how tokens choose experts: {', '.join(ROUTINGS)}",
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="105M", help=f"model to run, except for {_TRAINED}"
    )
    parser.add_argument("--prompts", type=int, default=64, help="prompts in all")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of each prompt")
    parser.add_argument(
        "--new-tokens", type=int, default=32, help="tokens to generate after each prompt"
    )
    parser.add_argument(
        "--spare", type=int, nargs="+", default=[2], metavar="N", help="spare slots a rank"
    )


def _prepare(args: argparse.Namespace, work: Path) -> None:
    if few := [num_ranks for num_ranks in args.world if num_ranks < 2]:
        raise ConfigError(
            f"--world {few[0]} has no ranks to place experts on and to compare. Use 2 or more."
        )


def write_skewed_model(routing: str, shape: str, folder: Path) -> None:
    """Writes a model in which each token of the vocabulary chooses the experts drawn for it.

    It chooses them in all layers alike: what layers add to its embedding is too little to matter.

    Args:
        routing: How they are drawn: a name of `ROUTINGS`.
        shape: A name of `SHAPES`.
        folder: Where.
    """
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    model = Qwen3MoeForCausalLM(sizes.config())
    router_EH = nn.init.orthogonal_(torch.empty(sizes.num_experts, sizes.hidden_size))
    generator = torch.Generator().manual_seed(0)
    logits_VE = ROUTINGS[routing](sizes.vocab_size, sizes.num_experts, sizes.top_k, generator)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(tokens_with_logits(logits_VE, router_EH, generator))
        for layer in model.model.layers:
            layer.mlp.gate.weight.copy_(router_EH)
    model.save_pretrained(folder)


@dataclass(frozen=True)
class _Jobs:
    """Jobs that differ in their prompts and in where experts are.

    Attributes:
        model: Their model.
        num_ranks: Their ranks, on this machine.
        new_tokens: What they generate after each prompt, at most.
        batch_size: Prompts of a rank at a time.
    """

    model: Path
    num_ranks: int
    new_tokens: int
    batch_size: int

    def run(self, prompts: Path, folder: Path, placement: Path | None = None) -> Metrics:
        """Runs one, which writes its output and its metrics to a folder; returns these."""
        arguments = {
            "--model": self.model,
            "--input": prompts,
            "--output": folder / _OUTPUT,
            "--metrics": folder,
            "--max-new-tokens": self.new_tokens,
            "--batch-size": self.batch_size,
            **({"--placement": placement} if placement is not None else {}),
        }
        folder.mkdir()
        words = tuple(str(word) for pair in arguments.items() for word in pair)
        _run(launch_command(local_cluster(self.num_ranks), Launch(words)))
        return read_metrics(folder)


def _run(command: Sequence[str]) -> None:
    ended = subprocess.run(
        command, env=one_thread_each(), capture_output=True, text=True, check=False
    )
    if ended.returncode != 0:
        raise DistributedError(
            f"{' '.join(command)} ended with exit code {ended.returncode}; the end of what it "
            f"said:\n{(ended.stdout + ended.stderr)[-_TAIL_CHARS:]}"
        )


def _measure(args: argparse.Namespace, work: Path) -> list[Result]:
    results = []
    for routing in args.routing:
        model = MODEL_DIR
        if routing != _TRAINED:
            model = work / f"model-{routing}"
            write_skewed_model(routing, args.shape, model)
        for num_ranks in args.world:
            print(f"{TABLE.name}: {routing}, {num_ranks} ranks", file=sys.stderr)
            jobs = _Jobs(model, num_ranks, args.new_tokens, -(-args.prompts // num_ranks))
            results.append(_measure_jobs(args, routing, jobs, work / f"{routing}-{num_ranks}"))
    return results


def _measure_jobs(args: argparse.Namespace, routing: str, jobs: _Jobs, folder: Path) -> Result:
    """Places experts by what a job recorded, and compares jobs on other prompts."""
    folder.mkdir()
    seen, unseen = (_write_prompts(args, routing, seed, folder) for seed in (1, 2))
    recorded = jobs.run(seen, folder / "recorded")
    placements = {_BEFORE: None, **_place(args.spare, recorded)}
    done: dict[str, list[Metrics]] = {name: [] for name in placements}
    chance = random.Random(0)
    for number in range(args.rounds):
        for name in chance.sample(list(placements), len(placements)):
            out = folder / f"round-{number}-{list(placements).index(name)}"
            done[name].append(jobs.run(unseen, out, placements[name]))
    _check_equal_outputs(done)
    return {
        "world_size": jobs.num_ranks,
        "routing": routing,
        "shape": args.shape,
        "prompts": args.prompts,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "hottest_factor": hot_experts(recorded)[0].factor,
        "jobs": {name: _figures(side) for name, side in done.items()},
    }


def _write_prompts(args: argparse.Namespace, routing: str, seed: int, folder: Path) -> Path:
    """Writes pieces of the book for the model that was trained on it, else random tokens."""
    chance, length = random.Random(seed), args.prompt_tokens
    text, path = _BOOK.read_text(encoding="utf-8"), folder / f"prompts-{seed}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(args.prompts):
            if routing == _TRAINED:
                start = chance.randrange(len(text) - length)
                prompt: Result = {"prompt": text[start : start + length]}
            else:
                vocabulary = range(SHAPES[args.shape].vocab_size)
                prompt = {"prompt_token_ids": chance.choices(vocabulary, k=length)}
            file.write(json.dumps({"id": str(number), **prompt}) + "\n")
    return path


def _place(spare: Iterable[int], recorded: Metrics) -> dict[str, Path]:
    """Has `ds-moe-ep balance` place experts; returns placements by their names in the table."""
    num_local = recorded.run.num_experts // recorded.run.world_size
    placements = {}
    for more in spare:
        out = recorded.folder / f"placement-{more}.json"
        command = [sys.executable, "-m", "ds_moe_ep", "balance", recorded.folder, "--out", out]
        _run([*map(str, command), "--slots-per-rank", str(num_local + more)])
        placements[f"placed, {more} spare slots a rank" if more else "placed, no copies"] = out
    return placements


def _check_equal_outputs(done: dict[str, list[Metrics]]) -> None:
    expected = (done[_BEFORE][0].folder / _OUTPUT).read_bytes()
    for name, side in done.items():
        if any((each.folder / _OUTPUT).read_bytes() != expected for each in side):
            raise DistributedError(f"other outputs than with {_BEFORE} experts: {name}.")


def _figures(side: Sequence[Metrics]) -> Result:
    """Returns what the jobs of a side recorded: balancedness on the mean, tokens/s as they are."""
    balances = [balance for metrics in side if (balance := balance_of(metrics)) is not None]
    return {
        "balancedness": mean(each.average for each in balances),
        "balancedness_worst_layer": mean(each.of_worst_layer for each in balances),
        "tokens_per_s": vars(Spread.of([_tokens_per_s(metrics) for metrics in side])),
    }


def _tokens_per_s(metrics: Metrics) -> float:
    tokens = sum(rank.new_tokens for rank in metrics.ranks)
    return tokens / max(rank.run_s for rank in metrics.ranks)


def _to_markdown(results: Sequence[Result]) -> str:
    titles = ["ranks", "routing", "experts", "balancedness", "of the worst layer", "tokens/s"]
    rows = []
    for result in results:
        before = result["jobs"][_BEFORE]["tokens_per_s"]["median"]
        for name, job in result["jobs"].items():
            rate = job["tokens_per_s"]
            rows.append(
                [
                    *(result["world_size"], result["routing"], name),
                    *(f"{job[key]:.3f}" for key in ("balancedness", "balancedness_worst_layer")),
                    with_range(rate, digits=0),
                    f"{rate['median'] / before:.2f}",
                ]
            )
    first = results[0]
    hottest = {each["routing"]: each["hottest_factor"] for each in results}
    told = ", ".join(f"{factor:.1f} times ({name})" for name, factor in hottest.items())
    return (
        f"{markdown_table([*titles, 'against before'], rows)}\n\n"
        "Whole jobs, `deepspeed --num_gpus N launch/infer.py`, float32, dispatcher auto, "
        f"{first['prompts']} prompts of {first['prompt_tokens']} tokens in one batch, at most "
        f"{first['new_tokens']} new ones. A job with --metrics records, `ds-moe-ep balance` places "
        "experts, and jobs on other prompts are run in turn, with --placement and without, "
        f"{first['jobs'][_BEFORE]['tokens_per_s']['num_rounds']} of each; their outputs are equal "
        "(checked). All figures are those of their metrics: balancedness of all layers' rows in 8 "
        "passes, on the mean, and that of the layer where it is least; tokens generated a second, "
        "reading the prompts included, median (least to most). "
        f"trained: the bundled model on its book. Others: {SHAPES[first['shape']].num_layers} "
        f"layers of {SHAPES[first['shape']].describe_layer()}, in all of which a token chooses the "
        "experts that were drawn for it; of zipf, expert i in proportion to (i + 1) ** -1.2, so "
        "that the hottest are neighbours. The hottest expert of a layer has "
        f"{told} the mean of its layer."
    )


TABLE = Table(
    name="balance-jobs",
    heading="Placement under skew, whole jobs",
    add_arguments=_add_arguments,
    prepare=_prepare,
    to_markdown=_to_markdown,
    measure_alone=_measure,
)
