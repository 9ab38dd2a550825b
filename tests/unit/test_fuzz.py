"""What users' files hold, damaged in 10,000 ways each: read, or refused in a sentence, never worse.

The damage is what happens to files (cut, overwritten, doubled, mixed up), and values that readers
trip over. hypothesis draws and shrinks it; atheris looks for more where it is installed.
"""

import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from ds_moe_ep.checkpoint.convert import to_expert_sharded
from ds_moe_ep.checkpoint.manifest import read_manifest
from ds_moe_ep.config.placement_file import placement_json, read_placement
from ds_moe_ep.config.run import load_run_config, read_monitor
from ds_moe_ep.engine.journal import Journal
from ds_moe_ep.engine.outputs import GenerateResult
from ds_moe_ep.engine.prompts import read_prompts
from ds_moe_ep.errors import DsMoeEpError
from ds_moe_ep.hostfile import read_hostfile
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.placement import SlotPlacement
from tests.helpers import run_command
from tests.helpers.families import save_tiny
from tests.helpers.launch import REPO

_INPUTS = 10_000
_SLOWEST_S = 5.0  # of CPU time, so it does not matter how busy a machine is; mostly milliseconds
_STUCK_S = 60  # by the clock, as atheris counts
_EXAMPLE = REPO / "configs" / "olmoe-1b-7b-ep64"
_HOSTFILE = b"# hosts\nworker-0 slots=8\nworker-1 slots=8 # the second\n\n10.0.0.1 slots=1\n"
_PROMPTS = (
    b'{"id": "a", "prompt": "Once upon"}\n{"id": 7, "prompt_token_ids": [1, 2, 3]}\n\n'
    b'{"prompt": "caf\xc3\xa9 \\u2028 \\ud83d\\ude00"}\n'
)
_PLACEMENT = placement_json(SlotPlacement(2, 2, 2, {0: (0, 1, 1, 0), 3: (1, 1, 0, 0)})).encode()
_MONITOR = b'{"tensorboard": {"enabled": true, "output_path": "logs"}, "wandb": {"enabled": false}}'
_JOB = {"task": "generate", "dtype": "float32", "input": "0a" * 32, "seed": 0, "top_p": 1.0}
_LINES = (
    b'\n[0, {"id": "a", "prompt": null, "token_ids": [1, 2], "completion": "caf\\u00e9", '
    b'"finish_reason": "stop"}]\n[3, {"id": "7", "prompt": "Once", "token_ids": [], '
    b'"completion": null, "finish_reason": "length"}]'
)
_TOKENS = [
    *(b"\0", b"\r", b"\n\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\\ud800", b"\\u0000"),
    *(b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"Infinity", b"9" * 5000, b'""', b"[]"),
    *(b"{}", b"[" * 3000, b'{"a":' * 2000, b'"', b",", b":", b"..", b"/", b"slots=", b"=", b"#"),
    *(b"; rm -rf x", b"$(id)", b"-o", b"1.5", b"18446744073709551616", b"'"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory: on a disk the writing would take minutes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@st.composite
def _damaged(draw: DrawFn, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(draw(st.sampled_from((1, 1, 2, 4)))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from((1, 1, 4, 30, 300))))
        damage = draw(st.integers(0, 5))
        if damage == 0:
            data[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
        elif damage == 1:
            del data[start:end]
        elif damage == 2:
            del data[start:]
        elif damage == 3:
            data[start:start] = data[start:end] * draw(st.sampled_from((1, 2, 20)))
        elif damage == 4:
            data[start:end] = draw(st.sampled_from(_TOKENS))
        else:
            data[start:start] = draw(st.sampled_from(_TOKENS))
    return bytes(data)


@st.composite
def _with_another_value(draw: DrawFn, content: bytes) -> bytes:
    """Replaces one value somewhere in a JSON document, which stays one."""
    root = document = json.loads(content)
    while isinstance(document, dict | list) and document:
        places = list(document) if isinstance(document, dict) else range(len(document))
        place = draw(st.sampled_from(places))
        inner = document[place]
        if not isinstance(inner, dict | list) or not inner or draw(st.integers(0, 4)) == 0:
            values = (None, True, -1, 0, 2**70, 1.5, "", "..", "a/b", [], {}, [None], {"a": 1})
            document[place] = draw(st.sampled_from(values))
            break
        document = inner
    return json.dumps(root).encode()


def _give_up(*args: object) -> None:
    pytest.fail(f"not read after {_SLOWEST_S:.0f} s of CPU time")


def _fuzz(
    read: Callable[[Path], object],
    file: Path,
    content: bytes,
    read_path: Path,
    *,
    may_refuse: bool = True,
) -> None:
    inputs = _damaged(content)
    if file.suffix == ".json":
        inputs |= _with_another_value(content)
    names = sorted(path.name for path in file.parent.iterdir())
    count = refused = 0

    @settings(
        max_examples=_INPUTS,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(inputs)
    def read_or_refuse(data: bytes) -> None:
        nonlocal count, refused
        count += 1
        file.write_bytes(data)
        signal.setitimer(signal.ITIMER_VIRTUAL, _SLOWEST_S)
        try:
            read(read_path)
        except DsMoeEpError as error:
            refused += 1
            assert str(error).strip()
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    before = signal.signal(signal.SIGVTALRM, _give_up)
    try:
        read_or_refuse()
    finally:
        signal.signal(signal.SIGVTALRM, before)
    assert sorted(path.name for path in file.parent.iterdir()) == names  # readers write nothing
    assert count >= _INPUTS > refused
    assert (refused > 0) == may_refuse


@pytest.mark.parametrize(
    ("read", "name", "content"),
    [
        (read_hostfile, "hostfile", _HOSTFILE),
        (read_prompts, "in.jsonl", _PROMPTS),
        (read_prompts, "in.txt", _PROMPTS),
        (read_model_spec, "config.json", (_EXAMPLE / "config.json").read_bytes()),
        (load_run_config, "ds_inference.json", (_EXAMPLE / "ds_inference.json").read_bytes()),
        (read_monitor, "ds_config.json", _MONITOR),
        (read_placement, "placement.json", _PLACEMENT),
    ],
    ids=["hostfile", "prompts", "text", "model-config", "deepspeed-config", "monitor", "placement"],
)
def test_a_damaged_file_is_read_or_refused(read, name, content, folder):
    file = folder / name
    file.write_bytes(content)
    read(file)
    _fuzz(read, file, content, file)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> bytes:
    """One of four tensors: small, so that reading it is fast."""
    root = tmp_path_factory.mktemp("manifest")
    save_tiny("olmoe", root / "model")
    to_expert_sharded(root / "model", root / "sharded", ep_size=2)
    content = json.loads((root / "sharded" / "manifest.json").read_text())
    content["tensors"] = dict(list(content["tensors"].items())[:4])
    content["source"]["files"] = {}
    return json.dumps(content).encode()


def test_a_damaged_manifest_is_read_or_refused(folder, manifest):
    file = folder / "manifest.json"
    file.write_bytes(manifest)
    read_manifest(file.parent)
    _fuzz(read_manifest, file, manifest, file.parent)


@pytest.mark.parametrize("name", ["job.json", "rank-00000.jsonl"])
def test_damaged_journals_are_read_or_refused(folder, name):
    """Of a line that is not whole nothing is taken, so lines are never refused."""
    contents = {"job.json": json.dumps(_JOB).encode(), "rank-00000.jsonl": _LINES}
    for each, content in contents.items():
        (folder / each).write_bytes(content)
    journal = Journal(folder, 0)
    assert [result.id for result in journal.read(_JOB).values()] == ["a", "7"]

    def read(path: Path) -> None:
        for index, result in journal.read(_JOB).items():
            assert isinstance(index, int) and isinstance(result, GenerateResult)

    _fuzz(read, folder / name, contents[name], folder, may_refuse=name == "job.json")


@pytest.mark.skipif(find_spec("atheris") is None, reason="needs atheris: pip install atheris")
@pytest.mark.parametrize(
    "reader", ["hostfile", "prompts", "model-config", "deepspeed-config", "manifest"]
)
def test_no_code_that_an_input_can_reach_breaks(reader, tmp_path, manifest):
    """Inputs that atheris makes while it watches which code they reach."""
    good = {
        "hostfile": _HOSTFILE,
        "prompts": _PROMPTS,
        "model-config": (_EXAMPLE / "config.json").read_bytes(),
        "deepspeed-config": (_EXAMPLE / "ds_inference.json").read_bytes(),
        "manifest": manifest,
    }
    (tmp_path / "good").write_bytes(good[reader])
    script = Path(__file__).with_name("fuzz_reader.py")
    options = [f"-atheris_runs={_INPUTS}", "-seed=1", f"-timeout={_STUCK_S}"]
    command = [sys.executable, script, reader, tmp_path, f"-artifact_prefix={tmp_path}/", *options]
    done = run_command(command, timeout_s=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"Done {_INPUTS} in" in done.stderr
