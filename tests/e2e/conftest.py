"""What end-to-end tests share: tiny models, built once, and files of prompts."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.families import save_tiny


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
