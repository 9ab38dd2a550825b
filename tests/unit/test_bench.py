"""The benchmark's own parts: turns, spreads, memory, and the document it writes."""

import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from ds_moe_ep.bench import load
from ds_moe_ep.bench.balance_jobs import write_skewed_model
from ds_moe_ep.bench.memory import PeakMemory, read_bytes_so_far
from ds_moe_ep.bench.models import SHAPES, write_model
from ds_moe_ep.bench.report import Report, markdown_table
from ds_moe_ep.bench.timing import Spread, time_in_turn
from ds_moe_ep.model_spec import read_model_spec
from tests.helpers.launch import REPO


def test_a_spread_is_median_least_and_most():
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(median=3.0, min=1.0, max=10.0, num_rounds=3)


def test_every_round_runs_all_sides_in_an_order_that_is_the_same_on_all_ranks():
    def orders() -> list[str]:
        runs: list[str] = []
        sides = {name: lambda name=name: runs.append(name) for name in "abc"}
        spreads = time_in_turn(sides, 20, wait_for_all=lambda: runs.append("wait"))
        assert runs[::2] == ["wait"] * 60
        assert [spread.num_rounds for spread in spreads.values()] == [20] * 3
        ran = "".join(runs[1::2])
        return [ran[first : first + 3] for first in range(0, 60, 3)]

    found = orders()
    assert {"".join(sorted(order)) for order in found} == {"abc"}
    assert {order[0] for order in found} == set("abc")
    ran = "".join(found)
    assert {"ab", "cb"} <= {ran[place : place + 2] for place in range(len(ran))}
    assert orders() == found


def test_a_time_is_that_of_the_slowest_rank():
    spreads = time_in_turn({"a": lambda: None}, 2, slowest=lambda seconds: 7.0)
    assert spreads["a"] == Spread(7.0, 7.0, 7.0, 2)


def test_the_peak_is_found_between_start_and_end(monkeypatch):
    high_seen = threading.Event()
    held = iter([5, 9])

    def sample():
        value = next(held, 6)
        if value == 6:
            high_seen.set()
        return value

    monkeypatch.setattr(PeakMemory, "now", staticmethod(sample))
    with PeakMemory() as peak:
        assert high_seen.wait(60)
    assert peak.num_bytes == 9


def test_memory_that_was_touched_is_seen():
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak.num_bytes - before.num_bytes > 60 << 20
    del block


def test_what_is_read_is_counted(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1_000_000))
    before = read_bytes_so_far()
    with path.open("rb", buffering=0) as file:
        os.read(file.fileno(), 300_000)
    assert 300_000 <= read_bytes_so_far() - before < 310_000


def test_the_105m_shape_is_that_of_the_anchor(tmp_path):
    config = SHAPES["105M"].config()
    config.save_pretrained(tmp_path)
    spec = read_model_spec(tmp_path)
    assert (len(spec.moe_layers), spec.num_experts, spec.top_k) == (16, 64, 8)
    assert 105e6 < spec.num_params < 106e6


def test_the_large_shape_is_at_least_2_gb(tmp_path):
    SHAPES["620M"].config().save_pretrained(tmp_path)
    assert 4 * read_model_spec(tmp_path).num_params > 2e9


def test_a_model_is_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        write_model(SHAPES["tiny"], tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def _report(table, text):
    return Report(table, f"About {table}", f"bench {table}", text, [{"x": 1}], {"cpu": "1 core"})


def test_tokens_of_a_skewed_model_choose_by_zipf_and_alike_in_all_layers(tmp_path):
    write_skewed_model("zipf", "tiny", tmp_path)
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    sizes, generator = SHAPES["tiny"], torch.Generator().manual_seed(1)
    vocabulary = torch.randperm(sizes.vocab_size, generator=generator)
    with torch.no_grad():  # in 16 prompts, each token of the vocabulary once
        found = model(vocabulary.view(16, -1), output_router_logits=True).router_logits
    chosen = [logits.topk(sizes.top_k).indices.sort().values for logits in found]
    assert len(chosen) == sizes.num_layers
    assert all(torch.equal(layer, chosen[0]) for layer in chosen)
    # Expert i in proportion to (i + 1) ** -1.2, without replacement.
    popularity = torch.arange(1.0, sizes.num_experts + 1) ** -1.2
    drawn = popularity.expand(50_000, -1).multinomial(sizes.top_k, generator=generator)
    shares, expected = (
        torch.bincount(each.flatten(), minlength=sizes.num_experts) / len(each)
        for each in (chosen[0], drawn)
    )
    torch.testing.assert_close(shares, expected, rtol=0, atol=5 * (0.25 / len(chosen[0])) ** 0.5)


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    (tmp_path / "benchmarks.md").write_text("# Benchmarks\n\nWritten by hand.\n")
    for table, text in (("load", "old"), ("layer", r"kept \1"), ("load", "new")):
        _report(table, text).write(tmp_path)
    document = (tmp_path / "benchmarks.md").read_text()
    assert document.startswith("# Benchmarks\n\nWritten by hand.\n\n<!-- bench load -->\n## About")
    assert "old" not in document
    assert [document.count(text) for text in ("new", r"kept \1", "<!-- end of bench")] == [1, 1, 2]
    stored = json.loads((tmp_path / "benchmarks" / "load.json").read_text())
    assert (stored["text"], stored["results"], stored["command"]) == (
        "new",
        [{"x": 1}],
        "bench load",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks", "benchmarks.md"]


def test_a_section_says_when_where_and_how():
    text = _report("load", "text").to_markdown()
    assert re.search(r"Measured on \d{4}-\d\d-\d\d: 1 core\.", text)
    assert "```bash\nbench load\n```" in text


def test_a_markdown_table():
    assert markdown_table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | ---: |\n| 1 | x |"


def test_the_loading_table_sets_both_sides_against_each_other():
    seconds = {
        "ours": vars(Spread(0.5, 0.4, 0.6, 5)),
        "transformers": vars(Spread(2.0, 1.0, 3.0, 5)),
    }
    result = {
        "model": "105M",
        "world_size": 8,
        "file_bytes": 420e6,
        "kept_bytes": 70e6,
        "read_factor": 1.006,
        "peak_bytes": 380e6,
        "allowed_peak_bytes": 384e6,
        "seconds": seconds,
    }
    text = load.TABLE.to_markdown([result])
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert cells == [
        *("105M", "8", "420", "70", "1.006", "380 (384)"),
        *("0.50 (0.40 to 0.60)", "2.00 (1.00 to 3.00)", "4.00"),
    ]
    assert "of 5 rounds" in text


@pytest.mark.parametrize("field", ["gpus", "cpu", "memory", "python", "versions", "ds_moe_ep"])
def test_the_machine_is_described(field):
    machine = Report("t", "h", "c", "x", []).machine
    assert machine[field]


def test_the_guard_forks_before_anything_may_have_asked_for_a_gpu():
    launched = """
import runpy, sys
from ds_moe_ep.rehearsal import guard
guard.go_on_guarded = lambda prefix: sys.exit("torch" in sys.modules)
runpy.run_path("launch/bench.py", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", launched], cwd=REPO, timeout=60)
    assert ended.returncode == 0
