"""A job on experts that `ds-moe-ep balance` has placed, from what was recorded to the outputs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_moe_ep.cli import main
from tests.helpers import launch_infer
from tests.helpers.families import NUM_EXPERTS, VOCAB_SIZE

pytestmark = pytest.mark.slow

NEW_TOKENS = 6
PROMPTS = {
    str(length): torch.randint(
        3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)
    ).tolist()
    for length in (4, 9, 2)
}


@pytest.fixture(scope="module")
def job(tiny_model, write_prompts, tmp_path_factory):
    """A model, the arguments of a job with it, and a folder with what a run recorded."""
    model, folder = tiny_model("deepseek_v3"), tmp_path_factory.mktemp("placement")
    layers = json.loads((model / "config.json").read_text())
    numbers = range(layers["first_k_dense_replace"], layers["num_hidden_layers"])
    tokens = [900, *[10] * (NUM_EXPERTS - 1)]
    lines = [json.dumps({"layer": n, "tokens_per_expert": tokens}) for n in numbers]
    (folder / "experts.jsonl").write_text("\n".join(lines) + "\n")
    args = ["--model", model, "--input", write_prompts(folder / "in.jsonl", PROMPTS)]
    return model, [*args, "--max-new-tokens", str(NEW_TOKENS), "--batch-size", "2"], folder


def place(folder, num_ranks, slots):
    path = folder / f"placement-{num_ranks}.json"
    command = ["balance", folder, "--num-ranks", num_ranks, "--slots-per-rank", slots]
    assert main([str(part) for part in [*command, "--out", path]]) == 0
    return path


def test_greedy_tokens_equal_hugging_face(job):
    model, args, folder = job
    placement, output = place(folder, 2, 5), folder / "out.jsonl"
    way = ["--output", output, "--placement", placement, "--ep-size", "2"]  # two groups of two
    result = launch_infer([*args, *way], num_ranks=4, is_forked=True)
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
    placement = place(folder, 4, 3)
    result = launch_infer(
        [*args, "--output", folder / "no.jsonl", "--placement", placement],
        num_ranks=2,
        is_forked=True,
    )
    assert result.returncode == 2
    said = result.stdout + result.stderr
    assert said.count("PlanError: ") == 1
    assert f"{placement} places experts on num_ranks=4, but this job spreads them over" in said
    assert "--num-ranks 2" in said
    assert "Traceback" not in said
