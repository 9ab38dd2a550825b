"""Jobs whose disk is full or whose folder goes: told once, and what was written stays valid."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.faulty_job import FAULTY_INFER, HOST, count_messages
from tests.helpers import launch_infer, run_command

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs (root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _check_told(result: subprocess.CompletedProcess[str], told: str) -> None:
    assert result.returncode == 1, result.stdout + result.stderr
    assert len(re.findall(told, result.stderr)) == 1, result.stderr
    assert count_messages(result.stderr) == 1, result.stderr


def test_a_job_whose_folder_goes_goes_on_when_it_is_back(faulty_job, undisturbed):
    folder = faulty_job.output.parent
    result = faulty_job.launch(2, fault="0,batch 2,2,MOVE_FOLDER")
    _check_told(
        result,
        rf"ResourceError: .*rank-0000\d\.jsonl: cannot be written on {HOST} \(No such file or dir",
    )
    assert not folder.exists()
    folder.with_name("moved").rename(folder)
    before = faulty_job.finished()
    assert before
    said = faulty_job.check_resumed(4, undisturbed)
    assert f"resuming: {len(before)} of 40 prompts are done" in said


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("0,batch 1,0,FILL_DISK_BUT_ONE_PAGE", rf"rank-0000\d\.jsonl: cannot be written on {HOST}"),
        ("0,writing the results,0,FILL_DISK", r"out\.jsonl: cannot be written"),
    ],
    ids=["finished-prompts", "results"],
)
def test_a_full_disk_is_told_and_what_is_written_stays_valid(
    faulty_job, small_disk, undisturbed, fault, told
):
    faulty_job.output = small_disk / "out.jsonl"
    result = faulty_job.launch(2, fault=fault)
    _check_told(result, rf"ResourceError: .*{told}.*\(No space left on device\)\. Make room")
    assert not faulty_job.output.exists()
    finished = faulty_job.finished()  # at least of the rank that took the last page
    assert finished and len(set(finished)) == len(finished)
    (small_disk / "filler").unlink()
    faulty_job.check_resumed(2, undisturbed)
    assert [path.name for path in small_disk.iterdir()] == ["out.jsonl"]


def test_metrics_that_find_no_room_cost_the_job_nothing(faulty_job, small_disk, undisturbed):
    job, metrics = faulty_job, small_disk / "metrics"
    result = launch_infer(
        job.words("--metrics", metrics),
        num_ranks=2,
        env=job.fault("0,batch 1,1,FILL_DISK", small_disk),
        script=FAULTY_INFER,
        is_forked=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    told = rf"{metrics}: cannot be written \(No space left on device\)\. The job goes on"
    assert len(re.findall(told, result.stderr)) == 1, result.stderr
    assert job.output.read_bytes() == undisturbed
    assert not job.partial.exists()
    report = run_command([sys.executable, "-m", "ds_moe_ep", "report", metrics])
    assert (report.returncode, report.stdout) == (2, "")
    assert f"{metrics} has no metrics.jsonl" in report.stderr
