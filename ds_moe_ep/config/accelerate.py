"""accelerate.yaml: how `accelerate launch` starts launch/infer.py on every host of a plan.

It describes processes only; what they compute stands in ds_inference.json beside it.
"""

import yaml

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.hostfile import Cluster

__all__ = ["ACCELERATE_YAML", "accelerate_yaml"]

ACCELERATE_YAML = "accelerate.yaml"

_MAIN_PROCESS_PORT = 29500


def accelerate_yaml(cluster: Cluster) -> str:
    """Return a configuration for `accelerate launch --config_file`, one for all hosts.

    `machine_rank` is the one thing that differs between hosts and is given on the command line
    there; a comment in the file spells the line out for every host.

    Raises:
        ConfigError: if the hosts do not all give the same slots, which accelerate cannot express.
    """
    first = cluster.hosts[0]
    for host in cluster.hosts:
        if host.slots != first.slots:
            raise ConfigError(
                f"accelerate starts the same processes on every host, but {first.name} gives slots "
                f"{list(first.slots)} and {host.name} gives {list(host.slots)}. Use run.sh."
            )
    contiguous = first.slots == tuple(range(len(first.slots)))
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if cluster.num_gpus > 1 else "NO",
        "gpu_ids": "all" if contiguous else ",".join(map(str, first.slots)),
        "machine_rank": 0,
        "main_process_ip": first.name,
        "main_process_port": _MAIN_PROCESS_PORT,
        "main_training_function": "main",
        "mixed_precision": "no",
        "num_machines": len(cluster.hosts),
        "num_processes": cluster.num_gpus,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    return _usage(cluster) + yaml.safe_dump(settings)


def _usage(cluster: Cluster) -> str:
    lines = [
        "Start this on every host, each with its own --machine_rank, from the folder that holds",
        "launch/infer.py. DIR is the folder of this file, MODEL the one with the weights:",
        "  accelerate launch --config_file DIR/accelerate.yaml --machine_rank RANK \\",
        "    launch/infer.py --model MODEL --config DIR --input IN.jsonl --output OUT.jsonl",
        "The other hosts must reach main_process_ip; --main_process_ip gives another address.",
    ]
    lines += [f"--machine_rank {rank} on {host.name}" for rank, host in enumerate(cluster.hosts)]
    return "".join(f"# {line}\n" for line in lines)
