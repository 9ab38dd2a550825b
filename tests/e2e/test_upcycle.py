"""A dense model upcycled with `ds-moe-ep convert` and run with `deepspeed launch/infer.py`."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import launch_infer, run_command
from tests.helpers.dense import VOCAB_SIZE, save_dense

_COMMAND = [sys.executable, "-m", "ds_moe_ep"]
_NEW_TOKENS = 6


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of a dense model, which no test may change."""
    folder = tmp_path_factory.mktemp("dense")
    save_dense("llama", folder)
    return folder


def _run(*args):
    result = run_command([*_COMMAND, *args], timeout_s=300, is_forked=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.mark.slow
def test_two_ranks_write_what_the_dense_model_does(dense, write_prompts, tmp_path):
    sizes = ["--upcycle-experts", "4", "--top-k", "2", "--every", "2"]
    out = _run("convert", dense, tmp_path / "ep", "--to", "ep", *sizes)
    assert out.startswith(f"wrote {tmp_path / 'ep'}: 8 files, ")
    out = _run("plan", "--model", tmp_path / "ep", "--num-gpus", "2")
    assert "4 experts" in out
    _run("config", "--model", tmp_path / "ep", "--num-gpus", "2", "--out", tmp_path / "config")

    ids = torch.randint(3, VOCAB_SIZE, (3, 5), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = write_prompts(tmp_path / "in.jsonl", dict(zip("abc", ids, strict=True)))
    files = ["--model", tmp_path / "ep", "--input", prompts, "--output", tmp_path / "out.jsonl"]
    options = ["--config", tmp_path / "config", "--max-new-tokens", str(_NEW_TOKENS)]
    result = launch_infer([*files, *options], num_ranks=2, is_forked=True)
    assert result.returncode == 0, result.stdout + result.stderr
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    for prompt, line in zip(ids, lines, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=_NEW_TOKENS, do_sample=False
        )
        assert line["token_ids"] == expected[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--cuda-graphs"]], ids=["launched", "replayed"])
def test_learned_positions_end_where_the_context_does(how, write_prompts, tmp_path):
    """A prompt that all but fills the context, in a batch with one that goes on.

    What else the model wants of `generate` changes nothing.
    """
    dense = save_dense("gpt2", tmp_path / "dense", eos_token_id=None)
    foreign = {"return_dict_in_generate": True, "cache_implementation": "static"}
    own = {"stop_strings": ["the"], "eos_token_id": None, **foreign}
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(own))
    sizes = ["--upcycle-experts", "4", "--top-k", "2"]
    _run("convert", tmp_path / "dense", tmp_path / "ep", "--to", "ep", *sizes)
    ids = {"long": [3 + place % 37 for place in range(61)], "short": [17, 5]}
    rooms = {"long": 3, "short": 9}  # of a context of 64
    prompts = write_prompts(tmp_path / "in.jsonl", ids)
    files = ["--model", tmp_path / "ep", "--input", prompts, "--output", tmp_path / "out.jsonl"]
    options = ["--max-new-tokens", "9", "--batch-size", "2", *how]
    result = launch_infer([*files, *options], num_ranks=1, is_forked=True)
    assert result.returncode == 0, result.stdout + result.stderr
    told = (result.stdout + result.stderr).count("generation_config.json: stop_strings=['the']")
    assert told == 1
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for line, (name, prompt) in zip(lines, ids.items(), strict=True):
        settings = {"max_new_tokens": rooms[name], "do_sample": False, "pad_token_id": 0}
        expected = dense.generate(torch.tensor([prompt]), **settings)
        assert (line["id"], line["finish_reason"]) == (name, "length")
        assert line["token_ids"] == expected[0, len(prompt) :].tolist()


def test_a_hugging_face_model_for_plain_transformers(dense, tmp_path):
    how = ["--method", "split", "--router-init", "normal:0.5", "--seed", "3", "--noise", "0.01"]
    sizes = ["--upcycle-experts", "4", "--top-k", "1"]
    _run("convert", dense, tmp_path / "hf", "--to", "hf", *sizes, *how)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (type(model).__name__, model.config.intermediate_size) == ("MixtralForCausalLM", 8)
    assert model(torch.tensor([[5, 9]])).logits.isfinite().all()
