"""Everything that is refused, in a real job: one clear message, exit code 2, and nothing left.

A case breaks one thing of a job that would work, and returns what its message must say.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_moe_ep.checkpoint.convert import to_expert_sharded
from tests.helpers import launch_infer
from tests.helpers.families import NUM_EXPERTS, VOCAB_SIZE, save_tiny
from tests.helpers.launch import REPO

pytestmark = pytest.mark.slow

_CONTEXT = 64  # of the tiny models
_PROMPT = '{"id": "a", "prompt_token_ids": [5, 6]}\n'
_TIMEOUT_S = 180.0  # a job takes seconds; a hang would take for ever


@dataclass
class Job:
    """A job in a folder of its own, and the model that it may break."""

    folder: Path
    num_ranks: int = 2
    args: list[str | Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.folder / "model"
        self.weights = self.model / "model.safetensors"
        self.input = self.write("in.jsonl", _PROMPT)
        (self.folder / "results").mkdir()
        self.output = self.folder / "results" / "out.jsonl"

    def write(self, name: str, content: str) -> Path:
        path = self.folder / name
        path.write_text(content)
        return path

    def change_config(self, **fields: object) -> None:
        config = json.loads((self.model / "config.json").read_text())
        self.write("model/config.json", json.dumps(config | fields))

    def drop_tensor(self, name: str) -> str:
        tensors = load_file(self.weights)
        del tensors[name]
        save_file(tensors, self.weights, metadata={"format": "pt"})
        return name

    def launch(self) -> subprocess.CompletedProcess[str]:
        files = ["--model", self.model, "--input", self.input, "--output", self.output]
        return launch_infer(
            [*files, *self.args],
            num_ranks=self.num_ranks,
            timeout_s=_TIMEOUT_S,
            is_forked=True,
        )


Case = Callable[[Job], tuple[str, ...]]

# Plans


def config_for_another_number_of_ranks(job):
    job.args = ["--config", REPO / "configs" / "olmoe-1b-7b-ep64"]
    return (
        "PlanError",
        "EP64",
        "for 64 ranks, but this job has 2",
        "Start 64 ranks",
        "ds-moe-ep config",
    )


def ep_size_that_does_not_divide_the_experts(job):
    job.num_ranks = 3
    return "PlanError", "ep_size=3", f"num_experts={NUM_EXPERTS}", "[1, 2, 4, 8]"


def ep_size_that_does_not_divide_the_ranks(job):
    job.num_ranks, job.args = 3, ["--ep-size", "2"]
    return "PlanError", "EP2", "but 3 are there", "Plans that fit 3 GPUs"


def ep_size_that_contradicts_the_config(job):
    config = job.write("ds.json", json.dumps({"moe": {"ep_size": 1}}))
    job.args = ["--config", config, "--ep-size", "2"]
    return "PlanError", "--ep-size 2 contradicts ep_size=1", str(config), "Leave one of them out"


def unknown_key_of_the_config(job):
    config = job.write("ds.json", json.dumps({"max_out_token": 7}))
    job.args = ["--config", config]
    return "ConfigError", str(config), "max_out_token", "max_out_tokens"


def config_for_another_number_of_experts(job):
    config = job.write("ds.json", json.dumps({"moe": {"num_experts": [64]}}))
    job.args = ["--config", config]
    return "ConfigError", "64 experts", f"has {NUM_EXPERTS}", "ds-moe-ep config"


# Models


def no_model(job):
    job.model = job.folder / "nowhere"
    return "ModelSpecError", str(job.model)


def no_config_json(job):
    (job.model / "config.json").unlink()
    return "ModelSpecError", str(job.model), "config.json"


def config_json_that_is_not_json(job):
    job.write("model/config.json", "{")
    return "ModelSpecError", "config.json"


def a_model_without_experts(job):
    shutil.rmtree(job.model)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(job.model)
    return "has no MoE layer", "upcycle the model: copy each FFN into every expert"


def quantized_weights(job):
    job.change_config(quantization_config={"quant_method": "fp8"})
    return "AdapterError", "quantized checkpoints (fp8)", "bf16"


# Weights


def no_weights(job):
    job.weights.unlink()
    return "CheckpointError", f"{job.model} has neither model.safetensors nor"


def only_pickled_weights(job):
    job.weights.rename(job.model / "pytorch_model.bin")
    return "CheckpointError", "pytorch_model.bin", f"convert {job.model} DST --to hf --allow-pickle"


def truncated_weights(job):
    job.weights.write_bytes(job.weights.read_bytes()[:-100])
    return "CheckpointError", str(job.weights), "truncated or corrupt", "Copy it again"


def a_shard_that_is_missing(job):
    weight_map = {"lm_head.weight": "model-1.safetensors", "model.norm.weight": "gone.safetensors"}
    job.write("model/model.safetensors.index.json", json.dumps({"weight_map": weight_map}))
    job.weights.rename(job.model / "model-1.safetensors")
    return "CheckpointError", "1 of 2 files", "are missing: gone.safetensors"


def a_corrupt_index(job):
    job.weights.rename(job.model / "shard.safetensors")
    job.write("model/model.safetensors.index.json", '{"weight_map": [')
    return "CheckpointError", "index.json: not an index of weights", "Copy it again"


def a_missing_tensor(job):
    name = job.drop_tensor("model.norm.weight")
    return "CheckpointError", "do not fit config.json", f"1 missing: {name}"


def a_missing_tensor_that_only_rank_1_reads(job):
    job.drop_tensor("model.layers.1.mlp.experts.7.up_proj.weight")
    return "CheckpointError: [rank 1 ", "do not fit config.json", "model.layers.1.mlp.experts"


def _second_shard(job):
    """Converts the job's model for two ranks; returns the file with the second one's experts."""
    sharded = job.folder / "sharded"
    to_expert_sharded(job.model, sharded, ep_size=2)
    job.model = sharded
    return sharded / "experts-00002-of-00002.safetensors"


def a_wrong_checksum(job):
    path = _second_shard(job)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return (
        "CheckpointError: [rank 1 ",
        f"{path} is corrupt: its sha256",
        "Copy it again",
        "--verify",
    )


def a_truncated_shard(job):
    path = _second_shard(job)
    path.write_bytes(path.read_bytes()[:-100])
    return "CheckpointError", str(path), "truncated", "again"


def a_shard_of_another_plan(job):
    to_expert_sharded(job.model, job.folder / "for-four", ep_size=4)
    path = _second_shard(job)
    shutil.copy(job.folder / "for-four" / "experts-00003-of-00004.safetensors", path)
    return "CheckpointError", str(path), "again"


def a_shard_of_another_model(job):
    """The same tensors, but other values."""
    save_tiny("olmoe", job.folder / "other", seed=1)
    to_expert_sharded(job.folder / "other", job.folder / "other-sharded", ep_size=2)
    path = _second_shard(job)
    shutil.copy(job.folder / "other-sharded" / path.name, path)
    return "CheckpointError: [rank 1 ", f"{path} is corrupt: its sha256", "Copy it again"


def a_manifest_of_a_newer_format(job):
    path = _second_shard(job).with_name("manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    return "CheckpointError", str(path), "version=2 was written by a newer ds_moe_ep", "Update"


# Code that a model brings with it, and that leaves a trace where it is run


def code_of_the_models_own(job):
    job.write("model/modeling_mine.py", _trace(job))
    job.change_config(model_type="mine_moe", auto_map={"AutoConfig": "modeling_mine.MineConfig"})
    return "AdapterError", "code of the model's own (auto_map), which is not run"


def code_of_a_tokenizer(job):
    job.write("model/tokenization_mine.py", _trace(job))
    auto_map = {"AutoTokenizer": ["tokenization_mine.MineTokenizer", None]}
    settings = {"tokenizer_class": "MineTokenizer", "auto_map": auto_map}
    job.write("model/tokenizer_config.json", json.dumps(settings))
    job.write("in.jsonl", '{"id": "b", "prompt": "Once upon a time"}\n')
    return "InputError", str(job.model), "the tokenizer cannot be read"


def _trace(job):
    return f"open({str(job.output.parent / 'run')!r}, 'w')\n"


# Prompts


def no_input(job):
    job.input = job.folder / "nowhere.jsonl"
    return "InputError", f"{job.input}: cannot be read", "--input"


def a_malformed_line(job):
    job.write("in.jsonl", _PROMPT + '{"id": "b", "prompt_token_ids": [5,\n')
    return "InputError", f"{job.input}:2", "not JSON"


def an_id_twice(job):
    job.write("in.jsonl", _PROMPT + _PROMPT)
    return "InputError", f"{job.input}:2", 'id "a" is already that of', f"{job.input}:1"


def a_prompt_longer_than_the_context(job):
    ids = [5] * _CONTEXT
    job.write("in.jsonl", _PROMPT + json.dumps({"id": "long", "prompt_token_ids": ids}))
    return "InputError", "prompt 'long' has 64 tokens", "is 64", "Shorten it to 63"


def a_token_outside_the_vocabulary(job):
    job.write("in.jsonl", json.dumps({"id": "b", "prompt_token_ids": [5, VOCAB_SIZE]}))
    return "InputError", "prompt 'b' has token id 96", "ends at 95"


def text_for_a_model_without_tokenizer(job):
    job.write("in.jsonl", '{"id": "b", "prompt": "Once upon a time"}\n')
    return "InputError", "prompt 'b' is text", "has no tokenizer", "prompt_token_ids"


# Output


def an_output_folder_that_is_missing(job):
    job.output = job.folder / "nowhere" / "out.jsonl"
    return "InputError", f"{job.output}: the folder", "does not exist", "mkdir -p"


def an_output_below_a_file(job):
    job.output = job.input / "out.jsonl"
    return "InputError", f"{job.output}", "is a file, not a folder"


def an_output_that_is_not_writable(job):
    job.output = Path("/proc/out.jsonl")  # permissions do not stop root, this does
    return "InputError", "/proc/out.jsonl: cannot be written", "Choose a folder"


def metrics_that_are_not_writable(job):
    job.args = ["--metrics", "/proc/metrics"]
    return "InputError", "/proc/metrics: cannot be written", "Name another folder with --metrics"


# Flags


def a_batch_of_nothing(job):
    job.args = ["--batch-size", "0"]
    return "argument --batch-size", "0 is not above 0"


def an_unknown_flag(job):
    job.args = ["--batchsize", "2"]
    return ("unrecognized arguments: --batchsize 2",)


CASES = [
    config_for_another_number_of_ranks,
    ep_size_that_does_not_divide_the_experts,
    ep_size_that_does_not_divide_the_ranks,
    ep_size_that_contradicts_the_config,
    unknown_key_of_the_config,
    config_for_another_number_of_experts,
    no_model,
    no_config_json,
    config_json_that_is_not_json,
    a_model_without_experts,
    quantized_weights,
    no_weights,
    only_pickled_weights,
    truncated_weights,
    a_shard_that_is_missing,
    a_corrupt_index,
    a_missing_tensor,
    a_missing_tensor_that_only_rank_1_reads,
    a_wrong_checksum,
    a_truncated_shard,
    a_shard_of_another_plan,
    a_shard_of_another_model,
    a_manifest_of_a_newer_format,
    code_of_the_models_own,
    code_of_a_tokenizer,
    no_input,
    a_malformed_line,
    an_id_twice,
    a_prompt_longer_than_the_context,
    a_token_outside_the_vocabulary,
    text_for_a_model_without_tokenizer,
    an_output_folder_that_is_missing,
    an_output_below_a_file,
    an_output_that_is_not_writable,
    metrics_that_are_not_writable,
    a_batch_of_nothing,
    an_unknown_flag,
]


@pytest.fixture(scope="module")
def launched(request, tiny_model, tmp_path_factory):
    """The jobs of all selected cases, run two at a time."""
    cases = [
        item.callspec.params["case"]
        for item in request.session.items
        if item.module is request.module
    ]
    jobs: dict[Case, tuple[Job, tuple[str, ...], Future]] = {}
    pool = ThreadPoolExecutor(max_workers=2)
    try:
        for case in cases:
            folder = tmp_path_factory.mktemp(case.__name__)
            shutil.copytree(tiny_model("olmoe"), folder / "model")
            job = Job(folder)
            says = case(job)
            jobs[case] = job, says, pool.submit(job.launch)
        yield jobs
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_refused(launched, case):
    job, says, future = launched[case]
    result = future.result()
    output = result.stdout + result.stderr
    assert result.returncode == 2, output
    assert "Traceback" not in output
    # The launcher's own lines go to stdout; argparse puts its usage, indented, before the error.
    said = [line for line in result.stderr.splitlines() if not re.match("usage: | ", line)]
    assert len(said) == 1, output
    assert re.match(r"(\w+Error|deepspeed launch/infer\.py: error): ", said[0])
    for fragment in says:
        assert fragment in said[0]
    assert not job.output.exists()
    assert list((job.folder / "results").iterdir()) == []
