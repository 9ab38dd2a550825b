"""The newcomer's first command, run as a newcomer runs it."""

import json
import sys

import pytest

from tests.helpers import run_command
from tests.helpers.launch import REPO

_OUT = REPO / "quickstart-out"

# Anywhere else the script would install an environment of its own, from the network.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (REPO / ".venv" / "installed").exists() or sys.prefix != str(REPO / ".venv"),
        reason="runs in the environment of launch/setup.sh only: bash tests/run.sh",
    ),
]


def test_the_quickstart_shows_plans_completions_and_files(tmp_path):
    result = run_command(["bash", REPO / "launch" / "quickstart.sh"], cwd=tmp_path, timeout_s=600)
    assert result.returncode == 0, result.stdout + result.stderr
    prompts = [
        json.loads(line)
        for line in (REPO / "ds_moe_ep" / "demo" / "prompts.jsonl").read_text().splitlines()
    ]
    outputs = [json.loads(line) for line in (_OUT / "outputs.jsonl").read_text().splitlines()]
    assert [output["prompt"] for output in outputs] == [prompt["prompt"] for prompt in prompts]
    for output in outputs:
        assert output["token_ids"]
        assert f"{output['prompt']} | {output['completion'].strip()}" in result.stdout
    assert "worker-7" in result.stdout  # the plan for 8x8
    assert "localhost" in result.stdout  # and for this machine
    assert (_OUT / "metrics.jsonl").exists()
    assert (_OUT / "model" / "config.json").exists()
    assert list(tmp_path.iterdir()) == []
