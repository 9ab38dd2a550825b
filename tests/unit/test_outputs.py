"""Result files: the lines, and their order. That a file is whole or not there: test_whole_file."""

import json
import os

import pytest

from ds_moe_ep.engine.outputs import GenerateResult, ScoreResult, write_results
from ds_moe_ep.errors import ResourceError

_GENERATED = GenerateResult("a", "Once", (4, 2), " upon\n\u2028", "length")
_SCORED = ScoreResult("b", 3, -1.5, (-1.0, -0.5))


def test_a_generated_line():
    line = _GENERATED.to_json_line()
    assert line == (
        '{"id": "a", "prompt": "Once", "token_ids": [4, 2], "completion": " upon\\n\u2028", '
        '"finish_reason": "length"}\n'
    )


def test_a_prompt_given_as_token_ids_has_no_key_for_its_text():
    record = json.loads(GenerateResult("a", None, (), None, "stop").to_json_line())
    assert record == {"id": "a", "token_ids": [], "completion": None, "finish_reason": "stop"}


def test_a_scored_line():
    assert _SCORED.to_json_line() == (
        '{"id": "b", "num_tokens": 3, "logprob": -1.5, "token_logprobs": [-1.0, -0.5]}\n'
    )


def test_numbers_that_are_not_finite_become_null():
    line = ScoreResult("b", 3, -float("inf"), (float("nan"), -float("inf"))).to_json_line()
    assert json.loads(line) == {
        "id": "b",
        "num_tokens": 3,
        "logprob": None,
        "token_logprobs": [None, None],
    }


def test_results_are_written_in_order_and_replace_the_old_file(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    write_results(path, [_GENERATED, _SCORED])
    assert path.read_text(encoding="utf-8") == _GENERATED.to_json_line() + _SCORED.to_json_line()
    write_results(path, [])
    assert path.read_bytes() == b""


def test_a_full_disk_is_told_with_the_way_out(tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    path = tmp_path / "out.jsonl"
    with pytest.raises(ResourceError) as error:
        write_results(path, [_SCORED])
    told = "cannot be written (No space left on device). Make room, or bring the folder back."
    assert str(error.value) == f"{path}: {told}"
