"""launch/infer.py as users start it: launchers, configurations, sampling, reports."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.helpers import launch_infer, run_command
from tests.helpers.families import VOCAB_SIZE
from tests.helpers.launch import REPO

pytestmark = pytest.mark.slow

_PROMPTS = {"a": [5, 9, 33, 4, 71], "b": [17], "c": [3, 88, 12]}
_SCRIPT = REPO / "launch" / "infer.py"
_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


class Job:
    """The arguments of one job, and what it writes."""

    def __init__(self, model: Path, prompts: Path, output: Path) -> None:
        self.output = output
        self.args = ["--model", model, "--input", prompts, "--output", output]
        self.args += ["--max-new-tokens", "6"]

    def launch(self, num_ranks: int, *args: str | Path, is_forked: bool = False):
        command = [*self.args, *args]
        return launch_infer(command, num_ranks=num_ranks, timeout_s=240.0, is_forked=is_forked)

    def results(self) -> list[dict]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def token_ids(self) -> dict[str, list[int]]:
        return {record["id"]: record["token_ids"] for record in self.results()}


@pytest.fixture
def job(tiny_model, write_prompts, tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl", _PROMPTS)
    return Job(tiny_model("olmoe"), prompts, tmp_path / "out.jsonl")


@pytest.fixture
def configured(tiny_model, tmp_path):
    """A folder that `ds-moe-ep config` wrote for two ranks on this machine."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    folder = tmp_path / "config"
    command = [sys.executable, "-m", "ds_moe_ep", "config", "--model", tiny_model("olmoe")]
    result = run_command([*command, "--hostfile", hostfile, "--out", folder])
    assert result.returncode == 0, result.stderr
    return folder


def _greedy(model: Path, ids: list[int], count: int = 6) -> list[int]:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt = torch.tensor([ids])
    output = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
    )
    return output[0, len(ids) :].tolist()


def test_the_generated_configuration_is_used(job, configured):
    path = configured / "ds_inference.json"
    settings = json.loads(path.read_text())
    assert (settings["dtype"], settings["max_out_tokens"]) == ("float32", 64)
    path.write_text(json.dumps(settings | {"dtype": "bfloat16", "max_out_tokens": 7}))
    result = job.launch(2, "--config", configured)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "weights in torch.bfloat16" in result.stdout
    assert {id: len(ids) for id, ids in job.token_ids().items()} == {"a": 2, "b": 6, "c": 4}


def test_accelerate_starts_it_with_the_generated_file(job, configured, tiny_model):
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", configured / "accelerate.yaml"]
    command = [*launcher, _SCRIPT, *job.args, "--config", configured]
    result = run_command(command, env=_CPU, timeout_s=180)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 on 2 ranks" in result.stdout
    assert job.token_ids() == {
        id: _greedy(tiny_model("olmoe"), ids) for id, ids in _PROMPTS.items()
    }


def test_plain_python_runs_one_rank_on_plain_text(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("olmoe"), tmp_path / "model")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(model)
    prompts = tmp_path / "in.txt"
    prompts.write_text("w5 w9 w33\n\nw17\n")
    job = Job(model, prompts, tmp_path / "out.jsonl")
    result = run_command([sys.executable, _SCRIPT, *job.args], env=_CPU, timeout_s=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 on 1 ranks, 4 prompt tokens" in result.stdout
    for record, id, ids in zip(job.results(), ("0", "1"), ([5, 9, 33], [17]), strict=True):
        expected = _greedy(model, ids)
        assert record == {
            "id": id,
            "prompt": " ".join(f"w{i}" for i in ids),
            "token_ids": expected,
            "completion": " ".join(f"w{i}" for i in expected),
            "finish_reason": "length",
        }


def test_one_prompt_on_eight_ranks(tiny_model, write_prompts, tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl", {"only": [5, 9, 33]})
    job, metrics = Job(tiny_model("olmoe"), prompts, tmp_path / "out.jsonl"), tmp_path / "metrics"
    result = job.launch(8, "--metrics", metrics)
    assert result.returncode == 0, result.stdout + result.stderr
    assert job.token_ids() == {"only": _greedy(tiny_model("olmoe"), [5, 9, 33])}
    # Rank 0 has the prompt and the word; the launcher's own lines begin with a time.
    shown = [line for line in result.stdout.splitlines() if not line.startswith("[20")]
    phases = [line for line in shown if re.match(r"\[\d/4\] ", line)]
    assert [line.split(": ")[0] for line in phases] == [
        "[1/4] place experts",
        "[2/4] configure communication",
        "[3/4] optimise batch distribution",
        "[4/4] fine-tune memory",
    ]
    shown = [line for line in shown if not re.match(r"\[\d/4\] | {6}(pass|warn)  ", line)]
    assert shown[0].startswith("3 MoE layers (OlmoeExperts) swapped: ep_rank 0 of 8 holds")
    names = "prompts tokens speed load communication dispatcher load_balance peak_memory output"
    assert [line[:14].strip().replace(" ", "_") for line in shown[1:]] == names.split()
    assert not result.stderr
    lines = [json.loads(line) for line in (metrics / "metrics.jsonl").read_text().splitlines()]
    assert [line["rank"] for line in lines] == list(range(8))
    assert [line["num_prompts"] for line in lines] == [1, 0, 0, 0, 0, 0, 0, 0]
    assert {line["num_steps"] for line in lines} == {6}
    chosen = r"(alltoall|allgather) in \d of 6 passes \(predicted ms a layer: alltoall [\d.e+-]+, "
    assert re.search(chosen + r"allgather [\d.e+-]+\)", lines[0]["dispatcher"])
    assert sum(line["expert_rows"] for line in lines) == 3 * 2 * (3 + 5)  # layers, top-2, tokens


def test_sampling_depends_on_the_seed_and_on_nothing_else(job):
    sample = ["--temperature", "0.8", "--top-p", "0.9"]

    def alone(seed: int, batch_size: int) -> dict[str, list[int]]:
        """One rank, without a launcher."""
        settings = [*sample, "--seed", str(seed), "--batch-size", str(batch_size)]
        command = [sys.executable, _SCRIPT, *job.args, *settings]
        result = run_command(command, env=_CPU, timeout_s=120, is_forked=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return job.token_ids()

    expected = alone(seed=7, batch_size=1)
    assert alone(seed=7, batch_size=3) == expected
    assert alone(seed=8, batch_size=1) != expected
    # Four ranks with two copies of the experts.
    sizes = ["--batch-size", "2", "--ep-size", "2"]
    result = job.launch(4, *sample, "--seed", "7", *sizes, is_forked=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert job.token_ids() == expected
