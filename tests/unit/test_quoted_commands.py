"""Commands in messages are for a user's shell: a path stands in them as one word."""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from ds_moe_ep.bringup.host_pairs import judge_pairs
from ds_moe_ep.checkpoint.convert import to_expert_sharded
from ds_moe_ep.checkpoint.files import open_checkpoint
from ds_moe_ep.checkpoint.manifest import read_manifest
from ds_moe_ep.cli import main
from ds_moe_ep.config.run import load_run_config
from ds_moe_ep.engine.checksums import check_share
from ds_moe_ep.errors import DsMoeEpError
from ds_moe_ep.monitor import top
from ds_moe_ep.monitor.live import follow
from ds_moe_ep.monitor.metrics_folder import read_metrics
from ds_moe_ep.monitor.verdicts import judge
from ds_moe_ep.whole_file import check_writable
from tests.helpers.families import save_tiny
from tests.helpers.metrics import small_metrics, write_metrics_folder

_NAME = "a; rm -rf [x]"


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / _NAME


@pytest.fixture
def sharded(tmp_path, folder) -> Path:
    save_tiny("olmoe", tmp_path / "model")
    to_expert_sharded(tmp_path / "model", folder, ep_size=2)
    return folder


def _refusal(refused: Callable[[], object]) -> str:
    with pytest.raises(DsMoeEpError) as caught:
        refused()
    return str(caught.value)


def _assert_told(message: str, command: str, path: Path) -> None:
    assert f"{command} {shlex.quote(str(path))}" in message
    assert f"{command} {path}" not in message
    words = shlex.split(message[message.index(command) :].replace(command, "", 1))
    assert words[0].rstrip(".") == str(path)


@pytest.mark.parametrize(
    ("read", "files", "command"),
    [
        (lambda folder: check_writable(folder / "out.jsonl"), None, "mkdir -p"),
        (read_manifest, [], "ds-moe-ep convert SRC"),
        (open_checkpoint, ["pytorch_model.bin"], "ds-moe-ep convert"),
        (open_checkpoint, [".metadata"], "ds-moe-ep convert"),
        (load_run_config, [], "ds-moe-ep config --model M --hostfile H --out"),
        (follow, [], "infer.py ... --metrics"),
    ],
    ids=["output", "manifest", "pickled", "megatron", "config", "top"],
)
def test_a_folder_is_one_word_of_a_command(folder, read, files, command):
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    _assert_told(_refusal(lambda: read(folder)), command, folder)


def test_a_checkpoint_is_one_word_of_a_command(sharded, tmp_path):
    for refused in (
        lambda: to_expert_sharded(sharded, tmp_path / "again", ep_size=2),
        lambda: to_expert_sharded(tmp_path / "model", sharded, ep_size=2),
    ):
        _assert_told(_refusal(refused), "ds-moe-ep convert", sharded)
    path = sharded / "config.json"
    path.write_bytes(path.read_bytes()[::-1])
    _assert_told(_refusal(lambda: check_share(sharded, 0, 1)), "ds-moe-ep convert", sharded)


def test_a_folder_of_metrics_is_one_word_of_a_command(folder, monkeypatch, capsys):
    files = small_metrics()
    ranks = files.pop("metrics.jsonl")
    write_metrics_folder(folder, files)
    message = _refusal(lambda: read_metrics(folder))
    _assert_told(message, "ds-moe-ep top", folder)
    _assert_told(message, "infer.py ... --resume --metrics", folder)
    write_metrics_folder(folder, {"metrics.jsonl": ranks})
    monkeypatch.setattr(top, "Console", partial(Console, force_terminal=True))
    monkeypatch.setattr(top, "_watch", lambda live, console: None)
    assert top.top(folder) == 0
    _assert_told(capsys.readouterr().out.splitlines()[-1], "ds-moe-ep report", folder)
    files["run.json"]["slots_per_rank"] = 3
    write_metrics_folder(folder, {"run.json": files["run.json"]})
    reasons = " ".join(found.reason for found in judge(read_metrics(folder)))
    _assert_told(reasons, "these: ds-moe-ep balance", folder)


def test_a_placement_is_one_word_of_a_command(folder, capsys):
    write_metrics_folder(folder, small_metrics())
    out = folder / "placement.json"
    words = ["balance", folder, "--slots-per-rank", "3", "--out", out]
    assert main([str(word) for word in words]) == 0
    _assert_told(capsys.readouterr().out.splitlines()[-1], "infer.py --placement", out)


def test_a_host_is_one_word_of_a_command():
    hosts = ["a", "b", "c;reboot"]
    odd = judge_pairs({(0, 1): 0.1, (0, 2): 0.1, (1, 2): 0.9}, hosts, 64)
    assert odd.reason.endswith("exclude one: --exclude 'c;reboot'")
