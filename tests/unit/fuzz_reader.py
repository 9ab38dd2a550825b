"""A reader of users' files under atheris, which changes inputs to reach more of its code.

By hand, for as long as wanted (`pip install atheris` first):
    python tests/unit/fuzz_reader.py READER [CORPUS] [-atheris_runs=100000 or others of libFuzzer]
A test runs each reader for a while where atheris is installed.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ds_moe_ep"]):
    from ds_moe_ep.checkpoint.manifest import read_manifest
    from ds_moe_ep.config.run import load_run_config
    from ds_moe_ep.engine.prompts import read_prompts
    from ds_moe_ep.errors import DsMoeEpError
    from ds_moe_ep.hostfile import read_hostfile
    from ds_moe_ep.model_spec import read_model_spec

# What reads a file, and the name that the file must have.
_READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "hostfile": (read_hostfile, "hostfile"),
    "prompts": (read_prompts, "in.jsonl"),
    "model-config": (read_model_spec, "config.json"),
    "deepspeed-config": (load_run_config, "ds_inference.json"),
    "manifest": (lambda path: read_manifest(path.parent), "manifest.json"),
}


def main() -> None:
    """Feeds the reader until something other than a refusal comes out of it."""
    read, name = _READERS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / name

        def feed(data: bytes) -> None:
            path.write_bytes(data)
            try:
                read(path)
            except DsMoeEpError as error:
                assert str(error).strip()
            assert [each.name for each in path.parent.iterdir()] == [name]

        atheris.Setup(sys.argv, feed)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
