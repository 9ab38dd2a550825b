"""What DeepSpeed's monitor is given, that nothing of it is lost, and that it never ends a job."""

import sys
import warnings
from types import SimpleNamespace

import deepspeed.comm
import pytest

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.monitor.deepspeed_events import DeepSpeedEvents
from ds_moe_ep.monitor.figures import JobNow, figures
from ds_moe_ep.monitor.metrics_format import Sample
from tests.helpers.metrics import small_metrics

_NOW = JobNow([Sample.model_validate(line) for line in small_metrics()["samples.jsonl"][-4:]])


class _UsageError(Exception):
    """As W&B's own: of no class that Python has."""


def _raise(error):
    raise error


class _Sender:
    """W&B's module or Comet's experiment as far as DeepSpeed calls it: sends when it is ended.

    So did W&B 0.31 in a job of ours: its file was empty where nobody had called finish.
    """

    def __init__(self):
        self.waiting, self.sent = {}, {}

    def log(self, data, step, commit):
        self.waiting |= {name: (value, step) for name, value in data.items()}

    def __internal_api__log_metric__(self, name, value, step, **others):
        self.waiting[name] = value, step

    def end(self):
        self.sent, self.waiting = self.waiting, {}


@pytest.fixture
def sender(monkeypatch):
    sender = _Sender()
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda group=None: 0)
    wandb = SimpleNamespace(init=lambda **options: None, log=sender.log, finish=sender.end)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    comet = SimpleNamespace(start=lambda **options: sender, __version__="3.41.0")
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    return sender


@pytest.mark.parametrize("section", ["wandb", "comet"])
def test_what_is_sent_in_the_background_is_sent_before_a_rank_ends(sender, section):
    events = DeepSpeedEvents({section: {"enabled": True, "project": "moe"}})
    events.update(_NOW)
    assert sender.waiting and not sender.sent
    events.close()
    now = figures(_NOW)
    assert sender.sent == {f"ds_moe_ep/{name}": (value, 40) for name, value in now.items()}
    assert sender.sent["ds_moe_ep/collective_mean_s"][0] == pytest.approx(0.00225)


def test_a_folder_that_cannot_be_made_is_refused_with_its_section(sender, tmp_path):
    (tmp_path / "file").touch()
    csv = {"enabled": True, "output_path": str(tmp_path / "file"), "job_name": "moe"}
    with pytest.raises(ConfigError, match=r"^csv_monitor: .*Not a directory.*enabled to false\.$"):
        DeepSpeedEvents({"comet": {"enabled": True}, "csv_monitor": csv})


def test_a_service_without_a_login_is_refused_with_its_section(sender, monkeypatch):
    error = _UsageError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **options: _raise(error))
    with pytest.raises(ConfigError) as refused:
        DeepSpeedEvents({"wandb": {"enabled": True}})
    assert str(refused.value) == (
        f"wandb: {error}. DeepSpeed's monitor cannot start: give it what that section needs, or "
        "set its enabled to false."
    )


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), _UsageError("gone")])
def test_a_monitor_that_fails_is_told_once_and_the_others_go_on(sender, monkeypatch, error):
    sections = {name: {"enabled": True, "project": "moe"} for name in ("wandb", "comet")}
    events = DeepSpeedEvents(sections)
    monkeypatch.setattr(sys.modules["wandb"], "log", lambda *args, **kwargs: _raise(error))
    with pytest.warns(UserWarning, match=r"^wandb: .*(space left|gone).*The job goes on") as told:
        events.update(_NOW)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        events.close()
    assert sender.sent["ds_moe_ep/prompts_done"] == (8, 40)


def test_a_monitor_that_cannot_be_ended_does_not_end_the_job(sender, monkeypatch):
    events = DeepSpeedEvents({"wandb": {"enabled": True}})
    monkeypatch.setattr(sys.modules["wandb"], "finish", lambda: _raise(_UsageError("no answer")))
    with pytest.warns(UserWarning, match="^wandb: no answer. The job goes on"):
        events.close()
