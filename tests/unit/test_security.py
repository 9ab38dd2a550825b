"""What the package never does: run what others wrote, hide its files or open them to everybody."""

import ast
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_moe_ep.bench.report import Report
from ds_moe_ep.bringup.report import PhaseReport, write_jsonl
from ds_moe_ep.checkpoint.convert import to_deepspeed, to_expert_sharded, to_hugging_face
from ds_moe_ep.cli import main
from ds_moe_ep.config.bundle import write_bundle
from ds_moe_ep.demo import write_demo_model
from ds_moe_ep.engine.journal import Journal
from ds_moe_ep.engine.outputs import GenerateResult, write_results
from ds_moe_ep.engine.summary import RankSummary
from ds_moe_ep.hostfile import local_cluster
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.monitor.folder_writer import FolderWriter
from ds_moe_ep.monitor.metrics_format import Run
from ds_moe_ep.monitor.rank_record import RankRecord
from ds_moe_ep.monitor.windows import Border
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.dense import save_dense
from tests.helpers.families import save_tiny
from tests.helpers.launch import REPO
from tests.helpers.metrics import small_metrics, write_metrics_folder

# What runs what it is given.
_RUNS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "importlib.import_module"),
    *("runpy.run_path", "runpy.run_module", "torch.load", "pickle.load", "pickle.loads"),
    *("pickle.Unpickler", "Unpickler", "joblib.load", "numpy.load", "yaml.load"),
}
# With the reason: these are not given anything that comes from a file of a user or from outside.
_ALLOWED = {
    ("checkpoint/pickled.py", "torch.load"): "with weights_only, where a flag asks for it",
    ("demo/train.py", "torch.load"): "the trainer's own checkpoint, and tensors alone",
    ("rehearsal/shared_start.py", "importlib.import_module"): "modules named by the rehearsal",
    ("rehearsal/shared_start.py", "runpy.run_path"): "the script that the launcher was given",
    ("bench/layer_sides.py", "importlib.import_module"): "a peer that is installed",
    ("megatron/stand_ins.py", "importlib.import_module"): "modules of torch and of Megatron",
    ("checkpoint/megatron/metadata.py", "pickle.Unpickler"): "derived: what it finds is in a list",
}


def _runs(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields what runs what it is given: called, or a class that another is derived from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            named = [node.func]
        elif isinstance(node, ast.ClassDef):
            named = node.bases
        else:
            continue
        yield from ((name, node.lineno) for name in map(ast.unparse, named) if name in _RUNS)


def test_what_runs_code_is_seen_where_it_is_called_and_where_a_class_derives_from_it():
    source = """
class Reader(pickle.Unpickler):
    def find_class(self, module, name):
        return super().find_class(module, name)

class Other(Mixin, Unpickler): pass
class Harmless(pickle.PickleError): pass
torch.load(path)
torch.save(path)
"""
    assert sorted(_runs(ast.parse(source))) == [
        ("Unpickler", 6),
        ("pickle.Unpickler", 2),
        ("torch.load", 8),
    ]


def test_nothing_but_what_is_listed_runs_code_or_reads_pickles():
    found = set()
    sources = [*(REPO / "ds_moe_ep").rglob("*.py"), *(REPO / "launch").glob("*.py")]
    for path in sources:
        tree = ast.parse(path.read_text())
        name = str(path.relative_to(REPO)).removeprefix("ds_moe_ep/")
        found |= {(name, runs) for runs, _ in _runs(tree)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            place = f"{path.relative_to(REPO)}:{node.lineno}: {ast.unparse(node.func)}"
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                assert not (keyword.arg == "shell" and value != "False"), place
                assert not (keyword.arg == "weights_only" and value != "True"), place
                if keyword.arg == "trust_remote_code" and value == "True":
                    assert path.name == "load.py", place  # after the flag has been looked at
    assert found == set(_ALLOWED)


@pytest.fixture(params=[0o022, 0o077], ids="{:03o}".format)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _write_everything(model: Path, folder: Path) -> None:
    to_expert_sharded(model, folder / "sharded", ep_size=2)
    to_hugging_face(folder / "sharded", folder / "back")
    to_deepspeed(model, folder / "deepspeed")
    write_demo_model(folder / "demo")
    spec = read_model_spec(model)
    write_bundle(model, local_cluster(2), ParallelPlan(ep_size=2), spec, folder / "config")
    result = GenerateResult("../../x", None, (1,), None, "length")
    journal = Journal(folder / "out.jsonl.partial", 0)
    journal.start({"task": "generate"}, resume=False)
    journal.append({0: result})
    write_jsonl(folder / "metrics" / "bringup.jsonl", [PhaseReport(1, ())])
    write_results(folder / "out.jsonl", [result])
    summary = RankSummary(0, "host", "allgather", 1, 1, 1, 1, 0.1, 0.1, 0.1, 1, 1, 0, 1)
    _write_metrics(folder / "metrics", summary)
    Report("table", "Heading", "command", "text", [{"world_size": 1}]).write(folder / "bench")


def _run_commands(model: Path, dense: Path, recorded: Path, folder: Path) -> None:
    """Writes what is written by commands, with their own words."""
    upcycled = ["--to", "ep", "--upcycle-experts", "8", "--top-k", "2"]
    placement = ["--slots-per-rank", "3", "--out", folder / "placement.json"]
    for command in (
        ["convert", model, folder / "megatron", "--to", "megatron"],
        ["convert", dense, folder / "upcycled", *upcycled],
        ["report", recorded, "--out", folder / "report.html"],
        ["balance", recorded, *placement],
    ):
        assert main([str(word) for word in command]) == 0, command


def _write_metrics(folder: Path, summary: RankSummary) -> None:
    run = Run.model_validate(small_metrics()["run.json"])
    writer = FolderWriter(folder, run)
    times = {"prefill": None, "decode": None}
    rows_of_expert = [{0: 1, 7: 2}, {0: 3, 7: 0}]
    borders = [Border(step=0, rows=[0, 0]), Border(step=8, rows=[3, 3])]
    writer.finish([RankRecord(summary, 0.5, {}, {}, times, None, {}, rows_of_expert, borders)])


def test_files_have_ordinary_modes(tmp_path, umask):
    save_tiny("olmoe", tmp_path / "model")
    save_dense("llama", tmp_path / "dense")
    recorded = write_metrics_folder(tmp_path / "recorded", small_metrics())
    _write_everything(tmp_path / "model", tmp_path / "ours")
    _run_commands(tmp_path / "model", tmp_path / "dense", recorded, tmp_path / "ours")
    written = list((tmp_path / "ours").rglob("*"))
    assert {path.name for path in written} >= {
        *("out.jsonl", "run.sh", "rank-00000.jsonl", "manifest.json", "metrics.jsonl"),
        *("report.html", "placement.json", "__0_0.distcp"),
    }
    assert (tmp_path / "ours" / "upcycled" / "manifest.json").exists()
    for path in written:
        mode = stat.S_IMODE(path.stat().st_mode)
        may_be = 0o777 if path.is_dir() or path.name == "run.sh" else 0o666
        assert oct(mode) == oct(may_be & ~umask), path


@pytest.mark.parametrize("id", ["../../x", "/etc/passwd", "a\0b", "-rf", "~", "..", "a/b"])
def test_ids_name_no_file(tmp_path, id):
    folder = tmp_path / "inner" / "results"
    folder.mkdir(parents=True)
    result = GenerateResult(id, None, (1,), None, "length")
    journal = Journal(folder / "out.jsonl.partial", 3)
    journal.start({"task": "generate"}, resume=False)
    journal.append({0: result})
    assert {path.name for path in journal.folder.iterdir()} == {
        *("job.json", "lock", "rank-00003.jsonl")
    }
    assert journal.read({"task": "generate"}) == {0: result}
    journal.remove()
    write_results(folder / "out.jsonl", [result])
    assert json.loads((folder / "out.jsonl").read_text())["id"] == id
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [folder / "out.jsonl"]
