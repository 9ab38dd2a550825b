"""Shows a plan to people, in a terminal or a file, and to other programs as JSON.

What it shows is computed in plan.py, placement.py and predict/.
"""

import json
import textwrap
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ds_moe_ep.hostfile import Cluster
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.placement import GpuAssignment, assignment_matrix, ranges, stage_moe_layers
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.predict.describe import describe_prediction
from ds_moe_ep.predict.prediction import Prediction

__all__ = ["PlanReport", "peer_names"]

_COLUMNS = ("GPU", "host", "slot", "experts", "layers", "memory", "load")


@dataclass(frozen=True)
class PlanReport:
    """A plan, what it was made for, and what is predicted of it.

    `notes` are sentences about how it came about.
    """

    plan: ParallelPlan
    spec: ModelSpec
    cluster: Cluster
    prediction: Prediction
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the report as JSON with sorted keys.

        A later version may add keys, but change none of these without another `version`:

            version: 1.
            plan: ep_size, tp_size, pp_size, dp_size, world_size, dense_dp_size.
            identities: the two equations, as text.
            peers: what other projects call the layout, by project.
            cluster: source; num_gpus; hosts, a list of {name, slots}.
            model: every attribute of `ModelSpec`, and is_moe, num_params, num_expert_params.
            weight_bytes_per_gpu: dense, experts and total, of the fullest GPU.
            gpus: in rank order, every attribute of `GpuAssignment`, and `layers`, its MoE layers.
            prediction: prompt_tokens, new_tokens (of the prompts it is for); memory, of a GPU, null
                if tp_size or pp_size > 1: weight_bytes, kv_bytes_per_token, kv_bytes_per_sequence,
                pass_bytes_per_sequence, largest_batch (null if the GPU's memory is not known);
                sent_bytes_per_token, by dispatcher, of all GPUs; hardware, where the figures come
                from, as text, empty without --gpu or --calibration, and then the rest is empty or
                null; batches, a list of {batch_per_gpu, step_s, step_device_s (without launching
                operations), step_shares, step_bound, step_dispatcher, prefill_s, prefill_shares,
                prefill_bound, tokens_per_s, sequences_per_s}; alternative: weight_bytes,
                fits_one_gpu, replicas and expert_parallel (their best batch, or null),
                expert_parallel_quicker_with_batches_per_gpu, expert_parallel_wins_from_params;
                targets, as read; verdicts, a list of {target, is_met, predicted, batch,
                met_up_to_tokens, limit}.
            remarks: sentences for people.
        """
        fullest = self._fullest
        content: dict[str, Any] = {
            "version": 1,
            "plan": {
                **asdict(self.plan),
                "world_size": self.plan.world_size,
                "dense_dp_size": self.plan.dense_dp_size,
            },
            "identities": self.plan.identities(),
            "peers": peer_names(self.plan),
            "cluster": {**asdict(self.cluster), "num_gpus": self.cluster.num_gpus},
            "model": {
                **asdict(self.spec),
                "is_moe": self.spec.is_moe,
                "num_params": self.spec.num_params,
                "num_expert_params": self.spec.num_expert_params,
            },
            "weight_bytes_per_gpu": {
                "dense": fullest.dense_bytes,
                "experts": fullest.expert_bytes,
                "total": fullest.dense_bytes + fullest.expert_bytes,
            },
            "gpus": [{**asdict(row), "layers": self._layers(row)} for row in self._matrix],
            "prediction": self.prediction.to_json(),
            "remarks": self.remarks(),
        }
        return json.dumps(content, indent=2, sort_keys=True)

    def to_text(self) -> str:
        """Return the report as plain text with aligned columns."""
        lines = [self.title()]
        for heading, body in self.sections():
            lines += ["", heading, *(f"  {line}" for line in body)]
        cells = [_COLUMNS, *self.table()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines.append("")
        for row in cells:
            aligned = (
                cell.ljust(width) if column == "host" else cell.rjust(width)
                for cell, width, column in zip(row, widths, _COLUMNS, strict=True)
            )
            lines.append("  ".join(aligned).rstrip())
        for remark in self.remarks():
            lines += ["", *textwrap.wrap(remark, width=80)]
        return "\n".join(lines)

    def print_rich(self) -> None:
        """Print the report to the terminal, with colour and a table."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console(highlight=False)
        console.print(Text(self.title(), style="bold green"))
        for heading, body in self.sections():
            console.print()
            console.print(Text(heading, style="bold cyan"))
            for line in body:
                console.print(Text(f"  {line}"))
        table = Table(box=SIMPLE_HEAD, header_style="bold cyan")
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column == "host" else "right")
        for cells in self.table():
            table.add_row(*map(Text, cells))
        console.print(table)
        for remark in self.remarks():
            console.print(Text(remark, style="yellow"))

    def title(self) -> str:
        """Return the line that says what fits."""
        plural = "" if self.cluster.num_gpus == 1 else "s"
        return f"{self.plan} fits {self.cluster.num_gpus:,} GPU{plural} ({self.cluster.describe()})"

    def sections(self) -> list[tuple[str, list[str]]]:
        """Return the headings before the table, each with its lines."""
        spec, plan = self.spec, self.plan
        return [
            ("Identities", list(plan.identities())),
            (
                "What others call this layout",
                [f"{project}: {name}" for project, name in peer_names(plan).items()],
            ),
            (f"Model {spec.name} ({spec.model_type}, {spec.dtype})", self._model_lines()),
            ("Weights on each GPU", self._weight_lines()),
            *describe_prediction(self.prediction, self.plan.world_size),
            (
                "GPU assignment",
                [
                    "memory: share of one whole set of experts that lies on the GPU",
                    "load: share of the expert work if all experts are chosen equally often",
                ],
            ),
        ]

    def table(self) -> list[tuple[str, ...]]:
        """Return the cells of the assignment matrix, one row per GPU."""
        return [
            (
                str(row.rank),
                row.host,
                str(row.slot),
                ranges(row.experts),
                ranges(self._layers(row)),
                f"{row.expert_memory_share:.2%}",
                f"{row.expected_load_share:.2%}",
            )
            for row in self._matrix
        ]

    def remarks(self) -> list[str]:
        """Return what the reader should know before trusting the figures."""
        remarks = list(self.notes)
        if not self.spec.params_are_exact:
            remarks.append(
                "Parameter counts are an estimate: what the blocks of "
                f"{self.spec.model_type!r} are made of is not known."
            )
        if self.plan.tp_size > 1 or self.plan.pp_size > 1:
            remarks += [
                "launch/infer.py runs plans with tp_size = pp_size = 1 only; this one is for "
                "Megatron.",
                "Dense weights are even shares: norms are whole on each tensor rank, embeddings on "
                "the first and last stage.",
                "Memory of prompts, times and targets are predicted for tp_size = pp_size = 1 "
                "alone.",
            ]
        return remarks

    @cached_property
    def _matrix(self) -> list[GpuAssignment]:
        return assignment_matrix(self.plan, self.spec, self.cluster)

    @property
    def _fullest(self) -> GpuAssignment:
        return max(self._matrix, key=lambda row: row.dense_bytes + row.expert_bytes)

    def _layers(self, row: GpuAssignment) -> tuple[int, ...]:
        return stage_moe_layers(self.plan, self.spec, self.plan.coordinates(row.rank).pp_rank)

    def _model_lines(self) -> list[str]:
        spec = self.spec
        params = (
            f"{_short(spec.num_params)} parameters, {_short(spec.num_dense_params)} of them dense"
        )
        if not spec.is_moe:
            return [params, f"{spec.num_layers} layers, none with routed experts"]
        num_instances = len(spec.moe_layers) * spec.num_experts
        return [
            params,
            f"{len(spec.moe_layers)} of {spec.num_layers} layers have {spec.num_experts} experts: "
            f"{num_instances:,} expert instances of {_short(spec.num_params_per_expert)}",
            f"each token goes to {spec.top_k} experts of a layer",
        ]

    def _weight_lines(self) -> list[str]:
        spec, fullest = self.spec, self._fullest
        num_instances = len(spec.moe_layers) * spec.num_experts
        num_parts = self.plan.tp_size * self.plan.pp_size
        lines = (
            ("dense", fullest.dense_bytes, "all" if num_parts == 1 else f"1/{num_parts}"),
            (
                "experts",
                fullest.expert_bytes,
                f"{fullest.num_expert_instances:,} of {num_instances:,} instances"
                + ("" if self.plan.tp_size == 1 else f", 1/{self.plan.tp_size} of each"),
            ),
            ("total", fullest.dense_bytes + fullest.expert_bytes, ""),
        )
        # One unit for all three, so that they can be compared; MiB for models of toy size.
        unit, unit_bytes = ("GiB", 2**30) if lines[-1][1] >= 2**28 else ("MiB", 2**20)
        return [
            f"{name:<7} {num_bytes / unit_bytes:9.2f} {unit}  {text}".rstrip()
            for name, num_bytes, text in lines
        ]


def peer_names(plan: ParallelPlan) -> dict[str, str]:
    """Return what other projects call the layout of a plan, by project."""
    return {"DeepSpeed": _deepspeed_name(plan), "vLLM": _vllm_name(plan)}


def _deepspeed_name(plan: ParallelPlan) -> str:
    if plan.ep_size > 1 and plan.tp_size == plan.dp_size == 1:
        name = '"E" (expert-only)'
    else:
        parts = (("E", plan.ep_size), ("M", plan.tp_size), ("D", plan.dp_size))
        letters = " + ".join(letter for letter, size in parts if size > 1)
        name = f'"{letters}" (E experts, M model, D data)' if letters else "a single copy"
    return name if plan.pp_size == 1 else f"{name}, with {plan.pp_size} pipeline stages"


def _vllm_name(plan: ParallelPlan) -> str:
    if plan.tp_size > 1:
        return "no name for it: its tensor-parallel ranks hold whole experts"
    name = f"data-parallel attention of {plan.ep_size} with EP {plan.ep_size}"
    if plan.ep_size == 1:
        name = f"data parallelism of {plan.dp_size} without expert parallelism"
    elif plan.dp_size > 1:
        name = f"{plan.dp_size} instances, each with {name}"
    return name if plan.pp_size == 1 else f"{name}, with {plan.pp_size} pipeline stages"


def _short(number: int) -> str:
    """Return a count with four digits at most: 6.92 B, 476.7 M."""
    for unit, suffix in ((10**12, " T"), (10**9, " B"), (10**6, " M")):
        if number >= unit:
            value = number / unit
            return f"{value:.{1 if value >= 100 else 2}f}{suffix}"
    return f"{number:,}"
