"""Python examples of README and docs/ do what is said of them, on two ranks, word for word."""

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_moe_ep.checkpoint.upcycle import upcycle_to_expert_sharded
from ds_moe_ep.checkpoint.upcycled_tensors import UpcycleRequest
from ds_moe_ep.demo import write_demo_model
from tests.helpers.dense import VOCAB_SIZE, save_dense
from tests.helpers.launch import REPO, free_port, run_command

PROMPTS_OF_RANKS = (
    ["The Queen turned", "The Hatter opened his eyes very"],
    ["The Hatter opened his eyes very"],
)


def test_readme_generates(tmp_path: Path) -> None:
    model = tmp_path / "quickstart-out" / "model"
    write_demo_model(model)

    stdout = _run_example("README.md", tmp_path)

    for rank, prompts in enumerate(PROMPTS_OF_RANKS):
        held = f"ep_rank {rank} of 2 holds experts {32 * rank} to {32 * rank + 31} of 64 in each"
        assert held in stdout
        assert str(_completed(model, prompts)) in stdout


def test_an_upcycled_model_is_trained(tmp_path: Path) -> None:
    dense = save_dense("llama", tmp_path / "dense").train()
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "llama-moe", UpcycleRequest(4, 2))

    stdout = _run_example("docs/upcycling.md", tmp_path)

    losses = {
        (int(rank), int(step)): float(loss)
        for rank, step, loss in re.findall(r"rank (\d) \S+, step (\d): loss (\d+\.\d+)", stdout)
    }
    assert losses.keys() == {(rank, step) for rank in range(2) for step in range(3)}
    for rank in range(2):
        torch.manual_seed(rank)
        tokens = torch.randint(VOCAB_SIZE, (2, 16))
        loss = dense(input_ids=tokens, labels=tokens).loss.item()  # copies of an FFN are that FFN
        assert losses[rank, 0] == pytest.approx(loss, abs=2e-5)
    assert (tmp_path / "llama-moe-trained" / "latest").read_text() == "global_step3"


def _run_example(page: str, folder: Path) -> str:
    """Runs the one Python example of a page in a folder, on two ranks; returns what it printed."""
    (example,) = re.findall(r"```python\n(.*?)```", (REPO / page).read_text(), re.DOTALL)
    (folder / "example.py").write_text(example)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2"]
    done = run_command(
        [*launcher, f"--master_port={free_port()}", "example.py"],
        env={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        timeout_s=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _completed(model: Path, prompts: list[str]) -> list[str]:
    """What transformers makes of prompts, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model)
    texts = []
    for prompt in prompts:
        batch = tokenizer(prompt, return_tensors="pt")
        (ids,) = reference.generate(**batch, max_new_tokens=20, do_sample=False)
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return texts
