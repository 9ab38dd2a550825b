"""README's Python example does what README says, on two ranks, word for word."""

import re
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_moe_ep.demo import write_demo_model
from tests.helpers.launch import REPO, free_port, run_command

PROMPTS = [
    ["The Queen turned", "The Hatter opened his eyes very"],
    ["The Hatter opened his eyes very"],
]


def test_python_example(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    model = tmp_path / "quickstart-out" / "model"
    write_demo_model(model)

    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2"]
    done = run_command(
        [*launcher, f"--master_port={free_port()}", "example.py"],
        env={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        timeout_s=180,
    )

    assert done.returncode == 0, done.stderr
    for rank, prompts in enumerate(PROMPTS):
        held = f"ep_rank {rank} of 2 holds experts {32 * rank} to {32 * rank + 31} of 64 in each"
        assert held in done.stdout
        assert str(_completed(model, prompts)) in done.stdout


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
