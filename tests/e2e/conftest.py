"""What end-to-end tests share: tiny models, built once, files of prompts, and a job to break."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.e2e.faulty_job import Job
from tests.helpers.families import save_tiny

# Of a job to break: enough for several batches on each of four ranks.
_PROMPTS = {f"p{i}": [3 + i, 60 - i, 7][: 1 + i % 3] for i in range(40)}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[[str], Path]:
    """Returns the folder of a family's tiny model, which no test may change."""

    @cache
    def folder_of(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        save_tiny(family, folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def write_prompts() -> Callable[[Path, Mapping[str, Sequence[int]]], Path]:
    """Returns a function that writes prompts given as token ids, by id, to a JSONL file."""

    def write(path: Path, token_ids_of: Mapping[str, Sequence[int]]) -> Path:
        records = [{"id": id, "prompt_token_ids": list(ids)} for id, ids in token_ids_of.items()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture
def faulty_job(tiny_model, write_prompts, tmp_path) -> Job:
    """Returns a job to which something is to happen."""
    prompts = write_prompts(tmp_path / "in.jsonl", _PROMPTS)
    return Job(tiny_model("olmoe"), prompts, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(tiny_model, write_prompts, tmp_path_factory) -> bytes:
    """Returns what `faulty_job` writes if nothing happens, on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prompts = write_prompts(folder / "in.jsonl", _PROMPTS)
    return Job(tiny_model("olmoe"), prompts, folder).run_undisturbed()
