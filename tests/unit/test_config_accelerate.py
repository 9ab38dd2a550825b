"""accelerate.yaml, given to accelerate and to torch's launcher behind it."""

import pytest
import yaml

from ds_moe_ep.config.accelerate import accelerate_yaml
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.hostfile import Cluster, Host, local_cluster, parse_hostfile
from tests.helpers.launch import REPO


def cluster(text):
    return parse_hostfile(text, "hostfile")


def launch_args(path, *options):
    """Return what `accelerate launch` makes of a configuration, up to starting processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    command = ["--config_file", str(path), *options, "launch/infer.py", "--model", "m"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    return args


def torch_launch_config(args):
    """Return what torch.distributed.run would start, which is what accelerate hands it."""
    import torch.distributed.run as distrib_run
    from accelerate.utils.launch import _filter_args, prepare_multi_gpu_env

    env = prepare_multi_gpu_env(args)
    script = ["--training_script", args.training_script]
    run_args = _filter_args(args, distrib_run.get_args_parser(), script)
    config, _, command = distrib_run.config_from_args(run_args)
    return config, command, env


@pytest.mark.parametrize("rank", [1, 7])
def test_eight_hosts_of_eight(rank):
    path = REPO / "configs" / "olmoe-1b-7b-ep64" / "accelerate.yaml"
    args = launch_args(path, "--machine_rank", str(rank))
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (64, 8, "no")
    config, command, env = torch_launch_config(args)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (8, 8, 8)
    assert config.rdzv_backend == "static"
    assert config.rdzv_endpoint == "worker-0:29500"
    assert config.rdzv_configs["rank"] == rank
    assert command[-3:] == ["launch/infer.py", "--model", "m"]
    assert env.get("CUDA_VISIBLE_DEVICES") is None


def test_without_machine_rank_it_is_the_first_host():
    path = REPO / "configs" / "olmoe-1b-7b-ep64" / "accelerate.yaml"
    assert int(launch_args(path).machine_rank) == 0


def test_the_comment_tells_every_hosts_machine_rank():
    text = accelerate_yaml(cluster("a slots=2\nb slots=2\n"))
    assert "# --machine_rank 0 on a\n# --machine_rank 1 on b\n" in text


@pytest.mark.parametrize(("num_gpus", "kind"), [(4, "MULTI_GPU"), (1, "NO")])
def test_this_machine(tmp_path, num_gpus, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    path = tmp_path / "accelerate.yaml"
    path.write_text(accelerate_yaml(local_cluster(num_gpus)))
    config = load_config_from_file(str(path))
    assert config.distributed_type == kind
    assert (config.num_machines, config.num_processes) == (1, num_gpus)


def test_the_same_part_of_every_host_is_named_by_gpu_ids(tmp_path):
    path = tmp_path / "accelerate.yaml"
    path.write_text(accelerate_yaml(Cluster((Host("a", (0, 2)), Host("b", (0, 2))), "h")))
    args = launch_args(path, "--machine_rank", "1")
    _, _, env = torch_launch_config(args)
    assert env["CUDA_VISIBLE_DEVICES"] == "0,2"


@pytest.mark.parametrize("second", [(0, 1, 2), (0, 2)])
def test_hosts_that_differ_are_refused(second):
    with pytest.raises(ConfigError, match=r"a gives slots \[0, 1\] and b gives \[0, .*Use run.sh"):
        accelerate_yaml(Cluster((Host("a", (0, 1)), Host("b", second)), "h"))


@pytest.mark.parametrize("name", ["null", "1e3", "a:b", "yes", "'x'", "a;reboot"])
def test_host_names_stay_text_in_yaml(name):
    text = accelerate_yaml(Cluster((Host(name, (0,)),), "h"))
    assert yaml.safe_load(text)["main_process_ip"] == name
