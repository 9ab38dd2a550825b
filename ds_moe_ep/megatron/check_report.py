"""The report of `ds-moe-ep megatron check`: what each stage said, and what each rank would hold."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from ds_moe_ep.megatron.ownership import RankPart
from ds_moe_ep.placement import ranges

__all__ = ["OWN_CHECKS", "STAGES", "CheckReport", "GroupSizes"]

STAGES = (
    "parse_args",
    "validate_args",
    "core_transformer_config_from_args",
    "initialize_model_parallel",
    "GPTModel",
)
"""Megatron's stages in their order, by the names of its functions."""

OWN_CHECKS = "checks of ds_moe_ep"


@dataclass(frozen=True)
class GroupSizes:
    """Sizes of the groups that Megatron made, in its words."""

    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    expert_parallel: int
    expert_tensor_parallel: int
    expert_data_parallel: int


@dataclass
class CheckReport:
    """What was found.

    Attributes:
        world_size: Number of ranks asked for.
        problems: Stage, or `OWN_CHECKS`, to what is wrong. A stage's are in Megatron's own words.
        not_reached: Stages that were not asked because an earlier one failed.
        sizes: Of the groups; None if they could not be made.
        ranks: What each rank would hold; empty if a stage failed.
    """

    world_size: int
    problems: dict[str, str] = field(default_factory=dict)
    not_reached: tuple[str, ...] = ()
    sizes: GroupSizes | None = None
    ranks: list[RankPart] = field(default_factory=list)

    def to_text(self) -> str:
        """Returns the report for people."""
        lines = [f"{name:<34} {self._verdict(name)}" for name in (OWN_CHECKS, *STAGES)]
        return "\n".join((*lines, *self._groups(), *self._ranks())) + "\n"

    def to_json(self) -> dict[str, object]:
        """Returns the report for other programs, as what JSON can hold."""
        return {
            "world_size": self.world_size,
            "problems": self.problems,
            "not_reached": list(self.not_reached),
            "group_sizes": self.sizes and asdict(self.sizes),
            "ranks": [asdict(part) for part in self.ranks],
        }

    def _verdict(self, name: str) -> str:
        if name in self.problems:
            return f"FAIL  {self.problems[name]}"
        return "not reached" if name in self.not_reached else "pass"

    def _groups(self) -> Iterator[str]:
        if self.sizes is not None:
            sizes = ", ".join(
                f"{name.replace('_', ' ')} {size}" for name, size in asdict(self.sizes).items()
            )
            yield f"\nGroups of {self.world_size} ranks: {sizes}"

    def _ranks(self) -> Iterator[str]:
        if self.ranks:
            yield f"\n{'rank':>5} {'dense params':>15} {'expert params':>15}  experts"
        for part in self.ranks:
            yield (
                f"{part.rank:>5} {part.dense_params:>15,} {part.expert_params:>15,}  "
                f"{_experts_text(part)}"
            )


def _experts_text(part: RankPart) -> str:
    """Returns the experts of a rank and their layers; layers with the same experts go together."""
    layers: dict[tuple[int, ...], list[int]] = {}
    for layer, experts in part.experts.items():
        layers.setdefault(experts, []).append(layer)
    texts = (f"{ranges(experts)} of layers {ranges(of)}" for experts, of in layers.items())
    return "; ".join(texts) or "none"
