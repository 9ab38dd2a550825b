import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ds_moe_ep.engine.journal import Journal, fingerprint
from ds_moe_ep.engine.options import JobOptions
from ds_moe_ep.engine.outputs import GenerateResult, ScoreResult
from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.errors import InputError, ResourceError
from tests.helpers.launch import REPO

PROMPTS = [Prompt("a", "Alice", None), Prompt("b", None, (4, 5))]


@pytest.fixture
def options(tmp_path) -> JobOptions:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"w": torch.arange(100.0)}, model / "model.safetensors")
    return JobOptions(model=model, input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl")


def generated(index: int) -> GenerateResult:
    return GenerateResult(f"p{index}", None, (index, 2), "caf\u00e9\n\u2028", "stop")


def started(options: JobOptions, rank: int = 0) -> Journal:
    journal = Journal(options.journal_folder, rank)
    journal.start(fingerprint(options, "torch.float32", PROMPTS), resume=False)
    return journal


def test_what_ranks_append_is_read_back(options):
    job = fingerprint(options, "torch.float32", PROMPTS)
    first = started(options)
    first.append({0: generated(0), 3: generated(3)})
    first.append({1: generated(1)})
    Journal(options.journal_folder, 7).append({2: generated(2)})
    assert first.read(job) == {index: generated(index) for index in range(4)}


def test_scores_come_back_to_the_last_bit(options):
    options = replace(options, task="score")
    journal = started(options)
    score = ScoreResult("a", 3, -1 / 3, (-0.1, -1e-30))
    journal.append({0: score})
    assert journal.read(fingerprint(options, "torch.float32", PROMPTS)) == {0: score}


@pytest.mark.parametrize("lost_bytes", range(1, 60, 7))
def test_a_line_cut_by_a_crash_counts_as_not_written(options, lost_bytes: int):
    journal = started(options)
    journal.append({0: generated(0), 1: generated(1)})
    path = journal.folder / "rank-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    journal.append({2: generated(2)})  # the resumed run writes on in the same file
    read = journal.read(fingerprint(options, "torch.float32", PROMPTS))
    assert read == {0: generated(0), 2: generated(2)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max_new_tokens": 9}, "max_new_tokens was 64, is 9"),
        ({"seed": 5}, "seed was 0, is 5"),
        ({"task": "score"}, "task was generate, is score"),
    ],
)
def test_another_job_is_refused(options, change, told):
    journal = started(options)
    with pytest.raises(InputError, match=told):
        journal.read(fingerprint(replace(options, **change), "torch.float32", PROMPTS))


def test_another_input_or_model_is_another_job(options):
    job = fingerprint(options, "torch.float32", PROMPTS)
    assert fingerprint(options, "torch.float32", PROMPTS[:1]) != job
    (options.model / "config.json").write_text('{"num_experts": 64}')
    assert fingerprint(options, "torch.float32", PROMPTS) != job


def test_other_weights_of_the_same_config_are_another_job(options):
    journal = started(options)
    journal.append({0: generated(0)})
    told = r"the run to resume was another job: weights was [0-9a-f]{64}, is [0-9a-f]{64}\. Use"
    values = torch.arange(100.0)
    values[50] += 1e-3
    for other in ({"w": values}, {"v": torch.arange(100.0)}, {"w": torch.arange(100.0)[None]}):
        save_file(other, options.model / "model.safetensors")
        with pytest.raises(InputError, match=told):
            journal.read(fingerprint(options, "torch.float32", PROMPTS))
    save_file({"w": torch.arange(100.0)}, options.model / "model.safetensors")
    assert journal.read(fingerprint(options, "torch.float32", PROMPTS)) == {0: generated(0)}


def test_a_copy_of_the_model_is_the_same_job(options, tmp_path):
    job = fingerprint(options, "torch.float32", PROMPTS)
    copied = shutil.copytree(options.model, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(copied / "model.safetensors", (0, 0))
    assert fingerprint(replace(options, model=copied), "torch.float32", PROMPTS) == job


def test_ranks_and_batch_size_do_not_make_another_job(options):
    job = fingerprint(options, "torch.float32", PROMPTS)
    assert fingerprint(replace(options, batch_size=1), "torch.float32", PROMPTS) == job


def test_a_fresh_start_forgets_and_a_resumed_one_keeps(options):
    job = fingerprint(options, "torch.float32", PROMPTS)
    journal = started(options)
    journal.append({0: generated(0)})
    journal.start(job, resume=True)
    assert journal.read(job) == {0: generated(0)}
    journal.start(job, resume=False)
    assert journal.read(job) == {}


def test_nothing_to_resume_is_no_error(options):
    journal = Journal(options.journal_folder, 0)
    assert journal.read(fingerprint(options, "torch.float32", PROMPTS)) == {}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[]", r"a list in place of an object"),
        (b"7", r"a int in place of an object"),
        (b"", "Expecting value"),
        (b'{"task": "gen', "Unterminated string"),
        (b"\xff{}", "can't decode byte 0xff"),
        (b"[" * 100_000, "recursion"),
    ],
    ids=["list", "number", "empty", "cut", "not-text", "deep"],
)
def test_a_broken_record_of_the_job_is_refused(options, content, told):
    job = fingerprint(options, "torch.float32", PROMPTS)
    journal = started(options)
    journal.append({0: generated(0)})
    (journal.folder / "job.json").write_bytes(content)
    way_out = "nothing is known to be done. Put it right, or start afresh without --resume"
    with pytest.raises(
        InputError, match=rf"job\.json: cannot be read \(.*{told}.*\), so {way_out}"
    ):
        journal.read(job)
    journal.start(job, resume=False)
    assert journal.read(job) == {}


def test_a_journal_that_cannot_be_read_is_refused(options):
    journal = started(options)
    (journal.folder / "rank-00003.jsonl").mkdir()
    with pytest.raises(InputError, match=r"rank-00003\.jsonl: cannot be read \(.*Is a directory"):
        journal.read(fingerprint(options, "torch.float32", PROMPTS))


def test_journals_of_an_unknown_job_are_not_gone_on_with(options):
    job = fingerprint(options, "torch.float32", PROMPTS)
    journal = started(options)
    journal.append({0: generated(0)})
    (journal.folder / "job.json").unlink()
    assert journal.read(job) == {}
    journal.start(job, resume=True)
    assert journal.read(job) == {}


def test_removal_leaves_no_trace(options, tmp_path: Path):
    journal = started(options)
    journal.append({0: generated(0)})
    journal.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_second_job_is_kept_away(options):
    job = fingerprint(options, "torch.float32", PROMPTS)
    first = started(options)
    first.append({0: generated(0)})
    second = Journal(options.journal_folder, 0)
    for refused in (second.check_free, lambda: second.start(job, resume=True)):
        told = rf"another job is writing this output: process {os.getpid()} on .*--output"
        with pytest.raises(InputError, match=told):
            refused()
    assert first.read(job) == {0: generated(0)}
    first.remove()
    second.check_free()
    second.start(job, resume=False)
    with pytest.raises(InputError):
        first.check_free()


def test_where_nothing_can_be_locked_it_is_said_once(options):
    script = """
import errno, fcntl, sys
from pathlib import Path
from ds_moe_ep.engine.journal import Journal

def no_locks(*args):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = no_locks
for rank in (0, 0):
    journal = Journal(Path(sys.argv[1]), rank)
    journal.check_free()
    journal.start({"task": "generate"}, resume=False)
"""
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", script, options.journal_folder]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    told = f"{options.journal_folder}: cannot be locked (No locks available). See to it that no"
    assert ended.stderr.count(told) == ended.stderr.count("Warning") == 1, ended.stderr


def test_the_lock_of_a_killed_job_is_free(options):
    script = """
import os, sys
from pathlib import Path
from ds_moe_ep.engine.journal import Journal
Journal(Path(sys.argv[1]), 0).start({"task": "generate"}, resume=False)
os.kill(os.getpid(), 9)
"""
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    subprocess.run([sys.executable, "-c", script, options.journal_folder], env=env, check=False)
    assert (options.journal_folder / "lock").exists()
    journal = Journal(options.journal_folder, 0)
    journal.check_free()
    journal.start(fingerprint(options, "torch.float32", PROMPTS), resume=False)


def test_a_full_disk_is_told_and_what_was_written_stays_valid(options, monkeypatch):
    job = fingerprint(options, "torch.float32", PROMPTS)
    journal = started(options)
    journal.append({0: generated(0)})

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    told = r"rank-00000\.jsonl: cannot be written on .* \(No space left on device\)\. Make room"
    with pytest.raises(ResourceError, match=told):
        journal.append({1: generated(1)})
    assert journal.read(job)[0] == generated(0)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_folder_removed_while_a_job_writes_breaks_it(options, rank):
    first = started(options)
    journal = first if rank == 0 else Journal(options.journal_folder, rank)
    journal.append({0: generated(0)})
    shutil.rmtree(journal.folder)
    told = (
        rf"{journal.folder}/rank-0000{rank}\.jsonl: cannot be written on .* \(No such file or "
        r"directory\)\. Make room, or bring the folder back, and run again with --resume"
    )
    for _ in range(2):
        with pytest.raises(ResourceError, match=told):
            journal.append({1: generated(1)})
    assert not journal.folder.exists()


def test_a_folder_that_became_another_jobs_is_not_written(options):
    first = started(options)
    first.append({0: generated(0)})
    shutil.rmtree(first.folder)
    second = started(options)
    with pytest.raises(ResourceError, match=r"cannot be written .*\(the folder is another job's"):
        first.append({1: generated(1)})
    assert second.read(fingerprint(options, "torch.float32", PROMPTS)) == {}


def test_a_host_with_a_folder_of_its_own_has_it_made_once(options):
    journal = Journal(options.journal_folder, 8)
    with pytest.raises(ResourceError, match="No such file or directory"):
        journal.append({0: generated(0)})
    journal.join()
    journal.append({0: generated(0)})
    assert [path.name for path in journal.folder.iterdir()] == ["rank-00008.jsonl"]


def test_a_folder_that_has_gone_is_told(options):
    gone = replace(options, output=options.output.parent / "results" / "out.jsonl")
    gone.output.parent.mkdir()
    journal = started(gone)
    shutil.rmtree(gone.output.parent)
    with pytest.raises(
        ResourceError, match=r"\(No such file or directory\).*bring the folder back"
    ):
        journal.append({0: generated(0)})
