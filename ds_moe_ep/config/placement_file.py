"""placement.json: which expert is in which slot of which rank, written and read by one schema."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from ds_moe_ep.config.strict import Strict, parse, read_json
from ds_moe_ep.errors import ConfigError, PlanError
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.placement import SlotPlacement
from ds_moe_ep.plan import ParallelPlan

__all__ = ["check_placement", "placement_json", "read_placement"]

_AGAIN = "ds-moe-ep balance METRICS_DIR --out placement.json"


class LayerSection(Strict):
    """The expert of each slot of a layer, rank after rank."""

    layer: NonNegativeInt
    expert_of_slot: list[NonNegativeInt]


class PlacementFile(Strict):
    """The content of placement.json."""

    format: Literal["ds_moe_ep placement"] = "ds_moe_ep placement"
    version: Literal[1]
    num_experts: PositiveInt
    num_ranks: PositiveInt
    slots_per_rank: PositiveInt
    layers: Annotated[list[LayerSection], Field(min_length=1)]

    @model_validator(mode="after")
    def _hangs_together(self) -> "PlacementFile":
        numbers = [section.layer for section in self.layers]
        if sorted(set(numbers)) != numbers:
            raise ValueError(f"layers {numbers} are not in ascending order, each once")
        num_slots = self.num_ranks * self.slots_per_rank
        if self.num_experts > num_slots:
            raise ValueError(
                f"num_experts={self.num_experts} is more than the {num_slots} slots of num_ranks="
                f"{self.num_ranks} with slots_per_rank={self.slots_per_rank}"
            )
        for section in self.layers:
            held = section.expert_of_slot
            if len(held) != num_slots:
                raise ValueError(
                    f"layer {section.layer} fills {len(held)} slots, num_ranks={self.num_ranks} "
                    f"with slots_per_rank={self.slots_per_rank} have {num_slots}"
                )
            if unknown := sorted(set(held) - set(range(self.num_experts))):
                raise ValueError(
                    f"layer {section.layer} has expert {unknown[0]}, num_experts="
                    f"{self.num_experts} are numbered from 0"
                )
            if lacking := sorted(set(range(self.num_experts)) - set(held)):
                raise ValueError(f"layer {section.layer} has no slot with expert {lacking[0]}")
        return self


def placement_json(placement: SlotPlacement) -> str:
    """Return the text of placement.json, a layer a line."""
    layers = [
        LayerSection(layer=layer, expert_of_slot=list(held))
        for layer, held in placement.expert_of_slot.items()
    ]
    content = PlacementFile(
        version=1,
        num_experts=placement.num_experts,
        num_ranks=placement.num_ranks,
        slots_per_rank=placement.slots_per_rank,
        layers=layers,
    ).model_dump()
    lines = ",\n".join(f"  {json.dumps(section)}" for section in content.pop("layers"))
    fields = "".join(f" {json.dumps(key)}: {json.dumps(v)},\n" for key, v in content.items())
    return f'{{\n{fields} "layers": [\n{lines}\n ]\n}}\n'


def read_placement(path: Path) -> SlotPlacement:
    """Return the placement in a file.

    Raises:
        ConfigError: if it cannot be read, or is not whole.
    """
    file = parse(PlacementFile, read_json(path), path)
    return SlotPlacement(
        file.num_experts,
        file.num_ranks,
        file.slots_per_rank,
        {section.layer: tuple(section.expert_of_slot) for section in file.layers},
    )


def check_placement(
    placement: SlotPlacement, plan: ParallelPlan, spec: ModelSpec, source: Path
) -> None:
    """Refuse a placement that was made for other ranks or another model.

    Args:
        placement: what was read.
        plan: the parallel sizes of this job.
        spec: its model.
        source: the file, for messages.

    Raises:
        ConfigError: if the model has other layers or another number of experts.
        PlanError: if an expert group has another number of ranks.
    """
    if (placement.num_experts, placement.moe_layers) != (spec.num_experts, spec.moe_layers):
        raise ConfigError(
            f"{source} places {_layers(placement.num_experts, placement.moe_layers)}; "
            f"{spec.name} has {_layers(spec.num_experts, spec.moe_layers)}. Record a run of this "
            f"model and write it again: {_AGAIN}."
        )
    if placement.num_ranks != plan.ep_size:
        raise PlanError(
            f"{source} places experts on num_ranks={placement.num_ranks}, but this job spreads "
            f"them over ep_size={plan.ep_size}. Use --ep-size {placement.num_ranks} with a "
            f"multiple of {placement.num_ranks} ranks, or write it again for these: {_AGAIN} "
            f"--num-ranks {plan.ep_size}."
        )


def _layers(num_experts: int, layers: tuple[int, ...]) -> str:
    first, last = min(layers, default=0), max(layers, default=0)
    return f"{num_experts} experts in {len(layers)} layers, numbers {first} to {last}"
