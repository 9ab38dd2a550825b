"""Result files: the lines, and that a file is there whole or not at all."""

import json
import os
import signal
import stat
import sys

import pytest

from ds_moe_ep.engine.outputs import (
    GenerateResult,
    ScoreResult,
    check_writable,
    remove_unfinished,
    write_results,
)
from ds_moe_ep.errors import InputError
from tests.helpers import run_command

_GENERATED = GenerateResult("a", "Once", (4, 2), " upon\n\u2028", "length")
_SCORED = ScoreResult("b", 3, -1.5, (-1.0, -0.5))


def _names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_generated_line():
    line = _GENERATED.to_json_line()
    assert line == (
        '{"id": "a", "prompt": "Once", "token_ids": [4, 2], "completion": " upon\\n\u2028", '
        '"finish_reason": "length"}\n'
    )


def test_a_prompt_given_as_token_ids_has_no_key_for_its_text():
    record = json.loads(GenerateResult("a", None, (), None, "stop").to_json_line())
    assert record == {"id": "a", "token_ids": [], "completion": None, "finish_reason": "stop"}


def test_a_scored_line():
    assert _SCORED.to_json_line() == (
        '{"id": "b", "num_tokens": 3, "logprob": -1.5, "token_logprobs": [-1.0, -0.5]}\n'
    )


def test_numbers_that_are_not_finite_become_null():
    line = ScoreResult("b", 3, -float("inf"), (float("nan"), -float("inf"))).to_json_line()
    assert json.loads(line) == {
        "id": "b",
        "num_tokens": 3,
        "logprob": None,
        "token_logprobs": [None, None],
    }


def test_results_are_written_in_order_and_replace_the_old_file(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    write_results(path, [_GENERATED, _SCORED])
    assert path.read_text(encoding="utf-8") == _GENERATED.to_json_line() + _SCORED.to_json_line()
    assert _names(tmp_path) == ["out.jsonl"]
    write_results(path, [])
    assert path.read_bytes() == b""


def test_the_mode_is_that_of_any_new_file(tmp_path):
    old_umask = os.umask(0o027)
    try:
        write_results(tmp_path / "out.jsonl", [_SCORED])
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE((tmp_path / "out.jsonl").stat().st_mode) == 0o640


def test_a_link_is_followed(tmp_path):
    (tmp_path / "far").mkdir()
    link = tmp_path / "out.jsonl"
    link.symlink_to("far/real.jsonl")
    check_writable(link)
    write_results(link, [_SCORED])
    assert link.is_symlink()
    assert (tmp_path / "far" / "real.jsonl").read_text() == _SCORED.to_json_line()


@pytest.mark.parametrize("broken_step", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken_step):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    results = [_GENERATED]
    if broken_step == "write":
        results.append(GenerateResult("b", "\ud800", (), "", "stop"))  # not UTF-8
    else:

        def no_space(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, broken_step, no_space)
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_results(path, results)
    assert path.read_text() == "old\n"
    assert _names(tmp_path) == ["out.jsonl"]


# Writes a file, and is killed before it has its name.
_KILLED = """
import os, signal, sys
from pathlib import Path
from ds_moe_ep.engine.outputs import write_lines
os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
write_lines(Path(sys.argv[1]), ["half"])
"""


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "out.jsonl"
    others = ["out.jsonl", ".out.jsonl.tmp", ".out.jsonl.b.7.tmp", ".out-jsonl.7.tmp"]
    for name in others:
        (tmp_path / name).touch()
    for _ in range(2):
        ended = run_command([sys.executable, "-c", _KILLED, path])
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(_names(tmp_path)) == len(others) + 2
    (tmp_path / "link").symlink_to(path)
    remove_unfinished(tmp_path / "link")
    assert _names(tmp_path) == sorted([*others, "link"])
    remove_unfinished(tmp_path / "gone" / "out.jsonl")


def test_what_can_be_written_passes_without_a_trace(tmp_path):
    check_writable(tmp_path / "new.jsonl")
    assert _names(tmp_path) == []
    (tmp_path / "old.jsonl").write_text("old\n")
    check_writable(tmp_path / "old.jsonl")
    assert (tmp_path / "old.jsonl").read_text() == "old\n"
    assert _names(tmp_path) == ["old.jsonl"]


def test_what_cannot_be_written_is_refused_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in [
        (tmp_path, "is a folder. Name a file for the results."),
        (tmp_path / "no" / "out.jsonl", f"the folder {tmp_path}/no does not exist. Make it: mkdir"),
        (tmp_path / "file" / "out.jsonl", f"{tmp_path}/file is a file, not a folder. Choose"),
        (tmp_path / ("x" * 300), "cannot be written (File name too long)."),
    ]:
        with pytest.raises(InputError) as error:
            check_writable(path)
        assert str(error.value).startswith(f"{path}: {message}")


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    with pytest.raises(InputError, match="is not a regular file"):
        check_writable(type(tmp_path)("/dev/null"))


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", read_only)  # root may write where others may not
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)\. Choose a"):
        check_writable(tmp_path / "out.jsonl")
