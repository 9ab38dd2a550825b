"""What DeepSpeed's monitor is given, and that nothing of it is lost when a rank ends."""

import sys
from types import SimpleNamespace

import deepspeed.comm
import pytest

from ds_moe_ep.monitor.deepspeed_events import DeepSpeedEvents
from ds_moe_ep.monitor.figures import JobNow, figures
from ds_moe_ep.monitor.metrics_format import Sample
from tests.helpers.metrics import small_metrics


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
    samples = [Sample.model_validate(line) for line in small_metrics()["samples.jsonl"][-4:]]
    events = DeepSpeedEvents({section: {"enabled": True, "project": "moe"}})
    events.update(JobNow(samples))
    assert sender.waiting and not sender.sent
    events.close()
    now = figures(JobNow(samples))
    assert sender.sent == {f"ds_moe_ep/{name}": (value, 40) for name, value in now.items()}
    assert sender.sent["ds_moe_ep/collective_mean_s"][0] == pytest.approx(0.00225)
