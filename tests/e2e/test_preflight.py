"""`ds-moe-ep preflight` as users start it: on this machine, and on hosts of which some are bad."""

import importlib.metadata
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from ds_moe_ep.bringup.report import PHASES
from ds_moe_ep.hostfile import read_hostfile
from ds_moe_ep.rehearsal.hosts import simulate_hosts, why_no_hosts
from tests.helpers import run_command

pytestmark = pytest.mark.slow

_COMMAND = [sys.executable, "-m", "ds_moe_ep", "preflight"]
_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
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
    assert "prompts of the longest kind" in checks["KV cache"]["reason"]
    assert not list(tmp_path.glob("preflight*"))


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("olmoe"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 10**9  # completions long enough for any machine's memory
    (model / "config.json").write_text(json.dumps(config))
    ended = run_command(
        [*_COMMAND, "--model", model, "--num-gpus", "1", "--max-new-tokens", str(10**8)]
        + ["--batch-size", "100", "--input", _one_batch(tmp_path), "--metrics", tmp_path],
        env=_CPU,
        timeout_s=240,
    )
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert re.search(
        r"^PlanError: --batch-size 100 does not fit: \[rank 0 \S+\] has room for .* GiB, and "
        r"each of 100 prompts takes .* of KV cache .*\. (Use --batch-size \d+|Not one fits: .*)$",
        ended.stderr,
        re.MULTILINE,
    )
    last = json.loads((tmp_path / "bringup.jsonl").read_text().splitlines()[-1])
    assert (last["phase"], last["verdict"]) == (4, "fail")


def _one_batch(folder: Path) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(f'{{"id": "{i}", "prompt_token_ids": [5]}}\n' for i in range(100)))
    return path


_reason = why_no_hosts()


@pytest.mark.skipif(_reason is not None, reason=str(_reason))
def test_hosts_that_are_alike_pass_and_bad_ones_are_all_named(tiny_model, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node-a slots=2\nnode-b slots=2\n")
    command = [*_COMMAND, "--model", tiny_model("olmoe"), "--hostfile", hostfile]
    with simulate_hosts(read_hostfile(hostfile)) as hosts:
        good = run_command(hosts.command([*command, "--max-new-tokens", "6"]), timeout_s=240)
        assert good.returncode == 0, good.stdout + good.stderr
        assert [name for name, _ in _verdicts(good.stdout)] == ["place experts, hosts", *PHASES]
        assert "flat (4 ranks), across (2 ranks), within (2 ranks)" in good.stdout
        assert re.search(r"slowest is node-a - node-b: [\d.]+ ms one way", good.stdout)

        # Another version on one host, seen there alone; the other host is off.
        _put_over_metadata(hosts, "node-b", tmp_path)
        hosts.cut_off("node-a")
        bad = run_command(hosts.command([*command, "--quick"]), timeout_s=240)
    assert bad.returncode == 2, bad.stdout + bad.stderr
    assert "Traceback" not in bad.stdout + bad.stderr
    (said,) = bad.stderr.splitlines()
    assert said.startswith(
        "BringUpError: stopped at phase 1 of 4, place experts, hosts: 2 of 2 cannot take part: "
        "node-a: not reachable by ssh ("
    )
    assert "ssh-copy-id node-a | node-b: transformers 1.2.3, not " in said
    assert _verdicts(bad.stdout) == [("place experts, hosts", "fail")]


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
