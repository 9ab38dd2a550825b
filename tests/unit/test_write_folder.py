"""Folders of planned files: what is refused, and what is kept when something comes in between."""

import errno
import fcntl
import json
import os
import shutil
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest

from ds_moe_ep.checkpoint import writer
from ds_moe_ep.checkpoint.layout import PlannedFile, copied_file
from ds_moe_ep.checkpoint.writer import Summary, write_folder
from ds_moe_ep.errors import CheckpointError

_FILES = [PlannedFile("a", b"1"), PlannedFile("release/b", b"23")]
_SUMMARY = Summary("list.json", lambda entries: json.dumps(sorted(entries)))


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


@pytest.fixture
def partial(target):
    return target.with_name("target.partial")


def _content(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


_WHOLE = {"a": "1", "release/b": "23", "list.json": '["a", "release/b"]'}


def _refused(*args, **kwargs):
    with pytest.raises(CheckpointError) as refused:
        write_folder(*args, **kwargs)
    return str(refused.value)


@pytest.mark.parametrize(
    ("when", "change"),
    [
        ("before", "replaced"),
        ("before", "linked to another"),
        ("meanwhile", "replaced"),
        ("meanwhile", "linked to another"),
        ("meanwhile", "removed"),
    ],
)
def test_a_source_that_changes_is_refused(tmp_path, target, partial, when, change):
    source, other = tmp_path / "source", tmp_path / "other"
    source.write_text("1234")
    other.write_text("5678")
    os.utime(other, ns=(0, 0))

    def change_it():
        if change == "replaced":
            other.replace(source)
            return
        source.unlink()
        if change == "linked to another":
            source.symlink_to(other)

    @contextmanager
    def show_progress(num_bytes):
        yield lambda num_bytes: None
        if when == "meanwhile":
            change_it()

    planned = copied_file(source)
    if when == "before":
        change_it()
    assert _refused(target, [planned], [], show_progress=show_progress) == (
        f"{source} has changed since the conversion began, so {target} was not made. Remove "
        f"{partial}, and run the same command again when nobody writes the source."
    )
    assert not target.exists()
    assert sorted(os.listdir(partial)) == ["source", "unfinished.jsonl"]


@pytest.mark.parametrize("twice", ["a", "list.json"])
def test_two_files_of_one_name_are_refused(tmp_path, target, twice):
    message = _refused(target, _FILES, [PlannedFile(twice, b"4")], summary=_SUMMARY)
    assert message.startswith(f"{target} would have two files of one name ({twice}): nothing was ")
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point_is_refused(tmp_path, target, monkeypatch):
    target.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    assert _refused(target, _FILES, []) == (
        f"{target} is a mount point, which the finished folder cannot replace: nothing was "
        f"written. Name a new folder, such as {target}/model."
    )
    assert list(tmp_path.iterdir()) == [target]


def test_the_current_folder_is_refused(tmp_path, target, monkeypatch):
    target.mkdir()
    monkeypatch.chdir(target)
    message = _refused(Path("."), _FILES, [])
    assert message.startswith(f"{target} is the folder that you are in, which the finished folder ")
    assert message.endswith(f"Name a new folder, such as {target}/model.")
    assert list(tmp_path.iterdir()) == [target]
    write_folder(Path("model"), _FILES, [])
    assert sorted(os.listdir()) == ["model"]


@pytest.mark.parametrize(
    ("held", "advice"),
    [
        ("thesis.txt", "Name a new folder."),
        ("config.json", "Name a new folder."),
        ("manifest.json", "or check this one: ds-moe-ep convert {} --verify."),
        ("ds_moe_ep.json", "or check this one: ds-moe-ep convert {} --verify."),
    ],
)
def test_a_check_is_advised_of_what_can_be_checked(target, held, advice):
    target.mkdir()
    (target / held).touch()
    assert _refused(target, _FILES, []).endswith(advice.format(target))
    assert os.listdir(target) == [held]


def test_a_file_system_without_locks(target, monkeypatch, partial):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    told = rf"{partial}: cannot be locked \(No locks available\)\. See to it that no second proc"
    with pytest.warns(UserWarning, match=told):
        write_folder(target, _FILES, [], summary=_SUMMARY)
    assert _content(target) == _WHOLE


def test_the_names_in_all_folders_are_synced_before_the_last(target, partial, monkeypatch):
    synced = []
    sync = writer.sync_folder
    monkeypatch.setattr(writer, "sync_folder", lambda folder: [synced.append(folder), sync(folder)])
    write_folder(target, _FILES, [PlannedFile("release/deep/c", b"4")])
    inner = [partial / "release" / "deep", partial / "release", partial]
    assert synced == [*inner, target.parent]


def _when_space_is_checked(monkeypatch, do):
    """Does something once, after this process has seen that there is no unfinished folder."""
    check_space = writer._check_space

    def check(*args):
        monkeypatch.setattr(writer, "_check_space", check_space)
        check_space(*args)
        do()

    monkeypatch.setattr(writer, "_check_space", check)


def test_of_two_that_begin_at_once_the_second_is_refused(target, partial, monkeypatch):
    held = []

    def begin():
        partial.mkdir()
        held.append((partial / "unfinished.jsonl").open("a"))
        fcntl.flock(held[0], fcntl.LOCK_EX)

    _when_space_is_checked(monkeypatch, begin)
    assert _refused(target, _FILES, []) == (
        f"{partial} is being written by another process. Wait for it, or end it."
    )
    held[0].close()
    write_folder(target, _FILES, [], summary=_SUMMARY)
    assert _content(target) == _WHOLE


@pytest.mark.parametrize("its_end", ["finished", "removed"])
def test_one_that_ends_as_another_takes_its_journal(target, partial, monkeypatch, its_end):
    flock = fcntl.flock

    def end_before(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(partial)
        if its_end == "finished":
            target.mkdir()
            (target / "config.json").touch()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", end_before)
    if its_end == "finished":
        assert f"{target} exists and is not empty" in _refused(target, _FILES, [])
        assert not partial.exists()
    else:
        write_folder(target, _FILES, [], summary=_SUMMARY)
        assert _content(target) == _WHOLE


class _Killed(BaseException):
    """Nobody catches it, as nobody catches a kill."""


def _killed_before_the_move(monkeypatch, target):
    def kill(self):
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(writer._Staging, "move_into_place", kill)
        with pytest.raises(_Killed):
            write_folder(target, _FILES, [], summary=_SUMMARY)


def test_one_killed_after_its_summary_goes_on(target, partial, monkeypatch):
    _killed_before_the_move(monkeypatch, target)
    kept = (partial / "release" / "b").stat().st_ino
    told_of = []

    def make(entries):
        told_of.extend(entries)
        return _SUMMARY.make(entries)

    write_folder(target, _FILES, [], summary=Summary(_SUMMARY.name, make))
    assert sorted(told_of) == ["a", "release/b"]
    assert _content(target) == _WHOLE
    assert (target / "release" / "b").stat().st_ino == kept


@pytest.mark.parametrize(
    "torn",
    [
        b"\xff\xfe\x80",
        b'{"name": "a\xff", "num_bytes": 1}',
        b"7",
        b'["a"]',
        b"{}",
        b'{"name": ["a"]}',
        b'{"name": "a"}',
        b'{"name": "a", "num_bytes": -1, "sha256": "x"}',
        b"[" * 100_000,
    ],
    ids=range(9),
)
def test_torn_lines_of_a_journal_are_left_out(target, partial, monkeypatch, torn):
    _killed_before_the_move(monkeypatch, target)
    kept = (partial / "release" / "b").stat().st_ino
    with (partial / "unfinished.jsonl").open("ab") as journal:
        journal.write(torn + b"\n")
    write_folder(target, _FILES, [], summary=_SUMMARY)
    assert _content(target) == _WHOLE
    assert (target / "release" / "b").stat().st_ino == kept


def test_a_name_that_is_too_long(tmp_path):
    target = tmp_path / ("x" * 300)
    message = _refused(target, _FILES, [])
    assert message.startswith(f"{target} could not be written: ")
    assert "File name too long" in message
    assert list(tmp_path.iterdir()) == []


def test_space_is_needed_for_what_is_left_only(target, partial, monkeypatch):
    _killed_before_the_move(monkeypatch, target)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
    write_folder(target, _FILES, [], summary=_SUMMARY)
    assert _content(target) == _WHOLE
