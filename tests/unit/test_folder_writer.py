"""A metrics folder that cannot be written: refused as a job begins, told later, once."""

import shutil
import warnings

import pytest

from ds_moe_ep.errors import ResourceError
from ds_moe_ep.monitor.figures import JobNow
from ds_moe_ep.monitor.folder_writer import FolderWriter
from ds_moe_ep.monitor.metrics_format import Run, Sample
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


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"cannot be written .*Name another folder with --met"):
        FolderWriter(tmp_path / "file" / "metrics", _RUN)
