"""A file is there whole or not at all."""

import os
import signal
import stat
import sys

import pytest

from ds_moe_ep.errors import InputError
from ds_moe_ep.whole_file import check_writable, remove_unfinished, write_lines
from tests.helpers import run_command


def _names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_the_mode_is_that_of_any_new_file(tmp_path):
    old_umask = os.umask(0o027)
    try:
        write_lines(tmp_path / "out.jsonl", ["new\n"])
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE((tmp_path / "out.jsonl").stat().st_mode) == 0o640


def test_a_link_is_followed(tmp_path):
    (tmp_path / "far").mkdir()
    link = tmp_path / "out.jsonl"
    link.symlink_to("far/real.jsonl")
    check_writable(link)
    write_lines(link, ["new\n"])
    assert link.is_symlink()
    assert (tmp_path / "far" / "real.jsonl").read_text() == "new\n"


@pytest.mark.parametrize("broken_step", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken_step):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    lines = ["new\n"]
    if broken_step == "write":
        lines.append("\ud800")  # not UTF-8
    else:

        def no_space(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, broken_step, no_space)
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_lines(path, lines)
    assert path.read_text() == "old\n"
    assert _names(tmp_path) == ["out.jsonl"]


# Writes a file, and is killed before it has its name.
_KILLED = """
import os, signal, sys
from pathlib import Path
from ds_moe_ep.whole_file import write_lines
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
