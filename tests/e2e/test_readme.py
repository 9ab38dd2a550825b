"""README's Python example does what README says, on two ranks, word for word."""

import json
import re
import sys
from pathlib import Path

import torch

from tests.helpers.families import VOCAB_SIZE, save_tiny
from tests.helpers.launch import REPO, free_port, run_command

NEW_TOKENS = 5
# What a reader would add: rank 0 has two prompts, rank 1 one that is longer.
GENERATE = f"""
import json, torch
ids = torch.load({{ids!r}})[job.info.rank]
tokens = engine.generate(ids, max_new_tokens={NEW_TOKENS}, do_sample=False, synced_gpus=True)
open({{out!r}} + str(job.info.rank), "w").write(json.dumps(tokens.tolist()))
if job.info.rank == 0:
    print(report, flush=True)
import os; os._exit(0)  # the interpreter's shutdown races with gloo's threads
"""


def test_python_example(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    assert '"quickstart-out/model"' in example
    model = save_tiny("olmoe", tmp_path / "model")
    prompts = [torch.randint(3, VOCAB_SIZE, shape) for shape in ((2, 4), (1, 7))]
    torch.save(prompts, tmp_path / "ids.pt")
    script = tmp_path / "example.py"
    script.write_text(
        example.replace("quickstart-out/model", str(tmp_path / "model"))
        + GENERATE.format(ids=str(tmp_path / "ids.pt"), out=str(tmp_path / "tokens"))
    )

    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    done = run_command(
        [*launcher, "--num_gpus=2", f"--master_port={free_port()}", script],
        env={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        timeout_s=180,
    )

    assert done.returncode == 0, done.stderr
    assert "ep_rank 0 of 2 holds experts 0 to 3 of 8 in each" in done.stdout
    for rank, ids in enumerate(prompts):
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        assert json.loads((tmp_path / f"tokens{rank}").read_text()) == expected.tolist()
