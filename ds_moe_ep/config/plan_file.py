"""plan.json and placement.csv: a plan as data, for other programs, for people and for reading back.

The same schema writes plan.json and reads it, so the two cannot drift apart.
"""

import csv
import io
import json
from dataclasses import asdict
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from ds_moe_ep.config.strict import Strict
from ds_moe_ep.hostfile import Cluster
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.placement import assignment_matrix
from ds_moe_ep.plan import ParallelPlan

__all__ = [
    "PLACEMENT_CSV",
    "PLAN_JSON",
    "PlanFile",
    "SizesSection",
    "make_plan_file",
    "placement_csv",
    "to_json",
]

PLAN_JSON = "plan.json"
PLACEMENT_CSV = "placement.csv"


class ModelSection(Strict):
    """The model a plan was made for."""

    name: str
    model_type: str
    architecture: str
    dtype: str
    num_layers: PositiveInt
    num_moe_layers: PositiveInt
    num_experts: PositiveInt
    top_k: PositiveInt
    num_params: PositiveInt
    num_expert_params: PositiveInt


class SizesSection(Strict):
    """The sizes of `ParallelPlan`, and the two that follow from them."""

    ep_size: PositiveInt
    tp_size: PositiveInt
    pp_size: PositiveInt
    dp_size: PositiveInt
    world_size: PositiveInt
    dense_dp_size: PositiveInt

    @classmethod
    def of(cls, plan: ParallelPlan) -> "SizesSection":
        """Return the sizes of a plan."""
        return cls(**asdict(plan), world_size=plan.world_size, dense_dp_size=plan.dense_dp_size)


class BytesSection(Strict):
    """Bytes of weights on the fullest GPU."""

    dense: NonNegativeInt
    experts: NonNegativeInt
    total: NonNegativeInt


class PlanFile(Strict):
    """The content of plan.json; where `ds-moe-ep plan --json` says the same, it uses these names.

    `hosts` has one `name:slot,slot,...` for each host, the way DeepSpeed's `--include` spells it.
    """

    version: Literal[1]
    plan: SizesSection
    identities: list[str]
    hosts: list[str]
    model: ModelSection
    weight_bytes_per_gpu: BytesSection

    def to_plan(self) -> ParallelPlan:
        """Return the plan that this file describes."""
        sizes = self.plan
        return ParallelPlan(sizes.ep_size, sizes.tp_size, sizes.pp_size, sizes.dp_size)


def make_plan_file(plan: ParallelPlan, spec: ModelSpec, cluster: Cluster) -> PlanFile:
    """Return the content of plan.json."""
    matrix = assignment_matrix(plan, spec, cluster)
    fullest = max(matrix, key=lambda row: row.dense_bytes + row.expert_bytes)
    return PlanFile(
        version=1,
        plan=SizesSection.of(plan),
        identities=list(plan.identities()),
        hosts=[host.slot_filter for host in cluster.hosts],
        model=ModelSection(
            name=spec.name,
            model_type=spec.model_type,
            architecture=spec.architecture,
            dtype=spec.dtype,
            num_layers=spec.num_layers,
            num_moe_layers=len(spec.moe_layers),
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            num_params=spec.num_params,
            num_expert_params=spec.num_expert_params,
        ),
        weight_bytes_per_gpu=BytesSection(
            dense=fullest.dense_bytes,
            experts=fullest.expert_bytes,
            total=fullest.dense_bytes + fullest.expert_bytes,
        ),
    )


def placement_csv(plan: ParallelPlan, spec: ModelSpec, cluster: Cluster) -> str:
    """Return one line per GPU, in rank order: where it is, its experts and how much they are.

    A GPU holds the same experts in each of its MoE layers; their ids are separated by spaces.
    """
    rows = [asdict(row) for row in assignment_matrix(plan, spec, cluster)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "experts": " ".join(map(str, row["experts"]))})
    return text.getvalue()


def to_json(content: object) -> str:
    """Return JSON that is the same for the same content: sorted keys, one value a line, ASCII."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
