"""launch/megatron_infer.py as users start it: a model converted, described, scored by Megatron."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ds_moe_ep.megatron.stand_ins import INSTALL
from tests.helpers import launch_infer, run_command
from tests.helpers.families import VOCAB_SIZE
from tests.helpers.launch import REPO, free_port
from tests.helpers.megatron import require_megatron

pytestmark = pytest.mark.slow

_SCRIPT = REPO / "launch" / "megatron_infer.py"
_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
_GENERATOR = torch.Generator().manual_seed(0)
_PROMPTS = {
    f"p{length}": torch.randint(3, VOCAB_SIZE, (length,), generator=_GENERATOR).tolist()
    for length in (5, 30, 1, 44, 2)
}


@pytest.fixture(scope="module", autouse=True)
def megatron_is_installed():
    require_megatron()


@pytest.fixture(scope="module")
def job(tiny_model, write_prompts, tmp_path_factory):
    """A folder with what a user makes first: checkpoint, arguments for two ranks, and prompts."""
    folder = tmp_path_factory.mktemp("megatron")
    convert_and_describe(tiny_model("olmoe"), folder)
    write_prompts(folder / "in.jsonl", _PROMPTS)
    return folder


def convert_and_describe(model: Path, folder: Path) -> None:
    (folder / "hostfile").write_text("localhost slots=2\n")
    ours = [sys.executable, "-m", "ds_moe_ep"]
    convert = [model, folder / "checkpoint", "--to", "megatron", "--target-spec", "local"]
    config = ["--model", model, "--hostfile", folder / "hostfile", "--out", folder / "config"]
    config += ["--megatron-transformer-impl", "local"]
    for command in ([*ours, "convert", *convert], [*ours, "config", *config]):
        result = run_command(command, is_forked=True)
        assert result.returncode == 0, result.stderr


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer for which w5 is token 5."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def files(job: Path, output: Path) -> list[str | Path]:
    args: list[str | Path] = ["--args", job / "config" / "megatron.args"]
    args += ["--load", job / "checkpoint"]
    return [*args, "--input", job / "in.jsonl", "--output", output]


def records_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def assert_scores_of_hugging_face(output: Path, model: Path, prompts=None) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    records = records_of(output)
    prompts = prompts or _PROMPTS
    assert [record["id"] for record in records] == list(prompts)
    for record, token_ids in zip(records, prompts.values(), strict=True):
        ids = torch.tensor([token_ids])
        with torch.no_grad():
            logprobs = reference(ids).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        assert list(record) == ["id", "num_tokens", "logprob", "token_logprobs"]
        assert record["num_tokens"] == len(token_ids)
        assert record["token_logprobs"] == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)
        assert record["logprob"] == pytest.approx(float(expected.sum()), rel=1e-5)


def test_deepspeed_starts_it(job, tiny_model, tmp_path):
    output = tmp_path / "out.jsonl"
    result = launch_infer(
        [*files(job, output), "--batch-size", "2"], num_ranks=2, script=_SCRIPT, timeout_s=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "scored 5 prompts (82 tokens)" in result.stdout
    assert "on 2 ranks, experts over 2" in result.stdout
    assert "Warning" not in result.stderr
    assert_scores_of_hugging_face(output, tiny_model("olmoe"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"]


def test_torchrun_starts_it_with_the_other_dispatcher(job, tiny_model, tmp_path):
    output = tmp_path / "out.jsonl"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [sys.executable, *launcher, _SCRIPT, *files(job, output)]
    result = run_command([*command, "--dispatcher", "allgather"], env=_CPU, timeout_s=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_scores_of_hugging_face(output, tiny_model("olmoe"))


def test_infer_py_reads_and_writes_the_same_files(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("qwen2_moe"), tmp_path / "model")
    save_tokenizer(model)
    convert_and_describe(model, tmp_path)
    (tmp_path / "in.jsonl").write_text(
        '{"id": "text", "prompt": "w5 w9 w33"}\n'
        '{"id": "tokens", "prompt_token_ids": [17, 4, 90, 8]}\n'
        '{"prompt": "w7"}\n'
    )
    ours, megatrons = tmp_path / "ours.jsonl", tmp_path / "megatrons.jsonl"
    args = ["--model", model, "--input", tmp_path / "in.jsonl", "--output", ours]
    for result in (
        launch_infer([*args, "--task", "score"], num_ranks=2, timeout_s=240, is_forked=True),
        one_rank([*files(tmp_path, megatrons), "--ep-size", "1"]),
    ):
        assert result.returncode == 0, result.stdout + result.stderr
    assert [record["id"] for record in records_of(ours)] == ["text", "tokens", "2"]
    for own, other in zip(*map(records_of, (ours, megatrons)), strict=True):
        assert list(own) == list(other)
        assert (own["id"], own["num_tokens"]) == (other["id"], other["num_tokens"])
        assert own["token_logprobs"] == pytest.approx(other["token_logprobs"], rel=1e-5, abs=1e-6)


def test_ranks_without_prompts_lend_their_experts(job, tiny_model, write_prompts, tmp_path):
    prompts = {"only": _PROMPTS["p5"]}
    write_prompts(tmp_path / "one.jsonl", prompts)
    output = tmp_path / "out.jsonl"
    args = [*files(job, output), "--input", tmp_path / "one.jsonl", "--ep-size", "4"]
    result = launch_infer(args, num_ranks=4, script=_SCRIPT, timeout_s=240, is_forked=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_scores_of_hugging_face(output, tiny_model("olmoe"), prompts)


def one_rank(args, *, is_forked=True, **env):
    command = [sys.executable, _SCRIPT, *args]
    return run_command(command, env=_CPU | env, timeout_s=120, is_forked=is_forked)


def test_plain_python_runs_one_rank_on_text(job, tiny_model, tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "in.txt").write_text("w5 w9 w33\n\nw17 w4\n")
    output = tmp_path / "out.jsonl"
    args = [*files(job, output), "--input", tmp_path / "in.txt", "--ep-size", "1"]
    result = one_rank([*args, "--tokenizer", tmp_path / "tokenizer"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert_scores_of_hugging_face(output, tiny_model("olmoe"), {"0": [5, 9, 33], "1": [17, 4]})


def test_more_ranks_are_asked_for_than_there_are(job, tmp_path):
    result = one_rank(files(job, tmp_path / "out.jsonl"))
    assert_refused(result, "megatron.args: --expert-model-parallel-size 2", "divide 1 ranks")


def test_refusals_of_arguments(job, tmp_path):
    words = (job / "config" / "megatron.args").read_text()
    for old, new, *expected in (
        ("--swiglu", "--swigloo", "Megatron does not know these arguments", "--swigloo"),
        ("--moe-router-topk 2", "--moe-router-topk 9", "more than --num-experts 8"),
        (
            "--micro-batch-size 1",
            "",
            "refuses these arguments",
            "args.micro_batch_size is not None",
        ),
        ("--num-layers 3", "--num-layers 2", "cannot load it into the model", "shape"),
        ("--transformer-impl local", "", "transformer_engine", "--megatron-transformer-impl local"),
        ("--tensor-model-parallel-size 1", "--tensor-model-parallel-size 2", "tensor"),
    ):
        (tmp_path / "bad.args").write_text(words.replace(old, new))
        args = [*files(job, tmp_path / "out.jsonl"), "--args", tmp_path / "bad.args"]
        assert_refused(one_rank([*args, "--ep-size", "1"]), *expected)


def test_refusals_of_files(job, tmp_path):
    output = tmp_path / "out.jsonl"
    broken = shutil.copytree(job / "checkpoint", tmp_path / "broken")
    (broken / "release" / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    dotted = shutil.copytree(job / "checkpoint", tmp_path / "dotted")
    (dotted / "release" / ".metadata").write_bytes(
        b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93"
        b"\x8c\x09touch ran\x85R."
    )
    (tmp_path / "in.txt").write_text("words\n")
    for args, *expected in (
        (["--load", broken], ".metadata holds more than a list of tensors", "posix.system"),
        (["--load", dotted], ".metadata holds more than a list of tensors", "filesystem.os.system"),
        (["--load", tmp_path], "is no whole checkpoint of Megatron's"),
        (["--input", tmp_path / "in.txt"], "has no tokenizer"),
        (["--args", tmp_path / "none.args"], "none.args: cannot be read"),
    ):
        assert_refused(one_rank([*files(job, output), "--ep-size", "1", *args]), *expected)
    assert not Path("ran").exists()


def test_a_killed_rank_ends_the_others(job, tmp_path):
    fault = {"FAULT": "1,pass 1,0,SIGKILL", "FAULT_MARK": str(tmp_path / "mark")}
    result = launch_infer(
        files(job, tmp_path / "out.jsonl"),
        num_ranks=2,
        env=fault | {"FAULT_IN": "megatron_infer"},
        script=REPO / "tests" / "e2e" / "faulty_infer.py",
        timeout_s=100,
        is_forked=True,
    )
    assert (tmp_path / "mark").exists()
    assert result.returncode == 1
    assert "was ended by SIGKILL at pass 1 of 1" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_without_megatron_it_says_how_to_have_it(job, tmp_path):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").touch()  # hides the one that is installed
    result = one_rank(files(job, tmp_path / "out"), is_forked=False, PYTHONPATH=str(tmp_path))
    assert_refused(result, INSTALL)


def assert_refused(result, *expected: str) -> None:
    said = result.stdout + result.stderr
    assert result.returncode == 2, said
    assert all(words in result.stderr for words in expected), said
    assert "Traceback" not in said
    assert len(result.stderr.strip().splitlines()) == 1, said
