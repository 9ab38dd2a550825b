"""Reads of a metrics folder what a placement of experts is made from: their loads, and the hosts.

The whole of a finished job is read by metrics_folder.py; what is made of it is not decided here.
"""

from dataclasses import replace
from itertools import groupby
from pathlib import Path

from ds_moe_ep.config.strict import parse, read_json_lines
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.hostfile import Cluster, Host, local_cluster
from ds_moe_ep.monitor.metrics_format import EXPERTS_JSONL, RANKS_JSONL, ExpertLoads, RankPlace

__all__ = ["read_expert_loads", "read_recorded_cluster"]


def read_expert_loads(folder: Path) -> dict[int, tuple[int, ...]]:
    """Return the tokens of each expert, by MoE layer in ascending order.

    Args:
        folder: what was given to ``infer.py --metrics``.

    Raises:
        ConfigError: if there is no such file, or its lines are not one for each layer of a model.
    """
    path = folder / EXPERTS_JSONL
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no {EXPERTS_JSONL}: no load of experts was recorded there. Name a "
            "folder that a finished job wrote: infer.py ... --metrics DIR."
        )
    loads: dict[int, tuple[int, ...]] = {}
    for source, content in read_json_lines(path):
        line = parse(ExpertLoads, content, source)
        if line.layer in loads:
            raise ConfigError(f"{source}: layer {line.layer} is there twice; keep one.")
        first = next(iter(loads.values()), line.tokens_per_expert)
        if len(line.tokens_per_expert) != len(first):
            raise ConfigError(
                f"{source}: layer {line.layer} has {len(line.tokens_per_expert)} experts, the "
                f"layers before it {len(first)}. Lines of different models are mixed: record anew."
            )
        loads[line.layer] = tuple(line.tokens_per_expert)
    if not loads:
        raise ConfigError(f"{path} is empty. Record a run with prompts: infer.py ... --metrics.")
    return dict(sorted(loads.items()))


def read_recorded_cluster(folder: Path) -> Cluster:
    """Return the hosts and slots that the recorded ranks ran on.

    The ranks of a host of a Cluster follow each other. Where they did not, as where a scheduler
    dealt them out in turn, all are on one host: no grouping of theirs would be that of the run.

    Raises:
        ConfigError: if they were not recorded, or are not numbered from 0 on.
    """
    path = folder / RANKS_JSONL
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no {RANKS_JSONL}, which tells the ranks of the run. Name them: "
            "--hostfile H, or --num-ranks N."
        )
    places = [parse(RankPlace, content, source) for source, content in read_json_lines(path)]
    places.sort(key=lambda place: place.rank)
    if [place.rank for place in places] != list(range(len(places))) or not places:
        raise ConfigError(
            f"{path} has lines of ranks {[place.rank for place in places]}, not one for each from "
            "0 on. Name the ranks: --hostfile H, or --num-ranks N."
        )
    runs = [(name, len(list(group))) for name, group in groupby(place.host for place in places)]
    if len({name for name, _ in runs}) < len(runs):
        return replace(local_cluster(len(places)), source=str(path))
    return Cluster(tuple(Host(name, tuple(range(size))) for name, size in runs), str(path))
