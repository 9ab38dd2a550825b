"""launch/infer.py writes the same with every dispatcher and batch mode as Hugging Face alone."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import launch_infer, run_command
from tests.helpers.families import VOCAB_SIZE
from tests.helpers.launch import REPO, free_port

pytestmark = pytest.mark.slow

NEW_TOKENS = 8
PROMPTS = {
    str(length): torch.randint(
        3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)
    ).tolist()
    for length in (4, 9, 2)
}
REPLICATED = ("--batch-mode", "replicated")
AUTO = (
    r"all(toall|gather) in \d+ of \d+ passes .*predicted ms a layer: alltoall \S+, allgather \S+\)"
)
# What the summary tells of the dispatcher, by arguments.
WAYS = {
    (): AUTO,
    ("--dispatcher", "alltoall"): "alltoall",
    ("--dispatcher", "allgather"): "allgather",
    ("--dispatcher", "deepspeed"): "deepspeed",
    REPLICATED: "allreduce",
    (*REPLICATED, "--dispatcher", "alltoall"): "alltoall",
    (*REPLICATED, "--dispatcher", "allgather"): "allgather",
    ("--cuda-graphs", "--dispatcher", "allgather"): "allgather",
    ("--cuda-graphs",): r".*allgather in \d+ of \d+ passes .*",
    ("--cuda-graphs", *REPLICATED): "allreduce",
}


@pytest.fixture(scope="module")
def job(tiny_model, write_prompts, tmp_path_factory):
    """The arguments of a job but its output, the folder for that, and what is to be written."""
    model, folder = tiny_model("olmoe"), tmp_path_factory.mktemp("dispatchers")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = []
    for ids in PROMPTS.values():
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)
        output = reference.generate(
            prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        expected.append(output[0, len(ids) :].tolist())
    args = ["--model", model, "--input", write_prompts(folder / "in.jsonl", PROMPTS)]
    return [*args, "--max-new-tokens", str(NEW_TOKENS), "--batch-size", "2"], folder, expected


def token_ids(path):
    return [json.loads(line)["token_ids"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def launched(job):
    """What each way wrote and told; two jobs run at a time."""
    args, folder, _ = job

    def launch(way):
        output = folder / f"out-{'-'.join(way).replace('--', '')}.jsonl"
        job_args = [*args, "--output", output, *way]
        return output, launch_infer(job_args, num_ranks=2, is_forked=True)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return {way: pool.submit(launch, way) for way in WAYS}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way) or "default")
def test_greedy_tokens_equal_hugging_face(job, launched, way):
    output, result = launched[way].result()
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(f" dispatcher  {WAYS[way]}$", result.stdout, re.MULTILINE), result.stdout
    assert ("of them replays" in result.stdout) == ("--cuda-graphs" in way)
    assert token_ids(output) == job[2]


@pytest.mark.parametrize("dispatcher", ["alltoall-2level", "allgather-2level"])
def test_two_hosts_of_two_ranks_dispatch_in_two_levels(job, dispatcher):
    """Two launchers on this machine, each with the local ranks 0 and 1, are two hosts."""
    args, folder, expected = job
    output, port = folder / f"{dispatcher}.jsonl", free_port()

    def launch(node):
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
        launcher += [f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        script = [REPO / "launch" / "infer.py", *args, "--output", output]
        return run_command(
            [sys.executable, *launcher, *script, "--dispatcher", dispatcher],
            env={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            timeout_s=300,
        )

    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(launch, (0, 1)))
    assert [result.returncode for result in results] == [0, 0], results
    assert f" dispatcher  {dispatcher}\n" in results[0].stdout
    assert token_ids(output) == expected
