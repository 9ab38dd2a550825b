"""Metrics folders made by code: a small one with figures to work out by hand, and a large one.

Nothing in them was measured.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

__all__ = ["large_metrics", "small_metrics", "write_metrics_folder"]

Files = dict[str, Any]
"""By file name, what stands in it: an object of a .json file, a list of them of a .jsonl file."""

_PARTS = ("attention", "router", "dispatch", "experts", "combine", "other")


def write_metrics_folder(folder: Path, files: Files) -> Path:
    """Writes a metrics folder, made if it is not there, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        lines = content if name.endswith(".jsonl") else [content]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def small_metrics() -> Files:
    """Returns a CPU run of 4 ranks, 2 MoE layers and 8 experts, of round numbers.

    Rank 3 is slow: its experts take 4 s and not 2 s, with 400 rows where the others have 200, and
    the others wait for it. Expert 7 of layer 3 takes 120 of 320 tokens: 3 times the mean of 40.
    """
    ranks = [_small_rank(rank) for rank in range(4)]
    samples = [
        {
            "t_s": float(second),
            "rank": rank,
            "utilisation": 0.5 + 0.1 * rank,
            "memory_bytes": (100 + rank) * 2**20,
            "step": 4 * second,
            "new_tokens": 8 * second,
            "prompts_done": second // 5,
            "prompts_queued": 2 - second // 5,
            "batch_size": 2,
            "collectives": 8 * second,
            "collectives_s": (0.012 if rank == 3 else 0.020) * second,
            "at": f"batch {1 + second // 5} of 3",
        }
        for second in range(1, 11)
        for rank in range(4)
    ]
    return {
        "run.json": _run(4, ["node-a", "node-a", "node-b", "node-b"], [1, 3], 8, 2),
        "samples.jsonl": samples,
        "metrics.jsonl": ranks,
        "experts.jsonl": [
            {"layer": 1, "tokens_per_expert": [40] * 8},
            {"layer": 3, "tokens_per_expert": [30, 30, 30, 30, 30, 30, 20, 120]},
        ],
        # By the number of passes: (10 * 0.6 + 30 * 0.8) / 40 = 0.75, and of the layers 0.95 and
        # (10 * 0.4 + 30 * 0.6) / 40 = 0.55.
        "balance.jsonl": [
            {"first_step": 1, "last_step": 10, "overall": 0.6, "layers": [0.8, 0.4]},
            {"first_step": 11, "last_step": 40, "overall": 0.8, "layers": [1.0, 0.6]},
        ],
        "bringup.jsonl": _bring_up(),
    }


def _bring_up() -> list[dict[str, Any]]:
    def check(name: str, verdict: str, reason: str) -> dict[str, Any]:
        found = {"name": name, "verdict": verdict, "reason": reason}
        return found | {"measured": None, "target": None, "unit": ""}

    checks = {
        "place experts": [check("experts", "pass", "ranks hold 16 experts of 2 layers, each once")],
        "configure communication": [
            check("values", "pass", "all-gather, all-to-all and all-reduce are right"),
            check("latency flat", "warn", "all-gather 1.7, all-to-all 1.6 ms (target 1) & <slow>"),
        ],
        "optimise batch distribution": [check("batch size", "pass", "2, as asked for")],
        "fine-tune memory": [check("weights", "pass", "40 MiB predicted, 40 MiB held")],
    }
    return [
        {
            "phase": number,
            "name": name,
            "verdict": found[-1]["verdict"],
            "seconds": 0.25 * number,
            "checks": found,
        }
        for number, (name, found) in enumerate(checks.items(), start=1)
    ]


def _run(
    world_size: int, hosts: list[str], layers: list[int], num_experts: int, top_k: int
) -> dict[str, Any]:
    return {
        "version": 2,
        "command": ["launch/infer.py", "--model", "tiny & <b>", "--metrics", "out"],
        "started_at": "2026-11-25T09:00:00+00:00",
        "model": "models/tiny & <b>",
        "model_type": "qwen3_moe",
        "plan": {
            "ep_size": world_size,
            "tp_size": 1,
            "pp_size": 1,
            "dp_size": 1,
            "world_size": world_size,
            "dense_dp_size": world_size,
        },
        "task": "generate",
        "dtype": "float32",
        "dispatcher": "allgather for decode steps",
        "batch_mode": "sharded",
        "hosts": hosts,
        "device": "cpu",
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "moe_layers": layers,
        "num_experts": num_experts,
        "top_k": top_k,
        "predicted_memory_bytes": 100 * 2**20,
    }


def _small_rank(rank: int) -> dict[str, Any]:
    is_slow = rank == 3
    prefill = {part: 0.1 for part in _PARTS}
    decode = {
        "attention": 1.0,
        "router": 0.5,
        "dispatch": 0.5 if is_slow else 1.5,
        "experts": 4.0 if is_slow else 2.0,
        "combine": 0.5 if is_slow else 1.5,
        "other": 0.5,
    }
    p50_s = 0.0005 if is_slow else 0.002
    collective = {"count": 80, "sent_bytes": 80 * 2048, "p50_s": p50_s, "p95_s": 0.004}
    return {
        "rank": rank,
        "host": "node-a" if rank < 2 else "node-b",
        "dispatcher": "allgather",
        "num_prompts": 3,
        "prompt_tokens": 30,
        "new_tokens": 80,
        "expert_rows": 400 if is_slow else 200,
        "load_s": 1.5,
        "run_s": 10.0,
        "comm_s": 1.0 if is_slow else 3.0,
        "comm_bytes": 80 * 2048,
        "num_steps": 40,
        "num_replays": 0,
        "peak_memory_bytes": (110 if is_slow else 100) * 2**20,
        "utilisation": 0.5 + 0.1 * rank,
        "num_passes": {"prefill": 2, "decode": 38},
        "parts_s": {"prefill": prefill, "decode": decode},
        "collectives": {
            "gather": {**collective, "max_s": 0.008, "histogram": [[p50_s, 50], [0.008, 30]]}
        },
        "first_token_s": {"p50": 0.4, "p95": 0.6, "max": 0.9},
        "pass_s": {
            "prefill": {"p50": 0.3, "p95": 0.35, "max": 0.4},
            "decode": {"p50": 0.2 + 0.01 * rank, "p95": 0.25, "max": 0.3},
        },
    }


def large_metrics(seed: int = 0) -> Files:
    """Returns a GPU run of 8 hosts of 8 ranks, 16 MoE layers and 64 experts, of drawn figures."""
    drawn = random.Random(seed)
    hosts = [f"worker-{rank // 8}" for rank in range(64)]
    layers = list(range(16))
    loads: list[dict[str, Any]] = []
    for layer in layers:
        weights = [drawn.lognormvariate(0, 0.45) for _ in range(64)]
        loads.append(
            {"layer": layer, "tokens_per_expert": [int(2e5 * weight) for weight in weights]}
        )
    rows = [sum(load["tokens_per_expert"][rank] for load in loads) for rank in range(64)]
    run = _run(64, hosts, layers, 64, 8)
    run |= {
        "model": "OLMoE-1B-7B",
        "command": "launch/infer.py --model OLMoE-1B-7B --input prompts.jsonl --output "
        "outputs.jsonl --metrics metrics".split(),
        "model_type": "olmoe",
        "device": "made-up GPU",
        "dtype": "bfloat16",
        "predicted_memory_bytes": 68 * 2**30,
        "available_memory_bytes": 76 * 2**30,
        "dispatcher": "auto: alltoall-2level for prefill, allgather-2level for decode steps",
    }
    return {
        "run.json": run,
        "samples.jsonl": [
            _large_sample(second, rank, drawn) for second in range(1, 121) for rank in range(64)
        ],
        "metrics.jsonl": [_large_rank(rank, rows, hosts, drawn) for rank in range(64)],
        "experts.jsonl": loads,
        "balance.jsonl": [
            {
                "first_step": 100 * window + 1,
                "last_step": 100 * window + 100,
                "overall": 0.8 + 0.1 * drawn.random(),
                "layers": [0.5 + 0.4 * drawn.random() for _ in layers],
            }
            for window in range(40)
        ],
        "bringup.jsonl": _bring_up(),
    }


def _large_sample(second: int, rank: int, drawn: random.Random) -> dict[str, Any]:
    return {
        "t_s": second + 0.01 * rank / 64,
        "rank": rank,
        "utilisation": min(1.0, max(0.0, drawn.gauss(0.9 - 0.3 * math.exp(-second / 6), 0.03))),
        "memory_bytes": int((64 + 2 * drawn.random()) * 2**30),
        "step": 33 * second,
        "new_tokens": 33 * 48 * second,
        "prompts_done": 12 * second,
        "prompts_queued": 12 * (120 - second),
        "batch_size": 48,
        "collectives": 1000 * second,
        "collectives_s": 0.2 * second,
        "at": f"batch {1 + second // 4} of 30",
    }


def _large_rank(
    rank: int, rows: list[int], hosts: list[str], drawn: random.Random
) -> dict[str, Any]:
    experts_s = 30 * rows[rank] * 64 / sum(rows)
    waiting_s = 30 * max(rows) * 64 / sum(rows) - experts_s
    parts = {
        "attention": drawn.gauss(22, 0.4),
        "router": 3.0,
        "dispatch": 12 + 0.6 * waiting_s,
        "experts": experts_s,
        "combine": 14 + 0.4 * waiting_s,
        "other": 9.0,
    }
    collectives = {
        kind: _drawn_collective(drawn, scale_s)
        for kind, scale_s in (("exchange", 6e-4), ("gather", 2.5e-4), ("counts", 6e-5))
    }
    return {
        "rank": rank,
        "host": hosts[rank],
        "dispatcher": "auto",
        "num_prompts": 1440,
        "prompt_tokens": 1440 * 200,
        "new_tokens": 1440 * 132,
        "expert_rows": rows[rank],
        "load_s": 21 + drawn.random(),
        "run_s": 120.0,
        "comm_s": parts["dispatch"] + parts["combine"],
        "comm_bytes": 3 * 10**11,
        "num_steps": 4000,
        "num_replays": 0,
        "peak_memory_bytes": int((66 + 1.5 * drawn.random()) * 2**30),
        "utilisation": min(1.0, drawn.gauss(0.88, 0.02)),
        "num_passes": {"prefill": 30, "decode": 3970},
        "parts_s": {
            "prefill": {part: 0.12 * seconds for part, seconds in parts.items()},
            "decode": {part: 0.88 * seconds for part, seconds in parts.items()},
        },
        "collectives": collectives,
        "first_token_s": {"p50": 0.31, "p95": 0.42, "max": 0.61},
        "pass_s": {
            "prefill": {"p50": 0.36, "p95": 0.41, "max": 0.6},
            "decode": {"p50": 0.0262, "p95": 0.0310, "max": 0.0551},
        },
    }


def _drawn_collective(drawn: random.Random, scale_s: float) -> dict[str, Any]:
    times_s = sorted(drawn.lognormvariate(math.log(scale_s), 0.5) for _ in range(400))
    buckets: dict[int, int] = {}
    for seconds in times_s:
        bucket = math.ceil(8 * math.log2(seconds))
        buckets[bucket] = buckets.get(bucket, 0) + 160
    return {
        "count": 64_000,
        "sent_bytes": 64_000 * 400_000,
        "p50_s": times_s[200],
        "p95_s": times_s[380],
        "max_s": times_s[-1],
        "histogram": [[2.0 ** (bucket / 8), count] for bucket, count in sorted(buckets.items())],
    }
