"""`deepspeed --num_gpus N launch/infer.py` writes what plain transformers computes in one process.

Every family on every number of ranks is a job of its own.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.helpers import launch_infer
from tests.helpers.families import CORE_FAMILIES, VOCAB_SIZE

pytestmark = pytest.mark.slow

WORLD_SIZES = (4, 2, 1)  # the longest first
NEW_TOKENS = 8
BATCH_SIZE = 2  # so that some batch is padded
_LENGTHS = {"short": 2, "long": 11, "middle": 5}  # with 4 ranks one of them has no prompt
PROMPTS = {
    id: torch.randint(
        3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)
    ).tolist()
    for id, length in _LENGTHS.items()
}


def _launch(model: Path, prompts: Path, output: Path, num_ranks: int, *args: str) -> list[Any]:
    """Runs one job to its end and returns the lines it wrote."""
    files = ["--model", model, "--input", prompts, "--output", output]
    sizes = ["--max-new-tokens", str(NEW_TOKENS), "--batch-size", str(BATCH_SIZE)]
    result = launch_infer([*files, *sizes, *args], num_ranks=num_ranks, is_forked=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in output.read_text().splitlines()]


def _read(model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(scope="module", params=CORE_FAMILIES)
def generated(request, tiny_model, write_prompts, tmp_path_factory):
    """A family's model, and what jobs of each number of ranks wrote; two jobs run at a time."""
    model, folder = tiny_model(request.param), tmp_path_factory.mktemp("parity")
    prompts = write_prompts(folder / "in.jsonl", PROMPTS)
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = {n: pool.submit(_launch, model, prompts, folder / str(n), n) for n in WORLD_SIZES}
    return _read(model), jobs


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_greedy_tokens_equal_hugging_face(generated, num_ranks):
    reference, jobs = generated
    expected = []
    for id, ids in PROMPTS.items():
        prompt = torch.tensor([ids])
        output = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        tokens = output[0, len(ids) :].tolist()
        reason = "stop" if tokens[-1] == reference.config.eos_token_id else "length"
        expected.append(
            {"id": id, "token_ids": tokens, "completion": None, "finish_reason": reason}
        )
    assert jobs[num_ranks].result() == expected


def test_a_family_that_takes_no_padding_gets_none(tiny_model, write_prompts, tmp_path):
    model = tiny_model("deepseek_v4")
    ids = {**PROMPTS, "short too": PROMPTS["short"][::-1]}
    lines = {}
    for name, prompts in {"together": ids, **{id: {id: ids[id]} for id in ids}}.items():
        file = write_prompts(tmp_path / f"{name}.jsonl", prompts)
        lines[name] = _launch(model, file, tmp_path / f"{name}.out.jsonl", 1)
    assert lines["together"] == [lines[id][0] for id in ids]


def test_scores_equal_hugging_face(tiny_model, write_prompts, tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl", PROMPTS)
    model = tiny_model("deepseek_v3")
    scored = _launch(model, prompts, tmp_path / "out.jsonl", 2, "--task", "score")
    assert [record["id"] for record in scored] == list(PROMPTS)
    reference = _read(model)
    for record, ids in zip(scored, PROMPTS.values(), strict=True):
        assert record.keys() == {"id", "num_tokens", "logprob", "token_logprobs"}
        with torch.no_grad():
            logprobs_LV = reference(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        expected = logprobs_LV[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(record["token_logprobs"]), expected, rtol=1e-5, atol=1e-6
        )
        assert record["num_tokens"] == len(ids)
        assert record["logprob"] == pytest.approx(float(expected.sum()), rel=1e-5, abs=1e-5)
