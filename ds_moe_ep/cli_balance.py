"""`ds-moe-ep balance`: reads its command line, and tells what a placement would make of the loads.

How experts are placed is in balance.py; none of it imports torch.
"""

import argparse
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_moe_ep.balance import RankLayout, balance, balancedness, contiguous_slots, rank_loads
from ds_moe_ep.errors import PlanError
from ds_moe_ep.hostfile import Cluster, local_cluster, read_hostfile
from ds_moe_ep.placement import SlotPlacement
from ds_moe_ep.whole_file import check_writable, write_lines

__all__ = ["add_balance_command"]

_LEGEND = (
    "balancedness is mean/max over ranks, 1 is perfect; overall is that of all layers' rows "
    "together,\nlayer by layer that of the time a pass takes if the ranks wait for the busiest in "
    "each layer"
)

Loads = Mapping[int, Sequence[int]]
"""By MoE layer, the tokens of each expert."""


def add_balance_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `balance` to the subcommands of a parser."""
    parser = commands.add_parser(
        "balance",
        help="tell how evenly recorded work is spread over ranks, and place experts better",
        description="Read how many tokens each expert got in a run with --metrics DIR, tell how "
        "balanced the ranks were, and place experts, the hottest in several copies, so that they "
        "are more so. infer.py --placement runs the result.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("metrics", type=Path, metavar="METRICS_DIR", help="what was given to infer.py --metrics")
    add(
        "--slots-per-rank",
        type=int,
        metavar="N",
        help="experts of a layer on each rank (default: as few as will do, so none has a copy)",
    )
    add("--out", type=Path, metavar="FILE", help="placement.json to write (default: only tell)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--hostfile", metavar="H", help="place for these hosts (default: those that were recorded)"
    )
    where.add_argument("--num-ranks", type=int, metavar="N", help="place for N ranks of one host")
    add("--ep-size", type=int, metavar="N", help="ranks of an expert group (default: all)")
    add(
        "--expert-groups",
        type=int,
        default=1,
        metavar="G",
        help="n_group of a model whose router chooses groups of experts first: a group stays on "
        "one host (default: no groups)",
    )
    parser.set_defaults(run=_balance)


def _balance(args: argparse.Namespace) -> int:
    from ds_moe_ep.config.placement_file import placement_json
    from ds_moe_ep.monitor.recorded import read_expert_loads

    loads = read_expert_loads(args.metrics)
    if args.out is not None:
        check_writable(args.out)
    cluster = _cluster(args)
    num_experts = len(next(iter(loads.values())))
    layout = _layout(args, cluster, num_experts)
    plain = _contiguous(loads, layout)
    told = [_recorded(loads, layout, cluster), _told("contiguous", loads, plain)]
    if layout.slots_per_rank == 1 and layout.num_slots == num_experts:
        print("\n".join(told))
        _refuse(args.out, _nothing(loads, layout))
        return 0
    placed = balance(loads, layout)
    told += [_told("placed", loads, placed), _gain(loads, plain, placed)]
    told += [_how(loads, placed, layout), "", _table(loads, plain, placed)]
    if args.out is not None:  # before anything is printed: who reads it may leave before its end
        write_lines(args.out, [placement_json(placed)])
        command = shlex.join(["infer.py", "--placement", str(args.out)])
        told += ["", f"wrote {args.out}: run it with {command}"]
    print("\n".join(told))
    return 0


def _cluster(args: argparse.Namespace) -> Cluster:
    from ds_moe_ep.monitor.recorded import read_recorded_cluster

    if args.hostfile is not None:
        return read_hostfile(args.hostfile)
    if args.num_ranks is not None:
        return local_cluster(args.num_ranks)
    return read_recorded_cluster(args.metrics)


def _layout(args: argparse.Namespace, cluster: Cluster, num_experts: int) -> RankLayout:
    """Returns the first expert group of a cluster; the others are alike."""
    ep_size = cluster.num_gpus if args.ep_size is None else args.ep_size
    if ep_size < 1 or cluster.num_gpus % ep_size:
        raise PlanError(
            f"--ep-size {ep_size} does not divide the {cluster.num_gpus} ranks of "
            f"{cluster.source}: every expert group has as many. Use a divisor of "
            f"{cluster.num_gpus}."
        )
    num_local = len(contiguous_slots(num_experts, ep_size)) // ep_size
    ranks_of_host = Counter(cluster.locate(rank)[0] for rank in range(ep_size))
    is_even = len(set(ranks_of_host.values())) == 1
    slots = num_local if args.slots_per_rank is None else args.slots_per_rank
    layout = RankLayout(ep_size, slots, len(ranks_of_host) if is_even else 1, args.expert_groups)
    layout.check(num_experts)
    return layout


def _contiguous(loads: Loads, layout: RankLayout) -> SlotPlacement:
    num_experts = len(next(iter(loads.values())))
    slots = contiguous_slots(num_experts, layout.num_ranks)
    num_local = num_experts // layout.num_ranks
    return SlotPlacement(num_experts, layout.num_ranks, num_local, dict.fromkeys(loads, slots))


@dataclass(frozen=True)
class _Balance:
    """How balanced the ranks are: over all layers' work, and waiting for each other in each."""

    overall: float
    by_layer: dict[int, float]
    layer_by_layer: float

    @classmethod
    def of(cls, loads: Loads, placement: SlotPlacement) -> "_Balance":
        of_rank = {
            layer: rank_loads(loads[layer], held, placement.num_ranks)
            for layer, held in placement.expert_of_slot.items()
        }
        totals = [sum(each) for each in zip(*of_rank.values(), strict=True)]
        waited_for = sum(max(each) for each in of_rank.values())
        return cls(
            balancedness(totals),
            {layer: balancedness(each) for layer, each in of_rank.items()},
            sum(totals) / len(totals) / waited_for if waited_for else 1.0,
        )


def _recorded(loads: Loads, layout: RankLayout, cluster: Cluster) -> str:
    num_experts = len(next(iter(loads.values())))
    rows = sum(sum(each) for each in loads.values())
    hosts = f" on {layout.num_hosts} hosts" if layout.num_hosts > 1 else ""
    return (
        f"{'recorded':>10}  {rows:,} rows of experts, {len(loads)} layers of "
        f"{_experts(num_experts)}\n"
        f"{'ranks':>10}  {layout.num_ranks}{hosts} ({cluster.source}), "
        f"{_experts(num_experts // layout.num_ranks)} of a layer on each if they are contiguous"
    )


def _told(name: str, loads: Loads, placement: SlotPlacement) -> str:
    found = _Balance.of(loads, placement)
    least = min(found.by_layer, key=found.by_layer.__getitem__)
    return (
        f"{name:>10}  balancedness {found.overall:.3f} overall, "
        f"{found.layer_by_layer:.3f} layer by layer (least: {found.by_layer[least]:.3f} in layer "
        f"{least})"
    )


def _gain(loads: Loads, plain: SlotPlacement, placed: SlotPlacement) -> str:
    before, after = (_Balance.of(loads, each).layer_by_layer for each in (plain, placed))
    less = 1 - before / after
    return f"{'gain':>10}  the work of the busiest, for which a pass waits, is {less:.0%} less"


def _how(loads: Loads, placed: SlotPlacement, layout: RankLayout) -> str:
    """Says what is placed where, and what it costs."""
    spare = layout.num_slots - placed.num_experts
    if spare == 0:
        return (
            f"{'how':>10}  experts change places; no slot is spare, so none has a copy. "
            f"{_with_one_more(loads, layout)}"
        )
    num_local = placed.num_experts // layout.num_ranks
    more = layout.slots_per_rank - num_local
    most = max(max(Counter(held).values()) for held in placed.expert_of_slot.values())
    return (
        f"{'how':>10}  {layout.slots_per_rank} slots on each rank: {spare} of {layout.num_slots} "
        f"hold copies of hot experts, {most} copies of one at most\n"
        f"{'costs':>10}  {_experts(more)} of a layer more on each rank: "
        f"{more / num_local:.0%} more expert weights"
    )


def _nothing(loads: Loads, layout: RankLayout) -> str:
    return (
        "each rank holds one expert of a layer and no slot is spare, so nothing can be balanced: "
        f"wherever an expert is, its rank has all its load. {_with_one_more(loads, layout)}"
    )


def _with_one_more(loads: Loads, layout: RankLayout) -> str:
    """Says what a spare slot on each rank would give."""
    slots = layout.slots_per_rank + 1
    if layout.num_ranks == 1:
        return "There is one rank, so there is nobody to share with."
    would = _Balance.of(loads, balance(loads, replace(layout, slots_per_rank=slots)))
    return (
        f"With copies of the hottest, --slots-per-rank {slots}, it would be "
        f"{would.layer_by_layer:.3f} layer by layer."
    )


def _experts(count: int) -> str:
    return "1 expert" if count == 1 else f"{count} experts"


def _refuse(out: Path | None, why: str) -> None:
    if out is not None:
        raise PlanError(f"{out} is not written: {why}")
    print(f"{'how':>10}  {why}")


def _table(loads: Loads, plain: SlotPlacement, placed: SlotPlacement) -> str:
    """Returns a line for each layer: balancedness of both, and its hottest expert."""
    before, after = _Balance.of(loads, plain), _Balance.of(loads, placed)
    lines = ["layer  contiguous  placed  hottest expert (share of rows, copies)"]
    for layer, tokens in loads.items():
        hottest = max(range(len(tokens)), key=lambda expert: (tokens[expert], -expert))
        share = tokens[hottest] / (sum(tokens) or 1)
        copies = placed.expert_of_slot[layer].count(hottest)
        lines.append(
            f"{layer:>5}  {before.by_layer[layer]:>10.3f}  {after.by_layer[layer]:>6.3f}  "
            f"{hottest} ({share:.1%}, {copies})"
        )
    return "\n".join([*lines, _LEGEND])
