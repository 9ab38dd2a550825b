"""The parallel plan: its sizes, the identities that tie them to the GPUs, each rank's groups.

It is arithmetic on integers. Which expert lives where is in placement.py; process groups are made
in dist/.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ds_moe_ep.errors import PlanError
from ds_moe_ep.hostfile import Cluster
from ds_moe_ep.model_spec import ModelSpec

__all__ = [
    "HOW_TO_UPCYCLE",
    "Coordinates",
    "ParallelPlan",
    "check_plan",
    "make_plan",
    "nearest_plans",
    "uneven_experts",
    "valid_ep_sizes",
]

HOW_TO_UPCYCLE = (
    "To get some, upcycle the model: copy each FFN into every expert of an MoE layer and add a "
    "router (sparse upcycling, arXiv 2212.05055): ds-moe-ep convert MODEL DST --to ep "
    "--upcycle-experts 64 --top-k 2"
)
"""What to do about a dense model; the end of a message, without its full stop."""

_SIZES_SPLIT_BY_TP = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands in each parallel dimension."""

    pp_rank: int
    dp_rank: int
    ep_rank: int
    tp_rank: int


@dataclass(frozen=True)
class ParallelPlan:
    """Sizes of the parallel dimensions.

    Ranks are numbered tp first, then ep, dp, pp: with tp_size=1 an expert group is a run of
    consecutive ranks, as DeepSpeed makes it.

    Attributes:
        ep_size: ranks that the experts of a layer are spread over.
        tp_size: ranks that each tensor is spread over.
        pp_size: ranks that the layers are spread over.
        dp_size: copies of each expert.
    """

    ep_size: int
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1

    def __str__(self) -> str:
        """Return the plan as people write it, "EP64 TP1 PP1 DP1"."""
        return f"EP{self.ep_size} TP{self.tp_size} PP{self.pp_size} DP{self.dp_size}"

    @property
    def world_size(self) -> int:
        """Number of ranks, one per GPU."""
        return self.ep_size * self.tp_size * self.pp_size * self.dp_size

    @property
    def dense_dp_size(self) -> int:
        """Number of replicas of the dense weights, each with its own part of the batch."""
        return self.ep_size * self.dp_size

    def identities(self) -> tuple[str, str]:
        """Return the two identities of sizes and number of GPUs, with numbers filled in."""
        tp_and_pp = f"tp_size {self.tp_size} * pp_size {self.pp_size}"
        gpus = _gpus(self.world_size)
        return (
            f"experts: ep_size {self.ep_size} * {tp_and_pp} * dp_size {self.dp_size} = {gpus}",
            f"dense: dense_dp_size {self.dense_dp_size} * {tp_and_pp} = {gpus}",
        )

    def coordinates(self, rank: int) -> Coordinates:
        """Return where a rank stands in each dimension.

        Raises:
            IndexError: if there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} is not one of {self.world_size} ranks")
        rest, tp_rank = divmod(rank, self.tp_size)
        rest, ep_rank = divmod(rest, self.ep_size)
        pp_rank, dp_rank = divmod(rest, self.dp_size)
        return Coordinates(pp_rank=pp_rank, dp_rank=dp_rank, ep_rank=ep_rank, tp_rank=tp_rank)

    def rank(self, at: Coordinates) -> int:
        """Return the global rank at some coordinates; the inverse of `coordinates`."""
        return (
            (at.pp_rank * self.dp_size + at.dp_rank) * self.ep_size + at.ep_rank
        ) * self.tp_size + at.tp_rank

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the parts of the same tensors as `rank`."""
        return self._group(rank, tp=True)

    def ep_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that together hold one copy of every expert, `rank` among them."""
        return self._group(rank, ep=True)

    def edp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold a copy of the same experts as `rank`."""
        return self._group(rank, dp=True)

    def dense_dp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold a copy of the same dense weights as `rank`."""
        return self._group(rank, ep=True, dp=True)

    def pp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the successive stages of the model `rank` is a stage of."""
        return self._group(rank, pp=True)

    def _group(
        self, rank: int, *, pp: bool = False, dp: bool = False, ep: bool = False, tp: bool = False
    ) -> tuple[int, ...]:
        """Return the ranks that differ from `rank` in the named dimensions only, ascending."""
        at = self.coordinates(rank)
        return tuple(
            self.rank(Coordinates(pp_rank, dp_rank, ep_rank, tp_rank))
            for pp_rank in (range(self.pp_size) if pp else (at.pp_rank,))
            for dp_rank in (range(self.dp_size) if dp else (at.dp_rank,))
            for ep_rank in (range(self.ep_size) if ep else (at.ep_rank,))
            for tp_rank in (range(self.tp_size) if tp else (at.tp_rank,))
        )


def valid_ep_sizes(num_experts: int, at_most: int | None = None) -> list[int]:
    """Return the divisors of num_experts up to `at_most`, ascending."""
    limit = num_experts if at_most is None else at_most
    return [size for size in _divisors(num_experts) if size <= limit]


def uneven_experts(ep_size: int, num_experts: int, where: str, ep_note: str = "") -> str:
    """Return why an ep_size that does not divide num_experts is refused, without a full stop.

    Args:
        ep_size: ranks that the experts of a layer were to be spread over.
        num_experts: experts of the layer.
        where: the layer.
        ep_note: what is to be said of ep_size.
    """
    return (
        f"ep_size={ep_size}{ep_note} does not divide num_experts={num_experts} ({where}): every "
        f"rank must own the same number of experts. Use ep_size in {valid_ep_sizes(num_experts)}"
    )


def make_plan(
    cluster: Cluster,
    spec: ModelSpec | None = None,
    *,
    ep_size: int | None = None,
    tp_size: int = 1,
    pp_size: int = 1,
    dp_size: int = 1,
) -> ParallelPlan:
    """Return the plan of these sizes after checking it.

    Args:
        cluster: the GPUs to fill.
        spec: the model; without it only the number of GPUs is checked.
        ep_size: ranks that the experts of a layer are spread over; by default what fills the GPUs.
        tp_size: ranks that each tensor is spread over.
        pp_size: ranks that the layers are spread over.
        dp_size: copies of each expert.

    Raises:
        PlanError: with the numbers and the nearest plans that fit.
    """
    others = ParallelPlan(ep_size=1, tp_size=tp_size, pp_size=pp_size, dp_size=dp_size)
    if ep_size is not None:
        plan = replace(others, ep_size=ep_size)
        check_plan(plan, cluster, spec)
        return plan
    _check_sizes(others)
    ep_size, rest = divmod(cluster.num_gpus, others.world_size)
    plan = replace(others, ep_size=max(1, ep_size))
    if rest:
        misfit = (
            f"tp_size={tp_size} * pp_size={pp_size} * dp_size={dp_size} = {others.world_size} does "
            f"not divide {_gpus(cluster.num_gpus)} ({cluster.describe()}), so no ep_size fills them"
        )
        raise PlanError(f"{misfit}. {_way_out(plan, cluster.num_gpus, spec)}")
    _check(plan, cluster, spec, ep_note=", the default that fills the GPUs,")
    return plan


def check_plan(plan: ParallelPlan, cluster: Cluster, spec: ModelSpec | None = None) -> None:
    """Refuse a plan that does not fill the cluster or does not suit the model.

    Raises:
        PlanError: with the numbers and the nearest plans that fit.
    """
    _check_sizes(plan)
    _check(plan, cluster, spec)


def _check(plan: ParallelPlan, cluster: Cluster, spec: ModelSpec | None, ep_note: str = "") -> None:
    misfits = [] if spec is None else [*_ep_misfits(plan, spec, ep_note)]
    if plan.world_size != cluster.num_gpus:
        misfits.append(_gpu_mismatch(plan, cluster))
    if spec is not None:
        misfits += _split_misfits(plan, spec)
    if misfits:
        raise PlanError(f"{'. '.join(misfits)}. {_way_out(plan, cluster.num_gpus, spec)}")


def nearest_plans(
    wanted: ParallelPlan, num_gpus: int, spec: ModelSpec | None = None, at_most: int = 4
) -> list[ParallelPlan]:
    """Return the plans that fill `num_gpus` and suit the model, those most like `wanted` first.

    Keeping ep_size counts most; splitting tensors or layers further than wanted comes last. There
    is always one: copies of the whole model, ep_size = tp_size = pp_size = 1.
    """

    def order(plan: ParallelPlan) -> tuple[bool, float, int]:
        splits_more = plan.tp_size > wanted.tp_size or plan.pp_size > wanted.pp_size
        changes = (
            3 * _doublings(plan.ep_size, wanted.ep_size)
            + _doublings(plan.tp_size, wanted.tp_size)
            + _doublings(plan.pp_size, wanted.pp_size)
            + _doublings(plan.dp_size, wanted.dp_size)
        )
        return splits_more, changes, -plan.ep_size

    fitting = [
        plan
        for plan in _factorizations(num_gpus)
        if spec is None or not any((*_ep_misfits(plan, spec), *_split_misfits(plan, spec)))
    ]
    return sorted(fitting, key=order)[:at_most]


def _doublings(size: int, other: int) -> float:
    return abs(math.log2(size / other))


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size != number]


def _factorizations(num_gpus: int) -> Iterator[ParallelPlan]:
    """Yield every plan of exactly this many GPUs."""
    for ep_size in _divisors(num_gpus):
        for tp_size in _divisors(num_gpus // ep_size):
            for pp_size in _divisors(num_gpus // (ep_size * tp_size)):
                dp_size = num_gpus // (ep_size * tp_size * pp_size)
                yield ParallelPlan(ep_size, tp_size, pp_size, dp_size)


def _check_sizes(plan: ParallelPlan) -> None:
    for name, size in vars(plan).items():
        if size < 1:
            raise PlanError(f"{name}={size}: every size is at least 1.")


def _ep_misfits(plan: ParallelPlan, spec: ModelSpec, ep_note: str = "") -> Iterator[str]:
    """Yield why the experts of a model cannot be spread as planned."""
    if not spec.is_moe:
        if plan.ep_size > 1:
            yield (
                f"ep_size={plan.ep_size}{ep_note} but {spec.name} ({spec.model_type}) has no MoE "
                f"layer, so there are no experts to spread. {HOW_TO_UPCYCLE}"
            )
    elif spec.num_experts % plan.ep_size:
        where = f"layer {spec.moe_layers[0]} of {spec.name}"
        yield uneven_experts(plan.ep_size, spec.num_experts, where, ep_note)


def _split_misfits(plan: ParallelPlan, spec: ModelSpec) -> Iterator[str]:
    """Yield why the tensors and layers of a model cannot be spread as planned."""
    sizes = {name: getattr(spec, name) for name in _SIZES_SPLIT_BY_TP}
    undivided = [f"{name}={size}" for name, size in sizes.items() if size % plan.tp_size]
    if undivided:
        yield (
            f"tp_size={plan.tp_size} does not divide {', '.join(undivided)} of {spec.name}: every "
            f"rank must hold as much. Use tp_size in {_divisors(math.gcd(*sizes.values()))}"
        )
    if plan.pp_size > spec.num_layers:
        yield (
            f"pp_size={plan.pp_size} is more than num_layers={spec.num_layers} of {spec.name}: "
            f"every stage needs a layer. Use pp_size up to {spec.num_layers}"
        )


def _way_out(wanted: ParallelPlan, num_gpus: int, spec: ModelSpec | None) -> str:
    """Return the sentence with plans that fit, on all GPUs and, if that spreads wider, on fewer."""
    plans = nearest_plans(wanted, num_gpus, spec)
    text = f"Plans that fit {_gpus(num_gpus)}: {'; '.join(map(str, plans))}."
    if spec is not None and spec.is_moe:
        widest = max(valid_ep_sizes(spec.num_experts, num_gpus))
        if num_gpus % widest:
            text += f" On {widest} of them: {ParallelPlan(ep_size=widest)}."
    return text


def _gpu_mismatch(plan: ParallelPlan, cluster: Cluster) -> str:
    needed, there = plan.world_size, cluster.num_gpus
    times = needed / there
    more = f"{times:,.0f}x as many" if times >= 10 else f"{times:.3g}x as many"
    comparison = more if needed > there else f"{there - needed:,} would idle"
    sizes = " * ".join(str(size) for size in vars(plan).values())
    return (
        f"{plan} needs {sizes} = {_gpus(needed)}, but {there:,} are there ({cluster.describe()}): "
        f"{comparison}"
    )


def _gpus(number: int) -> str:
    return f"{number:,} GPU" + ("" if number == 1 else "s")
