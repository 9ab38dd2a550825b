"""The bring-up as users start it, by `ds-moe-ep preflight` and by a job: passes and failures."""

import importlib.metadata
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from ds_moe_ep.bringup.report import PHASES
from ds_moe_ep.hostfile import read_hostfile
from ds_moe_ep.rehearsal.hosts import simulate_hosts
from tests.helpers import launch_infer, run_command
from tests.helpers.hosts import needs_hosts

pytestmark = pytest.mark.slow

_COMMAND = [sys.executable, "-m", "ds_moe_ep", "preflight"]
_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
_BANDWIDTH = r"flat (?:[\d.]+ GB/s|too fast to tell)"
_VERDICT = re.compile(r"\[(\d)/4\] (.*): (pass|warn|fail) \(")


def _verdicts(output: str) -> list[tuple[str, str]]:
    return [(name, verdict) for _, name, verdict in _VERDICT.findall(output)]


def test_four_phases_on_this_machine(tiny_model, tmp_path):
    ended = run_command(
        [*_COMMAND, "--model", tiny_model("olmoe"), "--num-gpus", "2", "--max-new-tokens", "6"]
        + ["--metrics", tmp_path],
        env=_CPU,
        timeout_s=240,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [name for name, _ in _verdicts(ended.stdout)] == ["place experts, hosts", *PHASES]
    assert "fail" not in [verdict for _, verdict in _verdicts(ended.stdout)]
    assert "2 ranks hold 24 experts of 3 layers, each once" in ended.stdout
    phases = [json.loads(line) for line in (tmp_path / "bringup.jsonl").read_text().splitlines()]
    assert [(phase["phase"], phase["name"]) for phase in phases] == list(enumerate(PHASES, 1))
    checks = {check["name"]: check for phase in phases for check in phase["checks"]}
    assert checks["values"]["verdict"] == checks["weights"]["verdict"] == "pass"
    assert checks["weights"]["measured"] == checks["weights"]["target"]
    assert checks["latency flat"]["measured"] > 0
    assert re.search(_BANDWIDTH, checks["bandwidth"]["reason"])
    assert "prompts of the longest kind" in checks["KV cache"]["reason"]
    assert not list(tmp_path.glob("preflight*"))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allreduce"])
def test_a_job_tells_its_bandwidth_whoever_chose_the_dispatcher(job_args, tmp_path, dispatcher):
    modes = ["--batch-mode", "replicated"] if dispatcher == "allreduce" else []
    options = [*job_args, "--dispatcher", dispatcher, *modes]
    ended = launch_infer(options, num_ranks=2, is_forked=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(rf"pass  bandwidth +{_BANDWIDTH}", ended.stdout)
    lines = [json.loads(line) for line in (tmp_path / "bringup.jsonl").read_text().splitlines()]
    (told,) = (check for check in lines[1]["checks"] if check["name"] == "bandwidth")
    assert re.search(_BANDWIDTH, told["reason"])
    assert told["unit"] == "GB/s"


@pytest.fixture
def job_args(tiny_model, write_prompts, tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl", {"a": [3, 4], "b": [5]})
    options = ["--model", tiny_model("olmoe"), "--input", prompts, "--max-new-tokens", "2"]
    return [*options, "--output", tmp_path / "out.jsonl", "--metrics", tmp_path]


# launch/infer.py, with something wrong on rank 1.
_WRONG = """\
import os, sys
if os.environ["RANK"] == "1":
    {wrong}
from launch.infer import main
sys.exit(main())
"""
_OTHER_VERSION = "sys.path.insert(0, os.path.dirname(__file__) + '/other')"
_OTHER_VALUES = """\
from ds_moe_ep.dist.collectives import Communicator
    right = Communicator.exchange_rows
    Communicator.exchange_rows = lambda *args: tuple(rows + 1 for rows in right(*args))"""


@pytest.mark.parametrize(
    ("wrong", "phase", "says"),
    [
        (_OTHER_VERSION, 1, r"\S+: transformers 1\.2\.3, not \S+: ssh .* install "),
        (_OTHER_VALUES, 2, r"values: wrong values from: \[rank 1 \S+\] all-to-all flat of 2$"),
    ],
)
def test_a_phase_that_fails_in_the_ranks_is_the_last(job_args, tmp_path, wrong, phase, says):
    (tmp_path / "wrong_infer.py").write_text(_WRONG.format(wrong=wrong))
    info = tmp_path / "other" / "transformers-1.2.3.dist-info" / "METADATA"
    info.parent.mkdir(parents=True)
    info.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 1.2.3\n")
    script = tmp_path / "wrong_infer.py"
    ended = launch_infer(job_args, num_ranks=2, script=script, is_forked=True)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    name = PHASES[phase - 1]
    told = re.findall(
        rf"^BringUpError: stopped at phase {phase} of 4, {name}: {says}", ended.stderr, re.MULTILINE
    )
    assert len(told) == ended.stderr.count("BringUpError") == 1, ended.stderr
    shown = _verdicts(ended.stdout)
    assert [name for name, _ in shown] == list(PHASES[:phase])
    assert [verdict == "fail" for _, verdict in shown] == [False] * (phase - 1) + [True]
    lines = [json.loads(line) for line in (tmp_path / "bringup.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == list(range(1, phase + 1))
    assert lines[-1]["verdict"] == "fail"
    assert not list(tmp_path.glob("out.jsonl*"))


def _checks(folder: Path) -> dict[str, dict]:
    """The checks of all phases that a job went through, by name."""
    lines = (folder / "bringup.jsonl").read_text().splitlines()
    return {check["name"]: check for line in lines for check in json.loads(line)["checks"]}


# launch/infer.py, where a pass takes 10 ms a token of each prompt, and 100 ms a new one.
_SLOW = """\
import sys, time
from ds_moe_ep.bringup import distribution
right = distribution.generate_batch
def generate_batch(engine, prompts, settings, *more):
    time.sleep(0.01 * len(prompts[0].token_ids) + 0.1 * settings.max_new_tokens)
    return right(engine, prompts, settings, *more)
distribution.generate_batch = generate_batch
from launch.infer import main
sys.exit(main())
"""


def test_prompts_are_spread_by_measured_cost(tiny_model, write_prompts, tmp_path):
    # By its tokens the long prompt would be worth four others; measured, it is worth one.
    prompts = {"long": [3] * 40, **{f"short-{number}": [4] for number in range(7)}}
    (tmp_path / "slow_infer.py").write_text(_SLOW)
    job = ["--model", tiny_model("olmoe"), "--output", tmp_path / "out.jsonl"]
    job += ["--input", write_prompts(tmp_path / "in.jsonl", prompts), "--metrics", tmp_path]
    job += ["--batch-size", "2", "--max-new-tokens", "10"]
    ended = launch_infer(job, num_ranks=2, script=tmp_path / "slow_infer.py", is_forked=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = _checks(tmp_path)["prompts"]
    figures = re.match(
        r"8 on 2 ranks by measured cost: ([\d.]+) ms a prompt token, ([\d.]+) ms a new one; "
        r"predicted mean/max 0\.9",
        told["reason"],
    )
    assert figures, told
    assert float(figures[2]) > 4 * float(figures[1]), told
    assert told["verdict"] == "pass"


# launch/infer.py, on a machine that has 2 MiB left.
_SMALL = """\
import sys
from ds_moe_ep import host_memory
host_memory.available_bytes = lambda: 2 << 20
from launch.infer import main
sys.exit(main())
"""


def test_the_batch_size_that_a_refusal_names_is_the_largest_that_fits(
    tiny_model, write_prompts, tmp_path
):
    (tmp_path / "small_infer.py").write_text(_SMALL)
    prompts = {str(number): [5] * 8 for number in range(80)}
    job = ["--model", tiny_model("olmoe"), "--output", tmp_path / "out.jsonl"]
    job += ["--input", write_prompts(tmp_path / "in.jsonl", prompts), "--metrics", tmp_path]

    def run(batch_size):
        options = [*job, "--max-new-tokens", "4", "--batch-size", str(batch_size)]
        script = tmp_path / "small_infer.py"
        return launch_infer(options, num_ranks=2, script=script, is_forked=True)

    refused = run(40)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    (told,) = re.findall(
        r"^PlanError: --batch-size 40 does not fit: \[rank \d \S+\] has room for 921\.6 KiB, and "
        r"each of 40 prompts takes ([\d.]+) KiB of KV cache and about ([\d.]+) KiB of a pass\. "
        r"Use --batch-size (\d+)$",
        refused.stderr,
        re.MULTILINE,
    )
    kv_kib, pass_kib, fits = float(told[0]), float(told[1]), int(told[2])
    assert fits == 921.6 // (kv_kib + pass_kib) >= 2
    assert run(fits + 1).returncode == 2
    assert not list(tmp_path.glob("out.jsonl*"))

    done = run(fits)
    assert done.returncode == 0, done.stdout + done.stderr
    cache = _checks(tmp_path)["KV cache"]
    assert (cache["verdict"], cache["measured"], cache["target"]) == ("pass", fits, fits)
    results = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in results] == list(prompts)


def test_prompts_of_which_not_one_fits_are_refused_with_what_helps(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("olmoe"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 10**12  # completions long enough for any machine's memory
    (model / "config.json").write_text(json.dumps(config))
    ended = run_command(
        [*_COMMAND, "--model", model, "--num-gpus", "1", "--max-new-tokens", str(10**11)]
        + ["--batch-size", "100", "--input", _one_batch(tmp_path), "--metrics", tmp_path],
        env=_CPU,
        timeout_s=240,
    )
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert re.search(
        r"^PlanError: --batch-size 100 does not fit: \[rank 0 \S+\] has room for .* GiB, and "
        r"each of 100 prompts takes .* of KV cache .*\. Not one fits: use shorter prompts, a lower "
        r"--max-new-tokens, --dtype bfloat16 or GPUs with more memory$",
        ended.stderr,
        re.MULTILINE,
    )
    last = json.loads((tmp_path / "bringup.jsonl").read_text().splitlines()[-1])
    assert (last["phase"], last["verdict"]) == (4, "fail")


def _one_batch(folder: Path) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(f'{{"id": "{i}", "prompt_token_ids": [5]}}\n' for i in range(100)))
    return path


@needs_hosts
def test_hosts_that_are_alike_pass_and_bad_ones_are_all_named(tiny_model, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node-a slots=2\nnode-b slots=2\n")
    command = [*_COMMAND, "--model", tiny_model("olmoe"), "--hostfile", hostfile]
    with simulate_hosts(read_hostfile(hostfile)) as hosts:
        good = run_command(hosts.command([*command, "--max-new-tokens", "6"]), timeout_s=240)
        assert good.returncode == 0, good.stdout + good.stderr
        assert [name for name, _ in _verdicts(good.stdout)] == ["place experts, hosts", *PHASES]
        assert "flat (4 ranks), across (2 ranks), within (2 ranks)" in good.stdout
        for group, num_ranks in (("flat", 4), ("across", 2), ("within", 2)):
            told = (
                rf"(?:pass|warn)  latency {group} +all-gather [\d.]+, all-to-all [\d.]+, "
                rf"all-reduce [\d.]+ ms \(p50, \d+ x 32 float32 a rank, {num_ranks} ranks; target 1"
            )
            assert re.search(told, good.stdout), good.stdout
        assert re.search(r"bandwidth +flat .*, across .*, within ", good.stdout)
        assert re.search(r"slowest is node-a - node-b: [\d.]+ ms one way", good.stdout)

        # Another version on one host, seen there alone; the other host is off.
        _put_over_metadata(hosts, "node-b", tmp_path)
        hosts.cut_off("node-a")
        alone = run_command(hosts.command([*command, "--quick"]), timeout_s=240)
        # A job is as far from starting a rank there.
        output = tmp_path / "out.jsonl"
        job = run_command(
            hosts.command([*_run_sh(tiny_model("olmoe"), hostfile, tmp_path), "--output", output]),
            timeout_s=240,
        )
    for bad in (alone, job):
        assert bad.returncode == 2, bad.stdout + bad.stderr
        assert "Traceback" not in bad.stdout + bad.stderr
        (said,) = bad.stderr.splitlines()
        assert said.startswith(
            "BringUpError: stopped at phase 1 of 4, place experts, hosts: 2 of 2 cannot take part: "
            "node-a: not reachable by ssh ("
        )
        assert "ssh-copy-id node-a | node-b: transformers 1.2.3, not " in said
        assert _verdicts(bad.stdout) == [("place experts, hosts", "fail")]
    assert not list(tmp_path.glob("out.jsonl*"))


def _run_sh(model: Path, hostfile: Path, folder: Path) -> list[str | Path]:
    """Writes the files of a run, as a user does, and returns the command that starts it."""
    command = [sys.executable, "-m", "ds_moe_ep", "config", "--model", model]
    written = run_command([*command, "--hostfile", hostfile, "--out", folder / "config"])
    assert written.returncode == 0, written.stderr
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return ["env", f"PATH={path}", "bash", folder / "config" / "run.sh"]


def _put_over_metadata(hosts, host: str, folder: Path) -> None:
    """Makes one host see another version of a package: its mounts are its own."""
    (path,) = [
        found.locate()
        for found in importlib.metadata.distribution("transformers").files or ()
        if found.name == "METADATA" and found.parent.name.endswith(".dist-info")
    ]
    other = folder / "METADATA"
    other.write_text(re.sub("(?m)^Version: .*$", "Version: 1.2.3", Path(path).read_text(), count=1))
    mount = run_command(hosts.command(["ssh", host, "mount", "--bind", other, path]))
    assert mount.returncode == 0, mount.stderr
