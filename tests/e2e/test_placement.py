"""A job on experts that `ds-moe-ep balance` has placed, from what was recorded to the outputs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_moe_ep.cli import main
from tests.helpers import launch_infer
from tests.helpers.families import VOCAB_SIZE

pytestmark = pytest.mark.slow

NEW_TOKENS = 6
PROMPTS = {
    str(length): torch.randint(
        3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)
    ).tolist()
    for length in (4, 9, 2)
}


RANKS = 4  # two expert groups of two


@pytest.fixture(scope="module")
def job(tiny_model, write_prompts, tmp_path_factory):
    """A model, the arguments of a job with it, and the folder in which a run recorded its loads."""
    model, folder = tiny_model("deepseek_v3"), tmp_path_factory.mktemp("placement")
    args = ["--model", model, "--input", write_prompts(folder / "in.jsonl", PROMPTS)]
    args += ["--max-new-tokens", str(NEW_TOKENS), "--batch-size", "2", "--ep-size", "2"]
    result = run(*args, "--output", folder / "recorded.jsonl", "--metrics", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return model, args, folder


def run(*args):
    return launch_infer(args, num_ranks=RANKS, is_forked=True)


def place(folder, *args):
    path = folder / f"placement{''.join(args)}.json"
    command = ["balance", str(folder), *args, "--out", str(path)]
    assert main(command) == 0
    return path


def test_greedy_tokens_equal_hugging_face(job):
    model, args, folder = job
    placement, output = place(folder, "--ep-size", "2", "--slots-per-rank", "5"), folder / "out"
    result = run(*args, "--output", output, "--placement", placement)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ep_rank 0 of 2 holds 5 of 8 experts in each, by placement" in result.stdout
    assert "4 ranks hold 5 of 8 experts in each of" in result.stdout
    found = [json.loads(line)["token_ids"] for line in output.read_text().splitlines()]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for ids, tokens in zip(PROMPTS.values(), found, strict=True):
        prompt = torch.tensor([ids])
        expected = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        assert tokens == expected[0, len(ids) :].tolist()


def test_a_placement_for_other_ranks_is_refused(job):
    _, args, folder = job
    placement = place(folder, "--slots-per-rank", "3")  # for all four ranks
    result = run(*args, "--output", folder / "no.jsonl", "--placement", placement)
    assert result.returncode == 2
    said = result.stdout + result.stderr
    assert said.count("PlanError: ") == 1
    assert f"{placement} places experts on num_ranks=4, but this job spreads them over" in said
    assert "--num-ranks 2" in said
    assert "Traceback" not in said
