"""What a rehearsal tells of a job that fails, and of results that are not those expected."""

import json
import re
import signal

import pytest

from ds_moe_ep.cli import main
from ds_moe_ep.errors import DistributedError
from ds_moe_ep.hostfile import local_cluster
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.rehearsal import guard, rehearse
from ds_moe_ep.rehearsal.rehearse import _compare, _launch, _Stage
from tests.helpers.launch import REPO

_EXPECTED = [[5, 6], [7, 8], [9, 1]]
_RIGHT = [("0", [5, 6]), ("1", [7, 8]), ("2", [9, 1])]
_BROUGHT_UP = """\
worker-0: [1/4] place experts: pass (0.05 s)
worker-0:       pass  hosts           2 of 2: same code
worker-0:       pass  experts         4 ranks hold 24 experts of 3 layers, each once
worker-0: [2/4] configure communication: warn (1.49 s)
"""
_LAUNCHERS = """\
a: [2026-11-26 19:38:40,595] [INFO] [launch.py:253:sigkill_handler] Killing subprocess 2856
pdsh@here: a: ssh exited with exit code 2
"""


def _write_results(folder, results):
    path = folder / "outputs.jsonl"
    lines = (json.dumps({"id": name, "token_ids": tokens}) + "\n" for name, tokens in results)
    path.write_text("".join(lines))
    return path


def test_results_as_expected(tmp_path):
    told = _compare(_EXPECTED, _write_results(tmp_path, _RIGHT))
    assert told == "all 3 equal those of transformers in one process"


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ([], "0 results for 3 prompts; missing: 0, 1, 2."),
        (_RIGHT[:2], "2 results for 3 prompts; missing: 2."),
        (
            [*_RIGHT[:2], ("x", [9, 1])],
            "3 results for 3 prompts; missing: 2; not asked for: x.",
        ),
        ([*_RIGHT, ("3", [4, 4])], "4 results for 3 prompts; not asked for: 3."),
        (
            [_RIGHT[1], _RIGHT[0], _RIGHT[2]],
            "3 results for 3 prompts; in another order, or some twice.",
        ),
        ([*_RIGHT, _RIGHT[0]], "4 results for 3 prompts; in another order, or some twice."),
        (
            [_RIGHT[0], ("1", [7, 9]), ("2", [9])],
            "2 of 3 prompts have other tokens than transformers' in one process: ids 1, 2.",
        ),
    ],
)
def test_results_that_are_not_as_expected_are_told_by_id(tmp_path, results, says):
    with pytest.raises(DistributedError, match=f"^outputs: {re.escape(says)}$"):
        _compare(_EXPECTED, _write_results(tmp_path, results))


def _launch_script(folder, script: str) -> str:
    """Has a script stand in for run.sh, on a stage where ranks take 3 GiB."""
    (folder / "config").mkdir()
    (folder / "config" / "run.sh").write_text(script)
    stage = _Stage(local_cluster(2), lambda argv: argv, lambda session: 3 << 30)
    return _launch(stage, folder, folder / "infer.py", ["--cuda-graphs"])


def test_a_job_that_fails_is_told_with_the_end_of_its_log(tmp_path):
    script = "for i in $(seq 40); do echo line $i; done; echo last words >&2; cat << END\n"
    with pytest.raises(DistributedError) as told:
        _launch_script(tmp_path, f"{script}{_LAUNCHERS}END\nexit 3\n")
    head, *lines = str(told.value).splitlines()
    assert head == "launch: run.sh ended with exit code 3; its last lines:"
    assert lines == [*(f"line {number}" for number in range(12, 41)), "last words"]


def test_a_job_that_works_is_told_with_its_bring_up(tmp_path):
    script = f'echo "$*" > {tmp_path}/asked; echo $INFER >> {tmp_path}/asked; cat <<END\n'
    told = _launch_script(tmp_path, f"{script}{_BROUGHT_UP}END\n")
    assert re.fullmatch(
        r"exit code 0 after \d+ s, 3\.0 GiB for all ranks together at most; bring-up: "
        r"\[1/4\] place experts: pass \(0\.05 s\), \[2/4\] configure communication: warn "
        r"\(1\.49 s\), 4 ranks hold 24 experts of 3 layers, each once",
        told,
    )
    files = f"--input {tmp_path}/prompts.jsonl --output {tmp_path}/outputs.jsonl"
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"{files} --max-new-tokens 8 --cuda-graphs",
        f"{tmp_path}/infer.py",
    ]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Notes the plans that would be rehearsed."""
    plans = []
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(guard, "go_on_guarded", lambda prefix: tmp_path)
    monkeypatch.setattr(
        rehearse, "rehearse", lambda model, cluster, plan, *args, **kwargs: plans.append(plan)
    )
    return plans


def _rehearse(*args: str) -> int:
    configs = REPO / "configs"
    model = configs / "olmoe-1b-7b-ep64" / "config.json"
    files = ["--model", str(model), "--hostfile", str(configs / "hostfile.8x8")]
    return main(["rehearse", *files, *args])


@pytest.mark.parametrize(
    ("args", "plan"),
    [
        ([], ParallelPlan(64)),
        (["--ep", "64"], ParallelPlan(64)),
        (["--ep", "8"], ParallelPlan(8, dp_size=8)),
        (["--ep", "1"], ParallelPlan(1, dp_size=64)),
    ],
)
def test_expert_groups_fill_the_hosts_as_those_of_infer(asked, args, plan):
    assert _rehearse(*args) == 0
    assert asked == [plan]


@pytest.mark.parametrize(
    ("ep_size", "says"),
    [
        ("0", "ep_size=0: every size is at least 1"),
        ("48", "ep_size=48 does not divide num_experts=64"),
        ("128", "ep_size=128 does not divide num_experts=64"),
    ],
)
def test_expert_groups_that_do_not_fill_the_hosts_are_refused(asked, capsys, ep_size, says):
    assert _rehearse("--ep", ep_size) == 2
    assert says in capsys.readouterr().err
    assert asked == []
