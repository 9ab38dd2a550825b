"""write_bundle: which files, which reasons, the same bytes, never half a folder."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_moe_ep.cli import main
from ds_moe_ep.config import bundle
from ds_moe_ep.config.bundle import write_bundle
from ds_moe_ep.config.megatron import MegatronOptions
from ds_moe_ep.config.run import load_run_config
from ds_moe_ep.errors import ConfigError, PlanError
from ds_moe_ep.hostfile import Cluster, Host, local_cluster, read_hostfile
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.plan import ParallelPlan, make_plan
from tests.helpers.launch import REPO

OLMOE = REPO / "configs" / "olmoe-1b-7b-ep64" / "config.json"
QWEN3 = REPO / "configs" / "qwen3-30b-a3b-ep64" / "config.json"
ALL_FILES = {
    *("accelerate.yaml", "ds_inference.json", "ds_train_autoep.json", "hostfile", "megatron.args"),
    *("placement.csv", "plan.json", "run.sbatch", "run.sh"),
}


def eight_by_eight():
    return read_hostfile(REPO / "configs" / "hostfile.8x8")


def write(out, model=QWEN3, cluster=None, dtype=None, **sizes):
    cluster = cluster or eight_by_eight()
    spec = read_model_spec(model)
    return write_bundle(model, cluster, make_plan(cluster, spec, **sizes), spec, out, dtype=dtype)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_files_of_a_family_that_has_all(tmp_path):
    report = write(tmp_path / "new" / "folder")
    assert set(report.written) == ALL_FILES == set(contents(tmp_path / "new" / "folder"))
    assert report.written == tuple(sorted(report.written))
    assert report.not_written == {}


def test_files_that_a_family_has_none_of_come_with_the_reason(tmp_path):
    report = write(tmp_path, OLMOE)
    assert list(report.not_written) == ["ds_train_autoep.json"]
    (reason,) = report.not_written.values()
    assert "AutoEP has no preset for model_type='olmoe'" in reason
    assert set(report.written) == ALL_FILES - {"ds_train_autoep.json"} == set(contents(tmp_path))


def test_a_plan_that_splits_tensors_is_written_for_megatron_only(tmp_path):
    report = write(tmp_path, ep_size=16, tp_size=4)
    assert report.written == ("hostfile", "megatron.args", "placement.csv", "plan.json")
    assert set(report.not_written) == ALL_FILES - set(report.written)
    for reason in report.not_written.values():
        assert reason.startswith("tp_size=4, pp_size=1: ") and "Use --tp 1 --pp 1" in reason
    with pytest.raises(ConfigError, match="no ds_inference.json in this folder.*Megatron only"):
        load_run_config(tmp_path)


def test_same_input_same_bytes_wherever_it_is_written(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b" / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b" / "c")
    for name, content in contents(tmp_path / "a").items():
        assert str(tmp_path).encode() not in content, name


def test_a_second_run_replaces_its_files_removes_obsolete_ones_and_leaves_others(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path)
    write(tmp_path, OLMOE, ep_size=32, dp_size=2)
    assert set(contents(tmp_path)) == ALL_FILES - {"ds_train_autoep.json"} | {"notes.txt"}
    assert load_run_config(tmp_path).plan == ParallelPlan(ep_size=32, dp_size=2)
    write(tmp_path, ep_size=16, tp_size=4)
    assert not (tmp_path / "run.sh").exists() and (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("broken", ["write_text", "replace"])
@pytest.mark.parametrize("failing_call", [1, 4, 9])
def test_a_crash_leaves_no_half_file_and_no_folder_that_looks_whole(
    tmp_path, monkeypatch, broken, failing_call
):
    write(tmp_path, OLMOE)
    before = contents(tmp_path)
    calls, original = [], getattr(Path, broken)

    def crash(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == failing_call:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, broken, crash)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)
    after = contents(tmp_path)
    write(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    for name, content in after.items():
        assert content in (before.get(name), whole.get(name)), name
    if after != before:
        with pytest.raises(ConfigError, match="no plan.json"):
            load_run_config(tmp_path)


def test_scripts_can_be_executed_and_files_be_read_by_others(tmp_path):
    old = os.umask(0o022)
    try:
        write(tmp_path)
    finally:
        os.umask(old)
    assert (tmp_path / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o644


def test_dtype_reaches_every_file_that_has_one(tmp_path):
    write(tmp_path, dtype="fp32")
    assert json.loads((tmp_path / "ds_inference.json").read_text())["dtype"] == "float32"
    assert "bf16" not in json.loads((tmp_path / "ds_train_autoep.json").read_text())
    assert "--bf16" not in (tmp_path / "megatron.args").read_text()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["model"]["dtype"] == "float32"
    assert plan["weight_bytes_per_gpu"]["experts"] == 4 * 48 * 2 * 3 * 2048 * 768


def test_a_dtype_that_cannot_be_run_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="dtype='int4' is not a type that can be run"):
        write(tmp_path / "out", dtype="int4")
    assert not (tmp_path / "out").exists()


def test_a_model_without_experts_is_refused_before_anything_is_written(tmp_path):
    spec = dataclasses.replace(read_model_spec(OLMOE), moe_layers=(), num_experts=0)
    with pytest.raises(ConfigError, match="has no MoE layer.*upcycle"):
        write_bundle(OLMOE, local_cluster(1), ParallelPlan(1), spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_that_does_not_fill_the_cluster_is_refused(tmp_path):
    with pytest.raises(PlanError):
        write_bundle(OLMOE, local_cluster(8), ParallelPlan(64), read_model_spec(OLMOE), tmp_path)
    assert not contents(tmp_path)


@pytest.mark.parametrize("name", ["a; rm -rf x", "-oProxyCommand=x", "#a", "", "a\nb", "a\x1b[0m"])
def test_host_names_that_no_hostfile_can_hold_are_refused(tmp_path, name):
    cluster = Cluster((Host(name, (0, 1)),), "somewhere")
    with pytest.raises(ConfigError, match="of somewhere cannot stand in a hostfile") as refused:
        write(tmp_path / "out", cluster=cluster)
    assert repr(name) in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("prepare", ["file", "file_above", "folder_for_a_file"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, prepare):
    out = tmp_path / "out"
    if prepare == "file":
        out.touch()
    elif prepare == "file_above":
        out.touch()
        out = out / "below"
    else:
        (out / "hostfile").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be written") as refused:
        write(out)
    assert f"--out {out}" in str(refused.value)


def test_placement_has_a_line_for_every_gpu(tmp_path):
    write(tmp_path)
    with (tmp_path / "placement.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in rows] == list(range(64))
    row = rows[13]
    assert (row["host"], row["slot"], row["experts"]) == ("worker-1", "5", "26 27")
    assert sum(int(row["num_expert_instances"]) for row in rows) == 48 * 128
    assert sum(float(row["expert_memory_share"]) for row in rows) == pytest.approx(1)


def test_plan_json_says_what_is_needed_to_rebuild_the_plan(tmp_path):
    write(tmp_path, OLMOE, ep_size=16, dp_size=4)
    plan = json.loads((tmp_path / "plan.json").read_text())
    sizes = {"ep_size": 16, "tp_size": 1, "pp_size": 1, "dp_size": 4}
    assert plan["plan"] == sizes | {"world_size": 64, "dense_dp_size": 64}
    assert plan["hosts"][7] == "worker-7:0,1,2,3,4,5,6,7"
    assert plan["model"]["num_params"] == 6_919_161_856


def test_deepspeed_reads_the_hostfile_as_the_same_hosts(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    write(tmp_path)
    assert fetch_hostfile(str(tmp_path / "hostfile")) == {f"worker-{i}": 8 for i in range(8)}


def test_a_file_that_hosts_cannot_express_comes_with_the_reason(tmp_path):
    cluster = Cluster((Host("a", (0, 1, 2)), Host("b", (1,))), "hostfile")
    report = write(tmp_path, cluster=cluster, ep_size=4)
    assert set(report.not_written) == {"accelerate.yaml", "run.sbatch"}
    assert "--include a:0,1,2@b:1" in (tmp_path / "run.sh").read_text()


def test_a_model_named_by_a_folder_is_the_default_of_the_scripts(tmp_path, monkeypatch):
    (tmp_path / "olmoe").mkdir()
    (tmp_path / "olmoe" / "config.json").write_bytes(OLMOE.read_bytes())
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "out", Path("olmoe"))
    for name in ("run.sh", "run.sbatch"):
        assert "\ndefault_model=olmoe\n" in (tmp_path / "out" / name).read_text()


def command(out, *options):
    hostfile = str(REPO / "configs" / "hostfile.8x8")
    return ["config", "--model", str(OLMOE), "--hostfile", hostfile, "--out", str(out), *options]


def test_the_command_tells_what_it_wrote_and_what_not(tmp_path, capsys):
    assert main(command(tmp_path, "--ep", "16", "--pp", "4")) == 0
    told = capsys.readouterr().out.splitlines()
    assert f"wrote {tmp_path / 'megatron.args'}" in told
    assert any(line.startswith("no run.sh: tp_size=1, pp_size=4: ") for line in told)


def test_what_a_user_has_set_up_for_deepspeeds_monitor_goes_into_both_of_its_files(tmp_path):
    csv_section = {"enabled": True, "output_path": "logs", "job_name": "mine"}
    own = tmp_path / "ds_config.json"
    others = {"tensorboard": {"enabled": False}, "train_batch_size": 8}
    own.write_text(json.dumps({"csv_monitor": csv_section, **others}))
    out = tmp_path / "out"
    command = ["config", "--model", str(QWEN3), "--hostfile", str(REPO / "configs/hostfile.8x8")]
    assert main([*command, "--out", str(out), "--monitor", str(own)]) == 0
    run = load_run_config(out)
    assert run.monitor == {"csv_monitor": csv_section}
    assert "csv_monitor" not in run.inference  # deepspeed.init_inference refuses it
    train = json.loads((out / "ds_train_autoep.json").read_text())
    assert train["csv_monitor"] == csv_section
    assert not {"tensorboard", "train_batch_size"} & train.keys()


def test_a_file_that_sets_up_no_monitor_is_refused_before_anything_is_written(tmp_path, capsys):
    own = tmp_path / "ds_config.json"
    own.write_text('{"train_batch_size": 8}')
    command = ["config", "--model", str(QWEN3), "--out", str(tmp_path / "out")]
    assert main([*command, "--monitor", str(own)]) == 2
    assert f"ConfigError: {own}: none of comet, csv_monitor, tensor" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_with_one_message(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(command(tmp_path / "file")) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("ConfigError: --out ")
    assert main(command(tmp_path / "out", "--ep", "64", "--tp", "16", "--pp", "4")) == 2
    assert not (tmp_path / "out").exists()


def test_nothing_heavy_is_imported():
    code = (
        "import sys, ds_moe_ep.config.bundle, ds_moe_ep.config.run\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'accelerate', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_every_file_has_a_name_that_the_report_knows(tmp_path):
    spec, cluster = read_model_spec(QWEN3), eight_by_eight()
    plan = make_plan(cluster, spec)
    assert set(bundle._makers(QWEN3, cluster, plan, spec, MegatronOptions(), {})) == ALL_FILES
