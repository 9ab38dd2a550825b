import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ds_moe_ep.engine.journal import Journal, fingerprint
from ds_moe_ep.engine.options import JobOptions
from ds_moe_ep.engine.outputs import GenerateResult, ScoreResult
from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.errors import InputError, ResourceError
from tests.helpers.launch import REPO

PROMPTS = [Prompt("a", "Alice", None, 0), Prompt("b", None, (4, 5), 1)]


@pytest.fixture
def options(tmp_path) -> JobOptions:
    (tmp_path / "config.json").write_text("{}")
    return JobOptions(model=tmp_path, input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl")


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


def test_removal_leaves_no_trace(options, tmp_path: Path):
    journal = started(options)
    journal.append({0: generated(0)})
    journal.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


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


def test_a_folder_that_has_gone_is_told(options):
    gone = replace(options, output=options.model / "results" / "out.jsonl")
    gone.output.parent.mkdir()
    journal = started(gone)
    shutil.rmtree(gone.output.parent)
    with pytest.raises(
        ResourceError, match=r"\(No such file or directory\).*bring the folder back"
    ):
        journal.append({0: generated(0)})
