"""A metrics folder that cannot be written: refused before a job begins, told later, once."""

import shutil
import tempfile
import warnings
from types import SimpleNamespace

import pytest

from ds_moe_ep.errors import InputError, ResourceError
from ds_moe_ep.monitor import folder_writer
from ds_moe_ep.monitor.figures import JobNow
from ds_moe_ep.monitor.folder_writer import FolderWriter
from ds_moe_ep.monitor.metrics_folder import check_metrics_folder
from ds_moe_ep.monitor.metrics_format import Run, Sample
from ds_moe_ep.monitor.windows import Border
from tests.helpers.metrics import small_metrics

_FILES = small_metrics()
_RUN = Run.model_validate(_FILES["run.json"])
_NOW = JobNow([Sample.model_validate(line) for line in _FILES["samples.jsonl"][:4]], None)


def test_a_folder_that_goes_is_told_once_and_not_made_again(tmp_path):
    folder = tmp_path / "metrics"
    writer = FolderWriter(folder, _RUN)
    writer.add(_NOW)
    shutil.rmtree(folder)
    told = rf"{folder}: cannot be written \(No such file or directory\)\. The job goes on"
    with pytest.warns(UserWarning, match=told):
        writer.add(_NOW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.add(_NOW)
        writer.finish([])
    assert not folder.exists()


def test_a_folder_that_fails_at_the_end_is_told(tmp_path):
    writer = FolderWriter(tmp_path / "metrics", _RUN)
    shutil.rmtree(tmp_path / "metrics")
    with pytest.warns(UserWarning, match="its metrics will not be whole"):
        writer.finish([])


def test_the_file_that_means_finished_is_written_last(tmp_path, monkeypatch):
    writer, folder = FolderWriter(tmp_path / "metrics", _RUN), tmp_path / "metrics"
    written = []

    def note(path, lines):
        written.append(path.name)
        assert not (folder / "metrics.jsonl").exists()

    monkeypatch.setattr(folder_writer, "write_lines", note)
    writer.finish([SimpleNamespace(rows_of_expert=[{}, {}], borders=[Border(step=0, rows=[0, 0])])])
    assert written == ["experts.jsonl", "balance.jsonl", "metrics.jsonl"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"cannot be written .*Name another folder with --met"):
        FolderWriter(tmp_path / "file" / "metrics", _RUN)


def test_a_look_beforehand_leaves_no_trace(tmp_path):
    for folder in (tmp_path, tmp_path / "new", tmp_path / "far" / "below"):
        check_metrics_folder(folder)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "samples.jsonl").write_text("old\n")
    check_metrics_folder(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("samples.jsonl", "old\n")
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "Not a directory"),
        ("file/metrics", "Not a directory"),
        ("new/" + "x" * 300, "File name too long"),
        ("others", "Is a directory"),
    ],
)
def test_a_folder_that_could_not_be_written_is_refused_beforehand(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "others" / "balance.jsonl").mkdir(parents=True)
    with pytest.raises(InputError) as refused:
        check_metrics_folder(tmp_path / name)
    assert str(refused.value) == (
        f"{tmp_path / name}: cannot be written ({reason}). Name another folder with --metrics."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "others"]


def test_a_disk_without_room_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        check_metrics_folder(tmp_path / "metrics")
    assert not (tmp_path / "metrics").exists()
