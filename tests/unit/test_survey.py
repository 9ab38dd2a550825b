"""Asking hosts over ssh: all bad ones are named at once, and no name is ever run.

A stand-in for ssh plays the hosts: it runs what it is given on this machine, as sshd's shell would,
and fails as ssh fails for those that are to be broken.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ds_moe_ep.bringup.compare import Wanted, problems
from ds_moe_ep.bringup.host_facts import PACKAGES, model_files, read_facts
from ds_moe_ep.bringup.preflight import Launch, ask_hosts, launch_command, preflight
from ds_moe_ep.bringup.report import FAIL, PASS
from ds_moe_ep.bringup.survey import Survey, survey
from ds_moe_ep.errors import BringUpError, ConfigError
from ds_moe_ep.hostfile import Cluster, Host, local_cluster
from tests.helpers import run_command
from tests.helpers.launch import REPO

_SSH = """#!/bin/sh
# The last argument is the command, the one before it the host.
printf '%s\\n' "$*" >> "{folder}/asked"
while [ $# -gt 2 ]; do shift; done
case $1 in
  off) echo "ssh: connect to host off port 22: No route to host" >&2; exit 255 ;;
  bare) echo "sh: 1: python: not found" >&2; exit 127 ;;
  hung) exec sleep 60 ;;
  silent) exit 0 ;;
  old) exec sh -c "$(printf %s "$2" | sed 's|PYTHONPATH=|&{folder}/old:|')" ;;
  chatty) echo "Welcome!" ;;
esac
exec sh -c "$2"
"""


@pytest.fixture
def ssh(tmp_path, monkeypatch) -> Path:
    """Puts the stand-in first on the PATH; returns the file that tells how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(_SSH.format(folder=tmp_path))
    (folder / "ssh").chmod(0o755)
    (folder / "pdsh").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    info = tmp_path / "old" / "transformers-4.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0\n")
    return tmp_path / "asked"


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def _cluster(*names: str) -> Cluster:
    """Made by hand: a hostfile with some of the names that are tried here is refused when read."""
    return Cluster(tuple(Host(name, (0, 1)) for name in names), "hosts")


def _told(report) -> dict[str, str]:
    return {check.name: check.reason for check in report.checks if check.verdict == FAIL}


def test_hosts_that_are_alike_pass(ssh, model):
    report = survey(_cluster("one", "chatty"), Survey(model, on_gpus=False))
    (check,) = report.checks
    assert report.verdict == check.verdict == PASS
    assert check.reason.startswith("2 of 2: Python ")
    assert "1 model files compared whole" in check.reason
    for call in ssh.read_text().splitlines():
        assert "-oBatchMode=yes" in call
        assert "-- one " in call or "-- chatty " in call


def test_hosts_find_packages_and_code_where_deepspeeds_launcher_has_ranks_find_them(
    ssh, model, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "old"))
    checkout = tmp_path / "checkout"  # not the code that is installed
    (checkout / "ds_moe_ep").mkdir(parents=True)
    (checkout / "ds_moe_ep" / "__init__.py").touch()
    monkeypatch.chdir(checkout)
    (check,) = survey(_cluster("one"), Survey(model, on_gpus=False)).checks
    assert check.verdict == PASS, check.reason
    assert "transformers 4.0" in check.reason


def test_hosts_alone_are_told_in_a_line_unless_one_is_bad(ssh, model):
    told = []
    asked = Survey(model, whole_files=False, on_gpus=False)
    ask_hosts(_cluster("one", "two"), asked, metrics=None, tell=told.append, is_brief=True)
    (line,) = told
    assert line.startswith("hosts: 2 of 2: Python ") and len(line.splitlines()) == 1
    with pytest.raises(BringUpError, match=r"2 of 3 cannot take part: off: .* \| bare: no interp"):
        cluster = _cluster("one", "off", "bare")
        ask_hosts(cluster, asked, metrics=None, tell=told.append, is_brief=True)


def test_every_bad_host_is_named_at_once_with_the_way_out(ssh, model, monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-oServerAliveInterval=7 -p 2222")
    cluster = _cluster("one", "off", "bare", "hung", "silent", "old")
    told = _told(survey(cluster, Survey(model, on_gpus=True, whole_files=False, timeout_s=15)))
    assert list(told) == ["one", "off", "bare", "hung", "silent", "old"]
    assert told["one"] == "0 GPUs for 2 slots: exclude it"
    assert "not reachable by ssh (ssh: connect to host off port 22: No route" in told["off"]
    assert "ssh-copy-id off" in told["off"]
    assert f"no interpreter at {sys.executable}" in told["bare"]
    assert "no answer within 15 s: try ssh hung hostname" in told["hung"]
    assert "cannot tell what it has (exit code 0)" in told["silent"]
    assert "transformers 4.0, not " in told["old"]
    assert f"ssh old '{sys.executable} -m pip install transformers==" in told["old"]
    assert "-oServerAliveInterval=7 -p 2222 -oConnectTimeout=" in ssh.read_text()


@pytest.mark.parametrize(
    "name",
    [
        "-oProxyCommand=touch${IFS}ran",
        "a;touch${IFS}ran",
        "$(touch${IFS}ran)",
        "`id`",
        "a|b",
        "a,b",
    ],
)
def test_a_name_that_is_none_is_refused_and_never_given_to_ssh(ssh, model, tmp_path, name, request):
    request.getfixturevalue("monkeypatch").chdir(tmp_path)
    told = _told(survey(_cluster("one", name), Survey(model, on_gpus=False)))
    assert list(told) == [name]
    assert f"{name!r} is no name of a host" in told[name]
    assert "touch" not in ssh.read_text()
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_never_run_by_a_shell(ssh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = tmp_path / "a; touch ran; $(touch ran) '\"`touch ran`"
    hostile.mkdir()
    (hostile / "config.json").write_text("{}")
    report = survey(_cluster("one"), Survey(hostile, on_gpus=False))
    assert report.verdict == PASS, report.to_text()
    assert "1 model files" in report.checks[0].reason
    assert not (tmp_path / "ran").exists()


def test_such_a_folder_is_refused_before_deepspeed_would_not_quote_it(ssh, tmp_path):
    launch = Launch(("--preflight", "--model", "a; rm -rf x"), tmp_path / "hosts")
    asked = Survey(tmp_path, on_gpus=False)
    with pytest.raises(ConfigError, match="'a; rm -rf x' would not reach the other hosts"):
        preflight(_cluster("one"), asked, launch, metrics=None, tell=lambda text: None)


def test_a_failed_survey_starts_no_rank_and_leaves_its_figures(ssh, model, tmp_path):
    launch = Launch(("--preflight", "--model", str(model)), tmp_path / "hosts")
    asked = Survey(model, on_gpus=False)
    with pytest.raises(BringUpError, match=r"2 of 3 cannot take part: off: .* \| bare: no interp"):
        preflight(
            _cluster("one", "off", "bare"),
            asked,
            launch,
            metrics=tmp_path / "metrics",
            tell=lambda text: None,
        )
    (line,) = (tmp_path / "metrics" / "survey.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["phase"], found["verdict"]) == (1, "fail")
    assert [check["name"] for check in found["checks"]] == ["hosts", "off", "bare"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("one", "two"), "this machine: pdsh is missing: apt-get install -y pdsh"),
        (
            ("off", "bare"),
            r"2 of 2 cannot take part: off: .* \| bare: no interp.* \| this machine: pdsh is "
            "missing: apt-get install -y pdsh",
        ),
    ],
)
def test_without_pdsh_this_machine_is_named_and_not_counted_as_a_host(
    ssh, model, monkeypatch, names, says
):
    (ssh.parent / "bin" / "pdsh").unlink()
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "pdsh" else found(name))
    cluster, told = _cluster(*names), []
    asked = Survey(model, whole_files=False, on_gpus=False)
    start = "stopped at phase 1 of 4, place experts, hosts: "
    with pytest.raises(BringUpError, match=f"^{start}{says}$"):
        ask_hosts(cluster, asked, metrics=None, tell=told.append)
    assert "of 3" not in told[0]
    assert ("pass  hosts           2 of 2: Python" in told[0]) == (names == ("one", "two"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import time; time.sleep(60)", r"did not tell within 2 s what it has: does its driver"),
        ("raise OSError('no driver')", r"cannot tell what it has: OSError: no driver$"),
    ],
)
def test_this_machine_is_not_waited_for_either(ssh, model, monkeypatch, source, says):
    monkeypatch.setattr("ds_moe_ep.bringup.survey._source", lambda: source)
    asked = Survey(model, whole_files=False, on_gpus=False, timeout_s=2)
    with pytest.raises(BringUpError, match=f"^this machine {says}"):
        survey(local_cluster(2), asked)


def test_ranks_are_started_by_deepspeeds_launcher():
    launch = Launch(("--preflight",), Path("/hosts"), master_port=7)
    several = launch_command(_cluster("a", "b"), launch)
    assert several[several.index("--hostfile") + 1] == "/hosts"
    assert "--include" not in several
    filtered = launch_command(_cluster("a", "b"), replace(launch, is_filtered=True))
    assert filtered[filtered.index("--include") + 1] == "a:0,1@b:0,1"
    assert "--force_multi" not in several
    assert "--force_multi" in launch_command(_cluster("a"), launch)
    local = launch_command(local_cluster(3), launch)
    assert local[local.index("--num_gpus") + 1] == "3"
    assert local[local.index("--master_port") + 1] == "7"


# What is compared


def test_headers_tell_files_apart_without_their_values(tmp_path):
    header = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    head = len(header).to_bytes(8, "little") + header
    for name, values in (("a", b"1234"), ("b", b"5678")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(head + values)
        (folder / "tokenizer.model").write_bytes(values)
        (folder / "notes.bin").write_bytes(values)  # nothing a job reads
    quick = [model_files(str(tmp_path / name), False) for name in "ab"]
    whole = [model_files(str(tmp_path / name), True) for name in "ab"]
    assert quick[0] == quick[1]
    assert quick[0] is not None and quick[0].keys() == {"model.safetensors", "tokenizer.model"}
    assert quick[0]["tokenizer.model"] == [4, None]
    assert whole[0] is not None and whole[0] != whole[1]
    assert model_files(str(tmp_path / "nowhere"), True) is None


def test_facts_of_this_machine(model):
    facts = read_facts(model=str(model), places=[str(model), "/nowhere"])
    assert facts["packages"].keys() == set(PACKAGES)
    assert facts["free_bytes"][str(model)] > 0
    assert facts["free_bytes"]["/nowhere"] is None
    assert len(facts["code_sha256"]) == 64


def _facts(**changes) -> dict:
    facts = {
        "python": "3.11.2",
        "packages": dict.fromkeys(PACKAGES, "1.0"),
        "code_sha256": "c",
        "has_folder": True,
        "num_gpus": 8,
        "free_bytes": {"/tmp": 1 << 30},
        "model_files": {"config.json": [2, "a"], "model.safetensors": [9, "b"]},
    }
    return {**facts, **changes}


def _packages(**changes) -> dict:
    return {"packages": {**dict.fromkeys(PACKAGES, "1.0"), **changes}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"python": "3.10.1"}, "Python 3.10.1, not 3.11.2"),
        (
            _packages(torch=None),
            "torch is missing: ssh h '/py -m pip install torch==1.0'",
        ),
        (_packages(torch="0.9"), "torch 0.9, not 1.0: ssh h '/py -m pip install torch==1.0'"),
        (
            _packages(ds_moe_ep="0.9"),
            """ds_moe_ep 0.9, not 1.0: ssh h '/py -m pip install -e '"'"'/my repo'"'"''""",
        ),
        ({"code_sha256": "d"}, "other code of ds_moe_ep: rsync -a '/my repo/' 'h:/my repo/'"),
        ({"code_sha256": None}, "no ds_moe_ep: rsync"),
        ({"has_folder": False}, "no folder /my repo"),
        ({"model_files": None}, "no model folder /m: rsync -aL /m/ h:/m/"),
        ({"model_files": {"config.json": [2, "a"]}}, "1 missing (model.safetensors)"),
        (
            {"model_files": {"config.json": [2, "x"], "model.safetensors": [9, "b"]}},
            "model files 1 different (config.json): rsync -aL /m/ h:/m/",
        ),
        (
            {"model_files": _facts()["model_files"] | {"model-2.safetensors": [9, "c"]}},
            "model files 1 not here (model-2.safetensors): if all of them belong to the model, "
            "rsync -aL h:/m/ /m/; else remove them there",
        ),
        ({"num_gpus": 3}, "3 GPUs for 8 slots: write 'h slots=3' in the hostfile"),
        ({"free_bytes": {"/tmp": 5 << 20}}, "5 MiB free in /tmp, 100 are needed"),
    ],
)
def test_what_is_wrong_with_a_host(changes, says):
    wanted = Wanted(_facts(), "/py", "/my repo", "/m", 8, {"/tmp": 100 << 20})
    found = problems("h", _facts(**changes), wanted)
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


def test_a_package_that_is_only_there_is_to_be_uninstalled():
    wanted = Wanted(_facts(**_packages(safetensors=None)), "/py", "/my repo", "/m")
    assert problems("h", _facts(), wanted) == [
        "safetensors 1.0 is installed, and here it is not: ssh h '/py -m pip uninstall -y "
        "safetensors'"
    ]
    assert problems("h", _facts(**_packages(safetensors=None)), wanted) == []


def test_hosts_only_asks_the_hosts_that_are_used_and_starts_no_rank(ssh, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("one slots=3\noff slots=3\nchatty slots=3\n")
    # 9 slots, or 6, do not divide 64 experts: a plan is run.sh's to have, not the survey's.
    command = [sys.executable, "-m", "ds_moe_ep", "preflight", "--hosts-only", "--quick"]
    command += ["--model", REPO / "configs" / "olmoe-1b-7b-ep64", "--hostfile", hostfile]
    env = {"DS_ACCELERATOR": "cpu"}
    bad = run_command(command, env=env)
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert "1 of 3 cannot take part: off: not reachable" in bad.stderr
    ssh.unlink()
    good = run_command([*command, "--exclude", "off"], env=env)
    assert (good.returncode, good.stderr, good.stdout.count("\n")) == (0, "", 1)
    assert good.stdout.startswith("hosts: 2 of 2: Python ")
    assert len(ssh.read_text().splitlines()) == 2 and "-- off" not in ssh.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--batch-size", "0"],
            "ds-moe-ep preflight: error: argument --batch-size: 0 is not above",
        ),
        (["--num-gpus", "3"], "PlanError: ep_size=3, the default that fills"),
        (["--num-gpus", "0"], "HostfileError: num_slots=0"),
        (["--hostfile", "/nowhere"], "HostfileError: /nowhere: cannot be read"),
        (["--hosts-only", "--metrics", "/proc/m"], "InputError: /proc/m: cannot be written (No"),
    ],
)
def test_what_needs_no_host_is_refused_before_any_is_asked(ssh, arguments, says):
    command = [sys.executable, "-m", "ds_moe_ep", "preflight"]
    model = REPO / "configs" / "olmoe-1b-7b-ep64"
    ended = run_command([*command, "--model", model, *arguments])
    assert ended.returncode == 2
    assert says in ended.stderr
    assert not ssh.exists()
